"""People's votes on a group of pictures: how they are written down and checked, and the scores that they come
to.

Votes are a JSON table. Pictures are named by their keys, so that votes belong to these very pictures and to
no others:

    {"pictures": [key, …],           the whole group, in the order in which it was shown
     "ranking":  [key, …],           best first; each beats those after it, pictures that are not named are
     not compared "winners":  [key, …],           each beats every picture of the group that is not among them
     "pairs":    [[key, key], …],    the first beats the second "prompt": "…", "voter": "…"}    what they were
     asked for, and who voted; all but the pictures may be left out
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from ..prompts import MAX_CHARACTERS
from ..rewards import RewardError
from ..run.scorer import to_8_bit

MAX_PICTURES, MAX_PAIRS, MAX_TEXT, MAX_VOTER = 256, 4096, 200_000, 64
KEY = re.compile(r"[0-9a-f]{16}")
LISTS = ("ranking", "winners")
FIELDS = ("pictures", *LISTS, "pairs", "prompt", "voter")
NOT_TEXT = re.compile("[\0\ud800-\udfff]")


class VoteError(RewardError):
    """Votes that cannot be used, in one line."""


@dataclass(frozen=True)
class Votes:
    """One person's votes on one group."""

    pictures: tuple[str, ...]
    ranking: tuple[str, ...] = ()
    winners: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    prompt: str = ""
    voter: str = ""

    def outcomes(self) -> list[tuple[str, str]]:
        """List every (winner, loser)."""
        losers = [key for key in self.pictures if key not in self.winners]
        # What the ranking and the winners both say was said once.
        return [*self.pairs, *dict.fromkeys([*combinations(self.ranking, 2), *product(self.winners, losers)])]

    def within(self, keys: Iterable[str]) -> list[tuple[str, str]]:
        """List the (winner, loser) that are both among these pictures."""
        known = set(keys)
        return [pair for pair in self.outcomes() if known.issuperset(pair)]

    def table(self) -> dict[str, Any]:
        """Return the votes as they are written down."""
        return {name: value for name in FIELDS if (value := getattr(self, name))}


def picture_key(picture: Tensor) -> str:
    """Name an image [H, W, 3] by its 8-bit pixels, which are its file's; "" where it holds NaN."""
    levels = to_8_bit(picture.detach().cpu()) * 255
    if levels.isnan().any():
        return ""
    content = levels.round().byte().contiguous().numpy()
    return hashlib.blake2b(f"{content.shape}".encode() + content.tobytes(), digest_size=8).hexdigest()


def parse(text: str, name: str = "votes") -> Votes:
    """Read votes from JSON text that may be anybody's; VoteError for whatever is not exactly votes."""
    if len(text) > MAX_TEXT:
        raise VoteError(
            f"{name}: they have {len(text)} characters; at most {MAX_TEXT} are allowed, vote on fewer "
            "pictures"
        )
    try:
        content = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        words = str(error) if isinstance(error, VoteError) else "they are not JSON"
        raise VoteError(f"{name}: {words}; empty the field and vote again") from error
    return from_table(content, name)


def from_table(content: Any, name: str = "votes") -> Votes:
    """Check a table of votes."""
    if not isinstance(content, dict):
        raise VoteError(
            f"{name}: they are no table but {type(content).__name__}; empty the field and vote again"
        )
    if unknown := sorted(set(content) - set(FIELDS)):
        raise VoteError(f"{name}: {unknown[0][:40]!a} is unknown; a table of votes has {', '.join(FIELDS)}")
    pictures = _keys(content, "pictures", name)
    if not pictures:
        raise VoteError(f"{name}: pictures is empty; it must name every picture of the group")
    lists = {field: _keys(content, field, name) for field in LISTS}
    pairs = _pairs(content.get("pairs", []), name)
    known = set(pictures)
    for field, keys in {**lists, "pairs": [key for pair in pairs for key in pair]}.items():
        if stranger := next((key for key in keys if key not in known), None):
            raise VoteError(f"{name}: {field} names {stranger}, which is not among pictures; vote again")
    texts = {
        field: _text(content.get(field, ""), f"{name}: {field}", limit) for field, limit in _LIMITS.items()
    }
    return Votes(pictures, lists["ranking"], lists["winners"], pairs, texts["prompt"], texts["voter"])


