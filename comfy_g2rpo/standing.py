"""One score per picture of several rewards' scores, for ranking: the mixes of training, with all pictures as the group."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .advantages import FLOOR, blend, moments
from .rewards import RewardError

MAX_RANKED = 8192  # pictures of one group whose ranks are compared pair by pair


def standing(
    scores: Tensor,
    weights: Sequence[float],
    mix: str = "zscore",
    gates: Sequence[float | None] = (),
    groups: Sequence[str] | None = None,
) -> Tensor:
    """Return one score [N] per picture of scores [R, N]; pictures of one name in `groups` are compared with one another, else all are.

    A single reward without a gate keeps its own units, and so does `sum`; the other mixes are relative to the pictures given. NaN where a
    reward cannot judge a picture though it judges others of the group.
    """
    if not all(map(math.isfinite, weights)):
        raise RewardError(f"weights {list(weights)} must be finite; give one number per reward")
    if len(scores) == 1 and not any(gate is not None for gate in gates):
        return weights[0] * scores[0]
    names = [""] * scores.shape[1] if groups is None else list(groups)
    made = torch.full((scores.shape[1],), math.nan)
    for name in dict.fromkeys(names):
        members = [i for i, other in enumerate(names) if other == name] if groups is not None else list(range(len(names)))
        if mix == "rank_product" and len(members) > MAX_RANKED:
            raise RewardError(
                f"mix is rank_product for {len(members)} pictures; at most {MAX_RANKED} are ranked, choose zscore or give fewer"
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
