"""What a prompt in GenEval's form asks for, and how much of it boxes show (Ghosh et al., arXiv 2310.11513).

    a photo of a red apple and two dogs        objects, counts, colours
    a photo of a dog left of a cat             places: left of, right of, above, below

Each thing that is asked for is a check, each colour and the place one more. The score is their mean: 1 where
GenEval says "correct". The authors say only that or 0, which few pictures could be told apart by.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: count for count, word in enumerate(WORDS, start=1)}
MAX_COUNT, MAX_THINGS, MAX_WORDS = 20, 6, 3
OVERLAP = 0.1  # of both objects' sizes, that their centres must be apart beyond

_LEAD = re.compile(r"(?:an? |the )?(?:photo(?:graph)?|picture|image) of ", re.IGNORECASE)
_PLACE = re.compile(r" (?:is )?(?:(?:(?:to|on) the )?(left|right) of|(above|below)) ")
_LIST = re.compile(r",? and |, ")
_WORD = re.compile(r"[a-z][a-z'-]*")
# A phrase with one of these says more than what and how many.
_MORE = frozenset(
    {"of", "on", "in", "at", "with", "without", "by", "for", "to", "from", "near", "behind", "under", "over"}
    | {"beside", "next", "into", "onto", "inside", "outside", "that", "which", "who", "is", "are", "as", "or"}
    | {"and", "wearing"}
)
_ING = frozenset({"building", "ring", "earring", "painting", "string", "wing", "king", "pudding"})
_PLURALS = {
    **{"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"},
    **{"geese": "goose", "feet": "foot", "teeth": "tooth", "buses": "bus", "shoes": "shoe"},
    **{"knives": "knife", "leaves": "leaf", "wolves": "wolf", "shelves": "shelf", "loaves": "loaf"},
    **{"scissors": "scissors", "cookies": "cookie", "ties": "tie", "pies": "pie", "movies": "movie"},
}


@dataclass(frozen=True)
class Thing:
    """Something to be seen; `exact` where a number was named, else one will do."""

    noun: str
    count: int = 1
    exact: bool = False
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """All that a prompt asks for; `place` is where the first thing is to be, seen from the second."""

    things: tuple[Thing, ...]
    place: str | None = None


@dataclass(frozen=True)
class Seen:
    """Boxes [N, 4] of one thing as left, top, right, bottom, the surest first, and each one's colour."""

    boxes: Tensor
    colours: tuple[str | None, ...]


@lru_cache(maxsize=4096)
def parse(prompt: str) -> Scene | None:
    """Read a prompt; None for one that is not in GenEval's form, as by halves it would be misjudged."""
    text = " ".join(prompt.split()).rstrip(".")
    lead = _LEAD.match(text)
    if not lead:
        return None
    text = text[lead.end() :].lower()
    parts = _PLACE.split(text)
    if len(parts) == 4:
        things = [parse_thing(parts[0]), parse_thing(parts[3])]
        place = f"{parts[1]} of" if parts[1] else parts[2]
    else:
        things, place = [parse_thing(part) for part in _LIST.split(text)], None
    if len(parts) not in (1, 4) or None in things or len(things) > MAX_THINGS:
        return None
    # Two things of one name could not be told apart.
    return Scene(tuple(things), place) if len({thing.noun for thing in things}) == len(things) else None


def parse_thing(text: str) -> Thing | None:
    """Read "two red apples"; None for anything that says more, or less."""
    first, *words = text.split(" ")
    count = NUMBERS.get(first) or (
        int(first) if first.isascii() and first.isdigit() and len(first) < 3 else 0
    )
    exact = count > 0
    count = count or (1 if first in ("a", "an", "the") else 0)
    # "an orange" is no colour.
    colour = words.pop(0) if words and words[0] in COLOURS and words != ["orange"] else None
    sound = 1 <= count <= MAX_COUNT and 1 <= len(words) <= MAX_WORDS
    if not sound or not all(_WORD.fullmatch(word) and word not in _MORE for word in words):
        return None
    if any(word.endswith("ing") and word not in _ING for word in words[1:]):
        return None  # "a dog running"
    last = singular(words[-1]) if count > 1 else words[-1]
    return Thing(" ".join([*words[:-1], last]), count, exact, colour)


def singular(word: str) -> str:
    """Return the singular of a plural noun."""
    if word in _PLURALS:
        return _PLURALS[word]
    for ending, rest, kept in (("ies", 3, "y"), ("oes", 2, ""), ("ss", 0, "")):
        if word.endswith(ending):
            return word[: len(word) - rest] + kept
    if word.endswith(("ches", "shes", "sses", "xes", "zzes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and len(word) > 2 else word


def score(scene: Scene, seen: Sequence[Seen]) -> float:
    """Return the share of a scene's checks that hold, 0 to 1; `seen` has an entry for each thing."""
    checks = []
    for thing, found in zip(scene.things, seen, strict=True):
        count = len(found.boxes)
        away = abs(count - thing.count) if thing.exact else max(thing.count - count, 0)
        checks.append(1 - min(away / thing.count, 1))
        if thing.colour:
            checks.append(sum(c == thing.colour for c in found.colours[: thing.count]) / thing.count)
    if scene.place:
        one, other = (found.boxes[: thing.count] for thing, found in zip(scene.things, seen, strict=True))
        pairs = [(a, b) for a in one for b in other]
        checks.append(sum(scene.place in places(a, b) for a, b in pairs) / max(len(pairs), 1))
    return sum(checks) / len(checks)


def places(one: Tensor, other: Tensor) -> set[str]:
    """Say where a box [4] lies, seen from another: GenEval's rule.

    The distance of the centres, less a tenth of both sizes, counts along an axis where it is more than half
    of the whole distance.
    """
    offset = ((one[:2] + one[2:]) - (other[:2] + other[2:])) / 2
    sizes = (one[2:] - one[:2]) + (other[2:] - other[:2])
    apart = (offset.abs() - OVERLAP * sizes).clamp(min=0) * offset.sign()
    across, down = (apart / torch.linalg.vector_norm(offset).clamp(min=1e-9)).tolist()
    named = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, share in named.items() if share > 0.5}
