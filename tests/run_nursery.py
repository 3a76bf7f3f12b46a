"""Train in forks of one process that has all libraries loaded, one order per line of JSON.

A fork can be made to die at its N-th change of the run's folder, with what it was writing half on the disk,
and to wait at its start until a file appears.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.reports.progress import Silent

CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR
WAIT = 300  # seconds


class Death:
    """Count what a process changes below a folder; at the given change, kill it."""

    def __init__(self, folder: str, at: int) -> None:
        self.folder, self.at, self.count = folder, at, 0
        self.fsync = os.fsync
        os.fsync = self.synced  # a fork of a test, which dies with it
        sys.addaudithook(self.heard)

    def heard(self, event: str, given: tuple[Any, ...]) -> None:
        """Take note of a change of the file system."""
        if event not in CHANGES or (event == "open" and not (given[2] & WRITING)):
            return
        if isinstance(given[0], (str, bytes, os.PathLike)) and os.fsdecode(given[0]).startswith(self.folder):
            self.changed()

    def synced(self, handle: int) -> None:
        """Take note that a file is about to be on the disk: at the fatal one, half of it is."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.startswith(self.folder) and os.path.isfile(path):
            if self.count + 1 == self.at:
                content = Path(path).read_bytes()
                # Of what is appended to, only the last line is new.
                kept = content.rfind(b"\n", 0, -1) + 1 if path.endswith("metrics.jsonl") else 0
                os.ftruncate(handle, kept + (len(content) - kept) // 2)
            self.changed()
        self.fsync(handle)

    def changed(self) -> None:
        """Count, and die."""
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Gated(Silent):
    """Wait at the start of a run until a file appears."""

    def __init__(self, gate: str | None) -> None:
        self.gate = gate

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        deadline = time.monotonic() + WAIT
        Path(f"{self.gate}.waiting").touch() if self.gate else None
        while self.gate and not os.path.exists(self.gate) and time.monotonic() < deadline:
            time.sleep(0.02)


def work(order: dict[str, Any]) -> None:
    """Train as ordered; the log holds the error, or how many changes there were."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    made, death = from_dict(order["config"]), Death(order["out"], order.get("kill", 0))
    try:
        training.train(made, Path(order["out"]), progress=Gated(order.get("gate")), **order["how"])
    except (ValueError, OSError) as error:
        Path(order["log"]).write_text(f"{type(error).__name__}: {error}")
        os._exit(2)
    Path(order["log"]).write_text(str(death.count))
    os._exit(0)


def warm(tree: dict[str, Any]) -> None:
    """Load what a run loads, but differentiate nothing: forks of a process that has cannot."""
    from accelerate import Accelerator

    training.prepare(from_dict(tree), Accelerator(cpu=True))


def main() -> None:
    """Obey: an order with a folder starts a fork, one with a process waits for it."""
    for line in sys.stdin:
        order = json.loads(line)
        if "warm" in order:
            warm(order["warm"])
            answer = {}
        elif "wait" in order:
            status = os.waitpid(order["wait"], 0)[1]
            answer = {"code": os.waitstatus_to_exitcode(status)}
        elif (pid := os.fork()) == 0:
            try:
                work(order)
            finally:
                os._exit(99)
        else:
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
