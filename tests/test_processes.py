"""Several processes share an evaluation out, find what one finds, and wait for each other."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_run import config

from comfy_g2rpo.run.evaluation import Evaluation, shares_shown
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.loop import out_of_time
from comfy_g2rpo.run.setup import World
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

pytestmark = pytest.mark.xdist_group("processes")  # one process makes the runs that they share

LIMIT, SLOW = 15, 22
"""Seconds after which a collective gives up, and which the first process takes for its first picture."""
REWARD = f"""
import os, time

seen = []

def own(images, prompts):
    with open({{place!r}} + "/judged." + os.environ.get("RANK", "alone"), "a") as file:
        file.write("".join(f"{{{{prompt}}}}\\n" for prompt in prompts))
    if os.environ.get("RANK") == "0" and not seen:
        time.sleep({SLOW})
    seen.append(True)
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
def test_rows_are_dealt_out_evenly_and_come_back_in_their_order(count: int, rows: int) -> None:
    dealt = World(count=count).dealt(rows)
    assert {len(part) for part in dealt} == {-(-rows // count)} and {*chain(*dealt)} == {*range(rows)}
    tables = [torch.tensor([[[10.0 * i, 1.0] for i in part]]) for part in dealt]
    worlds = [World(i, count, lambda table: torch.cat(tables, 1)) for i in range(count)]
    for world, table in zip(worlds, tables, strict=True):
        assert world.collect(table, rows)[0, :, 0].tolist() == [10.0 * i for i in range(rows)]
    for shown in ({0}, {0, rows - 1}, {*range(rows)}, set()):
        kept = shares_shown(worlds[0], rows, shown)
        assert len({len(places) for places in kept}) == 1
        numbers = [part[j] for part, places in zip(dealt, kept, strict=True) for j in places]
        assert shown <= {*numbers} and (shown or not numbers)


def test_what_the_first_process_says_goes_for_all() -> None:
    assert World().told(True) and not World().told(False)
    others = dataclasses.replace(World(), index=1, count=2)
    assert not others.told(True), "only the process that speaks is heard"


@pytest.mark.parametrize(("first", "seconds"), [(1.0, 59.0), (0.0, 61.0)])
def test_time_runs_out_for_all_after_the_same_step(first: float, seconds: float) -> None:
    """By the clock of the first process."""
    world = World(1, 2, lambda mine: torch.cat((torch.tensor([[[first]]]), mine), 1))
    setup = SimpleNamespace(pace=SimpleNamespace(minutes=1.0), world=world)
    assert out_of_time(setup, SimpleNamespace(seconds=seconds)) == bool(first)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train with one process and with two: 3 prompts × 3 noises, which two cannot share evenly."""
    place = tmp_path_factory.mktemp("processes")
    (place / "own.py").write_text(REWARD.format(place=str(place)))
    own = {"name": "own", "path": f"{place}/own.py:own"}
    quick = {"steps": 2, "eval_noises": 3, "preview_width": 128, "preview_height": 128}
    made = config(place, train=quick, heldout_rewards=[own])
    (place / "heldout.txt").write_text("a yellow circle\na red square above a blue circle\na blue square\n")
    train(made, place / "one", progress=Silent())
    recipe = place / "two.yaml"
    recipe.write_text(made.model_dump_json())  # JSON is YAML
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    child = [Path(__file__).with_name("process_child.py"), recipe, place / "two", str(LIMIT)]
    where = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run([*program, *child], env=where, timeout=300, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return place / "one", place / "two"


@pytest.mark.long
def test_an_evaluation_may_take_longer_than_collectives_wait(runs: tuple[Path, Path]) -> None:
    assert RunFolder(runs[1]).summary()["steps"] == 2


@pytest.mark.long
def test_both_judge_half(runs: tuple[Path, Path]) -> None:
    """A run looks at both ends: 9 pictures, the watch's of 3 prompts, 3 previews."""
    alone, *both = (
        Counter((runs[0].parent / f"judged.{who}").read_text().splitlines()) for who in ("alone", "0", "1")
    )
    assert both[0].keys() == both[1].keys() == alone.keys()
    whole, parts = alone.total(), [seen.total() for seen in both]
    assert parts[0] == parts[1] and whole <= sum(parts) <= whole + 6 * 2


@pytest.mark.long
def test_two_find_what_one_finds(runs: tuple[Path, Path]) -> None:
    folders = [RunFolder(path) for path in runs]
    for step in (0, 2):
        one, two = (Evaluation.read(folder, step) for folder in folders)
        assert one.prompts == two.prompts and one.names == two.names
        for a, b in ((one, two), (one.preview, two.preview)):
            assert torch.allclose(a.scores, b.scores, atol=1e-3)
        assert torch.allclose(one.noisy, two.noisy, atol=1e-3) and one.spread.keys() == two.spread.keys()
        assert all(torch.allclose(one.spread[name], two.spread[name], atol=1e-3) for name in one.spread)
        assert one.kl == pytest.approx(two.kl, rel=1e-3, abs=1e-8)
        names = [sorted(path.name for path in (run / f"images/{step:06d}").rglob("*")) for run in runs]
        assert names[0] == names[1] and sum(name.endswith(".png") for name in names[0]) == 12
