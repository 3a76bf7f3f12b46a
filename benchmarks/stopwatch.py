"""CPU seconds of a run's updates and evaluations, in a child process that takes turns with another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Client
from types import ModuleType
from typing import Any


class Stopwatch:
    """Clock the loop of a run: what lies between two updates counts for the first."""

    def __init__(self, address: str) -> None:
        self.turns = Client(address)
        self.spans: list[tuple[str, float]] = []
        self.what, self.begun = "", 0.0

    def watch(self, loop: ModuleType) -> None:
        """Put the clock around the loop's parts; only this process is changed."""
        loop.iterate = self.timed("update", loop.iterate)
        loop.look = self.timed("evaluation", loop.look)
        loop.save = self.timed("", loop.save)

    def timed(self, what: str, part: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a part of the loop; `save`, which has no name, only ends an update."""

        def call(*given: Any) -> Any:
            if not what:
                self.end("update")
                return part(*given)
            self.end("update")
            self.turns.send("ready")
            self.turns.recv()
            self.what, self.begun = what, time.process_time()
            try:
                return part(*given)
            finally:
                self.end("evaluation")

        return call

    def end(self, what: str) -> None:
        """End the span that runs, if it is one of this kind."""
        if self.what == what:
            self.spans.append((what, time.process_time() - self.begun))
            self.what = ""

    def close(self) -> None:
        """Hand the spans over."""
        self.turns.send(self.spans)
        self.turns.close()
