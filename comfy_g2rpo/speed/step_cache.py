"""Completions for less: another way to evaluate them, and steps whose velocity is predicted instead of
evaluated.

A completion needs no log-probability, so whatever keeps the order of the rewards in a group is legal there.
Anchors and forks, which the learner differentiates at, are never approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import over

Velocity = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]
"""What a policy's `velocity` is: x [B, …], sigma [B], cond → v."""


@dataclass(frozen=True)
class Shortcut:
    """How a rollout evaluates its completions."""

    velocity: Velocity | None = None
    """Stands in for the policy's own velocity, such as the same in lower precision."""
    cache: float = 0.0
    """Relative change of the velocity up to which a step is predicted; 0 evaluates every step."""


class Memory(NamedTuple):
    """The last two evaluations on the way to a completed state; `rate` and `slope` need both."""

    x: Tensor
    velocity: Tensor
    sigma: Tensor
    rate: Tensor | None = None
    """‖Δv‖ / ‖Δx‖ between the two."""
    slope: Tensor | None = None
    """Δv / Δσ between the two."""


def norms(rows: Tensor) -> Tensor:
    """Return the norm of each row of [B, …]."""
    return rows.flatten(1).norm(dim=1)


def predict_velocity(
    memories: Sequence[Memory | None], x: Tensor, sigma: Tensor, tolerance: float
) -> tuple[list[bool], Tensor]:
    """Choose the states x [B, …] at sigma [B] that need no evaluation; return their velocities [n, …].

    EasyCache's rule (arXiv 2507.02860), for every state by itself: as long as the velocity changes with the
    state at the rate that it last had, has it changed by less than `tolerance` of its norm? If so it is
    carried on along the line through the last two (TaylorSeer, arXiv 2503.06923, order 1), which is exact
    where paths are straight.
    """
    known = [i for i, memory in enumerate(memories) if memory is not None and memory.rate is not None]
    chosen = [False] * len(memories)
    if not known:
        return chosen, x[:0]
    at, velocity, level, rate, slope = (
        torch.stack(part) for part in zip(*(memories[i] for i in known), strict=True)
    )
    change = rate * norms(x[known] - at) / norms(velocity).clamp_min(1e-12)
    rows = [row for row, small in enumerate((change < tolerance).tolist()) if small]
    for row in rows:
        chosen[known[row]] = True
    ahead = over(sigma[known] - level, velocity) * slope
    return chosen, (velocity + ahead)[rows]


def remember(memories: Sequence[Memory | None], x: Tensor, velocity: Tensor, sigma: Tensor) -> list[Memory]:
    """Return what to remember of evaluated states x [B, …], given their parents' memories."""
    known = [i for i, memory in enumerate(memories) if memory is not None]
    made = [Memory(*row) for row in zip(x, velocity, sigma, strict=True)]
    if not known:
        return made
    before = [memories[i] for i in known]
    moved = x[known] - torch.stack([memory.x for memory in before])
    turned = velocity[known] - torch.stack([memory.velocity for memory in before])
    rates = norms(turned) / norms(moved).clamp_min(1e-12)
    slopes = turned / over(sigma[known] - torch.stack([memory.sigma for memory in before]), turned)
    for i, rate, slope in zip(known, rates, slopes, strict=True):
        made[i] = made[i]._replace(rate=rate, slope=slope)
    return made