_LIMITS = {"prompt": MAX_CHARACTERS, "voter": MAX_VOTER}


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table; a name that comes twice could be read in two ways."""
    table = dict(pairs)
    if len(table) < len(pairs):
        raise VoteError("a name comes twice in them")
    return table


def _keys(content: dict[str, Any], field: str, name: str) -> tuple[str, ...]:
    """Take a list of distinct keys."""
    found = content.get(field, [])
    if not isinstance(found, list) or len(found) > MAX_PICTURES:
        size = f"a list of {len(found)}" if isinstance(found, list) else type(found).__name__
        raise VoteError(f"{name}: {field} is {size}; it must be a list of at most {MAX_PICTURES} pictures")
    for key in found:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise VoteError(
                f"{name}: {field} holds {ascii(key)[:40]}; a picture's key has 16 of the characters "
                "0-9 and a-f"
            )
    if len(set(found)) < len(found):
        raise VoteError(f"{name}: {field} names a picture twice; name each once")
    return tuple(found)


def _pairs(found: Any, name: str) -> tuple[tuple[str, str], ...]:
    """Take a list of [winner, loser]."""
    if not isinstance(found, list) or len(found) > MAX_PAIRS:
        size = f"a list of {len(found)}" if isinstance(found, list) else type(found).__name__
        raise VoteError(f"{name}: pairs is {size}; it must be a list of at most {MAX_PAIRS} pairs")
    for pair in found:
        keys = pair if isinstance(pair, list) else []
        if (
            len(keys) != 2
            or not all(isinstance(key, str) and KEY.fullmatch(key) for key in keys)
            or keys[0] == keys[1]
        ):
            raise VoteError(
                f"{name}: pairs holds {ascii(pair)[:60]}; write each as [key of the better, key of the worse]"
            )
    return tuple((better, worse) for better, worse in found)


def _text(found: Any, name: str, limit: int) -> str:
    """Take a short text."""
    if not isinstance(found, str) or len(found) > limit or NOT_TEXT.search(found):
        raise VoteError(f"{name} is {ascii(found)[:40]}; it must be text of at most {limit} characters")
    return found


def bradley_terry(wins: np.ndarray, variance: float = 1.0) -> np.ndarray:
    """Return log strengths [N] from wins [N, N], wins[i, j] being how often i beat j: the mode under a normal
    prior of mean 0.

    P(i beats j) = 1/(1 + exp(θ_j − θ_i)): Bradley and Terry, "Rank analysis of incomplete block designs"
    (1952). The prior makes it unique for any comparisons, one-sided and disconnected ones too. Newton's steps
    are damped by log(1 + d)/d, where d is by how much a step moves any comparison; this converges from
    anywhere (Sun and Tran-Dinh, arXiv 1703.04599, ν = 2).
    """
    games, strength = wins + wins.T, np.zeros(len(wins))
    for _ in range(1000 if len(wins) else 0):
        chance = expit(strength[:, None] - strength[None])
        slope = (wins - games * chance).sum(1) - strength / variance
        curve = games * chance * (1 - chance)
        step = np.linalg.solve(np.diag(curve.sum(1) + 1 / variance) - curve, slope)
        reach = 2 * np.abs(step).max() + 1e-300
        strength += step * np.log1p(reach) / reach
        # The error is about the square of the last step.
        if reach < 1e-6:
            break
    return strength


def scores(keys: Sequence[str], votes: Iterable[Votes]) -> Tensor:
    """Score images by everybody's votes: [B] float32, NaN for one that was never compared."""
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    wins = np.zeros((len(place), len(place)))
    for vote in votes:
        for winner, loser in vote.within(place):
            wins[place[winner], place[loser]] += 1
    strength = bradley_terry(wins)
    strength[(wins + wins.T).sum(1) == 0] = np.nan
    return torch.tensor([strength[place[key]] for key in keys], dtype=torch.float32)
