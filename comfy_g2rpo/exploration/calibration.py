"""DenseGRPO's calibration of exploration (arXiv 2601.20218): as much noise at every step as leaves its images
as often better as worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST = 10.0  # what `etas` of a recipe may be


@dataclass(frozen=True)
class Round:
    """What a round measured with its etas [T], and the etas [T] that follow from it.

    `balance` is (#{ΔR > 0} − #{ΔR < 0}) / n by schedule step.
    """

    etas: tuple[float, ...]
    balance: Mapping[int, float]
    following: tuple[float, ...]


def balance_of(gains: Tensor) -> float:
    """Return by how much gains [n] are more often above 0 than below, from −1 to 1; NaN does not count."""
    known = gains[~gains.isnan()]
    return torch.sign(known).double().mean().item() if len(known) else float("nan")


def adjusted(eta: float, balance: float, step: float, limit: float, most: float = MOST) -> float:
    """Raise a step's strength where |balance| is below the limit, and lower it otherwise: by `step`, within
    0 and `most`. A balance of NaN says nothing.
    """
    if balance != balance:
        return eta
    # Rounded, so that a strength that comes back to a value is that value.
    return round(min(max(eta + (step if abs(balance) < limit else -step), 0.0), most), 9)


def calibrate(
    etas: Sequence[float],
    measure: Callable[[tuple[float, ...], int], Mapping[int, Tensor]],
    rounds: int,
    step: float = 0.05,
    balance: float = 0.1,
    most: float = MOST,
) -> Iterator[Round]:
    """Yield each round of the calibration; steps that `measure` leaves out keep their strength.

    `measure` takes the etas [T] and the number of the round, and returns gains [n] by schedule step.
    """
    now = tuple(map(float, etas))
    for number in range(rounds):
        found = {k: balance_of(gains) for k, gains in measure(now, number).items()}
        changed = {k: adjusted(now[k], value, step, balance, most) for k, value in found.items()}
        following = tuple(changed.get(k, eta) for k, eta in enumerate(now))
        yield Round(now, found, following)
        now = following
