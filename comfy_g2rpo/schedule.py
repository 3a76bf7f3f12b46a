"""Noise schedules and the index lists that completions visit."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Terminal = Literal["exact", "published"]


def shifted_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """Return the time-shifted noise levels σ_0 = 1 > … > σ_T = 0 as float32 [T+1].

    σ ↦ sσ / (1 + (s−1)σ), the resolution-dependent shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23).
    Computed in float64 and rounded once, so that every user of the list sees the same float32 values.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a trajectory needs at least 1 step")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be above 0 (1 leaves the schedule linear)")
    sigma = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * sigma / (1 + (shift - 1) * sigma)).float()


def completion_indices(
    num_steps: int, branch_step: int, granularity: int, terminal: Terminal = "exact"
) -> list[int]:
    """List the schedule indices that the completion of a branch at step k visits, from k+1 to T.

    k+1, k+2, k+2+λ, k+2+2λ, … (G²RPO, arXiv 2510.01982, §3.3): the first completed step is always a fine one.
    Where the stride misses T, "exact" adds one short last step; "published" drops the last state and jumps to
    0 from the one before, as the paper's code does.
    """
    if not 0 <= branch_step < num_steps:
        bounds = f"it must lie in 0…{num_steps - 1} for {num_steps} steps"
        raise ValueError(f"branch_step is {branch_step}; {bounds}")
    if granularity < 1:
        raise ValueError(f"granularity is {granularity}; a stride is at least 1")
    indices = [branch_step + 1, *range(branch_step + 2, num_steps + 1, granularity)]
    if indices[-1] == num_steps:
        return indices
    return [*(indices[:-1] if terminal == "published" else indices), num_steps]
