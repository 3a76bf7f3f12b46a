"""One job of a spool in a process of its own: it ends once, whoever stops, breaks or dies on the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_host import SMALL
from test_remote import with_lora

from comfy_g2rpo.files.one_writer import LOCK, one_writer
from comfy_g2rpo.files.safe import RunError, writing
from comfy_g2rpo.files.spool import JobError, Spool
from comfy_g2rpo.run.folder import RunFolder, is_run
from g2rpo_trainer.config.reading import find_recipe, read_yaml
from g2rpo_trainer.jobs import run_job as run_job_module
from g2rpo_trainer.jobs.run_job import Rules, begun, error_of, run_job

WORK = """
import sys
from pathlib import Path
from comfy_g2rpo.files.spool import Spool
from g2rpo_trainer.jobs.run_job import run_job
print(run_job(Spool(Path(sys.argv[1]) / "jobs"), "one", Path(sys.argv[1]) / "runs"))
"""


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))
"""
HANGS = """
import _thread, ctypes, signal, threading
from g2rpo_trainer.jobs import job_process
job_process.PATIENCE = 0.1
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=job_process.follow_parent, daemon=True).start()
while True:
    try:
        print("up", flush=True)
        ctypes.CDLL(None).sleep(300)
    except KeyboardInterrupt:  # before the call
        pass
"""


def job(steps: int, *settings: str) -> dict[str, Any]:
    """Describe a job of the tiny model."""
    return {
        "recipe": read_yaml(find_recipe("demo")),
        "settings": [*SMALL, f"train.steps={steps}", *settings],
        "source": "test",
    }


def later(until: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """Do something in a thread once a condition holds, within a minute and a half."""

    def work() -> None:
        deadline = time.monotonic() + 90
        while not until() and time.monotonic() < deadline:
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def steps_of(run: Path) -> int:
    """Count the rows of a run."""
    return len(RunFolder(run).metrics()) if is_run(run) else 0


def test_a_job_that_is_none_fails_in_one_line_without_a_process(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "jobs")
    for name, content, words in (
        ("none", {}, "no recipe of sections"),
        ("list", {"recipe": [], "settings": []}, "no recipe of sections"),
        ("settings", {"recipe": {}, "settings": "a.b=c"}, "settings that are no list"),
        ("deep", {"recipe": {"model": "DEEP"}, "settings": []}, "nested too deeply"),
    ):
        spool.submit(name, content)
        place = spool.path / f"{name}.job.json"
        place.write_text(place.read_text().replace('"DEEP"', "[" * 900 + "]" * 900))
        assert run_job(spool, name, tmp_path / "runs") == "failed"
        assert words in spool.ended(name)["error"] and "\n" not in spool.ended(name)["error"]
    assert not list((tmp_path / "runs").glob("*.log"))


def test_who_prepares_a_job_may_refuse_it(tmp_path: Path) -> None:
    def refuse(job: Any) -> Any:
        raise ValueError(f"no {job['source']}\nis taken")

    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1))
    assert run_job(spool, "one", tmp_path / "runs", Rules(prepare=refuse)) == "failed"
    assert spool.ended("one")["error"] == "no test is taken"
    with pytest.raises(JobError, match="has ended"):
        run_job(spool, "one", tmp_path / "runs")


def test_a_cancelled_job_ends_at_once_where_nobody_works_on_it(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1))
    spool.submit("two", job(1))
    assert spool.stop("one") == "cancelled"
    spool.cancel("two")  # by somebody else, while no worker was there
    assert run_job(spool, "two", tmp_path / "runs") == "cancelled" and not (tmp_path / "runs").exists()
    spool.submit("three", job(1))
    with spool.take("three"):
        assert spool.stop("three") == "running"
        with pytest.raises(RunError, match="being written by"):
            run_job(spool, "three", tmp_path / "runs")


