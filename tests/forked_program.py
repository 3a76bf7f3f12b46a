"""The program in as many processes as are wanted, started as a scheduler does, and what becomes of a run."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_run import assert_equal, config, outcome

from comfy_g2rpo.files.one_writer import LOCK
from comfy_g2rpo.files.safe import LEFTOVER
from comfy_g2rpo.run.folder import RunFolder, damage, is_run

NEEDS_LINUX = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc")


class Program:
    """Forks of one process that has all libraries loaded; fault_nursery.py. Silent ones are given up after so
    many seconds.
    """

    def __init__(self, place: Path, silence: float, **sections: dict[str, object]) -> None:
        self.place, self.recipe, self.log = place, place / "recipe.yaml", place / "log"
        self.recipe.write_text(config(place, **sections).model_dump_json())  # JSON is YAML
        quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        quiet |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "G2RPO_SILENCE": str(silence)}
        self.child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_nursery.py")), str(self.recipe)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet,
        )

    def close(self) -> None:
        """End the process that forks."""
        self.child.stdin.close()
        self.child.wait(60)

    def ask(self, order: dict[str, Any]) -> Any:
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def start(self, *words: object, count: int = 2, **more: object) -> list[int]:
        """Start processes; return their numbers. `more` of an order may be a fault, points, a module."""
        for file in self.place.glob("log.*"):
            file.unlink()
        self.port = free_port()
        order = {"words": [*map(str, words)], "count": count, "port": self.port, "log": str(self.log)}
        return self.ask({"address": "127.0.0.1"} | order | more)

    def wait(self, pids: list[int], limit: float = 900) -> list[tuple[int, float]]:
        """Return how processes ended, and how long after their fault."""
        ended = self.ask({"wait": pids, "limit": limit})
        met = [float(file.read_text()) for file in self.place.glob("log.*.met")]
        return [(code, at - met[0] if met else 0.0) for code, at in ended]

    def codes(self, *words: object, count: int = 2, **more: object) -> list[int]:
        """Run the program; return how its processes ended."""
        return [code for code, _ in self.wait(self.start(*words, count=count, **more))]

    def run(self, *words: object, count: int = 2, **more: object) -> None:
        """Run the program to a good end."""
        assert self.codes(*words, count=count, **more) == [0] * count, self.said()

    def words(self, run: Path, *more: object) -> list[object]:
        """Return the command that goes on with a run if there is one, else starts it, as a person would."""
        return ["resume", run] if is_run(run) else ["train", self.recipe, "--out", run, *more]

    def train(self, out: Path, fault: str = "") -> list[int]:
        """Start a run of two processes, of which one may meet a fault."""
        return self.start("train", self.recipe, "--out", out, fault=fault)

    def met(self, rank: int) -> bool:
        """Return whether a process has met its fault."""
        return Path(f"{self.log}.{rank}.met").exists()

    def await_fault(self, rank: int) -> None:
        """Wait until a process has met its fault."""
        assert soon(lambda: self.met(rank)), "the fault did not come"

    def said(self) -> list[str]:
        """Return the lines that the processes have printed."""
        logs = (Path(f"{self.log}.{rank}") for rank in range(4))
        return [line for log in logs if log.exists() for line in log.read_text().splitlines()]


def free_port() -> int:
    """Find a port at which nobody listens, below those that the system gives to others in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            return port


def soon(condition: Any, limit: float = 300) -> bool:
    """Wait until something holds; return whether it does in time."""
    deadline = time.monotonic() + limit
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def leftovers(run: Path) -> list[Path]:
    """List what interrupted writes have left in a run's folder."""
    return [path for path in run.rglob(".*") if LEFTOVER.fullmatch(path.name)]


def assert_sound(run: Path) -> None:
    """See that a run's folder holds whole files, and what a resume takes care of."""
    if not (run / "metrics.jsonl").exists():
        return
    folder = RunFolder(run)
    assert [damage(place) for place in folder.saved()] == [""] * len(folder.saved())
    assert not {*folder.saved()} & {*leftovers(run)}
    folder.metrics()


def assert_alike(run: Path, whole: Path) -> None:
    """See that a run has learnt what an undisturbed one has, and leaves nothing that it does not."""
    assert not leftovers(run) and not (run / LOCK).exists()
    assert_equal(outcome(run), outcome(whole))  # which sweeps


def files(run: Path) -> dict[str, bytes]:
    """Return what a run holds, but for what tells the time."""
    found = {path.relative_to(run).as_posix(): path for path in run.rglob("*") if path.is_file()}
    clocks = ("metrics.jsonl", "summary.json", "curves.png", "state.json")
    return {name: path.read_bytes() for name, path in found.items() if Path(name).name not in clocks}


def assert_same(run: Path, whole: Path) -> None:
    """Compare two finished runs: learning state, every file, no stray one."""
    assert_alike(run, whole)
    assert files(run) == files(whole)
    summaries = [RunFolder(each).summary() for each in (run, whole)]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}
    names = [sorted(path.name for path in (each / "checkpoints").iterdir()) for each in (run, whole)]
    assert names[0] == names[1]
