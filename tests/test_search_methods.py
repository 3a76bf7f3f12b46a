"""Each search against what it must be: exact laws, closed forms and counts on models of a few numbers."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from some_cases import some
from torch import Tensor

from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.sampling.branch_search import branch_search
from comfy_g2rpo.sampling.ensemble import ensemble, moved
from comfy_g2rpo.sampling.fresh_starts import best_of_n, coarse_first, noise_search
from comfy_g2rpo.sampling.funnel import funnel
from comfy_g2rpo.sampling.particles import Swarm, effective, one_pass, particle_gibbs, particles, systematic
from comfy_g2rpo.sampling.search import Ask, Result, Space, Told, search
from comfy_g2rpo.sampling.search_settings import SearchSettings
from comfy_g2rpo.schedule import shifted_sigmas

SIGMAS = shifted_sigmas(8)
ONE = (1, 1, 1)
Judge = Callable[[Tensor], Tensor]


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the exact velocity of data that is −1 ± .3 or +1 ± .3, the second twice as often."""
    means, weights = torch.tensor([-1.0, 1.0]), torch.tensor([1 / 3, 2 / 3])
    variance = (1 - sigma) ** 2 * 0.09 + sigma**2
    off = x[..., None] - (1 - sigma) * means
    share = (weights.log() - off**2 / (2 * variance)).softmax(-1)
    clean = (share * (means + (1 - sigma) * 0.09 / variance * off)).sum(-1)
    return (x - clean) / sigma


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the exact velocity of standard normal data."""
    return (sigma - (1 - sigma)) / ((1 - sigma) ** 2 + sigma**2) * x


def answered(velocity: Callable[[Tensor, Tensor], Tensor], judge: Judge) -> Callable[[Ask], Told]:
    """Return who answers requests by a velocity that is known, and keeps them as `asked`."""

    def answer(ask: Ask) -> Told:
        x, states, velocities = ask.start, [], []
        for here, there in pairwise(ask.indices):
            v = velocity(x, SIGMAS[here])
            states.append(x)
            velocities.append(v)
            x = x + (SIGMAS[there] - SIGMAS[here]) * v
        scores = judge(x).double() if ask.judged else torch.full((len(x),), math.nan).double()
        none = x.new_empty(len(x), 0, *x.shape[1:])
        way = (torch.stack(some, 1) if some and ask.kept else none for some in (states, velocities))
        answer.asked.append(ask)
        return Told(x, scores, *way)

    answer.asked = []
    return answer


def drive(asking: Generator[Ask, Told, Any], answer: Callable[[Ask], Told]) -> Any:
    """Answer all that is asked; return what the generator returns."""
    told = None
    while True:
        try:
            told = answer(asking.send(told))
        except StopIteration as end:
            return end.value


def space(shape: tuple[int, ...] = ONE, seed: int = 3) -> Space:
    return Space(SIGMAS, seeded_noise(shape, "given", seed), seed)


def first(latents: Tensor) -> Tensor:
    return latents.flatten(1)[:, 0]


# Fresh starts.


def test_coarse_first_looks_roughly_and_finishes_the_best_looking() -> None:
    answer = answered(gaussian, first)
    drive(coarse_first(space((2, 4, 4)), SearchSettings(), 64), answer)
    given, looks, finals = answer.asked
    assert len(given.start) == 1 and given.indices == tuple(range(9))
    assert looks.indices == (0, 2, 4, 6, 8) and len(looks.start) == 10 and not looks.names
    best = answered(gaussian, first)(looks).scores.argsort(descending=True)[:2]
    assert torch.equal(finals.start, looks.start[best]) and finals.indices == tuple(range(9))


def test_mutants_keep_the_noises_length_and_become_milder_where_none_is_better() -> None:
    scores = iter([1.0] * 1000)  # nothing is ever better than the first
    answer = answered(gaussian, lambda latents: torch.tensor([next(scores) for _ in latents]))
    found = search(noise_search, space((4, 32, 32)), SearchSettings(mutation=0.8), 400, answer)
    size = [one.norm().item() / one.numel() ** 0.5 for ask in answer.asked for one in ask.start]
    assert max(abs(each - 1) for each in size) < 0.05
    start = answer.asked[0].start[0]
    kept = [
        [(torch.dot(one.flatten(), start.flatten()) / start.norm() ** 2).item() for one in ask.start]
        for ask in answer.asked[1:7]
    ]
    expected = [0.6, 0.6, math.sqrt(1 - 0.4**2), math.sqrt(1 - 0.4**2), math.sqrt(0.96), math.sqrt(0.96)]
    for row, share in zip(kept, expected, strict=True):
        assert row == pytest.approx([share] * 4, abs=0.05)
    assert found.forwards == 400


def test_a_better_mutant_is_what_the_next_ones_come_from() -> None:
    answer = answered(gaussian, first)
    search(noise_search, space((1, 16, 16)), SearchSettings(mutation=0.3), 160, answer)
    best, score = None, -math.inf
    for ask in answer.asked:
        if best is not None and len(ask.start) == 4:
            like = torch.nn.functional.cosine_similarity(ask.start.flatten(1), best.flatten()[None])
            assert like.min() > 0.9
        scores = answered(gaussian, first)(ask).scores
        if scores.max() > score:
            best, score = ask.start[scores.argmax()], scores.max().item()


# Branch search.


def test_branches_take_the_forwards_of_their_completions_alone() -> None:
    answer = answered(gaussian, first)
    drive(branch_search(space(), SearchSettings(stride=1, group=3, steps=(0, 1, 2, 3)), 140), answer)
    spent = sum(len(ask.start) * ask.forwards for ask in answer.asked)
    starts = 140 // 16
    assert spent == starts * 8 + 3 * sum(8 - k - 1 for k in range(4))


@pytest.mark.parametrize("method", [best_of_n, coarse_first, branch_search, particles, ensemble])
def test_no_request_grows_with_the_budget(method: Any) -> None:
    answer = answered(mixture, first)
    search(method, space(), MIXED, 20_000, answer)
    assert max(len(ask.start) for ask in answer.asked) <= 256


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("change", [{"eta": 0.0}, {"group": 0, "steps": (7,)}])
def test_branches_without_noise_find_nothing_beyond_the_starts(stride: int, change: dict[str, Any]) -> None:
    shape, settings = (2, 4, 4), SearchSettings(stride=stride, **{"group": 2, "kernel": "ddim"} | change)
    answer = answered(mixture, first)
    found = search(branch_search, space(shape), settings, 128, answer)
    given, looks = answer.asked[:2]
    assert looks.indices == ((0, 1, 2, 4, 6, 8) if stride == 2 else tuple(range(9)))
    best = [given.start[0], looks.start[answer(looks).scores.argmax()]]
    whole = answer(Ask(torch.stack(best), tuple(range(9)))).scores.max().item()
    if settings.eta == 0:
        assert found.found[0].score == pytest.approx(whole, abs=1e-6)
    assert found.found[0].score >= whole - 1e-6


@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "ddim"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_best_so_far_never_gets_worse_and_gets_better_in_the_end(kernel: str, stride: int) -> None:
    target = seeded_noise((2, 4, 4), "target")

    def near(latents: Tensor) -> Tensor:
        return -(latents - target).square().flatten(1).sum(1)

    gained = []
    for seed in range(8):
        answer = answered(gaussian, near)
        settings = SearchSettings(kernel=kernel, stride=stride, group=4)
        found = search(branch_search, space((2, 4, 4), seed), settings, 160, answer)
        start = answered(gaussian, near)(answer.asked[0]).scores.max().item()
        assert found.found[0].score >= start
        gained.append(found.found[0].score - start)
    assert min(gained) >= 0 and sum(gained) > 1


def test_a_rough_branch_is_finished_from_the_states_that_are_known() -> None:
    answer = answered(mixture, first)
    settings = SearchSettings(stride=3, group=2, steps=(1,))
    drive(branch_search(space((1, 2, 2)), settings, 64), answer)
    given, starts, rough, finish = answer.asked
    assert rough.indices == (2, 3, 6, 8) and finish.indices == (4, 5, 6, 7, 8) and len(finish.start) == 1
    told = answer(rough)
    assert told.scores.max() > max(answer(given).scores.max(), answer(starts).scores.max())
    exact = answer(Ask(rough.start[told.scores.argmax()][None], tuple(range(2, 9))))
    assert torch.allclose(answer(finish).latents, exact.latents, atol=1e-6)


def test_a_leader_is_finished_where_its_next_state_is_not_known() -> None:
    answer = answered(mixture, first)
    search(branch_search, space((1, 2, 2)), SearchSettings(group=2, steps=(5,)), 64, answer)
    _, looks, finish, branches, *_ = answer.asked
    assert looks.indices == (0, 1, 2, 4, 6, 8) and finish.indices == (3, 4, 5, 6, 7, 8)
    best = looks.start[answer(looks).scores.argmax()][None]
    whole = answer(Ask(best, tuple(range(9))))
    assert torch.allclose(answer(finish).latents, whole.latents, atol=1e-6)
    assert branches.indices == (6, 7, 8)


@pytest.mark.parametrize("group", [0, 1, 5, 100])
@pytest.mark.parametrize("budget", [24, 40, 64, 100])
@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (1, 4), (6, 7)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_branches_leave_the_forwards_that_finish_the_leader(
    group: int, budget: int, steps: tuple[int, ...], stride: int
) -> None:
    """Nobody cuts the requests here: were more asked for than there is, the driver would cut the last."""
    for seed in range(4):
        answer, settings = answered(mixture, first), SearchSettings(group=group, steps=steps, stride=stride)
        drive(branch_search(space((1, 2, 2), seed), settings, budget), answer)
        asked = list(answer.asked)
        assert sum(len(ask.start) * ask.forwards for ask in asked) <= budget
        if not asked:
            continue  # the budget pays for no branch
        # After the last rough look that was the best so far, its image was made whole.
        looks = [(answer(ask).scores.max().item(), i) for i, ask in enumerate(asked)]
        rough = [(score, i) for score, i in looks if not asked[i].names]
        whole = [score for score, i in looks if asked[i].names]
        if rough and max(rough)[0] > max(whole):
            later = asked[max(rough)[1] + 1 :]
            assert any(len(ask.start) == 1 and ask.names and ask.indices[-1] == 8 for ask in later)


# Particles.

MIXED = SearchSettings(kernel="ddim", eta=1.0, judge_at=(2, 4, 6))


def plain(rows: int, seed: int, settings: SearchSettings = MIXED) -> Tensor:
    """Sample the mixture by the same noisy steps, without any weights."""
    x, here = torch.randn(rows, *ONE, generator=torch.Generator().manual_seed(seed)), space()
    for k in range(8):
        v = mixture(x, SIGMAS[k])
        noise = torch.randn(rows, *ONE, generator=torch.Generator().manual_seed(100 * seed + k))
        x = here.noisy_step(k, x, v, noise, settings) if k < 7 else here.euler_step(k, x, v)
    return x.flatten()


def passed(
    rows: int, settings: SearchSettings, seed: int = 3, reference: Swarm | None = None
) -> tuple[Swarm, Tensor]:
    """Bring particles through all steps; return them, and where each ends."""
    here = space(seed=seed)
    asking = one_pass(here, settings, rows, random.Random(seed), 0, reference)
    swarm = drive(asking, answered(mixture, first))
    return swarm, here.euler_step(7, swarm.x[7], swarm.velocity[7]).flatten()


def strong(strength: float, **changes: Any) -> SearchSettings:
    return dataclasses.replace(MIXED, strength=strength, **changes)


def test_without_strength_particles_have_the_samplers_law() -> None:
    swarm, ends = passed(4000, strong(0.0))
    assert swarm.log_weights.unique().tolist() == [0.0]
    assert ks_2samp(ends.numpy(), plain(4000, 1).numpy()).pvalue > 0.01


def tilted(strength: float) -> tuple[float, float]:
    """Return the mean of the sampler's law times exp(λR), R = x, and its standard error."""
    found = torch.cat([plain(20_000, seed) for seed in range(5)]).double()
    weights = (strength * found).softmax(0)
    mean = (weights * found).sum()
    return mean.item(), (weights * (found - mean)).square().sum().sqrt().item()