def test_a_job_whose_run_somebody_still_writes_is_not_begun(tmp_path: Path) -> None:
    def refuse(job: Any) -> Any:
        raise ValueError("it was begun")

    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1))
    with one_writer(tmp_path / "runs" / "one"):
        leaving = Rules(prepare=refuse, stop=lambda: True)
        assert run_job(spool, "one", tmp_path / "runs", leaving) == "waiting"
        waits = threading.Event()
        # Asked for the first time after the wait for the other process has begun.
        staying = Rules(prepare=refuse, stop=lambda: waits.set() or False, pause=0.01)
        thread = later(waits.is_set, lambda: spool.cancel("one"))
        assert run_job(spool, "one", tmp_path / "runs", staying) == "cancelled"
        thread.join()
    spool.submit("two", job(1))
    (tmp_path / "runs/two").mkdir()
    (tmp_path / "runs/two" / LOCK).touch()  # as a process leaves it that is killed
    assert run_job(spool, "two", tmp_path / "runs", Rules(prepare=refuse)) == "failed"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
def test_a_job_waits_while_the_disk_is_full(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1) | {"recipe": {"out": "x" * 3000}})
    ran = subprocess.run([sys.executable, "-c", FULL + WORK, tmp_path], capture_output=True, text=True)
    assert "RunError: cannot write" in ran.stderr and "file too large; make room" in ran.stderr
    assert spool.state("one") == "waiting"


@pytest.mark.skipif(sys.platform == "win32", reason="sleeps in the C library")
def test_a_run_that_hangs_ends_some_time_after_its_parent() -> None:
    child = subprocess.Popen([sys.executable, "-c", HANGS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child.stdout:
        assert child.stdout.readline() == b"up\n"
        child.stdin.close()
        assert child.wait(120) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="runs a shell script")
def test_whoever_presses_ctrl_c_twice_waits_for_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 300\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(KeyboardInterrupt), run_job_module._started([], tmp_path / "log", 1.0) as child:
        raise KeyboardInterrupt
    assert child.poll() is None  # it ends by itself, as its input has
    child.kill()
    child.wait()


def test_a_mistake_in_the_recipe_is_the_jobs_error_in_one_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1, "train.stepz=2"))
    assert run_job(spool, "one", tmp_path / "runs") == "failed"
    assert spool.ended("one")["error"].startswith("train.stepz is unknown (did you mean train.steps?)")


@pytest.mark.parametrize(
    ("said", "code", "line"),
    [
        (b"warning\nerror: first\nerror: x is 3; choose 4\nafter\n", 2, "x is 3; choose 4"),
        (b"Traceback\n  File\nKeyError: 'a'\n", 1, "KeyError: 'a'; see one.log"),
        (b"", 1, "exit code 1; see one.log"),
        (b"half\n", -9, "its process was ended by signal 9; 9 may mean that memory ran out; see one.log"),
        (b"\xff" * 10**6 + b"\nerror: " + b"y" * 9999, 2, "y" * 2000),
    ],
)
def test_the_error_of_a_job_is_one_line_of_what_its_process_said(
    said: bytes, code: int, line: str, tmp_path: Path
) -> None:
    (tmp_path / "one.log").write_bytes(said)
    assert error_of(tmp_path / "one.log", code) == line


@pytest.mark.long
def test_a_job_stops_with_its_worker_goes_on_with_the_next_and_ends_once(tmp_path: Path) -> None:
    spool, runs = Spool(tmp_path / "jobs"), tmp_path / "runs"
    spool.submit("one", job(40))
    command = [sys.executable, "-c", WORK, str(tmp_path)]
    # Killed without a word: the run of its job must stop by itself, and the next worker wait for that.
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as worker:
        later(lambda: steps_of(runs / "one") >= 6, lambda: os.kill(worker.pid, signal.SIGKILL)).join()
    assert spool.ended("one") is None
    stop = threading.Event()
    more = later(lambda: steps_of(runs / "one") >= 20, stop.set)
    assert run_job(spool, "one", runs, Rules(stop=stop.is_set)) == "waiting"
    more.join()
    assert run_job(spool, "one", runs) == "done"
    end = spool.ended("one")
    assert end["step"] == 40 and (runs / "one" / end["lora"]).is_file()
    steps = [row["step"] for row in RunFolder(runs / "one").metrics() if "nfe" in row]
    assert steps == list(range(1, 41))


