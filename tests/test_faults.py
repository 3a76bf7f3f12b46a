"""What befalls one of several processes ends all of them: within seconds, with one line and an exit code that
says whether to resume; and the run that is resumed ends as one that nothing befell.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fault_nursery import LATE
from forked_program import NEEDS_LINUX, Program, assert_alike, assert_sound, files, soon
from test_run import FEW, assert_equal, outcome
from torch.distributed import HashStore

from comfy_g2rpo.files.one_writer import LOCK
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.commands.exit_codes import AGAIN, MISTAKE
from g2rpo_trainer.processes import Left, Pulse, silence

pytestmark = [pytest.mark.xdist_group("faults"), NEEDS_LINUX]

SILENCE, SOON = 4.0, 120.0
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
"""How the process ends that meets a fault, how the other one does, and the line that is said about it."""
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
    (0, "checkpoint", "memory"),
    *((rank, phase, "stop") for rank in (0, 1) for phase in ("rollout", "reward", "update", "evaluate")),
]
CASES = [
    *(pytest.param(*each) for each in SHORT),
    *(pytest.param(*each, marks=pytest.mark.long) for each in LONG if each not in SHORT),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    pace = {**FEW, "checkpoint_every": 2}
    made = Program(tmp_path_factory.mktemp("faults"), SILENCE, train=pace)
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(program: Program) -> Path:
    """Train by two processes without a fault."""
    run = program.place / "whole"
    program.run(*program.words(run))
    program.ask({"draw": str(run)})
    return run


def resumed(program: Program, run: Path, whole: Path) -> None:
    """Let a run end; all of it must be as if nothing had happened."""
    program.run(*program.words(run))
    assert_alike(run, whole)


@pytest.mark.parametrize(("rank", "phase", "kind"), CASES)
def test_a_fault_ends_every_process_and_costs_nothing(
    rank: int, phase: str, kind: str, program: Program, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    own, other, line = ENDS[kind]
    pids = program.train(run, f"{rank} {PHASES[phase]} {kind}")
    if kind == "stop":
        ((code, after),) = program.wait([pids[1 - rank]], 300)
        assert (run / LOCK).exists() == (rank == 0), "who is stopped may still write"
        os.kill(pids[rank], signal.SIGCONT)
        ((woken, _),) = program.wait([pids[rank]], 60)
        ends = {rank: woken, 1 - rank: code}
    else:
        both = program.wait(pids, 300)
        ends, after = {place: code for place, (code, _) in enumerate(both)}, max(late for _, late in both)
    assert program.met(rank), "the fault did not come"
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
def test_processes_that_are_all_stopped_for_long_go_on(program: Program, whole: Path, tmp_path: Path) -> None:
    """As a terminal does by Ctrl-Z, and a scheduler that suspends."""
    run = tmp_path / "run"
    pids = program.train(run)
    assert soon((run / "metrics.jsonl").exists)
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
    program.await_fault(0)
    ((code, _),) = program.wait([first[1]], 120)
    assert program.codes("resume", run) == [MISTAKE] * 2
    (said,) = program.said()
    assert code == AGAIN and f"is being written by process {first[0]} on " in said
    os.kill(first[0], signal.SIGCONT)
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
@pytest.mark.parametrize("left", ["000002", ""])
def test_processes_without_a_common_disk_do_not_go_on(
    left: str, program: Program, whole: Path, tmp_path: Path
) -> None:
    """The others' copy of the run is older, or none is there."""
    run, other = tmp_path / "run", tmp_path / "other"
    for place in (run, other):
        shutil.copytree(whole, place)
    for path in (other / "checkpoints").iterdir():
        if path.name != left:
            shutil.rmtree(path)
    before = files(run)
    assert program.codes("resume", run, others=["resume", str(other)]) == [MISTAKE] * 2
    (said,) = program.said()
    assert f"different checkpoints, of the steps 3, {left[-1:] or 0}; give all the same run folder" in said
    assert files(run) == before


@pytest.mark.parametrize("given", ["soon", "nan", "0", "-5", "1e99"])
def test_a_silence_that_is_none_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G2RPO_SILENCE", given)
    with pytest.raises(ValueError, match=r"G2RPO_SILENCE is .*; give seconds, from 2 to"):
        silence()


def test_the_line_is_said_whoever_finds_the_loss_first() -> None:
    """Of four processes the second is lost, the last one finds it out, and the first one speaks."""
    store = HashStore()
    pulses = {rank: Pulse(store, rank, 4) for rank in (0, 2, 3)}
    for pulse in pulses.values():
        pulse.key = pulses[0].key  # as in processes of their own
    found = pulses[3].left([1], "was lost")
    pulses[3].end(found.code)
    assert (str(found), found.code) == ("", AGAIN)
    for rank, line in ((2, ""), (0, "process 1 of 4 was lost")):
        assert soon(partial(pulses[rank].ends.__contains__, 3))
        with pytest.raises(Left) as heard:
            pulses[rank].check()
        assert (str(heard.value), heard.value.code) == (line, AGAIN)
        pulses[rank].end(AGAIN)


def test_waiting_is_measured_where_there_is_somebody_to_wait_for(whole: Path) -> None:
    rows = [row for row in RunFolder(whole).metrics() if "nfe" in row]
    for row in rows:
        assert 0 < row["time/waiting"] <= row["time/waiting_max"]
        assert row["time/update"] > 0 and row["time/rollout"] > 0
