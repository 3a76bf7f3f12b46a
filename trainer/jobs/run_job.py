"""Run one job of a spool in a process of its own: claim it, train or resume, stop when asked, write its end.

    runs/<id>/          the run folder
    runs/<id>.recipe    the recipe as the process reads it
    runs/<id>.log       what the process has said

A job whose worker died is taken by the next one, which resumes its run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from comfy_g2rpo.files.one_writer import LOCK, opened
from comfy_g2rpo.files.safe import FileError, RunError, write_bytes, writing
from comfy_g2rpo.files.spool import CANCELLED, DONE, FAILED, WAITING, JobError, Spool
from comfy_g2rpo.run.folder import MAY_CHANGE, UNREAD, RunFolder, is_run

from ..commands.exit_codes import SIGNALLED, STOPS

Job = Mapping[str, Any]
INTERRUPTED = {code for number in STOPS for code in (-number, SIGNALLED + number)}
"""Exit codes of a run that somebody stopped: it can go on."""
TAIL = 2**16
"""Bytes at the end of a log in which its error is looked for."""


@dataclass(frozen=True)
class Rules:
    """How a job is run, beside what it says itself; times are in seconds."""

    prepare: Callable[[Job], Job] = dict
    """Returns what is run in place of the job; ValueError with the reason for a job that is refused."""
    stop: Callable[[], bool] = lambda: False
    """Whether the worker is ending: then the run stops, and its job waits for the next worker."""
    over: Callable[[Path], str] = lambda run: ""
    """Which limit a run has gone over, in words; nothing while it is within them."""
    pause: float = 0.5
    patience: float = 600.0
    """How long a run may take to reach its next forward once it is to stop; then it is killed."""


def run_job(spool: Spool, job_id: str, runs: Path, rules: Rules | None = None) -> str:
    """Run a job and write its end: done, failed or cancelled; waiting if it was stopped and is to go on.

    RunError if another worker holds the job, JobError if it has ended.
    """
    rules, begin = rules or Rules(), time.monotonic()
    with spool.take(job_id) as job:
        if url := spool.sent(job_id):
            raise RunError(
                f"{job_id} was sent to {url}; start g2rpo worker --forward {url}, or remove {job_id}.sent "
                f"from the spool, and {Path(runs) / job_id}, to train it here"
            )
        run = Path(runs).resolve() / job_id
        try:
            status, error = _run(job, run, rules, lambda: spool.cancelled(job_id))
        except ValueError as refusal:
            if isinstance(refusal, RunError) and isinstance(refusal.__cause__, OSError):
                raise  # this machine's disk is full, say: the job can go on later
            status, error = FAILED, " ".join(str(refusal).split())
        if status != WAITING:
            said = {"error": error} if error else {}
            spool.end(job_id, status, **said, **outcome(run), seconds=round(time.monotonic() - begin, 1))
    return status


def outcome(run: Path) -> dict[str, Any]:
    """Return the LoRA of a run so far, by its place in the run folder; empty before the first checkpoint."""
    with suppress(FileError, OSError):
        if is_run(run) and (place := RunFolder(run).outcome()):
            return {"lora": (place / "lora.safetensors").relative_to(run).as_posix(), "step": int(place.name)}
    return {}


def _run(job: Job, run: Path, rules: Rules, cancelled: Callable[[], bool]) -> tuple[str, str]:
    """Run a job's process to its end; return the job's status and its error."""
    log, recipe = run.with_name(f"{run.name}.log"), run.with_name(f"{run.name}.recipe")
    if cancelled():
        return CANCELLED, ""
    if not _free(run, rules, cancelled):
        return (CANCELLED if cancelled() else WAITING), ""
    words = _words(rules.prepare(job), run, recipe)
    reason = ""
    with _started(words, log, rules.patience) as child:
        while child.poll() is None and not (cancelled() or rules.stop()) and not reason:
            with suppress(subprocess.TimeoutExpired):
                child.wait(rules.pause)
            reason = rules.over(run)
        code = _ended(child, rules.patience)
    if code == 0:
        return DONE, ""
    if cancelled():
        return CANCELLED, ""
    if reason:
        return FAILED, reason
    return (WAITING, "") if rules.stop() or code in INTERRUPTED else (FAILED, error_of(log, code))


def _free(run: Path, rules: Rules, cancelled: Callable[[], bool]) -> bool:
    """Wait for the process of a worker that died to leave its run; False if the wait was broken off."""
    lock = run / LOCK
    while lock.exists():
        handle = opened(lock)
        if handle is not None:
            os.close(handle)
            break
        if cancelled() or rules.stop():
            return False
        time.sleep(rules.pause)
    return True


def _words(job: Job, run: Path, recipe: Path) -> list[str]:
    """Return the arguments of the command line that runs a job: train, or resume what is there."""
    sections, settings = job.get("recipe"), job.get("settings", [])
    if not isinstance(sections, dict) or not isinstance(settings, list):
        raise JobError("the job has no recipe of sections, or settings that are no list; submit another one")
    if is_run(run) and begun(run):
        # What a run has learned by stays; the rest may fit a card or a judge better now.
        return ["resume", str(run), "--quiet", *(f"--set={each}" for each in settings if may_change(each))]
    try:
        text = yaml.safe_dump(sections, allow_unicode=True, sort_keys=False)
    except RecursionError as error:
        raise JobError("the job's recipe is nested too deeply; submit another one") from error
    write_bytes(recipe, text.encode("utf-8", "surrogatepass"))
    anew = ["--replace"] if is_run(run) else []
    given = [f"--set={each}" for each in settings]
    return ["train", str(recipe), "--out", str(run), "--quiet", *anew, *given]


def begun(run: Path) -> bool:
    """Return whether a run has learned something."""
    newest = RunFolder(run).latest()
    return newest is not None and int(newest.name) > 0


def may_change(setting: str) -> bool:
    """Return whether a setting is of a field that may be another one when a run goes on."""
    section, _, rest = setting.partition("=")[0].strip().partition(".")
    return section in UNREAD or rest.rpartition(".")[2] in MAY_CHANGE.get(section, ())


@contextmanager
def _started(words: list[str], log: Path, patience: float) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process of a job, which is stopped with the context."""
    command = [sys.executable, "-m", f"{__package__}.job_process", *words]
    group = {"start_new_session": True}
    if os.name == "nt":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    with writing(log), open(log, "wb") as said:
        # A group of its own: Ctrl-C in the worker's terminal reaches the run by way of the worker alone. The
        # folder is one of ours, so that Python finds no foreign modules there, and a recipe no foreign files.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=Path(__file__).parent, **group
        )
    try:
        yield child
    except KeyboardInterrupt:
        child.stdin.close()  # it ends by itself, and nobody waits for that
        raise
    except BaseException:
        _ended(child, patience)
        raise


def _ended(child: subprocess.Popen[bytes], patience: float) -> int:
    """Ask a process to stop, unless it has ended, and return its exit code."""
    child.stdin.close()
    try:
        return child.wait(patience)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def error_of(log: Path, code: int) -> str:
    """Return what a process that failed has said, in one line."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return said[-1][:2000]
    if code < 0:
        return f"its process was ended by signal {-code}; 9 may mean that memory ran out; see {log.name}"
    return f"{lines[-1] if lines else f'exit code {code}'}; see {log.name}"[:2000]
