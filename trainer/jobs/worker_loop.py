"""A worker beside ComfyUI: takes the jobs of its spool one after another, the oldest first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.files.spool import DONE, FAILED, WAITING, JobError, Spool

from ..commands.exit_codes import heard
from .graph_job import Owner
from .run_job import Rules, run_job

PAUSE = 1.0  # seconds between two looks at an empty spool


class Trainer(Protocol):
    """Brings a job of a spool to its end."""

    def train(self, spool: Spool, job_id: str, runs: Path, stop: Callable[[], bool]) -> str:
        """Return how the job ended; waiting where it was stopped and is to go on."""


@dataclass(frozen=True)
class Here:
    """Trains on this machine."""

    owner: Owner

    def train(self, spool: Spool, job_id: str, runs: Path, stop: Callable[[], bool]) -> str:
        """Run a job in a process of its own."""
        rules = Rules(prepare=partial(self.owner.prepare, stem=runs / job_id), stop=stop)
        return run_job(spool, job_id, runs, rules)


class Worker:
    """Has the jobs of a spool trained, one after another."""

    def __init__(self, spool: Path, runs: Path, trainer: Trainer, say: Callable[[str], None] = print) -> None:
        self.spool, self.runs, self.trainer, self.say = Spool(spool), runs, trainer, say
        self.ending = threading.Event()
        self.told: set[str] = set()
        self.results: dict[str, str] = {}
        """How the jobs stand that it has run, by id."""

    def work(self, once: bool = False) -> bool:
        """Run what waits until a signal comes, or, `once`, until nothing waits; False after a signal."""
        with self.stoppable():
            while not self.ending.is_set():
                if any([self.run(job_id) for job_id in self.waiting()]):
                    continue
                if once:
                    return not self.ending.is_set()
                self.ending.wait(PAUSE)
        return False

    def waiting(self) -> list[str]:
        """List the jobs that wait, oldest first; one that cannot be read is told once and left alone."""
        found = []
        for job_id in self.spool.ids():
            try:
                if self.spool.state(job_id) == WAITING:
                    found.append(job_id)
            except (RunError, JobError) as error:
                self.tell_once(str(error))
        return found

    def run(self, job_id: str) -> bool:
        """Run a job, unless another worker has it or a signal has come; return whether it was run."""
        if self.ending.is_set():
            return False
        self.tell_once(f"{job_id}: begins")
        try:
            status = self.trainer.train(self.spool, job_id, self.runs, self.ending.is_set)
        except (RunError, JobError) as error:  # taken, or ended, by another worker meanwhile
            self.tell_once(str(error))
            return False
        self.told.discard(f"{job_id}: begins")
        self.results[job_id] = status
        ended = self.spool.ended(job_id) or {}
        what = {DONE: f", {self.runs / job_id / str(ended.get('lora'))}", FAILED: f", {ended.get('error')}"}
        self.say(f"{job_id}: {status}{what.get(status, '')}")
        return True

    def tell_once(self, text: str) -> None:
        """Say something that may come again every second."""
        if text not in self.told:
            self.told.add(text)
            self.say(text)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Turn Ctrl-C and its like into the end of the work: the run stops at its next forward.

        The second one ends the worker at once; its run follows it.
        """

        def ask(number: int, frame: Any) -> None:
            if self.ending.is_set():
                raise KeyboardInterrupt
            self.ending.set()

        former = {number: signal.signal(number, ask) for number in heard()}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def use_comfyui(base: Path) -> None:
    """Take reward models and tokenizers from a ComfyUI, unless the environment names others."""
    for name, place in (("G2RPO_REWARDS", base / "models/g2rpo_rewards"), ("COMFYUI_PATH", base)):
        if place.is_dir():
            os.environ.setdefault(name, str(place))
