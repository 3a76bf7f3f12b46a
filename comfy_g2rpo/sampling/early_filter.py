"""Which images to go on with, by what guidance itself says early on: CFG-Rejection (arXiv 2505.23343).

Where guidance moves an image much, the prompt has much to say about it, and the image mostly follows it
better. The gap is Δv = v_c − v_∅, the velocity with the prompt less the one without; its square is added up
over the first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..policy import Policy

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "velocity": torch.ones_like,
    "noise": lambda sigma: 1 - sigma,
    "clean": lambda sigma: sigma,
}
"""What the gap is measured on, and its factor to Δv at σ: ε̂ = x + (1−σ)v is the predicted noise and
x̂₀ = x − σv the predicted clean latent."""


def velocity_gap(cond: Tensor, uncond: Tensor, sigma: Tensor) -> Tensor:
    """Return Δv [B, …] of the clean latents predicted with and without the prompt; sigma: [B]."""
    return (uncond.float() - cond.float()) / per_row(sigma.float(), cond)


def squared_gap(gap: Tensor, sigma: Tensor, measure: str = "velocity", where: Tensor | None = None) -> Tensor:
    """Return the mean square per element of Δv [B, …] in a measure, as float64 [B] on the CPU; sigma: [B].

    `where` [B or 1, …] weighs the elements: a mask's images differ only beneath it.
    """
    squares = (per_row(MEASURES[measure](sigma), gap) * gap).float().square().flatten(1)
    if where is None:
        found = squares.mean(1)
    else:
        weights = where.float().expand_as(gap).flatten(1)
        found = (weights * squares).sum(1) / weights.sum(1).clamp(min=1e-12)
    # Not every device has float64.
    return found.cpu().double()


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Shape values [B] so that they multiply rows [B, …]."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


def steps_with_all(after: float, num_steps: int) -> int:
    """Return τ = ⌈after·T⌉, at least 1: the steps that all rows take."""
    # .7 · 10 is a little more than 7 in floating point.
    return max(1, min(num_steps, math.ceil(after * num_steps - 1e-9)))


def largest(gaps: Tensor, keep: int) -> list[int]:
    """Return the rows with the largest gaps [N], largest first; of equals the first, NaN last."""
    order = gaps.double().nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    return order[:keep].tolist()


def forwards(rows: int, keep: int, all_steps: int, num_steps: int, prompts: int = 2, later: int = 2) -> int:
    """Count forwards: all rows for τ steps with so many prompts, then the kept rows."""
    return prompts * rows * all_steps + later * min(keep, rows) * (num_steps - all_steps)


class Guided(Policy, Protocol):
    """A policy that tells what guidance makes of a prompt."""

    def velocity_and_gap(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return v [B, …] as `velocity` does, and the mean square of v_c − v_∅: float64 [B] on the
        CPU.

        ValueError where guidance weighs up no second prompt.
        """
        ...


class Gauging:
    """A policy that adds up every row's gap on its way; conditioning is (row, what the policy reads)."""

    def __init__(self, policy: Guided, rows: int) -> None:
        self.policy, self.gaps = policy, torch.zeros(rows, dtype=torch.float64)

    def inference(self) -> AbstractContextManager[None]:
        """Do as the policy does."""
        return self.policy.inference()

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[tuple[int, Any]]) -> Tensor:
        """Return v [B, …]."""
        rows = torch.tensor([row for row, _ in cond])
        made, gap = self.policy.velocity_and_gap(x, sigma, [own for _, own in cond])
        self.gaps.index_add_(0, rows, gap)
        return made
