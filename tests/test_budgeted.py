"""Optimal budgeted rejection: its closed forms, its optimality, and draws that keep sums unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_g2rpo.sampling.budgeted import acceptance, draw, drawn

WEIGHTS = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
LOGS = st.lists(st.floats(-50, 50), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("weights", "share", "expected"),
    [
        ([1, 2, 4, 8], 1 / 2, [1 / 7, 2 / 7, 4 / 7, 1]),
        ([1, 2, 4, 8], 1 / 4, [w / 15 for w in (1, 2, 4, 8)]),
        ([1, 2, 4, 8], 1, [1, 1, 1, 1]),
        ([3, 3, 3, 3, 3], 0.3, [0.3] * 5),
        ([1, 1, 10, 10], 3 / 4, [1 / 2, 1 / 2, 1, 1]),
        ([7], 0.4, [0.4]),
    ],
)
def test_closed_forms(weights: list[float], share: float, expected: list[float]) -> None:
    found = acceptance(torch.tensor(weights, dtype=torch.float64).log(), share)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


@given(LOGS, st.floats(0.01, 1))
@settings(max_examples=200)
def test_the_budget_is_kept_and_the_order_too(logs: list[float], share: float) -> None:
    made = torch.tensor(logs, dtype=torch.float64)
    found = acceptance(made, share)
    assert found.sum().item() == pytest.approx(share * len(logs), abs=1e-9)
    assert found.min() >= 0 and found.max() <= 1
    assert (found[made.argsort()].diff() >= -1e-12).all()


@given(LOGS, st.floats(0.01, 1), st.floats(-1e4, 1e4))
def test_only_proportions_count(logs: list[float], share: float, shift: float) -> None:
    made = torch.tensor(logs, dtype=torch.float64)
    assert torch.allclose(acceptance(made + shift, share), acceptance(made, share), atol=1e-8)


def test_rows_are_apart_and_kept_in_their_shape() -> None:
    both = torch.stack([WEIGHTS.log(), torch.zeros(4, dtype=torch.float64)])[:, None]
    found = acceptance(both, 0.5)
    assert found.shape == both.shape
    assert torch.equal(found[0, 0], acceptance(WEIGHTS.log(), 0.5)) and found[1, 0].tolist() == [0.5] * 4


def divergence(target: torch.Tensor, proposal: torch.Tensor, accepted: torch.Tensor) -> float:
    """Return KL(target ‖ what is kept)."""
    kept = proposal * accepted / (proposal * accepted).sum()
    return (target * (target / kept).log()).sum().item()


@pytest.mark.parametrize("seed", range(3))
def test_no_other_acceptance_of_the_same_budget_comes_closer(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, share = 10, 0.3
    target = torch.rand(count, generator=generator, dtype=torch.float64).square() + 1e-3
    target /= target.sum()
    proposal = torch.full_like(target, 1 / count)
    ours = acceptance((target / proposal).log(), share)
    best = divergence(target, proposal, ours)
    # Random weights to powers from 0 to 3, each brought to the same budget.
    random = torch.rand(1000, count, generator=generator, dtype=torch.float64).log()
    powers = 3 * torch.rand(1000, 1, generator=generator, dtype=torch.float64)
    for other in acceptance(powers * random, share):
        assert (
            other.sum() == pytest.approx(share * count)
            and divergence(target, proposal, other) >= best - 1e-12
        )


@pytest.mark.parametrize("share", [1 / 4, 1 / 2, 3 / 8])
def test_draws_keep_as_many_as_the_budget_and_leave_sums_unbiased(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gains = torch.randn(16, generator=generator, dtype=torch.float64)
    accepted = acceptance(torch.randn(16, generator=generator, dtype=torch.float64), share)
    sums = []
    for seed in range(300):
        kept = draw(accepted, seed)
        assert kept.sum() == round(16 * share)
        sums.append((gains / accepted)[kept].sum().item())
    found = torch.tensor(sums, dtype=torch.float64)
    error = found.std() / math.sqrt(len(sums))
    assert abs(found.mean() - gains.sum()) <= 3 * error


@pytest.mark.parametrize(
    ("accepted", "count"), [([0.2, 0.9, 0.7], 2), ([1.0, 1.0, 0.3], 2), ([1.0, 1.0], 2), ([0.1, 0.2], 0)]
)
def test_draws_round_a_broken_budget(accepted: list[float], count: int) -> None:
    for seed in range(50):
        kept = draw(torch.tensor(accepted), seed)
        assert kept.sum() == count


def test_certain_ones_are_always_kept_and_impossible_ones_never() -> None:
    accepted = torch.tensor([1.0, 0.5, 0.0, 0.5, 1.0], dtype=torch.float64)
    draws = torch.stack([draw(accepted, seed) for seed in range(200)])
    assert draws[:, [0, 4]].all() and not draws[:, 2].any()
    assert 60 < draws[:, 1].sum() < 140


def test_a_draw_depends_on_its_seed_alone_and_keeps_batches() -> None:
    accepted = torch.full((3, 8), 0.5)
    assert torch.equal(draw(accepted, 3), draw(accepted, 3)) and draw(accepted, 3).shape == (3, 8)
    assert not torch.equal(draw(accepted, 3), draw(accepted, 4))
    assert draw(accepted, 3).sum(1).tolist() == [4, 4, 4]


NO, UNKNOWN, INF = -math.inf, math.nan, math.inf


@pytest.mark.parametrize(
    ("logs", "share", "expected"),
    [
        ([NO, 0.0, 0.0, UNKNOWN], 0.25, [0, 0.5, 0.5, 0]),
        ([NO, 0.0, UNKNOWN, UNKNOWN], 0.75, [0, 1, 0, 0]),
        ([NO, UNKNOWN], 0.5, [0, 0]),
        ([1e4, 0.0, -1e4], 1 / 3, [1, 0, 0]),
        ([1e4, 0.0, -1e4], 2 / 3, [1, 1, 0]),
        ([-3e5, -3e5, 2e5], 2 / 3, [0.5, 0.5, 1]),
        ([INF, 0.0, 0.0], 2 / 3, [1, 0.5, 0.5]),
        ([INF, INF, 0.0], 1 / 3, [0.5, 0.5, 0]),
    ],
)
def test_what_cannot_be_kept_is_dropped_and_nothing_overflows(
    logs: list[float], share: float, expected: list[float]
) -> None:
    assert acceptance(torch.tensor(logs), share).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share is .*; it must be above 0"):
        acceptance(torch.zeros(3), share)


def test_cold_draws_are_the_best_and_hot_ones_anybody() -> None:
    scores = [0.3, 0.9, 0.1, 0.8, 0.5, 0.2]
    assert all(drawn(scores, 2, 1e-4, seed) == [1, 3] for seed in range(20))
    hot = [drawn(scores, 2, 1e6, seed) for seed in range(100)]
    assert {len(kept) for kept in hot} == {2}
    assert all(scores[a] >= scores[b] for a, b in hot)
    for i in range(6):
        assert 15 < sum(i in kept for kept in hot) < 52


def test_a_warm_draw_keeps_each_by_its_acceptance() -> None:
    scores, heat = [math.log(w) for w in (1.0, 2.0, 4.0, 8.0)], 1.0
    kept = [drawn(scores, 2, heat, seed) for seed in range(280)]
    for i, share in enumerate((1 / 7, 2 / 7, 4 / 7, 1.0)):
        assert sum(i in one for one in kept) / 280 == pytest.approx(share, abs=0.1)


def test_fewer_than_are_asked_for_are_all_kept_and_equals_too() -> None:
    assert drawn([0.2, 0.4], 5, 0.1, 0) == [1, 0]
    assert len(drawn([0.5] * 6, 4, 0.1, 3)) == 4