def test_a_run_that_is_tried_again_takes_other_settings_as_far_as_it_can(tmp_path: Path) -> None:
    given = {
        "recipe": {},
        "settings": ["train.slots=4", "model.dtype=fp32", "rewards.0.batch=2", "lora.rank=3"],
    }
    run, recipe = tmp_path / "one", tmp_path / "one.recipe"
    all_of_them = [f"--set={each}" for each in given["settings"]]
    begin = ["train", str(recipe), "--out", str(run), "--quiet"]
    assert run_job_module._words(given, run, recipe) == [*begin, *all_of_them]
    made = RunFolder.create(run, {"config": {}, "recipe": {}})
    with_lora(made, 0)
    # It has learned nothing: memory ran out, say, for which another preset is given.
    assert run_job_module._words(given, run, recipe) == [*begin, "--replace", *all_of_them]
    with_lora(made, 5)
    kept = ["--set=train.slots=4", "--set=rewards.0.batch=2"]
    assert run_job_module._words(given, run, recipe) == ["resume", str(run), "--quiet", *kept]


def test_a_run_without_a_checkpoint_has_learned_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"config": {}, "recipe": {}})
    assert not begun(run.path)
    with_lora(run, 0)
    assert not begun(run.path)
    with_lora(run, 1)
    assert begun(run.path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_run_that_is_replaced_can_be_replaced_again_wherever_that_broke_off(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunFolder.create(tmp_path / "one", {"config": {}, "recipe": {}})
    with_lora(made, 5)
    unlink = Path.unlink

    def breaks_off(path: Path, missing_ok: bool = False) -> None:
        if path.name == name:
            raise OSError(5, "killed here")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", breaks_off)
        with pytest.raises(RunError, match="killed here"):
            RunFolder.create(made.path, {"config": {}, "recipe": {}}, replace=True)
    assert not made.checkpoints.exists() and is_run(made.path) == (name == "metrics.jsonl")
    assert RunFolder.create(made.path, {"config": {}, "recipe": {}}, replace=True).metrics() == []


def test_a_job_that_a_service_has_is_not_trained_here_as_well(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1))
    spool.send("one", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"sent to http://127\.0\.0\.1:9; start g2rpo worker --forward"):
        run_job(spool, "one", tmp_path / "runs")
    assert spool.stop("one") == "waiting" and spool.cancelled("one")


@pytest.mark.long
def test_a_job_is_cancelled_or_goes_over_a_limit_on_the_way_and_keeps_its_lora(tmp_path: Path) -> None:
    spool, runs = Spool(tmp_path / "jobs"), tmp_path / "runs"
    spool.submit("one", job(5000))
    thread = later(lambda: steps_of(runs / "one") >= 3, lambda: spool.stop("one"))
    assert run_job(spool, "one", runs) == "cancelled"
    thread.join()
    assert (runs / "one" / spool.ended("one")["lora"]).is_file() and "error" not in spool.ended("one")
    spool.submit("two", job(5000))
    rules = Rules(over=lambda run: "too many steps" if steps_of(run) > 3 else "")
    assert run_job(spool, "two", runs, rules) == "failed"
    assert spool.ended("two")["error"] == "too many steps" and spool.ended("two")["step"] >= 3


def test_a_job_waits_for_room_on_the_disk_and_fails_by_what_that_does_not_mend(tmp_path: Path) -> None:
    def full(job: Any) -> Any:
        with writing(tmp_path / "some"):
            raise OSError(errno.ENOSPC, "No space left on device")

    def damaged(job: Any) -> Any:
        raise RunError("config.json is damaged (no table); restore it or start a new run")

    spool = Spool(tmp_path / "jobs")
    spool.submit("one", job(1))
    with pytest.raises(RunError, match="no space left on device; make room"):
        run_job(spool, "one", tmp_path / "runs", Rules(prepare=full))
    assert spool.state("one") == "waiting"
    assert run_job(spool, "one", tmp_path / "runs", Rules(prepare=damaged)) == "failed"
    assert "is damaged" in spool.ended("one")["error"]