@pytest.mark.parametrize("judge_at", some([(2, 4, 6), (1,), (7,)], 1))
def test_weighted_particles_estimate_the_tilted_law_ever_better(judge_at: tuple[int, ...]) -> None:
    exact, unsure = tilted(1.5)
    errors = {}
    for rows, repeats in ((50, 60), (800, 20)):
        found = []
        for seed in range(repeats):
            swarm, ends = passed(rows, strong(1.5, judge_at=judge_at), seed)
            found.append((swarm.log_weights.softmax(0) * ends.double()).sum().item())
        mean, spread = statistics.mean(found), statistics.stdev(found)
        # The estimate's bias falls like 1/n.
        assert abs(mean - exact) < 3 * math.hypot(spread / repeats**0.5, unsure) + 0.5 / rows
        errors[rows] = spread
    assert 0.15 < errors[800] / errors[50] < 0.4  # √(50/800) = .25


@pytest.mark.parametrize("rows", some([3, 1], 1))
def test_particle_gibbs_leaves_the_tilted_law_as_it_is(rows: int) -> None:
    """Begin with a draw from the target, go around it twice with as few as two particles: still a draw."""
    exact, unsure = tilted(1.5)
    settings = strong(1.5)
    pool, ends = passed(4000, settings, seed=11)
    chance = random.Random(5)
    begun, after = [], []
    for seed in range(400):
        (row,) = chance.choices(range(4000), pool.log_weights.softmax(0).tolist())
        reference = pool.rows(slice(row, row + 1))
        begun.append(ends[row].item())
        for again in range(2):
            swarm, where = passed(rows, settings, 10_000 + 2 * seed + again, reference)
            (row,) = chance.choices(range(rows + 1), swarm.log_weights.softmax(0).tolist())
            reference = swarm.rows(slice(row, row + 1))
        after.append(where[row].item())
    for found in (begun, after):
        error = math.hypot(statistics.stdev(found) / len(found) ** 0.5, unsure)
        assert abs(statistics.mean(found) - exact) < 3 * error
    assert sum(a != b for a, b in zip(begun, after, strict=True)) > 90  # and it moves


