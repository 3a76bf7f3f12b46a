"""Which rows the early filter keeps: by a gap that is known, whatever their order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from comfy_g2rpo.sampling.early_filter import (
    MEASURES,
    forwards,
    largest,
    squared_gap,
    steps_with_all,
    velocity_gap,
)

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def toy(x: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Return a linear model's velocities with and without the prompt, whose gap is `pull` everywhere."""
    without = 0.5 * x
    return without + pull.view(-1, 1, 1), without


@pytest.mark.parametrize("measure", MEASURES)
def test_the_gap_of_a_linear_model_is_added_up_exactly(measure: str) -> None:
    pull, total = torch.tensor([0.0, 1.0, -2.0]), torch.zeros(3, dtype=torch.float64)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    factors = {"velocity": lambda s: 1, "noise": lambda s: 1 - s, "clean": lambda s: s}[measure]
    for level, lower in itertools.pairwise(SIGMAS[:3]):
        sigma = level.expand(3)
        given, without = toy(x, pull)
        gap = velocity_gap(x - level * given, x - level * without, sigma)
        total += squared_gap(gap, sigma, measure)
        x = x + (lower - level) * given
    expected = sum(factors(level) ** 2 for level in (1.0, 0.75)) * pull.double() ** 2
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)
    assert total[0] < 1e-6 and largest(total, 2) == [2, 1]


def test_a_mask_weighs_the_elements() -> None:
    gap = torch.ones(2, 1, 2, 2)
    gap[0, 0, 0, 0] = 3.0
    where = torch.zeros(1, 1, 2, 2)
    where[..., 0, :] = 1
    assert squared_gap(gap, torch.ones(2), where=where).tolist() == [5.0, 1.0]
    assert squared_gap(gap, torch.ones(2)).tolist() == [3.0, 1.0]
    assert squared_gap(gap, torch.ones(2), where=torch.zeros(2, 1, 2, 2)).tolist() == [0.0, 0.0]


def test_the_largest_come_first_equals_as_they_come_and_nan_last() -> None:
    gaps = torch.tensor([1.0, math.nan, 3.0, 3.0, 0.0, math.nan])
    assert largest(gaps, 3) == [2, 3, 0]
    assert largest(gaps, 9) == [2, 3, 0, 4, 1, 5]


def test_the_order_of_rows_does_not_matter() -> None:
    gaps = torch.rand(50, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert order[largest(gaps[order], 7)].tolist() == largest(gaps, 7)


@pytest.mark.parametrize(
    ("after", "num_steps", "expected"),
    [(0.3, 10, 3), (0.3, 8, 3), (0.7, 10, 7), (0.1, 30, 3), (0.01, 8, 1), (1.0, 8, 8), (0.3, 1, 1)],
)
def test_the_steps_of_all_rows_are_rounded_up(after: float, num_steps: int, expected: int) -> None:
    assert steps_with_all(after, num_steps) == expected


def test_forwards_are_two_per_row_and_step_and_one_later_without_guidance() -> None:
    assert forwards(16, 4, 3, 8) == 2 * (16 * 3 + 4 * 5)
    assert forwards(16, 4, 3, 8, 2, 1) == 2 * 16 * 3 + 4 * 5
    assert forwards(3, 4, 3, 8) == 2 * 3 * 8
