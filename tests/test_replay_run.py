"""Whole runs with old forks on the bundled model: resumed to the bit, of several sizes, by two processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from program import leave
from some_cases import some
from test_run import FEW, LAUNCH, StopAt, assert_equal, config, outcome, prepare

from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.recipes import FIELDS
from comfy_g2rpo.replay.replay_file import NAME
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.iteration import iterate
from comfy_g2rpo.run.setup import Setup, make_learner
from g2rpo_trainer.cost.estimate import count
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

pytestmark = pytest.mark.xdist_group("replay")

TREE = {"name": "g2rpo_single", "num_steps": 4, "group_size": 3, "learning_rate": 1e-3, "objective": "clip"}
WAYS = {
    "clip, evenly": {"replay": 2},
    "vargrad, drawn": {"objective": "vargrad", "replay": 1, "replay_by": "draw"},
    "few, by rank, twice": {"replay": 3, "replay_by": "rank", "replay_size": 5, "epochs": 2, "ema": 0.5},
    "young, step by step": {"replay": 2, "replay_age": 1, "update": "per_step"},
}


def forks(run: Path) -> dict[str, torch.Tensor]:
    """Return what the newest checkpoint of a run keeps of old forks."""
    return read_tensors(RunFolder(run).latest() / NAME)[0]


def stop_at(step: int) -> Silent:
    """Return what presses Ctrl-C when a step is shown."""
    return StopAt(step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train in a way, once."""
    made: dict[str, Path] = {}

    def run(way: str) -> Path:
        if way not in made:
            path = tmp_path_factory.mktemp("whole")
            train(config(path, train=FEW, method={**TREE, **WAYS[way]}), path / "run", progress=Silent())
            made[way] = path / "run"
        return made[way]

    return run


@pytest.mark.parametrize("way", some(WAYS, 1))
def test_a_stopped_run_goes_on_with_the_forks_that_it_had(way: str, whole: Callable, tmp_path: Path) -> None:
    made = config(tmp_path, train=FEW, method={**TREE, **WAYS[way]})
    with pytest.raises(KeyboardInterrupt):
        train(made, tmp_path / "run", progress=stop_at(2))
    train(made, tmp_path / "run", resume=True, progress=Silent())
    assert_equal(outcome(whole(way)), outcome(tmp_path / "run"))
    ours, theirs = forks(tmp_path / "run"), forks(whole(way))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if "nfe" in row]
    assert [row["replay/rows"] > 0 for row in rows] == [False, True, True]


def test_a_model_that_has_not_moved_learns_from_a_fork_what_it_learned(tmp_path: Path) -> None:
    """With the model's own conditioning, sizes of batch and noise: ratios are 1, and the gradient is the
    same.
    """
    method = {**TREE, "group_size": 6, "learning_rate": 0, "replay": 1}
    setup = prepare(config(tmp_path, train=FEW, method=method))
    learner, steps = make_learner(setup), []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: steps.append(gradients_of(setup)) or step()
    iterate(setup, learner, lambda phase: None)
    known, learner.step = learner.forks, 0
    row = iterate(setup, learner, lambda phase: None)
    # The same step once more: half of its rows are new, half of them old, and they are the same forks.
    assert len(known) == row["replay/rows"] > 0 and row["ratio/max_deviation"] < 1e-6
    alone, together = steps
    assert torch.nn.functional.cosine_similarity(alone, together, dim=0) > 1 - 1e-5


def gradients_of(setup: Setup) -> torch.Tensor:
    """Return the gradient of the adapter in one row."""
    return torch.cat([p.grad.flatten() for p in setup.policy.parameters()])


@pytest.mark.long
def test_a_killed_run_goes_on_so_too(whole: Callable, tmp_path: Path) -> None:
    """Without any farewell: what was on the disk is all there is."""
    made = config(tmp_path, train=FEW, method={**TREE, **WAYS["clip, evenly"]})
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(made.model_dump_json())
    code = (
        "import os, sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from g2rpo_trainer.config.reading import load\n"
        "from g2rpo_trainer.reports.progress import Silent\n"
        "from g2rpo_trainer.run import train\n"
        "class Kill(Silent):\n"
        "    def step(self, row):\n"
        "        if row['step'] == 3 and 'nfe' in row: os.kill(os.getpid(), 9)\n"
        "train(load(Path(sys.argv[1])), Path(sys.argv[2]), progress=Kill())\n"
    )
    dead = subprocess.run([sys.executable, "-c", code, recipe, tmp_path / "run"], timeout=300, check=False)
    assert dead.returncode == -signal.SIGKILL
    assert int(RunFolder(tmp_path / "run").latest().name) == 2
    train(made, tmp_path / "run", resume=True, progress=Silent())
    assert_equal(outcome(whole("clip, evenly")), outcome(tmp_path / "run"))


def test_without_replay_there_is_no_trace_of_it(tmp_path: Path) -> None:
    for name, method in (("without", {}), ("with", {"replay": 0, "replay_size": 3, "replay_by": "draw"})):
        train(config(tmp_path, train=FEW, method={**TREE, **method}), tmp_path / name, progress=Silent())
    assert_equal(outcome(tmp_path / "without"), outcome(tmp_path / "with"))
    rows = RunFolder(tmp_path / "with").metrics()
    assert not any(name.startswith("replay") for row in rows for name in row)
    assert not list((tmp_path / "with").rglob(NAME))


