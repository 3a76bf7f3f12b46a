"""What holds for every search: budgets, repetition, the given noise, judges that abstain or tie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.sampling.search import GIVEN, Ask, Result, Space, Stopped, Told, answer, search, walk
from comfy_g2rpo.sampling.search_methods import METHODS
from comfy_g2rpo.sampling.search_settings import READS, SearchSettings
from comfy_g2rpo.schedule import shifted_sigmas

from .toys import SHAPE, ToyPolicy

SIGMAS = shifted_sigmas(8)
TARGET = seeded_noise(SHAPE, "target")
ELITIST = [name for name in METHODS if name not in ("particles", "funnel", "particle_gibbs", "ensemble")]


def near(latents: Tensor) -> Tensor:
    """Reward images that are near a target."""
    return -(latents - TARGET).square().flatten(1).mean(1)


def run(
    name: str,
    budget: int,
    judge: Callable[[Tensor], Tensor] = near,
    slots: int = 64,
    seed: int = 5,
    keep: int = 1,
    policy: ToyPolicy | None = None,
    **settings: object,
) -> Result:
    policy, space = policy or ToyPolicy(), Space(SIGMAS, seeded_noise(SHAPE, "given", seed), seed)
    made = SearchSettings(**settings)

    def evaluate(ask: Ask) -> Told:
        return answer(ask, policy, 0.3, SIGMAS, judge, slots)

    return search(METHODS[name], space, made, budget, evaluate, keep)


class GuidedToy(ToyPolicy):
    """A policy whose guidance moves a row by its mean."""

    def velocity_and_gap(self, x: Tensor, sigma: Tensor, cond: list[float]) -> tuple[Tensor, Tensor]:
        return self.velocity(x, sigma, cond), x.double().flatten(1).mean(1).square()


def image(seed: int = 5) -> Tensor:
    """Return what ordinary sampling makes of the given noise."""
    noise = seeded_noise(SHAPE, "given", seed)[None]
    made = roll_out(ToyPolicy(), deterministic(8), SIGMAS, [0.3], [0], SHAPE, start=noise)
    return made.latents[0, 0]


@pytest.mark.parametrize("budget", [8, 15, 16, 31, 32, 64, 67, 128, 200])
@pytest.mark.parametrize("name", METHODS)
def test_no_forward_beyond_the_budget_and_less_than_an_image_left(name: str, budget: int) -> None:
    policy = ToyPolicy()
    found = run(name, budget, policy=policy)
    assert found.forwards == sum(policy.calls)
    assert budget - 8 < found.forwards <= budget


@pytest.mark.parametrize("name", METHODS)
def test_a_search_repeats_itself_whatever_the_slots(name: str) -> None:
    alone, few, many = (run(name, 64, slots=slots, keep=4) for slots in (1, 3, 64))
    again, other = run(name, 64, slots=1, keep=4), run(name, 64, slots=1, seed=6)
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(alone.found, again.found, strict=True))
    for found in (few, many):
        assert [one.name for one in found.found] == [one.name for one in alone.found]
        for a, b in zip(found.found, alone.found, strict=True):
            assert torch.allclose(a.latent, b.latent, atol=1e-4)
    assert not torch.equal(other.found[0].latent, alone.found[0].latent)


@pytest.mark.parametrize("name", ELITIST)
def test_where_all_score_the_same_nothing_is_found(name: str) -> None:
    found = run(name, 64, judge=lambda latents: torch.ones(len(latents)))
    assert found.found[0].name == GIVEN
    assert torch.allclose(found.found[0].latent, image(), atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_with_one_images_budget_it_is_the_given_noises(name: str) -> None:
    found = run(name, 8)
    assert torch.allclose(found.found[0].latent, image(), atol=1e-5)
    assert found.given == found.found[0].score


@pytest.mark.parametrize("name", ELITIST)
@pytest.mark.parametrize("seed", range(4))
def test_the_best_is_no_worse_than_the_given_noises(name: str, seed: int) -> None:
    found = run(name, 64, seed=seed)
    assert found.given == pytest.approx(near(image(seed)[None]).item(), abs=1e-5)
    assert found.found[0].score >= found.given


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_the_latents_and_the_best_comes_first(name: str) -> None:
    found = run(name, 64, keep=5)
    for one in found.found:
        assert one.score == pytest.approx(near(one.latent[None]).item(), abs=1e-6)
    scores = [one.score for one in found.found]
    assert all(one.whole for one in found.found) and scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_images_without_a_score_are_passed_over(name: str, share: float) -> None:
    generator = torch.Generator().manual_seed(1)

    def judge(latents: Tensor) -> Tensor:
        blank = torch.rand(len(latents), generator=generator) < share
        return torch.where(blank, torch.nan, near(latents))

    found = run(name, 64, judge=judge)
    assert found.found[0].latent.isfinite().all()
    assert math.isnan(found.found[0].score) == (share == 1.0)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_in_which_a_reward_sees_images_does_not_matter(name: str) -> None:
    def shuffled(latents: Tensor) -> Tensor:
        order = torch.randperm(len(latents))
        return near(latents[order])[order.argsort()]

    plain, mixed = run(name, 64), run(name, 64, judge=shuffled)
    assert torch.equal(plain.found[0].latent, mixed.found[0].latent)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("requests", [1, 2, 5])
def test_a_stopped_search_keeps_what_it_has(name: str, requests: int) -> None:
    seen: list[tuple[float, bool]] = []
    space = Space(SIGMAS, seeded_noise(SHAPE, "given", 5), 5)

    def evaluate(ask: Ask) -> Told:
        if len(seen) == requests:
            raise Stopped
        told = answer(ask, ToyPolicy(), 0.3, SIGMAS, near)
        seen.append((told.scores.max().item(), bool(ask.names)))
        return told

    try:
        found = search(METHODS[name], space, SearchSettings(), 64, evaluate)
    except Stopped:
        assert not [score for score, _ in seen if score == score]  # nothing was judged before
        return
    best, made = found.found[0], [score for score, whole in seen if whole]
    assert best.whole == bool(made)
    assert best.score == max(made or [score for score, _ in seen if score == score])


def test_a_budget_below_one_image_is_refused() -> None:
    with pytest.raises(ValueError, match="budget is 7; one image of 8 steps takes 8 forwards"):
        run("best_of_n", 7)


def test_a_jump_to_the_end_is_the_predicted_image() -> None:
    policy, x = ToyPolicy(), seeded_noise((3, *SHAPE), "x")
    ask = Ask(x, (3, 8), kept=True)
    told = answer(ask, policy, 0.3, SIGMAS, near)
    v = policy.velocity(x, SIGMAS[3].expand(3), [0.3] * 3)
    assert torch.allclose(told.latents, x - SIGMAS[3] * v, atol=1e-6)
    assert torch.equal(told.x[:, 0], x) and torch.allclose(told.velocity[:, 0], v, atol=1e-6)


def test_a_walk_from_the_last_index_takes_no_forward() -> None:
    policy, x = ToyPolicy(), seeded_noise((3, *SHAPE), "x")
    told = answer(Ask(x, (8,)), policy, 0.3, SIGMAS, near)
    assert policy.calls == [] and torch.equal(told.latents, x) and walk(8, (8,), False).forwards == 0


def test_every_setting_is_read_by_some_method_and_every_method_has_a_name() -> None:
    fields = {field.name for field in dataclasses.fields(SearchSettings)}
    assert {name for reads in READS.values() for name in reads} == fields
    assert list(READS) == list(METHODS)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_the_gap_of_guidance_is_added_up_row_by_row(slots: int) -> None:
    start = torch.stack([seeded_noise(SHAPE, "gap", row) for row in range(7)])
    asked = Ask(start, (0, 2, 5, 8), judged=False, by_gap=True)
    told = answer(asked, GuidedToy(), 0.3, SIGMAS, near, slots)
    way = answer(asked._replace(by_gap=False, kept=True), GuidedToy(), 0.3, SIGMAS, near, slots)
    assert torch.equal(told.latents, way.latents)
    expected = way.x.double().flatten(2).mean(2).square().sum(1)
    torch.testing.assert_close(told.scores, expected, rtol=1e-5, atol=1e-9)


def test_looks_by_the_gap_of_guidance_are_not_judged_and_the_largest_are_finished() -> None:
    asked = []

    def evaluate(ask: Ask) -> Told:
        told = answer(ask, GuidedToy(), 0.3, SIGMAS, near)
        asked.append((ask, told))
        return told

    space = Space(SIGMAS, seeded_noise(SHAPE, "given", 5), 5)
    settings = SearchSettings(score="guidance_gap")
    found = search(METHODS["coarse_first"], space, settings, 64, evaluate, 3)
    (given, _), (looks, told), (finals, _) = asked
    assert given.judged and finals.judged and not looks.judged
    assert torch.equal(finals.start, looks.start[told.scores.argsort(descending=True)[:2]])
    assert found.scored == 3 and len(found.found) == 3 and found.forwards == 64
    assert all(one.score == near(one.latent[None]).double().item() for one in found.found)


def test_the_gap_of_guidance_needs_guidance() -> None:
    settings = SearchSettings(score="guidance_gap")
    with pytest.raises(ValueError, match="needs guidance above 1"):
        settings.check("coarse_first", guided=False)
    settings.check("coarse_first", guided=True)
    settings.check("particles", guided=False)  # which does not read it
