"""The learning benchmark counts all model work, tunes every arm by the same rule, and compares arms on the
seeds they share.
"""

import pytest
import torch
from learning import (
    ARMS,
    OWN,
    RATES,
    START,
    TUNE_SEEDS,
    Counted,
    best_setting,
    differences,
    interval,
    jobs_again,
    neighbours,
    next_setting,
    reached,
    tried,
    tuning_jobs,
    weighted,
)
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.recipes import recipe


def test_work_is_one_per_forward_and_two_more_per_backward():
    policy = Counted(ToyPolicy())
    x, sigma, conds = torch.randn(3, *SHAPE), torch.full((3,), 0.5), [0.1] * 3
    with torch.no_grad():
        policy.velocity(x, sigma, conds)
    assert policy.work == 3
    old = policy.velocity(x, sigma, conds).detach()
    assert policy.work == 6
    (policy.velocity(x, sigma, conds) - old).sum().backward()
    assert policy.work == 15


def climb(gain, tries, weighted=True):
    gains = {}
    for _ in range(tries):
        setting = next_setting(gains, weighted, START)
        assert setting not in gains
        gains[setting] = gain(*setting)
    return list(gains)


def test_tuning_climbs_from_its_start_and_tries_every_kind_of_neighbour():
    rate = START[0]
    up, down = (RATES[RATES.index(rate) + i] for i in (1, -1))
    tries = climb(
        lambda lr, weights, prompts, average: (
            1.0 if (lr, prompts) == (rate, 1) else 0.5 if lr == rate else 0.0
        ),
        7,
    )
    single = (rate, OWN, 1, 0.0)
    assert tries[:4] == [START, single, (up, *single[1:]), (down, *single[1:])]
    assert tries[4:6] == [(rate, OWN, 1, 0.9), (rate, "balanced", 1, 0.0)]


def test_tuning_goes_on_in_the_direction_that_pays():
    assert max(climb(lambda lr, weights, prompts, average: -abs(lr - 2 * START[0]), 6))[0] >= 2 * START[0]


def test_rates_end_where_the_ladder_does():
    for rate in (RATES[0], RATES[-1]):
        near = [other for other, *_ in neighbours((rate, OWN, 2, 0.0), weighted=True)]
        assert {rate} < set(near) <= set(RATES)


def test_an_arm_without_weights_to_choose_gets_as_many_tries():
    tries = climb(lambda lr, weights, prompts, average: float(prompts), 8, weighted=False)
    assert len(set(tries)) == 8
    assert {weights for _, weights, _, _ in tries} == {OWN}
    assert {prompts for _, _, prompts, _ in tries} == {1, 2, 4}


def test_a_setting_counts_with_the_mean_of_all_tuning_seeds():
    def result(setting, seed, gain):
        job = next(job for job in tuning_jobs("mix_grpo", setting, 1.0) if job["seed"] == seed)
        return {**job, "curve": [{"agreement": gain}]}

    other = (START[0], "balanced", 2, 0.9)
    first, second, third = TUNE_SEEDS
    results = [
        result(START, first, 0.1),
        result(START, second, 0.3),
        result(START, third, 0.5),
        result(other, first, 9.0),
    ]
    assert tried(results, "mix_grpo") == {START: pytest.approx(0.3)}
    assert (
        best_setting([*results, result(other, second, 0.0), result(other, third, 0.0)], "mix_grpo") == other
    )


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe_with_the_shared_gradient_norm(arm):
    for setting in (START, (START[0], "balanced", 2, 0.9)):
        settings = tuning_jobs(arm, setting, 1.0)[0]["method"]
        made = recipe(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        )
        assert made.max_grad_norm < 1e-3


def test_step_weights_matter_where_an_update_has_several_steps():
    assert [arm for arm in ARMS if not weighted(arm)] == [
        "g2rpo {1}",
        "g2rpo {2}",
        "g2rpo {1,2}",
        "g2rpo {1,3}",
        "g2rpo {2,4}",
    ]


def run(arm, seed, gain, work=10):
    curve = [{"cpu": 5, "work": 4, "agreement": gain / 2}, {"cpu": 10, "work": work, "agreement": gain}]
    return {"arm": arm, "seed": seed, "cpu_seconds": 10, "work": 8, "curve": curve}


def test_a_budget_is_read_where_it_was_spent():
    made = run("a", 0, 0.2)
    made["curve"][0]["work"] = 9
    assert [reached(made, budget)["agreement"] for budget in ("cpu", "work")] == [0.2, 0.1]


def test_arms_are_compared_on_the_seeds_that_both_have():
    runs = [run("a", 0, 0.3), run("a", 1, 0.4), run("a", 2, 9.0), run("b", 0, 0.2), run("b", 1, 0.3)]
    assert differences(runs, "a", ["b"])[2].startswith("| b | 2 | +0.100 ± 0.000")


def test_the_interval_is_students():
    mean, width = interval([1.0, 2.0, 3.0])
    assert (mean, width) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))


def test_a_recorded_run_is_made_again_up_to_its_own_updates():
    recorded = run("a", 0, 0.2) | {"before": {}}
    recorded["curve"] = [{**point, "updates": i} for i, point in enumerate(recorded["curve"], start=3)]
    (job,) = jobs_again([recorded])
    assert [point["updates"] for point in job["points"]] == [3, 4]
    assert not {"before", "curve"} & set(job)
    assert all(set(point) == {"cpu", "work", "updates"} for point in job["points"])
