"""Runs that learn from finished images by DiffusionNFT and AWM, on the bundled model."""

import dataclasses

import pytest
import torch
from some_cases import some
from test_run import FEW, StopAt, assert_equal, config, outcome, prepare

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.recipes import RECIPES
from comfy_g2rpo.run.checkpoint import restore
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.iteration import iterate
from comfy_g2rpo.run.optimizers import update_average
from comfy_g2rpo.run.setup import make_learner
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.cost.card_memory import resident
from g2rpo_trainer.cost.count_model import count_model
from g2rpo_trainer.cost.estimate import count
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("run")


def settings(name, **changes):
    method = {"name": name, "num_steps": 4, "group_size": 3, "learning_rate": 1e-3, **changes}
    return {"method": method, "train": FEW}


AVERAGE = {"old_decay": 0.8, "old_ramp": 0.4, "ema": 0.9}


@pytest.mark.parametrize(
    ("name", "changes"),
    some(
        [("diffusion_nft", AVERAGE), ("awm", {"old_decay": 0.3, "old_ramp": 1.0, "epochs": 2}), ("awm", {})],
        2,
    ),
)
def test_a_stopped_run_goes_on_bit_by_bit(name, changes, tmp_path):
    sections = settings(name, **changes)
    training.train(config(tmp_path, **sections), tmp_path / "whole", progress=Silent())
    with pytest.raises(KeyboardInterrupt):
        training.train(config(tmp_path, **sections), tmp_path / "run", progress=StopAt(2))
    assert int(RunFolder.open(tmp_path / "run").latest().name) < 3
    training.train(config(tmp_path, **sections), tmp_path / "run", progress=Silent(), resume=True)
    whole = outcome(tmp_path / "whole")
    assert_equal(outcome(tmp_path / "run"), whole)
    assert any(key.startswith("old/") for key in whole[1]) == bool(changes.get("old_decay"))
    rows = [row for row in whole[2] if "nfe" in row]
    assert len(rows) == 3 and all(row["nfe"] == 2 * 3 * 4 and row["skipped"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 and 0 < row["advantage/abs_mean"] < 1.5 for row in rows)


def test_a_checkpoint_without_the_old_policy_is_not_taken_for_one_with(tmp_path):
    made = config(tmp_path, **settings("diffusion_nft", old_decay=0.0))
    training.train(made, tmp_path / "run", progress=Silent())
    setup = prepare(config(tmp_path, **settings("diffusion_nft")))
    with pytest.raises(RunError, match="does not fit this adapter"):
        restore(setup, make_learner(setup), RunFolder.open(tmp_path / "run"))


def test_images_are_drawn_with_the_average_and_compared_with_it(tmp_path, monkeypatch):
    setup = prepare(config(tmp_path, **settings("diffusion_nft", old_decay=0.9, old_ramp=0.5)))
    learner, seen = make_learner(setup), []
    before = [p.detach().clone() for p in setup.policy.parameters()]
    expected = [p.clone() for p in before]
    inference, rolled = setup.policy.inference, []

    def spying():
        rolled.append([p.detach().clone() for p in setup.policy.parameters()])
        return inference()

    monkeypatch.setattr(setup.policy, "inference", spying)
    for step in range(3):
        row = iterate(setup, learner, lambda phase: None)
        assert all(torch.equal(a, b) for a, b in zip(rolled[-1], expected, strict=True))
        update_average(expected, setup.policy.parameters(), min(0.9, 0.5 * (step + 1)))
        assert all(torch.equal(a, b) for a, b in zip(learner.old, expected, strict=True))
        seen.append(row["old_policy/velocity"])
    assert seen[0] == 0 and seen[2] > 0
    now = setup.policy.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(now, expected, strict=True))


@pytest.mark.long
def test_without_an_average_the_adapter_itself_draws(tmp_path):
    made = config(tmp_path, **settings("diffusion_nft", old_decay=0.0))
    other = config(tmp_path, **settings("diffusion_nft", old_decay=0.5, old_ramp=1e-6))
    outcomes = []
    for place, one in (("none", made), ("next to none", other)):
        training.train(one, tmp_path / place, progress=Silent())
        outcomes.append(outcome(tmp_path / place))
    pairs = [found[0] for found in outcomes]
    assert all(torch.allclose(pairs[0][k][i], pairs[1][k][i], atol=1e-4) for k in pairs[0] for i in (0, 1))


@pytest.mark.parametrize("name", ["diffusion_nft", "awm"])
def test_halving_where_memory_runs_out_changes_no_row(name, tmp_path):
    setup = prepare(config(tmp_path, **settings(name, kl=0.0)))
    learner, velocity, limit = make_learner(setup), setup.policy.velocity, 5

    def tight(x, sigma, cond):
        if len(x) > limit and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("too many rows")
        return velocity(x, sigma, cond)

    learner.limits.micro_batch.rows = 64
    setup.policy.velocity = tight
    iterate(setup, learner, lambda phase: None)
    free = prepare(config(tmp_path, **settings(name, kl=0.0)))
    other = make_learner(free)
    iterate(free, other, lambda phase: None)
    assert learner.limits.micro_batch.rows <= limit < other.limits.micro_batch.rows
    for a, b in zip(setup.policy.parameters(), free.policy.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("name", "passes"), [("diffusion_nft", 2), ("awm", 1)])
def test_the_plan_counts_what_a_run_does(name, passes, tmp_path):
    made = config(tmp_path, **settings(name))
    counts = count(made)
    levels = {"diffusion_nft": 4, "awm": 1}[name]
    assert counts.group_forwards == 3 * 4 and counts.group_images == 3
    assert counts.group_trained == passes * 3 * levels
    setup = prepare(made)
    learner, passed = make_learner(setup), []
    velocity = setup.policy.velocity

    def counting(x, sigma, cond):
        passed.append((len(x), torch.is_grad_enabled()))
        return velocity(x, sigma, cond)

    setup.policy.velocity = counting
    row = iterate(setup, learner, lambda phase: None)
    assert row["nfe"] == counts.step_forwards == 2 * 3 * 4
    # The KL's reference comes without a gradient, as the rollout does.
    assert sum(n for n, graded in passed if graded) == 2 * counts.group_trained


def test_a_run_with_cheap_images_is_guarded_like_any_other(tmp_path):
    made = config(tmp_path, **settings("awm"), speed={"tail_stride": 2, "guard_every": 1, "guard_share": 1.0})
    summary = training.train(made, tmp_path / "run", progress=Silent())
    rows = [row for row in RunFolder.open(tmp_path / "run").metrics() if "nfe" in row]
    assert summary and "guard/rank" in rows[0]


def test_the_learners_copies_are_where_memory_is_estimated():
    made = load("demo", ["method.name=diffusion_nft", "method.granularities=[1]"])
    counted = count_model(made)
    with_average, without = (
        resident(made, counted, dataclasses.replace(RECIPES["diffusion_nft"], old_decay=decay))["adapter"]
        for decay in (0.5, 0.0)
    )
    assert with_average == 2 * without
