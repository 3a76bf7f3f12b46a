"""What befalls one of several processes ends all of them: within seconds, with one line and an exit code that
says whether to resume; and the run that is resumed ends as one that nothing befell.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_nursery import LATE
from test_run import FEW, assert_equal, config, outcome
from test_run_kills import disk, resize

from comfy_g2rpo.files.one_writer import LOCK
from comfy_g2rpo.files.safe import LEFTOVER
from comfy_g2rpo.run.folder import RunFolder, damage
from g2rpo_trainer.commands.exit_codes import AGAIN, MISTAKE
from g2rpo_trainer.processes import silence

__all__ = ["disk"]  # a fixture

pytestmark = [
    pytest.mark.xdist_group("faults"),
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc"),
]

SILENCE, SOON = 4.0, 30.0
"""Seconds after which a silent process is given up here, and within which all end, on a busy machine."""
PHASES = {
    "start": "g2rpo_trainer.run:prepare 1",
    "evaluate": "comfy_g2rpo.run.evaluation:draw 1",
    "rollout": "comfy_g2rpo.rollout:roll_out 3",
    "decode": "comfy_g2rpo.run.scorer:_decoded 4",
    "reward": "comfy_g2rpo.run.scorer:_score 4",
    "score": "comfy_g2rpo.run.iteration:score 2",
    "update": "comfy_g2rpo.update:update 2",
    "optimizer": "comfy_g2rpo.update:clip_gradients 2",
    "follow": "comfy_g2rpo.run.iteration:follow 2",
    "checkpoint": "comfy_g2rpo.run.checkpoint:write_checkpoint 1",
    "finish": "comfy_g2rpo.run.loop:finish 1",
}
"""Where a fault comes: a function of the run, and the how manieth call of it, mostly in the second step."""
ENDS = {
    "kill": (
        -signal.SIGKILL,
        AGAIN,
        r"process {rank} of 2 (was lost|has shown no life).*; continue with: .*",
    ),
    "term": (143, 143, r"interrupted; continue with: g2rpo resume {run}"),
    "memory": (MISTAKE, MISTAKE, r"error: out of memory, .*"),
    "stop": (AGAIN, AGAIN, rf"process {{rank}} of 2 has shown no life for {SILENCE:g} s; continue with: .*"),
}
"""How the process ends that meets a fault, how the other one does, and the only line that is said."""
NO_ROOM, BROKEN = (
    "cannot allocate memory for thread-local data: ABORT",
    (127, -signal.SIGABRT, -signal.SIGSEGV),
)
"""What the C library says, and how it and what stands on it may end a process, where memory is out for them:
before Python can say anything. Then the process is lost, as one that is killed.
"""
SHORT = [(1, "update", "term")]
LONG = [
    *((rank, phase, "kill") for rank in (0, 1) for phase in PHASES if (rank, phase) != (1, "checkpoint")),
    *((rank, phase, "term") for rank in (0, 1) for phase in PHASES if phase not in ("start", "checkpoint")),
    *((rank, phase, "memory") for rank in (0, 1) for phase in ("rollout", "decode", "update", "evaluate")),
    *((rank, phase, "stop") for rank in (0, 1) for phase in ("rollout", "reward", "update", "evaluate")),
]
CASES = [
    *(pytest.param(*each) for each in SHORT),
    *(pytest.param(*each, marks=pytest.mark.long) for each in LONG if each not in SHORT),
]


class Program:
    """The program in as many processes as are wanted, started as a scheduler does; fault_nursery.py."""

    def __init__(self, place: Path) -> None:
        self.place, self.recipe, self.log = place, place / "recipe.yaml", place / "log"
        made = config(place, train={**FEW, "checkpoint_every": 2})
        self.recipe.write_text(made.model_dump_json())  # JSON is YAML
        quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
        quiet |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "G2RPO_SILENCE": str(SILENCE)}
        self.child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_nursery.py")), str(self.recipe)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet,
        )

    def ask(self, order: dict[str, Any]) -> Any:
        self.child.stdin.write(json.dumps(order) + "\n")
        self.child.stdin.flush()
        return json.loads(self.child.stdout.readline())

    def start(self, *words: object, count: int = 2, fault: str = "") -> list[int]:
        """Start processes; return their numbers."""
        for file in self.place.glob("log.*"):
            file.unlink()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        order = {"words": list(map(str, words)), "count": count, "port": port, "fault": fault}
        return self.ask(order | {"log": str(self.log)})

    def wait(self, pids: list[int], limit: float = 240) -> list[tuple[int, float]]:
        """Return how processes ended, and how long after their fault."""
        ended = self.ask({"wait": pids, "limit": limit})
        met = [float(file.read_text()) for file in self.place.glob("log.*.met")]
        return [(code, at - met[0] if met else 0.0) for code, at in ended]

    def run(self, *words: object, count: int = 2) -> None:
        """Run the program to a good end."""
        codes = [code for code, _ in self.wait(self.start(*words, "--quiet", count=count))]
        assert codes == [0] * count, self.said()

    def train(self, out: Path, fault: str = "") -> list[int]:
        """Start a run of two processes, of which one meets a fault."""
        return self.start("train", self.recipe, "--out", out, "--quiet", fault=fault)

    def said(self) -> list[str]:
        """Return the lines that the processes have printed."""
        logs = (self.place / f"log.{rank}" for rank in range(4))
        return [line for log in logs if log.exists() for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    made = Program(tmp_path_factory.mktemp("faults"))
    yield made
    made.child.stdin.close()
    made.child.wait(60)


@pytest.fixture(scope="module")
def whole(program: Program) -> Path:
    """Train by two processes without a fault."""
    program.run("train", program.recipe, "--out", program.place / "whole")
    return program.place / "whole"


def assert_sound(run: Path) -> None:
    """See that a run's folder holds whole files, and what a resume takes care of."""
    if not (run / "metrics.jsonl").exists():
        return
    folder = RunFolder(run)
    assert [damage(place) for place in folder.saved()] == [""] * len(folder.saved())
    folder.metrics()