def test_the_reference_is_row_0_at_every_step_to_the_bit() -> None:
    first_pass, _ = passed(5, strong(8.0))
    reference = first_pass.rows(slice(2, 3))
    again, _ = passed(5, strong(8.0), 4, reference)
    for name in ("x", "velocity", "seen"):
        for kept, found in zip(getattr(reference, name), getattr(again, name), strict=True):
            assert torch.equal(kept[0], found[0])
    assert len(again.log_weights) == 6


def test_one_particle_beside_a_reference_with_endless_strength_climbs() -> None:
    answer, here = answered(mixture, first), space(seed=8)
    settings = dataclasses.replace(MIXED, strength=1e6, iterations=12)
    search(particle_gibbs, here, settings, 12 * 8, answer)
    ends = [first(answered(mixture, first)(ask).latents).item() for ask in answer.asked if ask.names]
    assert len(ends) == 12
    asking, best = particle_gibbs(here, settings, 12 * 8), -math.inf
    told, references = None, []
    while (ask := next(asking, None) if told is None else asking.send(told)) and len(references) < 11:
        told = answered(mixture, first)(ask)
        if ask.names:
            best = max(best, told.scores.item())
            references.append(best)
    assert references == sorted(references)


@pytest.mark.parametrize("seed", range(5))
def test_systematic_draws_come_within_one_of_their_share(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(40, generator=generator, dtype=torch.float64) ** 4
    weights /= weights.sum()
    counts = torch.zeros(40)
    for point in torch.linspace(0, 0.999, 50).tolist():
        drawn = systematic(weights, point)
        assert len(drawn) == 40
        count = torch.bincount(drawn, minlength=40)
        assert ((count - 40 * weights).abs() < 1).all()
        counts += count
    assert torch.allclose(counts / 50, 40 * weights.float(), atol=0.05)


def test_copies_of_a_particle_part_at_the_next_step() -> None:
    swarm, _ = passed(64, strong(50.0))
    last = swarm.x[7].flatten()
    assert len(last.unique()) == 64  # whoever they come from
    assert len(swarm.x[6].flatten().unique()) < 64


def test_the_effective_number() -> None:
    assert effective(torch.zeros(7)) == pytest.approx(7)
    assert effective(torch.tensor([0.0, -1e9, -1e9])) == pytest.approx(1)
    assert effective(torch.tensor([1e5, 1e5, -math.inf])) == pytest.approx(2)  # whatever their size


def test_particles_spend_a_forward_at_each_step() -> None:
    answer = answered(mixture, first)
    drive(particles(space(), MIXED, 64), answer)
    assert [ask.indices for ask in answer.asked] == [(k, 8) for k in range(8)]
    assert [ask.judged for ask in answer.asked] == [k in (2, 4, 6, 7) for k in range(8)]
    assert {len(ask.start) for ask in answer.asked} == {8}


# The ensemble.


def test_members_move_as_the_published_rule_has_it_for_several_rewards() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scores = (torch.randn(6, *shape, generator=generator) for shape in ((2, 3, 3), (3,)))
    target = scores.amax(0) + scores.std(0, correction=0)
    made = x.clone()
    error, off = scores - target, scores - scores.mean(0)
    c = torch.tensor([[torch.dot(error[i], off[j]) / 6 for j in range(6)] for i in range(6)])
    for i in range(6):
        made[i] -= 0.3 / c.norm() * sum(c[i, j] * (x[j] - x.mean(0)) for j in range(6))
    assert torch.allclose(moved(x, scores, 0.3), made, atol=1e-5)


def test_many_members_move_along_the_covariance_with_the_reward() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, spread = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 2.0, 3.0])
    misses = {}
    for count in (100, 1600):
        off = []
        for _ in range(10):
            x = torch.randn(count, 4, generator=generator) * spread
            step = (moved(x, (x @ weight)[:, None], 0.3) - x).mean(0)
            off.append(1 - torch.nn.functional.cosine_similarity(step, spread**2 * weight, 0).item())
        misses[count] = sum(off) / 10
    assert misses[1600] < 0.02 and misses[1600] < misses[100] / 6  # 1 − cos falls like 1/N


