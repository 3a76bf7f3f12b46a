"""Budgeted rejection: which of many candidates to keep, when only so many may be kept on average.

Optimal Budgeted Rejection Sampling (arXiv 2311.00460): of all acceptances with one budget, a = min(c·w, 1)
brings what is kept closest to the law that the weights w ask for, by every f-divergence. c follows from the
budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rollout import stream

HALVINGS = 60
BEYOND = 1e3  # of +∞: above the greatest finite logarithm


def acceptance(log_weights: Tensor, share: float) -> Tensor:
    """Return the acceptances min(c·w, 1) of log w [.., N], float64, which sum to share · N along the last
    axis.

    Candidates of weight 0 (−∞) and unknown ones (NaN) are never kept; where fewer are left than the budget
    allows, all of them are. ValueError unless share lies above 0 and is at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share:g}; it must be above 0 and at most 1")
    logs = log_weights.double()
    usable = ~(logs.isnan() | (logs == -torch.inf))
    known = usable & logs.isfinite()
    greatest = torch.where(known, logs, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    logs = torch.where(usable, torch.where(known, logs, greatest + BEYOND), -torch.inf)
    count = usable.sum(-1, keepdim=True)
    budget = (share * logs.shape[-1] * torch.ones_like(greatest)).clamp(max=count)
    top = logs.amax(-1, keepdim=True)
    least = torch.where(usable, logs, torch.inf).amin(-1, keepdim=True)
    top, least = (torch.where(count > 0, end, 0.0) for end in (top, least))
    # With share/w of the greatest for c the sum is at most the budget; with 1/w of the least all are kept.
    low, high = math.log(share) - top, -least
    for _ in range(HALVINGS):
        middle = low + (high - low) / 2
        enough = (middle + logs).clamp(max=0).exp().sum(-1, keepdim=True) >= budget
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    found = (high + logs).clamp(max=0).exp()
    # What the halvings leave over is shared out among those that are not certain.
    certain = found >= 1
    rest = torch.where(certain, 0.0, found)
    scale = (budget - certain.sum(-1, keepdim=True)) / rest.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.where(certain, found, (rest * scale).clamp(0, 1))


def draw(accepted: Tensor, seed: int) -> Tensor:
    """Draw who is kept, a mask like the acceptances [.., N]: exactly round(Σa) along the last axis.

    Systematic in a random order, so that each is kept with its own acceptance; where these do not sum to a
    whole number, they are brought to the nearest by `acceptance` first.
    """
    generator = torch.Generator().manual_seed(stream("budgeted", seed))
    rows = accepted.double().reshape(-1, accepted.shape[-1])
    kept = torch.zeros_like(rows, dtype=torch.bool)
    for row, mask in zip(rows, kept, strict=True):
        count = round(row.sum().item())
        order = torch.randperm(len(row), generator=generator)
        points = torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(count)
        if count:
            ends = acceptance(row.log(), count / len(row))[order].cumsum(0)
            ends[-1] = count + 1.0  # nothing is lost to rounding
            mask[order[torch.searchsorted(ends, points, right=True)]] = True
    return kept.reshape(accepted.shape)


def drawn(scores: Sequence[float], count: int, temperature: float, seed: int) -> list[int]:
    """Draw which of N candidates are kept by their finite scores, `count` of them at most; best first.

    Weights are exp(score / temperature): a low temperature keeps the best, a high one anybody.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    accepted = acceptance(values / temperature, min(1.0, count / len(values)))
    kept = draw(accepted, seed).nonzero().flatten()
    return kept[values[kept].argsort(descending=True, stable=True)].tolist()
