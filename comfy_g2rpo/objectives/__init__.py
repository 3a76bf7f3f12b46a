"""What an update makes smaller: one function per objective, by name in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..methods.recipe_options import Recipe
from .forward_process import awm, nft, nft_metrics
from .pairs import pair_metrics, pairs
from .policy_gradient import clip, clip_metrics, on_policy
from .record_rows import Records
from .vargrad import vargrad, vargrad_metrics

Values = dict[str, Tensor]
"""What a loss saw, without gradient, per sample [S] or row [N], by name."""


@dataclass(frozen=True)
class Objective:
    """A loss, and what it is computed from."""

    loss: Callable[[Tensor, Records, Recipe], tuple[Tensor, Values]]
    """From the velocities [N, …] of the rows to a sum over them, and values."""
    samples: bool = False
    """Whether it needs the noise and the advantage of every sample, or the sum over a fork alone."""
    compares: bool = False
    """Whether it compares with the policy that rolled out, and so needs the rows' `velocity`."""
    values: bool = False
    """Whether it learns from rewards in their own units, where a sample of advantage 0 counts, too."""
    metrics: Callable[[Values, Recipe], dict[str, float]] | None = None
    """What the values of all rows say."""
    stored: bool = False
    """Whether it learns from forks that were kept with votes, and not from rollouts."""
    images: bool = False
    """Whether it learns from finished images and not from stochastic steps."""


OBJECTIVES: dict[str, Objective] = {
    "on_policy": Objective(on_policy),
    "clip": Objective(clip, samples=True, compares=True, metrics=clip_metrics),
    "pairs": Objective(pairs, metrics=pair_metrics, stored=True),
    "nft": Objective(nft, compares=True, metrics=nft_metrics, images=True),
    "awm": Objective(awm, compares=True, metrics=clip_metrics, images=True),
    "vargrad": Objective(vargrad, samples=True, compares=True, values=True, metrics=vargrad_metrics),
}
