"""Direct noise optimisation: its regulariser, its gradients, and what it ends at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from comfy_g2rpo.sampling import noise_optimizing
from comfy_g2rpo.sampling.noise_optimizing import (
    FLOOR,
    Climb,
    Seen,
    backpropagate,
    estimated_gradient,
    improbability,
    improbability_gradient,
    length,
    nearby,
    negative_log_probability,
    optimise,
    shuffles,
    vectors_of,
    within_lengths,
)
from comfy_g2rpo.sampling.search import Stopped

D = 1024


def draw(seed: int = 0, elements: int = D) -> Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(noise: Tensor) -> float:
    return improbability(noise, shuffles(noise.numel(), 0))


def mean_value(change: str) -> float:
    changes = {"fresh": lambda z: z, "shifted": lambda z: z + 0.1, "smaller": lambda z: 0.9 * z}
    return sum(value(changes[change](draw(seed))) for seed in range(24)) / 24


@pytest.mark.parametrize("seed", range(4))
def test_the_floor_is_reached_where_nothing_speaks_against_a_noise(seed: int) -> None:
    assert value(0.5 * draw(seed)) == pytest.approx(4 * math.log(2), abs=1e-12)
    assert pytest.approx(2.7726, abs=5e-5) == FLOOR


@pytest.mark.parametrize(("change", "low", "high"), [("fresh", 2.775, 2.82), ("shifted", 3.0, 3.4)])
def test_fresh_noise_is_near_it_and_a_wrong_mean_is_above(change: str, low: float, high: float) -> None:
    assert low < mean_value(change) < high


def test_a_wrong_scale_is_not_seen() -> None:
    """So that its length is held within bounds by itself."""
    assert mean_value("smaller") == pytest.approx(FLOOR, abs=0.01)


@pytest.mark.parametrize("noise", [torch.ones(D), draw()[:16].repeat(64)], ids=["constant", "tile"])
def test_patterns_are_far_above(noise: Tensor) -> None:
    assert value(noise.double()) > 20


def test_the_order_counts_once_as_it_is_and_once_shuffled() -> None:
    orders, noise = shuffles(D, "key"), draw() + 0.2
    own = negative_log_probability(vectors_of(noise, torch.arange(D)[None]))[0]
    mixed = negative_log_probability(vectors_of(noise, orders)).mean()
    assert improbability(noise, orders) == pytest.approx((own + mixed).item(), abs=1e-12)


def test_many_orders_at_a_time_are_the_same_as_few(monkeypatch: pytest.MonkeyPatch) -> None:
    noise, orders = draw() + 0.2, shuffles(D, 0)
    whole, gradient = improbability(noise, orders), improbability_gradient(noise, orders)
    monkeypatch.setattr(noise_optimizing, "AT_ONCE", 7 * D)
    again, other = improbability(noise, orders), improbability_gradient(noise, orders)
    assert again == pytest.approx(whole, abs=1e-12)
    assert torch.allclose(gradient, other, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 3, 16, 63, 64, 1000])
def test_any_size_can_be_looked_at(elements: int) -> None:
    noise = draw(1, elements)
    orders = shuffles(elements, 0)
    assert improbability(noise, orders) >= FLOOR - 1e-9
    assert improbability_gradient(noise, orders).isfinite().all()


def test_its_gradient_is_that_of_finite_differences() -> None:
    noise, orders, step = 1.2 * draw(3) + 0.15, shuffles(D, 0), 1e-5
    gradient = improbability_gradient(noise, orders)
    for at in (0, 7, 500, 1023):
        away = torch.zeros(D, dtype=torch.float64)
        away[at] = step
        rise = improbability(noise + away, orders) - improbability(noise - away, orders)
        assert gradient[at].item() == pytest.approx(rise / (2 * step), rel=1e-4, abs=1e-7)


def test_a_length_is_held_within_its_bounds() -> None:
    assert length(within_lengths(2 * draw(), 0.95, 1.05)) == pytest.approx(1.05)
    assert length(within_lengths(draw() / 2, 0.95, 1.05)) == pytest.approx(0.95)
    assert torch.equal(within_lengths(torch.zeros(4), 0.95, 1.05), torch.zeros(4))


def test_an_estimate_is_the_direction_in_which_scores_rise() -> None:
    """Of a linear reward it is its own direction, as images become many; those unjudged do not count."""
    way, image = draw(1, 12), draw(2, 12)
    images = image + 0.1 * draw(3, 12 * 4000).view(4000, 12)
    scores = images @ way
    scores[::10] = math.nan
    made = estimated_gradient(images, image, scores, (image @ way).item())
    assert made.norm().item() == pytest.approx(1.0)
    assert torch.cosine_similarity(made, way, dim=0) > 0.99
    flat = estimated_gradient(images, image, torch.ones(4000), 1.0)
    assert torch.equal(flat, torch.zeros_like(image))


def test_a_gradient_goes_back_through_a_walk_as_autograd_takes_it() -> None:
    weight, sigmas = draw(4, 36).view(6, 6) / 3, torch.tensor([1.0, 0.8, 0.3, 0.0], dtype=torch.float64)
    asked = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma.item())
        return torch.tanh(x @ weight) * (1 + sigma[:, None])

    start, end = draw(5, 6)[None].requires_grad_(), draw(6, 6)[None]
    states, x = [], start
    for k in range(3):
        states.append(x.detach())
        x = x + (sigmas[k + 1] - sigmas[k]) * velocity(x, sigmas[k].expand(1))
    (whole,) = torch.autograd.grad(x, start, 1e-9 * end)
    asked.clear()
    checks = []
    made = backpropagate(velocity, states, sigmas, 1e-9 * end, lambda: checks.append(1))
    assert torch.allclose(made, whole, rtol=1e-9, atol=0)
    assert asked == pytest.approx([0.3, 0.8, 1.0]) and len(checks) == 3
    zero = torch.zeros(1, 6)
    assert torch.equal(backpropagate(velocity, states, sigmas, zero), zero)


def linear(rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, y and the noise that maximises −‖Wz − y‖², which is an ordinary one."""
    weight = torch.linalg.qr(draw(7, rows * rows).view(rows, rows))[0].float()
    best = draw(8, rows).float()
    best = best / length(best)
    return weight, weight @ best, best


