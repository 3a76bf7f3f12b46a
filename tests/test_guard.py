"""Cheaper completions: exact where the learner looks, each state by itself, and gone where they would
change who is better than whom.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.advantages import rank_correlation
from comfy_g2rpo.kernels import dpm_2m_step
from comfy_g2rpo.plan import ROOT, independent, singular
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.rewards import Reward
from comfy_g2rpo.run.rank_guard import check, excerpt, roll_out_guarded
from comfy_g2rpo.run.scorer import Scorer, leaf_group, roll_out_and_score
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.cheap_completions import Speed
from comfy_g2rpo.speed.fitting_rollout import roll_out
from comfy_g2rpo.speed.step_cache import Shortcut

STEPS, CONDS, SEEDS = 12, [0.3, -0.8], [11, 12]
PLAN = singular(STEPS, [0, 3, 5], 4, (1, 2))
MADE = recipe("g2rpo", num_steps=STEPS, group_size=4)


class Painter(ToyPolicy):
    """A toy whose latents are its pictures, and whose completions can be spoilt."""

    device, decodes_while_rolling = torch.device("cpu"), True

    def __init__(self):
        super().__init__(dtype=torch.float64)

    def decode(self, latents):
        return (latents / 6 + 0.5).clamp(0, 1).flatten(1).view(len(latents), 1, 6, 3)

    def spoilt(self, x, sigma, cond):
        return -self.velocity(x, sigma, cond)


class Brightness(Reward):
    """The mean of a picture."""

    name, licence, compares_across_prompts = "brightness", "", True

    def score(self, images, prompts):
        return images.flatten(1).mean(1)


class Crowd(Brightness):
    name, needs_group = "crowd", True


JUDGES = (Brightness(),)


def run(plan, shortcut=None, policy=None, slots=7, prompts=(0, 1)):
    policy = policy or ToyPolicy(dtype=torch.float64)
    conds, seeds = ([part[p] for p in prompts] for part in (CONDS, SEEDS))
    return roll_out(
        policy, plan, shifted_sigmas(plan.num_steps), conds, seeds, SHAPE, slots=slots, shortcut=shortcut
    )


def close(one, two):
    return torch.allclose(one, two, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def exact():
    return run(PLAN)


@given(st.data())
def test_the_rank_correlation_is_spearmans_with_ties_at_their_mean(data):
    scores = [data.draw(st.lists(st.integers(0, 4), min_size=6, max_size=6)) for _ in range(2)]
    found = rank_correlation(
        *(torch.tensor(row, dtype=torch.float32).view(1, 1, 6, 1) for row in scores)
    ).item()
    flat = [len(set(row)) == 1 for row in scores]
    if any(flat):
        assert found != found if all(flat) else found == 0
    else:
        assert found == pytest.approx(spearmanr(*scores)[0], abs=1e-6)


def test_members_that_could_not_be_judged_are_left_out_of_the_rank_correlation():
    cheap, true = torch.tensor([1.0, torch.nan, 3.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, torch.nan])
    found = rank_correlation(cheap.view(1, 1, 5, 1), true.view(1, 1, 5, 1))
    assert found.item() == pytest.approx(spearmanr([1, 3, 2], [1, 3, 4])[0])


@pytest.mark.parametrize(
    "shortcut", [Shortcut(cache=0.5), Shortcut(velocity=Painter().spoilt)], ids=["foreseen", "spoilt"]
)
def test_anchors_and_branch_states_stay_exact(exact, shortcut):
    cheap = run(PLAN, shortcut)
    assert close(cheap.x, exact.x) and close(cheap.velocity, exact.velocity)
    assert not torch.allclose(cheap.latents, exact.latents, atol=0.01)


def test_a_longer_stride_leaves_the_branch_states_as_they_are(exact):
    cheap = run(singular(STEPS, [0, 3, 5], 4, (1, 2), coarsest=2))
    assert close(cheap.x, exact.x) and close(cheap.velocity, exact.velocity)
    for member in range(12):
        assert torch.equal(
            cheap.noise(0, cheap.plan.transitions[member]), exact.noise(0, PLAN.transitions[member])
        )


def test_a_longer_stride_replaces_the_finer_granularities_alone(exact):
    plan = singular(STEPS, [0, 3, 5], 4, (1, 2), coarsest=2)
    cheap = run(plan)
    drawn = [
        {leaf: made.latents[0, made.plan.images.index(leaf.state)] for leaf in made.plan.leaves}
        for made in (cheap, exact)
    ]
    pairs = [
        (one, drawn[0][one], drawn[1][other]) for one, other in zip(plan.leaves, PLAN.leaves, strict=True)
    ]
    assert all(close(a, b) for leaf, a, b in pairs if leaf.granularity == 1)
    assert not any(close(a, b) for leaf, a, b in pairs if leaf.granularity == 0)
    assert plan.forwards < 0.75 * PLAN.forwards


@pytest.mark.parametrize(
    "plan", [singular(STEPS, [0, 3], 2, (1, 4), coarsest=3), independent(STEPS, [1, 2], 2, coarsest=3)]
)
def test_a_longer_stride_is_the_second_order_solver_from_the_first_step_after_the_noise(plan):
    sigmas, rollout = shifted_sigmas(STEPS), run(plan)
    policy = ToyPolicy(dtype=torch.float64)
    for leaf in plan.leaves[:3:2]:
        path = [leaf.state]
        while plan.states[path[0]].parent != ROOT:
            path.insert(0, plan.states[path[0]].parent)
        fork = max(i for i, state in enumerate(path) if plan.states[state].trained)
        x, past, before, made = None, None, None, plan.coefficients(sigmas)
        for here, there in pairwise(path):
            x = rollout.noise(0, path[0]) if x is None else x
            sigma, sigma_next = (sigmas[plan.states[s].index] for s in (here, there))
            v = policy.velocity(x[None], sigma.reshape(1), CONDS[:1])[0].detach()
            denoised = x - sigma * v
            if plan.states[there].kernel == "dpm_2m":
                a, b, c = dpm_2m_step(before, sigma, sigma_next)
                assert path.index(here) > fork
                x = a * x + b * v + c * past
            else:
                noise = made.std[there] * rollout.noise(0, there) if plan.states[there].noise else 0
                x = made.x_coef[there] * x + made.v_coef[there] * v + noise
            past, before = denoised, sigma
        assert {plan.states[s].kernel for s in path[fork + 2 :]} == {
            "dpm_2m" if leaf.granularity == 0 else "ode"
        }
        assert close(rollout.latents[0, plan.images.index(leaf.state)], x.float())


@pytest.mark.parametrize("slots", [1, 3, 1000])
def test_what_is_foreseen_of_a_state_depends_on_nothing_else_in_its_batch(slots):
    shortcut = Shortcut(cache=0.1)
    together = run(PLAN, shortcut, slots=7)
    assert together.nfe < 2 * PLAN.forwards
    other = run(PLAN, shortcut, slots=slots)
    assert close(other.latents, together.latents) and other.nfe == together.nfe
    alone = [run(PLAN, shortcut, slots=slots, prompts=[p]) for p in (0, 1)]
    assert close(torch.cat([one.latents for one in alone]), together.latents)
    assert sum(one.nfe for one in alone) == together.nfe


def test_a_tolerance_of_almost_nothing_foresees_nothing(exact):
    cheap = run(PLAN, Shortcut(cache=1e-9))
    assert close(cheap.latents, exact.latents) and cheap.nfe == exact.nfe


def test_straight_paths_are_foreseen_exactly_after_two_evaluations():
    class Straight(ToyPolicy):
        def velocity(self, x, sigma, cond):
            self.calls.append(len(x))
            return torch.ones_like(x) * torch.tensor(list(cond)).view(-1, 1, 1, 1)

    plan = singular(STEPS, [3], 2, (1,))
    cheap, exact = run(plan, Shortcut(cache=0.01), Straight()), run(plan, None, Straight())
    assert close(cheap.latents, exact.latents)
    # Two prompts, each with four anchor states and two evaluations for each of two branches.
    assert cheap.nfe == 2 * (4 + 2 * 2)


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.3])
def test_foresight_costs_the_less_the_more_it_may_err(exact, tolerance):
    cheap, bolder = (run(PLAN, Shortcut(cache=c)) for c in (tolerance, 3 * tolerance))
    assert bolder.nfe < cheap.nfe <= exact.nfe
    assert (cheap.latents - exact.latents).norm() < (bolder.latents - exact.latents).norm()


@pytest.mark.parametrize("name", RECIPES)
def test_an_excerpt_draws_what_the_whole_draws(name):
    whole = build_plan(RECIPES[name], iteration=30, seed=3)
    groups = {leaf_group(whole, whole.leaves[-1])}
    part = excerpt(whole, groups)
    drawn = {p: run(p, slots=64, prompts=[1]) for p in (whole, part)}
    kept = [leaf for leaf in whole.leaves if leaf_group(whole, leaf) in groups]
    assert kept and len(kept) == len(part.leaves)
    for one, other in zip(kept, part.leaves, strict=True):
        pictures = (
            drawn[p].latents[0, p.images.index(leaf.state)] for p, leaf in ((whole, one), (part, other))
        )
        assert close(*pictures)
        assert whole.states[one.state].index == part.states[other.state].index


def explored(speed, velocity=None, step=0, cheap=True, made=MADE, rewards=JUDGES):
    """Explore an iteration of two prompts; return it with the plans that were rolled out."""
    policy, plans = Painter(), []

    def roll(plan, places, judges, shortcut):
        plans.append((plan, list(places), shortcut))
        scorer = Scorer(policy.decode, judges, ["a", "b"], len(plan.images))
        conds, seeds = ([part[p] for p in places] for part in (CONDS, SEEDS))
        return scorer, roll_out_and_score(
            policy, plan, shifted_sigmas(STEPS), conds, seeds, SHAPE, scorer, 16, None, shortcut
        )

    return roll_out_guarded(roll, made, speed, velocity, cheap, step, 0, 2, rewards), plans


def test_nothing_is_cheap_or_measured_unless_it_is_asked_for():
    found, plans = explored(Speed(guard_every=1))
    assert (
        [(len(places), shortcut) for _, places, shortcut in plans] == [(2, None)]
        and found.metrics == {}
        and found.cheap
    )


def test_a_share_of_the_groups_is_measured_every_so_many_iterations():
    speed = Speed(cache=0.05, guard_every=3, guard_share=0.34)
    measured = {step: explored(speed, step=step) for step in range(4)}
    assert [bool(found.metrics) for found, _ in measured.values()] == [True, False, False, True]
    found, plans = measured[0]
    assert found.metrics["guard/rank"] > 0.95 and found.metrics["guard/on"] == 1 and found.cheap
    part, places, shortcut = plans[1]
    assert shortcut is None and places == [0, 1] and len(part.leaves) == 2 * 2 * 4
    assert found.metrics["guard/nfe"] == 2 * part.forwards
    assert measured[0][1][1][0] != measured[3][1][1][0]  # another choice each time


def test_where_groups_share_their_pictures_a_share_of_the_prompts_is_measured():
    made = recipe("flow_grpo", num_steps=STEPS, group_size=4)
    _, plans = explored(Speed(cache=0.05, guard_share=0.5), made=made)
    assert [len(places) for _, places, _ in plans] == [2, 1]


@pytest.mark.parametrize("name", ["dense_grpo", "flow_grpo_fast"])
def test_where_gains_teach_their_order_is_measured(name):
    made = recipe(name, num_steps=STEPS, group_size=4, credit="gain")
    found, plans = explored(Speed(cache=0.01), made=made)
    assert len(plans) == 2 and found.metrics["guard/rank"] > 0.95 and found.cheap
    found, _ = explored(Speed(cache=0.01), velocity=Painter().spoilt, made=made)
    assert found.metrics["guard/rank"] < 0.95 and not found.cheap


def test_what_turns_the_order_round_is_switched_off_and_done_again_exactly():
    found, plans = explored(Speed(cache=0.01), velocity=Painter().spoilt)
    exact, _ = explored(Speed())
    assert found.metrics["guard/rank"] < 0.95 and found.metrics["guard/on"] == 0 and not found.cheap
    assert found.plan == exact.plan and torch.equal(found.scorer.scores, exact.scorer.scores)
    assert torch.equal(found.rollout.x, exact.rollout.x) and plans[-1][2] is None
    assert (
        found.metrics["guard/nfe"] > 2 * plans[1][0].forwards
    )  # measuring, and the rollout that was thrown away


def test_once_off_it_stays_off():
    found, plans = explored(Speed(cache=0.01, guard_every=1), velocity=Painter().spoilt, cheap=False)
    assert len(plans) == 1 and plans[0][2] is None and found.metrics == {} and not found.cheap


def test_the_processes_of_a_run_decide_together():
    policy = Painter()

    def roll(plan, places, judges, shortcut):
        scorer = Scorer(policy.decode, judges, ["a", "b"], len(plan.images))
        return scorer, roll_out_and_score(
            policy, plan, shifted_sigmas(STEPS), CONDS, SEEDS, SHAPE, scorer, 16, None, shortcut
        )

    def with_a_bad_one(found):
        return torch.cat([found, torch.tensor([[[-4.0, 4.0]]])], 1)

    alone = roll_out_guarded(roll, MADE, Speed(cache=0.01), None, True, 0, 0, 2, [Brightness()])
    shared = roll_out_guarded(
        roll, MADE, Speed(cache=0.01), None, True, 0, 0, 2, [Brightness()], with_a_bad_one
    )
    assert alone.cheap and not shared.cheap and shared.metrics["guard/rank"] < alone.metrics["guard/rank"]


def test_rewards_that_see_whole_groups_are_not_asked_by_the_guard():
    _, plans = explored(Speed(cache=0.05), rewards=(Crowd(), Brightness()))
    assert len(plans) == 2
    check(Speed(), [Crowd()])
    check(Speed(cache=0.1), [Crowd(), Brightness()])
    with pytest.raises(
        ValueError,
        match="speed: its guard cannot ask crowd, which judge whole groups only; leave the section out",
    ):
        check(Speed(cache=0.1), [Crowd()])
