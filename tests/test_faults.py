"""What befalls one of several processes ends all of them: within seconds, with one line and an exit code that
says whether to resume; and the run that is resumed ends as one that nothing befell.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from fault_nursery import LATE
from forked_program import NEEDS_LINUX, Program, assert_alike, assert_sound, files, soon
from judge_host import JudgeHost, Misbehaviour, close_mid_body, hang
from test_run import FEW, assert_equal, outcome
from torch.distributed import HashStore
from two_machines import ADDRESSES, TwoMachines, Unavailable

from comfy_g2rpo.files.one_writer import LOCK
from comfy_g2rpo.run.folder import RunFolder, read_state
from g2rpo_trainer.commands.exit_codes import AGAIN, MISTAKE
from g2rpo_trainer.processes import Left, Pulse, silence

pytestmark = [pytest.mark.xdist_group("faults"), NEEDS_LINUX]

SILENCE, SOON = 4.0, 120.0
"""Seconds after which a silent process is given up here, and within which all end, on a busy machine."""
PHASES = {
    "start": "g2rpo_trainer.run:prepare 1",
    "load": "g2rpo_trainer.run:load_policy 1",
    "evaluate": "comfy_g2rpo.run.evaluation:draw 1",
    "rollout": "comfy_g2rpo.rollout:roll_out 3",
    "decode": "comfy_g2rpo.run.scorer:_decoded 4",
    "reward": "comfy_g2rpo.run.scorer:_score 4",
    "score": "comfy_g2rpo.run.iteration:score 2",
    "update": "comfy_g2rpo.update:update 2",
    "optimizer": "comfy_g2rpo.update:clip_gradients 2",
    "reduce": "torch.distributed.distributed_c10d:all_reduce 2",
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
SHORT = [(1, "update", "term"), (1, "load", "memory4")]
NOT_TERM = ("start", "load", "checkpoint")
STOPPED = ("rollout", "reward", "update", "reduce", "evaluate")
LONG = [
    *((rank, phase, "kill") for rank in (0, 1) for phase in PHASES if (rank, phase) != (1, "checkpoint")),
    *((rank, phase, "term") for rank in (0, 1) for phase in PHASES if phase not in NOT_TERM),
    *((rank, phase, "memory") for rank in (0, 1) for phase in ("rollout", "decode", "update", "evaluate")),
    *((rank, "load", f"memory{room}") for rank in (0, 1) for room in (0, 4, 12, 28)),
    (0, "checkpoint", "memory"),
    *((rank, phase, "stop") for rank in (0, 1) for phase in STOPPED),
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
    run, fault = tmp_path / "run", f"{rank} {PHASES[phase]} {kind}"
    kind = kind.rstrip("0123456789")
    own, other, line = ENDS[kind]
    pids = program.train(run, fault)
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


# Between machines


@pytest.fixture(scope="module")
def machines() -> Iterator[TwoMachines]:
    try:
        made = TwoMachines()
    except Unavailable as error:
        pytest.skip(str(error))
    yield made
    made.remove()


SILENT = rf"process {{other}} of 2 has shown no life for {SILENCE:g} s"
GONE = r"process {other} of 2 was lost: it was killed, or its machine or the network is gone"
CUTS = {
    "closed": (GONE, GONE),
    "closed but for the store": ("the connection between the processes broke off",),
    "closed to the store": (f"{SILENT}|{GONE}",) * 2,
    "cut": (SILENT, SILENT),
}
"""What becomes of the connections, and what the processes say; one line where they still hear each other."""
CUT_SHORT = [("closed", 1, "update")]
CUT_LONG = [
    *(("closed", *where) for where in ((1, "start"), (0, "rollout"), (1, "reduce"), (0, "checkpoint"))),
    *(("closed but for the store", *where) for where in ((1, "reward"), (0, "reduce"), (1, "evaluate"))),
    *(("cut", *where) for where in ((1, "load"), (0, "rollout"), (1, "reduce"), (0, "checkpoint"))),
]


def part(
    how: str, rank: int, phase: str, program: Program, machines: TwoMachines, run: Path, *more: str
) -> None:
    """Train by two processes and let them lose each other while one is held in a phase. Both live on, and
    both have to end.
    """
    order = machines.order()
    if how in ("closed", "closed but for the store"):
        order["environment"] |= {"G2RPO_SILENCE": "60"}  # nobody waits for that
    fault = f"{rank} {PHASES[phase]} stop"
    pids = program.start("train", program.recipe, "--out", run, *more, fault=fault, **order)
    program.await_fault(rank)
    store = {"closed to the store": "=", "closed but for the store": "!="}.get(how)
    try:
        if how == "cut":
            machines.cut()
        else:
            machines.close_sockets(*(("dport", store, f":{program.port}") if store else ()))
        os.kill(pids[rank], signal.SIGCONT)
        both = program.wait(pids, 300)
    finally:
        machines.mend()
    said = program.said()
    assert [code for code, _ in both] == [AGAIN] * 2, said
    assert max(late for _, late in both) < SOON
    lines = [line.format(other=1 - place) for place, line in enumerate(CUTS[how])]
    again = f"; continue with: g2rpo resume {re.escape(str(run))}"
    assert len(said) == len(lines), said
    assert all(re.fullmatch(f"({line}){again}", text) for line, text in zip(lines, said, strict=True)), said
    assert_sound(run)


@pytest.mark.parametrize(
    ("how", "rank", "phase"),
    [
        *(pytest.param(*each) for each in CUT_SHORT),
        *(pytest.param(*each, marks=pytest.mark.long) for each in CUT_LONG),
    ],
)
def test_processes_that_lose_each_other_end_and_nothing_is_lost(
    how: str, rank: int, phase: str, program: Program, whole: Path, machines: TwoMachines, tmp_path: Path
) -> None:
    part(how, rank, phase, program, machines, run := tmp_path / "run")
    resumed(program, run, whole)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_can_tell_each_other_nothing_end(
    rank: int, program: Program, machines: TwoMachines, tmp_path: Path
) -> None:
    """Gradients still come through, so a run that is soon done ends well. This one is longer."""
    run, other = tmp_path / "run", tmp_path / "other"
    steps = "--set", "train.steps=400"
    part("closed to the store", rank, "update", program, machines, run, *steps)
    made = RunFolder(run).latest().name
    assert int(made) == RunFolder(run).metrics()[-1]["step"] >= 2
    program.run("train", program.recipe, "--out", other, "--set", f"train.steps={int(made)}")
    states = [read_state(folder / "checkpoints" / made)[0] for folder in (run, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.long
def test_of_four_processes_one_on_each_machine_says_who_is_lost(
    program: Program, machines: TwoMachines, tmp_path: Path
) -> None:
    run, order = tmp_path / "run", machines.order(2)
    order["environment"] |= {"G2RPO_SILENCE": "60"}
    words = "train", program.recipe, "--out", run, "--set", "train.prompts_per_step=4"
    pids = program.start(*words, count=4, fault=f"2 {PHASES['update']} stop", **order)
    program.await_fault(2)
    machines.close_sockets("dst", "=", ADDRESSES[0])
    os.kill(pids[2], signal.SIGCONT)
    assert [code for code, _ in program.wait(pids, 300)] == [AGAIN] * 4, program.said()
    ours, theirs = program.said()
    assert ours.startswith("process 2, 3 of 4 was lost: ") and theirs.startswith("process 0 of 4 was lost: ")
    assert_sound(run)
    program.run("resume", run, count=4)


# Between the run and its judge


def hang_up(host: JudgeHost, request: web.Request, body: dict[str, Any]) -> None:
    """Reset the connection in the middle of the request."""
    linger = struct.pack("ii", 1, 0)
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.transport.abort()


def at_first(behave: Misbehaviour) -> Misbehaviour:
    """Misbehave when a question comes for the first time."""
    known = set()

    def behaviour(host: JudgeHost, request: web.Request, body: dict[str, Any]) -> Any:
        question = json.dumps(body)
        if not body or question in known:
            return None
        known.add(question)
        return behave(host, request, body)

    return behaviour


def judged(host: JudgeHost) -> list[str]:
    """Return the settings by which a run asks a judge."""
    judge = {"name": "bright", "url": host.url, "protocol": "yes_no", "model": "toy"}
    return ["--set", f"rewards={json.dumps([judge | {'retries': 1, 'timeout': 5}])}"]


@pytest.fixture(scope="module")
def host() -> Iterator[JudgeHost]:
    with JudgeHost(keep=False) as made:
        yield made


@pytest.fixture(scope="module")
def well_judged(program: Program, host: JudgeHost) -> Path:
    """Train by two processes under a judge without a fault."""
    run = program.place / "well judged"
    program.run(*program.words(run, *judged(host)))
    return run


@pytest.mark.parametrize(
    "behave",
    [
        hang_up,
        pytest.param(close_mid_body, marks=pytest.mark.long),
        pytest.param(hang, marks=pytest.mark.long),
    ],
)
def test_a_judges_connection_that_breaks_in_a_request_costs_another_one(
    behave: Misbehaviour, program: Program, host: JudgeHost, well_judged: Path, tmp_path: Path
) -> None:
    run, host.behave, asked = tmp_path / "run", at_first(behave), host.asked
    program.run(*program.words(run, *judged(host)))
    assert host.asked - asked > 2 * 3 * 9, "every question comes twice"
    assert not program.said()
    assert_equal(outcome(run), outcome(well_judged))


@pytest.mark.long
@pytest.mark.parametrize("questions", [2 + 9 + 4, 2 + 3 * 9])
def test_a_judge_that_stays_away_ends_all_in_one_line(
    questions: int, program: Program, host: JudgeHost, well_judged: Path, tmp_path: Path
) -> None:
    run, host.behave, before = tmp_path / "run", None, host.asked
    host.behave = lambda *given: hang_up(*given) if host.asked - before > questions else None
    assert program.codes(*program.words(run, *judged(host))) == [MISTAKE] * 2
    *warned, said = sorted(program.said(), key=lambda line: line.startswith("error: "))
    assert warned and all("(this is said once)" in line for line in warned), program.said()
    assert re.fullmatch(
        r"error: .* judge .* of the 18 pictures of step [12].*; mend the .*, and resume the run", said
    )
    assert_sound(run)
    host.behave = None
    program.run(*program.words(run))
    assert_alike(run, well_judged)


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
