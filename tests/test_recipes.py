import dataclasses

import pytest

from comfy_g2rpo.plan import count_forwards
from comfy_g2rpo.recipes import FIELDS, RECIPES, build_plan, check, recipe


def stochastic(plan):
    """List the schedule steps that are stochastic."""
    return sorted({plan.states[s.parent].index for s in plan.states if s.kernel not in ("ode", "dpm_2m")})


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_within_its_own_bounds_and_can_be_planned(name):
    plan = build_plan(check(RECIPES[name]))
    assert plan.forwards > 0 and plan.shape[0] and len(plan.images) >= 6


def test_g2rpo_is_the_published_setting():
    made = RECIPES["g2rpo"]
    assert build_plan(made).forwards == count_forwards(16, range(8), 12, (1, 2))
    assert (made.kernel, made.eta, made.shift, made.clamp) == ("flow_sde", 0.7, 3.0, 5.0)


def test_g2rpo_single_differs_by_its_granularities_alone():
    assert dataclasses.replace(RECIPES["g2rpo"], granularities=(1,)) == RECIPES["g2rpo_single"]


def test_flow_grpo_is_stochastic_on_all_steps_but_the_last():
    assert stochastic(build_plan(RECIPES["flow_grpo"])) == list(range(15))


def test_flow_grpo_fast_takes_a_window_of_two_in_the_first_half():
    windows = {tuple(stochastic(build_plan(RECIPES["flow_grpo_fast"], i))) for i in range(60)}
    assert all(b == a + 1 and b < 8 for a, b in windows) and len(windows) == 7


def test_dance_grpo_trains_a_random_share_of_its_stochastic_steps():
    """The published code scores the prediction of the last step, so that its noise never counts, and trains
    int(0.6 · 15) of the others."""
    plans = [build_plan(RECIPES["dance_grpo"], i) for i in range(5)]
    assert all(stochastic(plan) == list(range(15)) and plan.shape[0] == 9 for plan in plans)
    assert len({plan.forks for plan in plans}) > 1


def test_mix_grpo_slides_its_window_by_one_every_25_iterations():
    starts = [stochastic(build_plan(RECIPES["mix_grpo"], i))[0] for i in (0, 24, 25, 50, 11 * 25, 12 * 25)]
    assert starts == [0, 0, 1, 2, 11, 0]


def test_tempflow_grpo_branches_at_every_step_of_several_seeds():
    plan = build_plan(RECIPES["tempflow_grpo"])
    assert plan.shape == (2 * 15, 6, 1) and stochastic(plan) == list(range(15))


def test_random_single_steps():
    made = recipe("g2rpo", pick="random", pick_size=3)
    chosen = [stochastic(build_plan(made, i, seed=1)) for i in range(6)]
    assert all(len(steps) == 3 and max(steps) < 8 for steps in chosen) and len({tuple(s) for s in chosen}) > 1
    assert chosen == [stochastic(build_plan(made, i, seed=1)) for i in range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": -1}, "eta is -1; it must lie between 0 and 10"),
        ({"group_size": 1}, "group_size"),
        ({"granularities": (0,)}, "granularities"),
        ({"granularities": ()}, "granularities"),
        ({"kernel": "flow_sdee"}, "did you mean 'flow_sde'"),
        ({"epochs": 2}, "objective: clip"),
        ({"update": "per_step"}, "objective: clip"),
        ({"tree": "independent"}, "granularities"),
    ],
)
def test_a_field_out_of_its_bounds_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("g2rpo", **changes)


def test_a_misspelt_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'flow_grpo'"):
        recipe("flow_gpro")


def test_every_field_says_what_it_is():
    assert all(field.metadata["help"].endswith(".") for field in FIELDS.values())
