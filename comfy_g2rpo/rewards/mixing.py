"""Several rewards as one: for single images, and for ranking a group of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..advantages import FLOOR, blend, moments
from .protocol import Reward, RewardError, score_all


@dataclass(frozen=True)
class MixedReward:
    """Judge by the weighted sum, or the minimum, of several rewards in their own units; NaN where one cannot
    judge, or a gate fails.

    For one picture at a time. Z-scores, ranks and what a gate does in training need a group to compare with:
    `advantages.blend`.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    mode: str = "sum"
    gates: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        mix(torch.zeros(len(self.rewards), 0), self.weights, self.mode, self.gates)

    @property
    def name(self) -> str:
        """Name the parts and their weights."""
        parts = [
            f"{weight:g} {reward.name}" for weight, reward in zip(self.weights, self.rewards, strict=True)
        ]
        return f"min({', '.join(parts)})" if self.mode == "minimum" else " + ".join(parts)

    @property
    def licence(self) -> str:
        """Name the licences of the parts."""
        return ", ".join(sorted({reward.licence for reward in self.rewards}))

    @property
    def compares_across_prompts(self) -> bool:
        """Say whether every part's score means the same for every prompt."""
        return all(reward.compares_across_prompts for reward in self.rewards)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        return mix(score_all(self.rewards, images, prompts), self.weights, self.mode, self.gates)


def mix(
    scores: Tensor, weights: Sequence[float], mode: str = "sum", gates: Sequence[float | None] = ()
) -> Tensor:
    """Mix scores [R, …] by weights [R] into their sum, or the minimum of those with a weight: […].

    NaN where a score is missing or lies on the wrong side of its gate: below it or, for a negative weight,
    above.
    """
    if mode not in ("sum", "minimum"):
        raise RewardError(
            f"mix is {mode[:40]!a}; single pictures can be judged by sum or minimum, the others need a "
            "group to compare with"
        )
    weight = torch.tensor(weights, dtype=torch.float32)
    if len(weight) != len(scores):
        raise RewardError(f"weights has {len(weight)} entries for {len(scores)} rewards; give one per reward")
    if not weight.isfinite().all() or not weight.any():
        raise RewardError(
            f"weights {list(weights)} must be finite and not all zero; give one number per reward"
        )
    if len(gates) not in (0, len(scores)):
        raise RewardError(
            f"gates has {len(gates)} entries for {len(scores)} rewards; give one per reward, or none"
        )
    if mode == "minimum":
        used = weight != 0
        mixed = (weight.view(-1, *[1] * (scores.ndim - 1)) * scores)[used].amin(0)
    else:
        mixed = torch.einsum("r,r...->...", weight, scores)
    for row, each, gate in zip(scores, weights, gates or [None] * len(scores), strict=True):
        if gate is not None:
            mixed = torch.where((row > gate if each < 0 else row < gate) | row.isnan(), torch.nan, mixed)
    return mixed


MAX_RANKED = 8192  # pictures of one group whose ranks are compared pair by pair


def standing(
    scores: Tensor,
    weights: Sequence[float],
    mix: str = "zscore",
    gates: Sequence[float | None] = (),
    groups: Sequence[str] | None = None,
) -> Tensor:
    """Return one score [N] per picture of scores [R, N]; pictures of one name in `groups` are compared with
    one another, else all are.

    A single reward without a gate keeps its own units, and so does `sum`; the other mixes are relative to the
    pictures given. NaN where a reward cannot judge a picture though it judges others of the group.
    """
    if not all(map(math.isfinite, weights)):
        raise RewardError(f"weights {list(weights)} must be finite; give one number per reward")
    if len(scores) == 1 and not any(gate is not None for gate in gates):
        return weights[0] * scores[0]
    names = [""] * scores.shape[1] if groups is None else list(groups)
    made = torch.full((scores.shape[1],), math.nan)
    for name in dict.fromkeys(names):
        members = (
            [i for i, other in enumerate(names) if other == name]
            if groups is not None
            else list(range(len(names)))
        )
        if mix == "rank_product" and len(members) > MAX_RANKED:
            raise RewardError(
                f"mix is rank_product for {len(members)} pictures; at most {MAX_RANKED} are ranked, "
                "choose zscore or give fewer"
            )
        made[members] = of_group(scores[:, members], weights, mix, gates)
    return made


def of_group(scores: Tensor, weights: Sequence[float], mix: str, gates: Sequence[float | None]) -> Tensor:
    """Mix the scores [R, n] of one group: [n]."""
    blended = blend(scores[:, None, :, None], weights, mix, gates)
    if mix != "zscore":
        return blended[0, 0, :, 0]
    weight = torch.tensor([w for w in weights if w], dtype=blended.dtype).view(-1, 1, 1, 1)
    mean, std = moments(blended)
    judges = ~blended.isnan().all(2, keepdim=True)
    complete = (~blended.isnan() | ~judges).all(0) & judges.any(0)
    z = torch.where(judges & (std > FLOOR), (blended - mean) / (std + FLOOR), 0.0)
    return torch.where(complete, (weight * z).sum(0), torch.nan)[0, :, 0]