def test_members_stay_where_nothing_tells_them_apart_and_keep_their_distance() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 2, 8, 8, generator=generator)
    assert torch.equal(moved(x, torch.ones(8, 1), 0.3), x)
    assert torch.equal(moved(x, torch.full((8, 1), torch.nan), 0.3), x)
    scores = torch.randn(8, 1, generator=generator)
    assert torch.equal(moved(x, scores, 0.0), x)
    made = moved(x, scores, SearchSettings().pull)
    assert (made - made.mean(0)).norm() > 0.95 * (x - x.mean(0)).norm()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    assert torch.allclose(moved(x[order], scores[order], 0.3), moved(x, scores, 0.3)[order], atol=1e-6)
    scores[2] = torch.nan
    assert torch.equal(moved(x, scores, 0.3)[2], x[2])


def test_an_ensemble_without_pull_is_as_many_ordinary_images() -> None:
    answer = answered(mixture, first)
    drive(ensemble(space((1, 2, 2)), SearchSettings(pull=0.0), 128), answer)
    rows = len(answer.asked[0].start)
    exact = answered(mixture, first)(Ask(answer.asked[0].start, tuple(range(9))))
    made = answered(mixture, first)(answer.asked[-1])
    assert torch.allclose(made.latents, exact.latents, atol=1e-5)
    active = sum(0.3 < float(sigma) < 0.95 for sigma in SIGMAS[:7])
    assert rows == 128 // (8 + 2 * active)
    assert sum(len(ask.start) * ask.forwards for ask in answer.asked) == rows * (8 + 2 * active)