def test_a_linear_model_reaches_its_maximum() -> None:
    weight, y, best = linear()
    lengths = []

    def look(noise: Tensor, number: int, wanted: bool) -> Seen:
        away = weight @ noise - y
        lengths.append(length(noise))
        return Seen(-away.square().sum().item(), -2 * weight.T @ away if wanted else None)

    start = draw(9, 64).float()
    made = optimise(start / length(start), Climb(400, 0.05, 0.0), 0, look)
    assert (made.noise - best).abs().max() < 0.01
    assert made.score == max(made.scores) and len(made.scores) == 401
    assert min(lengths) >= 0.95 - 1e-6 and max(lengths) <= 1.05 + 1e-6


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_noise_stays_one_whatever_the_reward_wants(weight: float) -> None:
    """A reward for a large mean: the length stays in its bounds, and the regulariser holds it back."""
    lengths = []

    def look(noise: Tensor, number: int, wanted: bool) -> Seen:
        lengths.append(length(noise))
        return Seen(noise.mean().item(), torch.full_like(noise, 0.02))

    made = optimise(draw().float(), Climb(60, 0.05, weight), 0, look)
    assert min(lengths) >= 0.95 - 1e-6 and max(lengths) <= 1.05 + 1e-6
    assert value(made.noise.double()) < 10 if weight else value(made.noise.double()) > 100


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_it_with_the_best_so_far(broken: float) -> None:
    def look(noise: Tensor, number: int, wanted: bool) -> Seen:
        gradient = torch.full_like(noise, broken if number == 3 else 0.1)
        return Seen([1.0, 2.0, 5.0, 3.0][number], gradient)

    made = optimise(draw().float(), Climb(20), 0, look)
    assert (made.score, made.step, len(made.scores)) == (5.0, 2, 4)
    assert made.noise.isfinite().all() and "not finite" in made.ended


def test_an_image_without_a_score_ends_it_with_the_best_before() -> None:
    def look(noise: Tensor, number: int, wanted: bool) -> Seen:
        return Seen([1.0, math.nan][number], torch.ones_like(noise))

    made = optimise(draw().float(), Climb(20), 0, look)
    assert (made.score, made.step) == (1.0, 0) and "could not be judged" in made.ended


@pytest.mark.parametrize("at", [0, 2])
def test_it_can_be_stopped(at: int) -> None:
    def look(noise: Tensor, number: int, wanted: bool) -> Seen:
        if number == at:
            raise Stopped
        return Seen(float(number), torch.ones_like(noise))

    if not at:
        with pytest.raises(Stopped):
            optimise(draw().float(), Climb(20), 0, look)
        return
    assert optimise(draw().float(), Climb(20), 0, look).step == 1


def test_a_step_without_a_gradient_is_the_last() -> None:
    made = optimise(draw().float(), Climb(20), 0, lambda *_: Seen(1.0, None))
    assert (made.scores, made.ended) == ([1.0], "")


def test_a_noise_of_zeros_stays_where_nothing_pulls() -> None:
    made = optimise(torch.zeros(64), Climb(3), 0, lambda noise, *_: Seen(0.0, torch.zeros_like(noise)))
    assert torch.equal(made.noise, torch.zeros(64))


def test_probes_are_drawn_anew_in_every_step_and_alike_in_every_run() -> None:
    noise = draw().float().view(1, 4, 16, 16)
    first, second = nearby(noise, 8, 5, 0), nearby(noise, 8, 5, 1)
    assert first.shape == (8, 4, 16, 16) and not torch.equal(first, second)
    assert torch.equal(first, nearby(noise, 8, 5, 0))
    assert torch.equal(first[:3], nearby(noise, 3, 5, 0))
    assert (first - noise).std().item() == pytest.approx(0.1, rel=0.02)
