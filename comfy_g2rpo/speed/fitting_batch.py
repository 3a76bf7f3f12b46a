"""How many rows fit into memory at once: found out by running out of it, and halved until they fit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

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
        """Run work over `count` rows; None where memory ran out and the limit has been halved."""
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


def limit_of(rows: int | Limit) -> Limit:
    """Return a limit for a number of rows, or the one that is given."""
    return rows if isinstance(rows, Limit) else Limit(rows)


def free() -> None:
    """Give what an attempt has left behind back to the device."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
