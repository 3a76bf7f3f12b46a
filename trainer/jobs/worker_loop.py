"""A worker beside ComfyUI: takes the jobs of its spool one after another, the oldest first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.files.spool import DONE, FAILED, WAITING, JobError, Spool

from .graph_job import ModelFolders, prepared
from .run_job import Rules, run_job

PAUSE = 1.0  # seconds between two looks at an empty spool
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Worker:
    """Runs the jobs of a spool; `settings` and the preset of a card's size are its owner's, for every job."""

    def __init__(
        self,
        spool: Path,
        runs: Path,
        folders: ModelFolders,
        settings: Sequence[str] = (),
        preset: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.spool, self.runs, self.folders, self.say = Spool(spool), runs, folders, say
        self.settings, self.preset = settings, preset
        self.ending = threading.Event()
        self.told: set[str] = set()
        self.results: dict[str, str] = {}
        """How the jobs stand that it has run, by id."""

    def work(self, once: bool = False) -> bool:
        """Run what waits until a signal comes, or, `once`, until nothing waits; False after a signal."""
        with self.stoppable():
            while not self.ending.is_set():
                waiting = self.waiting()
                for job_id in waiting:
                    self.run(job_id)
                if once and not waiting:
                    return True
                if not waiting:
                    self.ending.wait(PAUSE)
        return False

    def waiting(self) -> list[str]:
        """List the jobs that wait, oldest first; one that cannot be read is told once and left alone."""
        found = []
        for job_id in self.spool.ids():
            try:
                if self.spool.state(job_id) == WAITING:
                    found.append(job_id)
            except JobError as error:
                self.tell_once(str(error))
        return found

    def run(self, job_id: str) -> None:
        """Run a job, unless another worker has it or a signal has come."""
        if self.ending.is_set():
            return
        rules = Rules(prepare=partial(self.prepare, job_id), stop=self.ending.is_set)
        self.say(f"{job_id}: begins")
        try:
            status = run_job(self.spool, job_id, self.runs, rules)
        except (RunError, JobError) as error:  # taken, or ended, by another worker meanwhile
            self.tell_once(str(error))
            return
        self.results[job_id] = status
        ended = self.spool.ended(job_id) or {}
        what = {DONE: f", {self.runs / job_id / str(ended.get('lora'))}", FAILED: f", {ended.get('error')}"}
        self.say(f"{job_id}: {status}{what.get(status, '')}")

    def prepare(self, job_id: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is run in place of a job."""
        own = prepared(job, self.folders, self.runs / job_id)
        return {**own, "settings": [*self.of_preset(own["recipe"]), *self.settings]}

    def of_preset(self, recipe: Mapping[str, Any]) -> list[str]:
        """Return the settings of the preset for a job's model; none for a family without presets."""
        if self.preset is None:
            return []
        from ..cost.presets import presets, written

        family = presets().get(str(recipe["model"].get("family")), {})
        return written(family.get(self.preset, {}))

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

        former = {number: signal.signal(number, ask) for number in STOPS}
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
