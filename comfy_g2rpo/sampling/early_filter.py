"""Which images to go on with, by what guidance itself says early on: CFG-Rejection (arXiv 2505.23343).

Where guidance moves an image much, the prompt has much to say about it, and the image mostly follows it
better. The gap is Δv = v_c − v_∅, the velocity with the prompt less the one without; its square is added up
over the first steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

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
    """Return the mean square per element of Δv [B, …] in a measure, as float64 [B]; sigma: [B].

    `where` [B or 1, …] weighs the elements: a mask's images differ only beneath it.
    """
    squares = (per_row(MEASURES[measure](sigma), gap) * gap).double().square()
    if where is None:
        return squares.flatten(1).mean(1)
    weights = where.double().expand_as(squares).flatten(1)
    return (weights * squares.flatten(1)).sum(1) / weights.sum(1).clamp(min=1e-12)


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