@pytest.mark.parametrize("spoil", ["cut", "changed", "gone"])
def test_damaged_forks_set_a_checkpoint_aside(spoil: str, whole: Callable, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole("clip, evenly"), tmp_path / "run"))
    place = RunFolder(run).latest() / NAME
    content = place.read_bytes()
    place.write_bytes(content[:-9] if spoil == "cut" else content[:-9] + b"123456789")
    if spoil == "gone":
        place.unlink()
    made = config(tmp_path, train=FEW, method={**TREE, **WAYS["clip, evenly"]})
    train(made, run, resume=True, progress=Silent())
    assert (run / "checkpoints" / "damaged-000003").is_dir()
    assert_equal(outcome(whole("clip, evenly")), outcome(run))


def test_forks_of_prompts_that_are_gone_are_left_behind(whole: Callable, tmp_path: Path) -> None:
    from comfy_g2rpo.run.checkpoint import restore

    run = Path(shutil.copytree(whole("clip, evenly"), tmp_path / "run"))
    setup = prepare(config(tmp_path, train=FEW, method={**TREE, **WAYS["clip, evenly"]}))
    learner = make_learner(setup)
    restore(setup, learner, RunFolder(run))
    prompts = {fork.prompt for fork in learner.forks}
    gone = sorted(prompts)[0]
    fewer = replace(setup, prompts=replace(setup.prompts, train=tuple(prompts - {gone})))
    restore(fewer, learner, RunFolder(run))
    assert {fork.prompt for fork in learner.forks} == prompts - {gone}
    # Turned off, or made smaller, in a run that goes on.
    restore(replace(setup, recipe=replace(setup.recipe, replay_size=2)), learner, RunFolder(run))
    assert len(learner.forks) == 2
    learner.forks = []
    restore(replace(setup, recipe=replace(setup.recipe, replay=0)), learner, RunFolder(run))
    assert learner.forks == []


def test_old_forks_of_another_size_wait_for_theirs(tmp_path: Path) -> None:
    sizes = ["64x64", "96x48"]
    setup = prepare(config(tmp_path, model={"sizes": sizes}, method={**TREE, "replay": 2}))
    learner, seen = make_learner(setup), []
    for step in range(6):
        known = {fork.x.shape for fork in learner.forks}
        row = iterate(setup, learner, lambda phase: None)
        seen.append((setup.size(step).shape in known, row["replay/rows"] > 0))
    assert all(known == replayed for known, replayed in seen) and (True, True) in seen
    assert {fork.x.shape for fork in learner.forks} == {size.shape for size in setup.sizes}


def test_an_update_that_is_broken_off_keeps_the_forks_of_before(tmp_path: Path) -> None:
    setup = prepare(config(tmp_path, train=FEW, method={**TREE, "replay": 2}))
    learner = make_learner(setup)
    iterate(setup, learner, lambda phase: None)
    before = list(learner.forks)

    def stop(phase: str) -> None:
        if phase == "update":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        iterate(setup, learner, stop)
    assert before and all(one is other for one, other in zip(learner.forks, before, strict=True))


@pytest.mark.long
def test_two_processes_replay_what_one_does(tmp_path: Path) -> None:
    """The forks of both are everybody's: either takes its share of the choice, and the first saves all."""
    made = config(tmp_path, method={**TREE, "replay": 2, "replay_by": "draw"}, train=FEW)
    train(made, tmp_path / "one", progress=Silent())
    recipe = tmp_path / "two.yaml"
    recipe.write_text(made.model_dump_json())
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH]
    where = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*program, "train", recipe, "--out", tmp_path / "two"], check=True, timeout=300, env=where)
    one, two = (outcome(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[0][name][i], two[0][name][i], atol=1e-5) for name in one[0] for i in (0, 1))
    ours, theirs = forks(tmp_path / "one"), forks(tmp_path / "two")
    assert torch.equal(ours["counts"], theirs["counts"]) and torch.equal(ours["prompt"], theirs["prompt"])
    assert torch.allclose(ours["velocity"], theirs["velocity"], atol=1e-3)


@pytest.mark.long
def test_a_plan_counts_the_passes_and_the_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without, clipped, twice = (
        count(config(tmp_path, train=FEW, method={**TREE, **method})).group_trained
        for method in ({}, {"replay": 4}, {"replay": 4, "epochs": 2})
    )
    assert clipped == 5 * without and twice == (1 + 2 * 5) * without
    code, printed, _ = leave(
        capsys, "plan", "demo", "--set", "method.objective=clip", "--set", "method.replay=4"
    )
    assert code == 0 and "old forks" in printed and "in memory and in every checkpoint" in printed
    code, printed, _ = leave(capsys, "plan", "demo")
    assert code == 0 and "old forks" not in printed


def test_a_run_whose_forks_would_fill_the_disk_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [
        "--set",
        "method.objective=clip",
        "--set",
        "method.replay=1",
        "--set",
        "method.replay_size=100000",
    ]
    large = ["--set", "model.width=256", "--set", "model.height=256"]
    code, _, error = leave(capsys, "train", "demo", "--out", tmp_path / "run", *many, *large)
    assert code == 2 and "replay_size is 100000: " in error and "set it to " in error
    assert not (tmp_path / "run").exists()


def test_every_field_has_a_sentence_and_bounds() -> None:
    for name in ("replay", "replay_size", "replay_by", "replay_age", "vargrad_tau"):
        rule = FIELDS[name].metadata
        assert rule["help"].endswith(".") and (rule["choices"] or rule["low"] is not None)
