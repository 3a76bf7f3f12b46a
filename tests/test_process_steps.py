"""One process, two and four take the same steps, send each other what the closed form says, and go on from
each other's checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from forked_program import NEEDS_LINUX, Program
from test_run import FEW, VARYING, outcome

from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.recipes import build_plan, recipe

pytestmark = [pytest.mark.xdist_group("process steps"), NEEDS_LINUX]

PROMPTS, METHOD = 4, {"num_steps": 4, "group_size": 3}
SEVERAL = [2, pytest.param(4, marks=pytest.mark.long)]


class Steps(NamedTuple):
    """What one process knows of two steps: gradients [2, N], metrics, and what the second step sent."""

    gradients: torch.Tensor
    rows: list[dict[str, Any]]
    sent: list[tuple[str, list[list[int]]]]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    pace = {**FEW, "prompts_per_step": PROMPTS, "checkpoint_every": 1}
    made = Program(tmp_path_factory.mktemp("steps"), silence=60, train=pace, method=METHOD)
    yield made
    made.close()


@pytest.fixture(scope="module")
def steps(program: Program) -> Callable[[int], list[Steps]]:
    """Take two steps by so many processes."""

    @cache
    def taken(count: int) -> list[Steps]:
        out = program.place / f"steps of {count}"
        program.run(program.recipe, out, count=count, module="one_step")
        found = []
        for rank in range(count):
            told = json.loads(Path(f"{out}.{rank}.json").read_text())
            gradients = read_tensors(Path(f"{out}.{rank}.safetensors"))[0]["gradients"]
            found.append(Steps(gradients, told["rows"], told["sent"]))
        return found

    return taken


@pytest.mark.parametrize("count", SEVERAL)
def test_several_take_the_gradients_of_one(count: int, steps: Callable[[int], list[Steps]]) -> None:
    (alone,), found = steps(1), steps(count)
    assert all(torch.equal(each.gradients, found[0].gradients) for each in found), "they have drifted apart"
    largest = alone.gradients.abs().amax(1)
    assert (largest > 1e-5).all(), "there is something to compare"
    apart = (found[0].gradients - alone.gradients).abs().amax(1)
    print(f"{count} processes: gradients apart by {apart.tolist()}, the largest being {largest.tolist()}")
    # Other batches round otherwise, and advantages divide by a group's spread.
    assert (apart <= 1e-6).all() and (apart <= 1e-5 * largest).all()


@pytest.mark.parametrize("count", SEVERAL)
def test_several_find_the_metrics_of_one(count: int, steps: Callable[[int], list[Steps]]) -> None:
    (alone,), found = steps(1), steps(count)
    for one, *others in zip(alone.rows, *(each.rows for each in found), strict=True):
        assert len(one) > 10
        for other in others:
            own = {name: value for name, value in other.items() if not name.startswith(VARYING)}
            assert own == pytest.approx({name: one[name] for name in own}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("count", SEVERAL)
def test_a_step_sends_its_gradient_once_and_its_scores(
    count: int, steps: Callable[[int], list[Steps]]
) -> None:
    """Numbers by process: scores of its prompts' pictures, two metrics, and one of every parameter."""
    pictures = len(build_plan(recipe("g2rpo", **METHOD)).images)
    closed = [["gloo:all_gather", [[1, PROMPTS // count, pictures]]], ["gloo:all_gather", [[1, 1, 2]]]]
    for each in steps(count):
        parameters = each.gradients.shape[1]
        assert each.sent == [*closed, ["gloo:barrier", []], ["gloo:all_reduce", [[parameters]]]]
        print(f"{count} processes: {pictures * PROMPTS // count} scores, {parameters} gradients")
    assert steps(1)[0].sent == []


@pytest.mark.long
def test_a_run_goes_on_from_two_processes_to_one_to_four(program: Program, tmp_path: Path) -> None:
    """An update by Adam, so that rounding may grow."""
    run, alike = tmp_path / "run", tmp_path / "alike"
    program.run("train", program.recipe, "--out", alike, count=1)
    program.run("train", program.recipe, "--out", run, "--set", "train.steps=1")
    for steps, count in ((2, 1), (3, 4)):
        program.run("resume", run, "--set", f"train.steps={steps}", count=count)
    one, other = outcome(run), outcome(alike)
    assert all(
        torch.allclose(one[0][name][i], other[0][name][i], atol=1e-5) for name in one[0] for i in (0, 1)
    )
    # The shorter runs have looked at their ends, too.
    rows = [[row for row in found[2] if "nfe" in row] for found in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3]
    means = [[row["reward/agreement/mean"] for row in each] for each in rows]
    assert means[0] == pytest.approx(means[1], abs=1e-3)
