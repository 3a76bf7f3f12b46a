"""The learning benchmark counts all model work, tunes every arm by the same rule, and compares arms on the seeds they share."""

import pytest
import torch
from learning import ARMS, START, Counted, differences, interval, next_setting, reached, tuning_job
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


def test_tuning_climbs_from_the_common_start_and_never_repeats():
    assert next_setting({}) == START
    gains = {}
    for _ in range(6):
        setting = next_setting(gains)
        assert setting not in gains
        gains[setting] = -abs(setting[0] - 4e-3)
    assert max(gains, key=gains.get)[0] == 4e-3


def test_the_prompts_stay_within_what_is_allowed():
    gains = {(1e-3, 1): 0.1, (2e-3, 1): 0.05, (5e-4, 1): 0.05}
    assert next_setting(gains) == (1e-3, 2)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_recipe(arm):
    settings = tuning_job(arm, START, 1.0)["method"]
    assert recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


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
