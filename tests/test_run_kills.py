"""A run that is killed anywhere, or that finds the disk full anywhere, ends as one that was left alone; and
of two writers exactly one goes on.

G2RPO_KILLS says how many kills there are (20, of which `make test` takes some). With -s a table of what
became of them is printed at the end: `G2RPO_KILLS=200 pytest -m "" -k anywhere -s tests/test_run_kills.py`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from forked_program import NEEDS_LINUX, Program, assert_same, assert_sound, leftovers
from some_cases import ALL, some
from test_run import FEW

from comfy_g2rpo.files.one_writer import LOCK
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.commands.exit_codes import AGAIN, DONE, MISTAKE

pytestmark = [pytest.mark.xdist_group("run kills"), NEEDS_LINUX]

KILLS, SOME = int(os.environ.get("G2RPO_KILLS", 20)), (0, 1, 10)
"""How many kills there are, and which ones `make test` takes: of one process and of two, two of them inside
checkpoints. A run that is killed again and again takes eighteen more.
"""
COUNTS, SILENCE = (1, 2, 4), 60.0
CHECKPOINTS = 4
"""That a run of three steps writes: one before the first, which is the best till then, and one after each."""
INSIDE, FOLDER = "inside a checkpoint", "any write"
PHASES = {
    "start": ["g2rpo_trainer.run:prepare", "comfy_g2rpo.run.setup:make_learner"],
    "evaluation": ["comfy_g2rpo.run.evaluation:draw", "comfy_g2rpo.run.evaluation:evaluate"],
    "rollout": ["comfy_g2rpo.rollout:roll_out"],
    "decoding": ["comfy_g2rpo.run.scorer:_decoded"],
    "reward": ["comfy_g2rpo.run.scorer:_score"],
    "scores": ["comfy_g2rpo.run.iteration:score"],
    "update": ["comfy_g2rpo.update:update", "comfy_g2rpo.update:clip_gradients"],
    "end of a step": ["comfy_g2rpo.run.iteration:follow", "comfy_g2rpo.run.checkpoint:save"],
    "end": ["comfy_g2rpo.run.loop:finish"],
}
"""Where kills come beside those in writing: functions of the run, at any call of them."""
KINDS = [*PHASES, FOLDER]
TABLE = [*KINDS, INSIDE]


class Whole(NamedTuple):
    """An undisturbed run, and how often each of its processes came to every point."""

    run: Path
    counts: list[dict[str, int]]

    @property
    def inside(self) -> int:
        """Count the changes that one checkpoint takes, below the folder that is being filled."""
        filling = next(point for point in self.counts[0] if point.endswith("/.filling-"))
        each, rest = divmod(self.counts[0][filling], CHECKPOINTS)
        assert not rest, "the checkpoints of a run take different numbers of changes"
        return each


class Kill(NamedTuple):
    """A kill: of how many processes which one, in what, and the point and number as a nursery takes them."""

    count: int
    rank: int
    kind: str
    point: str
    number: int


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    pace = {**FEW, "checkpoint_every": 1, "keep_checkpoints": 2}
    method = {"num_steps": 3, "group_size": 2}
    made = Program(tmp_path_factory.mktemp("kills"), SILENCE, train=pace, method=method)
    yield made
    made.close()


def arguments(program: Program, run: Path, count: int) -> list[object]:
    """Return the command by which so many processes start a run, or go on with it."""
    return program.words(run, "--set", f"train.prompts_per_step={count}")


@pytest.fixture(scope="module")
def whole(program: Program) -> Callable[[int], Whole]:
    """Train by so many processes without a kill."""

    @cache
    def made(count: int) -> Whole:
        run = program.place / f"whole {count}"
        functions = [point for points in PHASES.values() for point in points]
        points = [*functions, str(run), f"{run}/checkpoints/.filling-"]
        pids = program.start(*arguments(program, run, count), count=count, points=points)
        assert program.wait(pids) == [(DONE, 0.0)] * count, program.said()
        program.ask({"draw": str(run)})
        counts = [json.loads(Path(f"{program.log}.{rank}.counts").read_text()) for rank in range(count)]
        return Whole(run, counts)

    return made


def drawn(number: int, whole: Whole, run: Path) -> Kill:
    """Draw the n-th kill: every fifth inside a checkpoint, the others in turn."""
    chance, count = random.Random(f"kill {number}"), len(whole.counts)
    rank = chance.randrange(count)
    kind = INSIDE if number % 5 == 0 else KINDS[(number - number // 5) % len(KINDS)]
    if kind == INSIDE:
        # From the folder's making on, until it is about to get its name.
        at = chance.randrange(CHECKPOINTS) * whole.inside + chance.randint(2, whole.inside - 1)
        return Kill(count, rank, kind, f"{run}/checkpoints/.filling-", at)
    if kind == FOLDER:
        return Kill(count, 0, kind, str(run), chance.randint(1, whole.counts[0][str(whole.run)]))
    point = chance.choice([point for point in PHASES[kind] if whole.counts[rank][point]])
    return Kill(count, rank, kind, point, chance.randint(1, whole.counts[rank][point]))


def killed(program: Program, kill: Kill, run: Path) -> None:
    """Train until a process is killed; see how all end. Another one than the writer is killed while that
    one is held up inside a checkpoint.
    """
    writer = 0 if kill.kind in (INSIDE, FOLDER) else kill.rank
    fault = f"{writer} {kill.point} {kill.number} {'kill' if kill.rank == writer else 'stop'}"
    pids = program.start(*arguments(program, run, kill.count), count=kill.count, fault=fault)
    if kill.rank != writer:
        program.await_fault(writer)
        assert leftovers(run), "the writer is not inside a checkpoint"
        os.kill(pids[kill.rank], signal.SIGKILL)
        os.kill(pids[writer], signal.SIGCONT)
    codes = [code for code, _ in program.wait(pids)]
    assert codes.pop(kill.rank) == -signal.SIGKILL, (kill, program.said())
    # Who has nothing left to do is done, whatever becomes of the last files.
    ends = {AGAIN, DONE} if kill.kind == FOLDER else {AGAIN}
    assert {*codes} <= ends, (kill, codes, program.said())
    if kill.count > 1 and AGAIN in codes:
        # On a busy machine others may seem lost, too.
        line = rf"process (\d, )*{kill.rank}(, \d)* of {kill.count} was lost: .*"
        assert [said for said in program.said() if re.fullmatch(line, said)], (kill, program.said())


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[tuple[str, int, str]]]:
    """Count kills, equal ends and leftovers by what was killed; print a table of them."""
    found: Counter[tuple[str, int, str]] = Counter()
    yield found
    print("\n\n| kill | processes | kills | resumes equal | left half-written |\n|---|---|---|---|---|")
    for kind, count in sorted({key[:2] for key in found}, key=lambda key: (TABLE.index(key[0]), key)):
        row = (f"{found[kind, count, what]} |" for what in ("kills", "equal", "left"))
        print(f"| {kind} | {count} |", *row)


@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=() if ALL or i in SOME else pytest.mark.long) for i in range(KILLS)]
)
def test_a_run_that_is_killed_anywhere_ends_as_if_it_was_not(
    number: int,
    program: Program,
    whole: Callable[[int], Whole],
    tally: Counter[tuple[str, int, str]],
    tmp_path: Path,
) -> None:
    run, undisturbed = tmp_path / "run", whole(COUNTS[number % len(COUNTS)])
    kill = drawn(number, undisturbed, run)
    tally[kill.kind, kill.count, "kills"] += 1
    killed(program, kill, run)
    tally[kill.kind, kill.count, "left"] += len(leftovers(run))
    assert kill.kind != INSIDE or kill.rank or [p for p in leftovers(run) if p.name.startswith(".filling-")]
    assert_sound(run)
    program.run(*arguments(program, run, kill.count), count=kill.count)
    assert_same(run, undisturbed.run)
    tally[kill.kind, kill.count, "equal"] += 1


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(
    program: Program, whole: Callable[[int], Whole], tmp_path: Path
) -> None:
    run, (*others, last) = tmp_path / "run", [point for points in PHASES.values() for point in points]
    writes = [f"{run} {number}" for number in (30, 17, 8, 25, 3)]
    for at in (*(f"{point} 1" for point in others), *writes, f"{last} 1"):
        codes = program.codes(*arguments(program, run, 1), count=1, fault=f"0 {at} kill")
        assert codes == [-signal.SIGKILL], (at, program.said())
    program.run(*arguments(program, run, 1), count=1)
    assert_same(run, whole(1).run)


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_clocks_that_differ_between_machines_change_nothing(
    count: int, program: Program, whole: Callable[[int], Whole], tmp_path: Path
) -> None:
    """A run is killed on a machine, and its files bear times of clocks that are decades off."""
    run, inside = tmp_path / "run", whole(count).inside
    fault = f"0 {run}/checkpoints/.filling- {3 * inside - 1} kill"
    assert -signal.SIGKILL in program.codes(*arguments(program, run, count), count=count, fault=fault)
    (run / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "2099-01-01 00:00:00+00:00"}))
    newest = RunFolder(run).latest()
    for path in [run, *run.rglob("*")]:
        at = 1 if newest in (path, path.parent) else 2**32
        os.utime(path, (at, at))
    program.run(*arguments(program, run, count), count=count)
    assert_same(run, whole(count).run)


# Two writers

VERBS = ("start", "resume", "replace")


@pytest.mark.parametrize(("first", "second"), some(product(VERBS, VERBS), 2))
def test_of_two_writers_exactly_one_goes_on(
    first: str, second: str, program: Program, whole: Callable[[int], Whole], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start = [*arguments(program, run, 1)]
    verbs = {"start": start, "resume": ["resume", run], "replace": [*start, "--replace"]}
    if first != "start":
        shutil.copytree(whole(1).run, run)
        shutil.rmtree(run / "checkpoints/000003")
        (run / "summary.json").unlink()
    (one,) = program.start(*verbs[first], count=1, fault="0 comfy_g2rpo.run.loop:learn 1 stop")
    program.await_fault(0)
    assert program.codes(*verbs[second], count=1) == [MISTAKE]
    (said,) = program.said()
    assert f"is being written by process {one} on " in said
    os.kill(one, signal.SIGCONT)
    assert program.wait([one])[0][0] == DONE
    assert_same(run, whole(1).run)


# A full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small disk."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("cannot mount a small disk here: this test needs root on Linux")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def resize(disk: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)


@pytest.mark.long
@pytest.mark.parametrize(("count", "tries"), [(1, 12 if ALL else 6), (2, 4)])
def test_a_run_goes_on_wherever_the_disk_was_full(
    count: int, tries: int, program: Program, whole: Callable[[int], Whole], disk: Path
) -> None:
    """Grow the disk a little at a time: each try ends in one line until there is room for all."""
    run = disk / "run"
    needed = sum(-(-path.stat().st_size // 4096) * 4 for path in whole(count).run.rglob("*")) + 200
    failures = 0
    for i in range(tries):
        resize(disk, 8 + i * (needed - 8) // tries)
        codes = program.codes(*arguments(program, run, count), count=count)
        if codes == [DONE] * count:
            break
        failures += 1
        (said,) = program.said()
        assert codes == [MISTAKE] * count and "no space left on device; make room" in said
        assert_sound(run)
    assert failures >= tries // 2
    resize(disk, 4 * needed)
    program.run(*arguments(program, run, count), count=count)
    assert_same(run, whole(count).run)
