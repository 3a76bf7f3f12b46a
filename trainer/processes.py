"""The processes of one run: where they wait for each other, and how all end where one of them does."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from comfy_g2rpo.run.setup import World

from .commands.exit_codes import AGAIN, DONE, MISTAKE, SIGNALLED, UNFORESEEN, ran_out

PATIENCE = timedelta(days=30)
"""A judge may keep one process for long: the others wait. That one has ended or stopped shows otherwise."""
SILENCE = 300.0
"""Seconds without a sign of life after which a process is given up; $G2RPO_SILENCE has other ones."""
LOST = "was lost: it was killed, or its machine or the network is gone"
CONNECTION = "the connection between the processes"
"""What is said of processes that show no life any more, and what is gone where all do."""
BEAT, GRACE = 0.5, 3.0
"""Seconds from one sign of life to the next, and for which one waits to learn why another process is gone."""
NUMBERS = itertools.count()


def silence() -> float:
    """Return the seconds without a sign of life after which a process is given up."""
    return seconds_given("G2RPO_SILENCE", SILENCE)


def seconds_given(variable: str, usual: float) -> float:
    """Return the seconds that an environment variable gives; ValueError where these are no sensible ones."""
    given = os.environ.get(variable) or str(usual)
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 2 <= seconds <= PATIENCE.total_seconds():
        raise ValueError(
            f"{variable} is {given[:40]!a}; give seconds, from 2 to {PATIENCE.total_seconds():g}"
        )
    return seconds


class Left(Exception):
    """Another process has ended the run: the exit code to end with, and a line where nobody else says it."""

    def __init__(self, code: int, line: str = "") -> None:
        super().__init__(line)
        self.code = code


class Pulse:
    """What the processes of a run let each other know: that they live, and how they have ended.

    It beats in a thread, so that it goes on in a long forward or call of a judge. A process that is stopped
    (SIGSTOP, a frozen machine) has no pulse.
    """

    def __init__(self, store: Any, index: int, count: int) -> None:
        self.store, self.index, self.count = store, index, count
        self.silence = silence()
        self.key = f"g2rpo/{next(NUMBERS)}"
        self.beats, self.code, self.waited, self.deadline = 0, None, 0.0, 0.0
        self.heard = {rank: (b"", time.monotonic()) for rank in range(count) if rank != index}
        self.ends: dict[int, tuple[int, list[int], str]] = {}
        self.cause: tuple[list[int], str] = [], ""
        """Which processes are gone, and what became of them, where this one ends for that."""
        self.met = time.monotonic()
        self.look: Callable[[str], None] = lambda phase: self.check()
        """Called while waiting; raises to stop."""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def beat(self) -> None:
        """Tell and hear until this process ends, and once more to say how it does."""
        try:
            self.exchange()
            while not self.ended.wait(BEAT):
                self.exchange()
            self.exchange()
            # The store may be this process's own: the others are to read in it why the run ends.
            while self.index == 0 and self.code and not self.all_know():
                time.sleep(BEAT / 10)
                self.exchange()
        except (RuntimeError, OSError):  # the store is gone with its process, which gatherings tell, too
            return

    def all_know(self) -> bool:
        """Return whether the others have ended, are lost, or had time enough."""
        answered = len(self.ends) + len(self.silent(GRACE / 2)) >= self.count - 1
        return answered or time.monotonic() > self.deadline

    def exchange(self) -> None:
        """Say that this process lives, or how it ended, and look at what the others say."""
        now = time.monotonic()
        if now - self.met > self.silence / 2:
            # This process was stopped itself, and perhaps all: who did not hear tells nothing of the others.
            self.heard = {rank: (said, now) for rank, (said, _) in self.heard.items()}
        self.beats += 1
        self.store.set(f"{self.key}/{self.index}", json.dumps([self.beats, self.code, *self.cause]))
        for rank, (before, _) in self.heard.items():
            # Getting a key that is not there yet would keep everybody else from the store.
            if self.store.check([f"{self.key}/{rank}"]):
                said = self.store.get(f"{self.key}/{rank}")
                if said != before:
                    self.heard[rank] = said, time.monotonic()
                    _, code, gone, what = json.loads(said)
                    if code is not None:
                        self.ends[rank] = code, gone, what
        self.met = time.monotonic()

    def silent(self, seconds: float) -> list[int]:
        """List the processes that have neither ended nor shown life for so long."""
        now = time.monotonic()
        if now - self.met > seconds:  # nobody is heard, not even the store, which the first process may keep
            return [rank for rank in (0,) if rank != self.index]
        return [rank for rank, (_, at) in self.heard.items() if rank not in self.ends and now - at > seconds]

    def check(self) -> None:
        """Raise Left where another process has ended the run, or shows no life any more."""
        for code, gone, what in [*self.ends.values()]:
            if code == AGAIN and what:
                # Who found it out first need not be the one that says it.
                raise self.left(gone, what)
            if code:
                raise Left(code)
        if self.silent(self.silence):
            time.sleep(GRACE)  # if this process was stopped itself, its pulse comes first
        if gone := self.silent(self.silence):
            raise self.left(gone, f"has shown no life for {self.silence:g} s")

    def left(self, gone: list[int], what: str) -> Left:
        """Return how this process ends where others are lost; only the first of those left says so, and the
        first on every machine that is cut off: who hears nobody misses the first process of all.
        """
        self.cause = gone, what
        others = [rank for rank in range(self.count) if rank not in gone]
        says = self.index == others[0] or (gone == [0] and os.environ.get("LOCAL_RANK") == "0")
        which = f"process {', '.join(map(str, gone))} of {self.count}" if gone else CONNECTION
        return Left(AGAIN, f"{which} {what}" if says else "")

    def loss(self) -> Left:
        """Return why a gathering broke off: what another process says, else that it is lost, or out of reach
        although it lives.
        """
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            self.check()
            time.sleep(BEAT / 10)
        gone = self.silent(GRACE / 2)
        return self.left(gone, LOST if gone else "broke off")

    def finish(self, work: Callable[[], Any]) -> None:
        """Start something that all processes do together, and wait for its end.

        Waiting in the library instead could be neither broken off nor told from work.
        """
        begin, pause = time.perf_counter(), 0.0005
        try:
            going = work()
            while going is not None and not going.is_completed():
                self.look("wait")
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
            if going is not None:
                going.wait()
        except RuntimeError as error:
            if ran_out(error):
                raise
            raise self.loss() from error
        finally:
            self.waited += time.perf_counter() - begin

    def end(self, code: int) -> None:
        """Tell the others how this process ends."""
        self.code, self.deadline = code, time.monotonic() + GRACE
        self.ended.set()
        self.thread.join(2 * GRACE)


def code_of(error: BaseException) -> int:
    """Return the exit code of a process that an error ends."""
    if isinstance(error, Left):
        return error.code
    if isinstance(error, KeyboardInterrupt):
        return SIGNALLED + getattr(error, "number", 2)
    return MISTAKE if isinstance(error, (ValueError, OSError)) or ran_out(error) else UNFORESEEN


def accelerator_of(cpu: bool) -> Accelerator:
    """Let accelerate find the device, and several processes each other."""
    try:
        return Accelerator(cpu=cpu)
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE") or 1) == 1:
            raise
        raise apart(error) from error


def apart(error: RuntimeError) -> Left:
    """Say that processes have not found together, as far as a library has words for it."""
    reason = str(error).strip().partition("\n")[0][:200]
    return Left(AGAIN, f"the processes of the run did not find together: {reason}")


@contextmanager
def together(accelerator: Accelerator) -> Iterator[tuple[World, Pulse | None]]:
    """Let the processes of a run find together, and hear how each of them ends."""
    try:
        world, pulse = world_of(accelerator)
    except RuntimeError as error:
        raise apart(error) from error
    code = DONE
    try:
        yield world, pulse
    except BaseException as error:
        code = code_of(error)
        raise
    finally:
        if pulse:
            pulse.end(code)


def world_of(accelerator: Accelerator) -> tuple[World, Pulse | None]:
    """Return how processes find together, and their pulse, of several. What is gathered lies on the CPU
    anyway.
    """
    count, index = accelerator.num_processes, accelerator.process_index
    if count == 1:
        return World(), None
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    # There is no public name for the store in which the processes have met.
    pulse = Pulse(dist.distributed_c10d._get_default_store(), index, count)

    def gather(table: torch.Tensor) -> torch.Tensor:
        mine = table.cpu().contiguous()
        parts = [torch.empty_like(mine) for _ in range(count)]
        pulse.finish(lambda: dist.all_gather(parts, mine, group=patient, async_op=True))
        return torch.cat(parts, 1)

    def wait() -> None:
        pulse.finish(lambda: dist.barrier(group=patient, async_op=True))

    def reduce(gradients: Sequence[torch.Tensor]) -> None:
        wait()
        vector = parameters_to_vector(gradients)
        # Not by accelerate, whose call returns when all is done, or never.
        pulse.finish(lambda: dist.all_reduce(vector, async_op=True))
        vector /= count
        vector_to_parameters(vector, gradients)

    return World(index, count, gather, reduce, wait, lambda: pulse.waited), pulse


def speaks() -> bool:
    """Return whether this is the process that says what becomes of the run."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
