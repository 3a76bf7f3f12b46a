"""How much fits into memory at once: found out by running out of it, and halved until it fits. Results do not depend on it."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .pace import Pace

try:
    import resource
except ImportError:  # Windows has none
    resource = None

OutOfMemory: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)

Result = TypeVar("Result")


@dataclass
class Limit:
    """So many rows at once; `halvings` counts how often memory ran out."""

    rows: int
    halvings: int = 0

    def parts(self, work: Callable[[slice], Tensor], count: int) -> Tensor:
        """Run work over `count` rows, as many at once as fit, and put the results [n, …] together."""
        done: list[Tensor] = []
        start = 0
        while start < count:
            part = slice(start, min(start + self.rows, count))
            if (found := self.attempt(partial(work, part), part.stop - start)) is not None:
                done.append(found)
                start = part.stop
        return done[0] if len(done) == 1 else torch.cat(done)

    def until(self, work: Callable[[], Result], count: int) -> Result:
        """Run work, which looks at `rows` itself, over `count` rows until it fits."""
        while (found := self.attempt(work, min(self.rows, count))) is None:
            pass
        return found

    def attempt(self, work: Callable[[], Result], count: int) -> Result | None:
        """Run work over `count` rows; None where memory ran out and the limit is half of them now. One row that does not fit raises."""
        try:
            return work()
        except OutOfMemory:
            if count <= 1:
                raise
        # Only here has the exception let go of what the attempt had made.
        self.rows = count // 2
        self.halvings += 1
        free()
        return None


@dataclass
class Limits:
    """What a run does at once: latents in a forward of the rollout, pictures in a decoding, latents in a forward and backward."""

    slots: Limit
    decode_batch: Limit
    micro_batch: Limit
    said: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pace: Pace) -> Limits:
        """Begin with what is asked for."""
        return cls(Limit(pace.slots), Limit(pace.decode_batch), Limit(pace.micro_batch))

    def within(self, pace: Pace) -> Pace:
        """Return a pace that asks for no more than fits."""
        return dataclasses.replace(pace, **self.lowered())

    def lowered(self) -> dict[str, int]:
        """Return what memory has brought down, by name, and how much fits now."""
        limits = {"slots": self.slots, "decode_batch": self.decode_batch, "micro_batch": self.micro_batch}
        return {name: limit.rows for name, limit in limits.items() if limit.halvings}

    def news(self) -> str:
        """Say once what has come down; nothing where nothing has since the last time."""
        now = self.lowered()
        fresh = [f"{name} is {rows} from now on" for name, rows in now.items() if self.said.get(name) != rows]
        self.said = now
        return f"memory ran out: {', '.join(fresh)}; results stay the same" if fresh else ""


def limit_of(rows: int | Limit) -> Limit:
    """Return a limit for a number of rows, or the one that is given."""
    return rows if isinstance(rows, Limit) else Limit(rows)


def free() -> None:
    """Give what an attempt has left behind back to the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device, or of the process, in bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
