"""Runs that choose branches, prompts or steps: counted ahead, and the same again after a stop."""

import pytest
from some_cases import some
from test_run import FEW, StopAt, assert_equal, config, outcome

from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import run as training
from g2rpo_trainer.cost.estimate import count
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("choosing")

WAYS = {
    "coarsest": {"expand": 2.0, "prune_by": "coarsest", "pick": "random", "diversity_weight": 0.5},
    "prediction": {"expand": 2.0, "std": "global"},
    "trajectories": {"name": "pro_grpo", "expand": 2.0, "granularities": [1]},
}
CHOICES = {
    "signal": {"prompt_choice": "signal", "pick": "random", "step_share": [1, 3]},
    "curriculum": {"name": "ada_grpo", "candidates": 2},
    "baseline": {"global_advantage": 0.5, "std": "global"},
}


@pytest.mark.parametrize("way", some(WAYS | CHOICES, 1))
def test_a_run_costs_what_is_announced_and_goes_on_as_if_it_had_not_stopped(way, tmp_path):
    made = config(tmp_path, method=(WAYS | CHOICES)[way], train=FEW)
    training.train(made, tmp_path / "whole", progress=Silent())
    with pytest.raises(KeyboardInterrupt):
        training.train(made, tmp_path / "parts", progress=StopAt(2))
    training.train(made, tmp_path / "parts", resume=True, progress=Silent())
    assert_equal(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    spent = [
        row["nfe"] + row.get("choice/nfe", 0)
        for row in RunFolder.open(tmp_path / "whole").metrics()
        if "nfe" in row
    ]
    assert sum(spent) == pytest.approx(3 * count(made).step_forwards)


@pytest.mark.parametrize("way", some(WAYS, 1))
def test_the_guard_and_cheap_completions_work_where_branches_are_dropped(way, tmp_path):
    speed = {"tail_stride": 2, "cache": 0.1, "guard_every": 1, "guard_share": 1.0, "guard_rank": 0.0}
    made = config(tmp_path, method=WAYS[way], train={**FEW, "steps": 2}, speed=speed)
    training.train(made, tmp_path / "run", progress=Silent())
    rows = [row for row in RunFolder.open(tmp_path / "run").metrics() if "nfe" in row]
    assert rows[0]["guard/on"] == (rows[0]["guard/rank"] >= 0) and rows[0]["guard/nfe"] > 0
    assert all(row["dropped_share"] == 0 for row in rows)