# What all of them find where the reward is easy.


@pytest.mark.parametrize(
    "method", [best_of_n, coarse_first, noise_search, branch_search, particles, particle_gibbs, ensemble]
)
def test_every_search_finds_better_than_the_given_noise(method: Any) -> None:
    gained = []
    for seed in range(12):
        found: Result = search(method, space(seed=seed), MIXED, 96, answered(mixture, first))
        given = answered(mixture, first)(Ask(space(seed=seed).noise[None], tuple(range(9)))).scores.item()
        gained.append(found.found[0].score - given)
    assert sum(gained) / 12 > 0.1


def test_a_funnel_goes_on_with_the_better_half_of_its_starts() -> None:
    answer = answered(gaussian, lambda x: x.flatten(1).sum(1))
    result = search(funnel, space((1, 2, 2)), SearchSettings(eta=0.0, strength=0.0), 64, answer)
    looks, first, *others = answer.asked
    assert looks.indices == (0, 2, 8) and len(looks.start) == 14
    # Without noise and without weights the seven are the best of the looks, each a step further.
    told = answer(looks)
    best = told.scores.argsort(descending=True)[:7]
    here = space((1, 2, 2)).euler_step(2, told.x[best, 1], told.velocity[best, 1])
    assert torch.allclose(first.start, here, atol=1e-6) and first.indices == (3, 8)
    assert [len(ask.start) for ask in others] == [7, 7, 7, 7]
    assert result.forwards == 14 * 2 + 7 * 5 and result.scored == 14 + 4 * 7


@pytest.mark.parametrize("judge_at", [(0,), (1, 2), (7,), (40,)])
@pytest.mark.parametrize("budget", [16, 17, 100, 1500])
def test_a_funnel_enters_anywhere_within_its_budget(judge_at: tuple[int, ...], budget: int) -> None:
    answer = answered(gaussian, lambda x: x.flatten(1).sum(1))
    result = search(funnel, space(), SearchSettings(judge_at=judge_at), budget, answer, keep=3)
    assert budget - 8 < result.forwards <= budget and all(one.whole for one in result.found)
    assert all(len(ask.start) <= 128 for ask in answer.asked)
