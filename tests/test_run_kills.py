"""A run that is killed anywhere, or that finds the disk full anywhere, ends as one that was left alone; and
of two writers exactly one goes on.

G2RPO_KILLS says how many kills there are (2, or 20 with all cases).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from some_cases import ALL, some
from test_run import assert_equal, config, outcome

from comfy_g2rpo.files.one_writer import LOCK
from comfy_g2rpo.files.safe import LEFTOVER
from comfy_g2rpo.run.folder import RunFolder, is_run

pytestmark = [
    pytest.mark.xdist_group("run kills"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc"),
]

KILLS, DISKS = int(os.environ.get("G2RPO_KILLS", 20 if ALL else 2)), 12 if ALL else 6


class Nursery:
    """Forks that train; see run_nursery.py."""

    def __init__(self, place: Path) -> None:
        script = Path(__file__).with_name("run_nursery.py")
        quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        self.child = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet,
        )
        self.tree = config(place).model_dump(mode="json")
        self.ask({"warm": self.tree})
        self.log = place / "log"

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def start(
        self, out: Path, log: Path | None = None, kill: int = 0, gate: Path | None = None, **how: bool
    ) -> int:
        """Start a fork that trains; return its process."""
        order = {"config": self.tree, "out": str(out), "how": how, "kill": kill, "log": str(log or self.log)}
        return self.ask(order | ({"gate": str(gate)} if gate else {}))["pid"]

    def wait(self, pid: int) -> int:
        """Return how a fork ended: its exit code, or less the signal that killed it."""
        return self.ask({"wait": pid})["code"]

    def train(self, out: Path, kill: int = 0, **how: bool) -> tuple[int, str]:
        """Train to the end; return the exit code and the log."""
        return self.wait(self.start(out, kill=kill, **how)), self.log.read_text()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.child.stdin.close()
    made.child.wait(60)


@pytest.fixture(scope="module")
def whole(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Train without a kill; return the run and how often its folder changed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    code, log = nursery.train(path)
    assert code == 0, log
    return path, int(log)


def files(run: Path) -> dict[str, bytes]:
    """Return what a run holds, but for what tells the time."""
    found = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    clocks = ("metrics.jsonl", "summary.json", "curves.png", "state.json")
    return {name: path.read_bytes() for name, path in found.items() if Path(name).name not in clocks}


def assert_same(run: Path, whole: Path) -> None:
    """Compare two finished runs: learning state, every file, no stray one."""
    assert_equal(outcome(run), outcome(whole))
    assert files(run) == files(whole)
    assert not [path for path in run.rglob(".*") if LEFTOVER.fullmatch(path.name) or path.name == LOCK]
    summaries = [RunFolder(each).summary() for each in (run, whole)]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}
    names = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (run, whole)]
    assert names[0] == names[1]


def go_on(nursery: Nursery, run: Path) -> None:
    """Resume a run if there is one, else start it, as a person would."""
    how = {"resume": True} if is_run(run) else {}
    code, log = nursery.train(run, **how)
    assert code == 0, log


@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_that_is_killed_in_any_write_ends_as_if_it_was_not(
    number: int, nursery: Nursery, whole: tuple[Path, int], tmp_path: Path
) -> None:
    path, changes = whole
    at = 1 + (number * (changes - 1)) // max(KILLS - 1, 1)
    code, log = nursery.train(tmp_path / "run", kill=at)
    assert code == -signal.SIGKILL, log
    go_on(nursery, tmp_path / "run")
    assert_same(tmp_path / "run", path)


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(
    nursery: Nursery, whole: tuple[Path, int], tmp_path: Path
) -> None:
    for at in (30, 17, 8, 25, 3):
        how = {"resume": True} if is_run(tmp_path / "run") else {}
        assert nursery.train(tmp_path / "run", kill=at, **how)[0] == -signal.SIGKILL
    go_on(nursery, tmp_path / "run")
    assert_same(tmp_path / "run", whole[0])


# Two writers

VERBS: dict[str, dict[str, bool]] = {"start": {}, "resume": {"resume": True}, "replace": {"replace": True}}


@pytest.mark.parametrize(("first", "second"), some(product(VERBS, VERBS), 2))
def test_of_two_writers_exactly_one_goes_on(
    first: str, second: str, nursery: Nursery, whole: tuple[Path, int], tmp_path: Path
) -> None:
    run, gate = tmp_path / "run", tmp_path / "go"
    if first != "start":
        shutil.copytree(whole[0], run)
        shutil.rmtree(run / "checkpoints/000003")
        (run / "summary.json").unlink()
    one = nursery.start(run, tmp_path / "one", gate=gate, **VERBS[first])
    deadline = time.monotonic() + 120
    while not gate.with_name("go.waiting").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    other = nursery.start(run, tmp_path / "other", **VERBS[second])
    assert nursery.wait(other) == 2
    said = (tmp_path / "other").read_text()
    assert f"is being written by process {one} on " in said and len(said.splitlines()) == 1
    gate.touch()
    assert nursery.wait(one) == 0, (tmp_path / "one").read_text()
    assert_same(run, whole[0])


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
def test_a_run_goes_on_wherever_the_disk_was_full(
    nursery: Nursery, whole: tuple[Path, int], disk: Path
) -> None:
    """Grow the disk a little at a time: each try ends in one line until there is room for all."""
    needed = sum(-(-path.stat().st_size // 4096) * 4 for path in whole[0].rglob("*")) + 200
    sizes = [8 + i * (needed - 8) // DISKS for i in range(DISKS)]
    failures = 0
    for size in sizes:
        resize(disk, size)
        how = {"resume": True} if is_run(disk / "run") else {}
        code, log = nursery.train(disk / "run", **how)
        if code == 0:
            break
        failures += 1
        assert code == 2 and "no space left on device" in log and len(log.splitlines()) == 1, log
    assert failures >= DISKS // 2
    resize(disk, 4 * needed)
    go_on(nursery, disk / "run")
    assert_same(disk / "run", whole[0])
