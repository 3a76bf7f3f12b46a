"""What a run needs of ComfyUI: its folders, its stop button, its progress bar and its page."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from server import PromptServer

from ...comfy_g2rpo.blocks.run_names import checked_name
from ...comfy_g2rpo.files.safe import FileError
from ...comfy_g2rpo.run.folder import RunFolder, is_run
from .routes import runs_root

NEWEST = "newest"
EVENT = "g2rpo.progress"
SECONDS_BETWEEN_EVENTS = 0.25
STOPS = (comfy.model_management.InterruptProcessingException, torch.cuda.OutOfMemoryError)

NAME_TIP = "Letters, digits, dots, dashes and underscores, 64 at most."
check_interrupted: Callable[[], None] = comfy.model_management.throw_exception_if_processing_interrupted


def contained(root: Path, name: str, widget: str) -> Path:
    """Return root/name; raise ValueError unless it lies in the root, links followed."""
    base = os.path.realpath(root)
    place = os.path.realpath(os.path.join(base, name))
    if os.path.commonpath((base, place)) != base or place == base:
        raise ValueError(f"{widget} is {name[:80]!a}, which leads out of its folder; choose another name")
    return Path(place)


def run_place(name: str, widget: str = "run") -> Path:
    """Return the folder of a run; refuse one that has a link out of it, which writing would follow."""
    name = checked_name(name, widget)
    if name.lower() == NEWEST:
        raise ValueError(f"{widget}: {name} stands for the newest run in Run Monitor; give another name")
    place = contained(runs_root(), name, widget)
    for folder, folders, files in os.walk(place):
        for entry in (*folders, *files):
            path = os.path.join(folder, entry)
            if os.path.islink(path) and os.path.commonpath((place, os.path.realpath(path))) != str(place):
                raise ValueError(
                    f"{widget} is {name[:80]!a}, and its {entry[:80]!a} is a link that leads out of "
                    "it; remove the link"
                )
    return place


def known_run(name: str, advice: str) -> RunFolder:
    """Return a run that exists; raise ValueError, with advice, where there is none of this name."""
    place = run_place(name)
    if not is_run(place):
        raise ValueError(f"run: there is no run named {name[:80]!a}; {advice}")
    return RunFolder(place)


def loras_root() -> Path:
    """Return the folder of our LoRA files, one that LoraLoader lists."""
    return Path(folder_paths.get_folder_paths("loras")[0]) / "g2rpo"


def lora_place(stem: str, widget: str, taken: Callable[[Path], bool] = os.path.exists) -> Path:
    """Return the first LoRA file named stem, stem_00002, … that is not taken."""
    stem = checked_name(stem, widget)
    for number in range(1, 100_000):
        file = f"{stem}.safetensors" if number == 1 else f"{stem}_{number:05d}.safetensors"
        place = contained(loras_root(), file, widget)
        if not taken(place):
            return place
    raise FileError(f"{widget} is {stem!r}, and all its numbers are taken; choose another name")


def lora_listing(place: Path) -> str:
    """Return a LoRA file's name as LoraLoader's list shows it."""
    return os.path.relpath(place, os.path.realpath(folder_paths.get_folder_paths("loras")[0]))


def asking_client() -> str | None:
    """Return the client whose graph runs, to tell nobody else; None where there is none.

    A script that names no client gets no messages, for core would send them to every page.
    """
    return getattr(getattr(PromptServer, "instance", None), "client_id", None)


class Live:
    """Tell the page and the progress bar how a run goes, and stop it where the user asks for that."""

    def __init__(self, node: str | None, run: str, rows: int = 0) -> None:
        self.node, self.run, self.rows = node, run, rows
        self.total = self.first = self.at = self.done = 0
        self.phase, self.expected = "", {}
        self.began = self.sent = 0.0
        self.bar: Any = None

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin at `first_step`; write the cost of a step into the log before anything runs."""
        self.total, self.first, self.at, self.began = total_steps, first_step, first_step, time.monotonic()
        self.bar = comfy.utils.ProgressBar(max(total_steps, 1), node_id=self.node)
        self.bar.update_absolute(min(first_step, total_steps), max(total_steps, 1))
        if first_step < total_steps:
            self.note(f"steps {first_step} to {total_steps}, {plan_line}")
        self.send("rollout", now=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a row that was added to the run folder."""
        self.rows += 1
        self.phase = ""
        if metrics["step"] == self.first:
            # The untrained model was measured: only what follows tells how long a step takes.
            self.began = time.monotonic()
        self.at = int(metrics["step"])
        self.bar.update_absolute(min(self.at, self.total), max(self.total, 1))
        self.send("rollout")

    def note(self, text: str) -> None:
        """Write a note into ComfyUI's log."""
        logging.info("G²RPO run %s: %s", self.run, text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tell the page that the run has ended."""
        self.at = int(summary.get("steps", self.at))
        self.send("done", now=True)

    def stopped(self) -> None:
        """Tell the page that the run was stopped."""
        self.send("stopped", now=True)

    def check(self, phase: str) -> None:
        """Raise where the user has pressed the stop button; called before every forward."""
        check_interrupted()
        self.done = self.done + 1 if phase == self.phase else 1
        self.phase = phase
        self.send(phase)

    def send(self, phase: str, now: bool = False) -> None:
        """Tell the page, at most four times a second."""
        clock = time.monotonic()
        client = asking_client()
        if client is None or (not now and clock - self.sent < SECONDS_BETWEEN_EVENTS):
            return
        self.sent = clock
        made = self.at - self.first
        left = (clock - self.began) / made * (self.total - self.at) if made > 0 else None
        of = max(self.expected[phase], self.done) if phase in self.expected else None
        event = {"node": self.node, "run": self.run, "row": self.rows, "seconds_left": left}
        event |= {"step": self.at, "total": self.total, "phase": phase, "done": self.done, "of": of}
        PromptServer.instance.send_sync(EVENT, event, client)