def resumed(program: Program, run: Path, whole: Path) -> None:
    """Let a run end; all of it must be as if nothing had happened."""
    begun = (run / "config.json").exists() and (run / "metrics.jsonl").exists()
    program.run(*(("resume", run) if begun else ("train", program.recipe, "--out", run)))
    assert_equal(outcome(run), outcome(whole))
    assert not [path for path in run.rglob(".*") if LEFTOVER.fullmatch(path.name) or path.name == LOCK]


@pytest.mark.parametrize(("rank", "phase", "kind"), CASES)
def test_a_fault_ends_every_process_and_costs_nothing(
    rank: int, phase: str, kind: str, program: Program, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    own, other, line = ENDS[kind]
    pids = program.train(run, f"{rank} {PHASES[phase]} {kind}")
    if kind == "stop":
        ((code, after),) = program.wait([pids[1 - rank]], 120)
        assert (run / LOCK).exists() == (rank == 0), "who is stopped may still write"
        program.ask({"wake": pids[rank]})
        ((woken, _),) = program.wait([pids[rank]], 60)
        ends = {rank: woken, 1 - rank: code}
    else:
        both = program.wait(pids, 120)
        ends, after = {place: code for place, (code, _) in enumerate(both)}, max(late for _, late in both)
    assert (program.place / f"log.{rank}.met").exists(), "the fault did not come"
    said = [text for text in program.said() if text != NO_ROOM]
    if kind == "memory" and ends[rank] in BROKEN:
        own, (_, other, line) = ends[rank], ENDS["kill"]
    assert ends == {rank: own, 1 - rank: other}, said
    assert after < SOON + (2 * SILENCE if kind == "stop" else 0)
    expected = line.format(rank=rank, run=re.escape(str(run)))
    assert [text for text in said if re.fullmatch(expected, text)], said
    assert len(said) == 1 + (kind == "stop" and len(said) > 1), said
    assert_sound(run)
    if (kind, phase) in {("term", "update"), ("kill", "update")} and (rank == 1 or kind == "term"):
        assert RunFolder(run).latest().name == "000001", "the step that was finished is kept"
    resumed(program, run, whole)


@pytest.mark.long
def test_a_full_disk_ends_every_process_and_costs_nothing(program: Program, whole: Path, disk: Path) -> None:
    needed = sum(-(-path.stat().st_size // 4096) * 4 for path in whole.rglob("*"))
    failures = 0
    for share in (0.1, 0.3, 0.5, 0.7):
        resize(disk, int(share * needed))
        begun = (disk / "run/metrics.jsonl").exists()
        words = ("resume", disk / "run") if begun else ("train", program.recipe, "--out", disk / "run")
        codes = [code for code, _ in program.wait(program.start(*words, "--quiet"), 120)]
        if codes == [0, 0]:
            break
        failures += 1
        (said,) = program.said()
        assert codes == [MISTAKE, MISTAKE] and "no space left on device; make room" in said
        assert_sound(disk / "run")
    assert failures >= 2
    resize(disk, 4 * needed)
    resumed(program, disk / "run", whole)


@pytest.mark.long
def test_processes_that_are_all_stopped_for_long_go_on(program: Program, whole: Path, tmp_path: Path) -> None:
    """As a terminal does by Ctrl-Z, and a scheduler that suspends."""
    run = tmp_path / "run"
    pids = program.train(run)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * SILENCE)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert [code for code, _ in program.wait(pids, 120)] == [0, 0], program.said()
    assert_equal(outcome(run), outcome(whole))


@pytest.mark.long
def test_a_second_run_in_the_same_place_ends_all_its_processes(program: Program, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = program.train(run, f"0 {PHASES['update']} stop")
    deadline = time.monotonic() + 120
    while not Path(f"{program.log}.0.met").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    ((code, _),) = program.wait([first[1]], 120)
    second = program.start("resume", run, "--quiet")
    assert [code for code, _ in program.wait(second, 120)] == [MISTAKE] * 2
    (said,) = program.said()
    assert code == AGAIN and f"is being written by process {first[0]} on " in said
    program.ask({"wake": first[0]})
    assert program.wait([first[0]], 60)[0][0] != LATE


@pytest.mark.long
def test_a_launcher_that_is_told_to_end_ends_all_with_a_checkpoint(
    program: Program, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "g2rpo_trainer.cli",
    ]
    where = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    more = ["--set", "train.steps=400"]
    launcher = subprocess.Popen(
        [sys.executable, *words, "train", program.recipe, "--out", run, "--quiet", *more],
        env=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and launcher.poll() is None:
        if (run / "metrics.jsonl").exists() and len(RunFolder(run).metrics()) > 1:
            break
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    assert said.count("interrupted; continue with: g2rpo resume") == 1, said
    folder = RunFolder(run)
    assert folder.latest() and folder.metrics()[-1]["step"] == int(folder.latest().name) >= 1
    assert not (run / LOCK).exists()


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_of_two_processes_goes_on_with_another_number(
    count: int, program: Program, tmp_path: Path
) -> None:
    four = ("--set", "train.prompts_per_step=4", "--set", "train.checkpoint_every=1")
    run, alike = tmp_path / "run", tmp_path / "alike"
    program.run("train", program.recipe, "--out", run, *four, "--set", "train.steps=2")
    program.run("train", program.recipe, "--out", alike, *four)
    program.run("resume", run, "--set", "train.steps=3", count=count)
    one, other = outcome(run), outcome(alike)
    assert all(
        torch.allclose(one[0][name][i], other[0][name][i], atol=1e-5) for name in one[0] for i in (0, 1)
    )
    # The shorter run has looked at its end, too.
    rows = [[row for row in found[2] if "nfe" in row] for found in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3]
    means = [[row["reward/agreement/mean"] for row in each] for each in rows]
    assert means[0] == pytest.approx(means[1], abs=1e-3)


@pytest.mark.parametrize("given", ["soon", "nan", "0", "-5", "1e99"])
def test_a_silence_that_is_none_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_SILENCE", given)
    with pytest.raises(ValueError, match=r"G2RPO_SILENCE is .*; give seconds, from 2 to"):
        silence()


def test_waiting_is_measured_where_there_is_somebody_to_wait_for(whole: Path) -> None:
    rows = [row for row in RunFolder(whole).metrics() if "nfe" in row]
    for row in rows:
        assert 0 < row["time/waiting"] <= row["time/waiting_max"]
        assert row["time/update"] > 0 and row["time/rollout"] > 0
