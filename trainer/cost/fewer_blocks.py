"""What a model's passes take, counted on a few of its blocks: every further equal block adds the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from ..model.stored_linear import StoredLinear

FEW = 2
"""Blocks of a run that are counted: the first has another before it, and the last another behind it."""


class Run(NamedTuple):
    """Equal blocks that follow one another in a list of a transformer."""

    name: str
    start: int
    length: int


def kind(block: nn.Module) -> tuple[Any, ...]:
    """Return what two blocks have in common that take the same."""
    numbers = [(name, part.shape, part.dtype, part.requires_grad) for name, part in block.named_parameters()]
    packed = [
        (name, part.in_features, part.out_features, type(part.packed))
        for name, part in block.named_modules()
        if isinstance(part, StoredLinear)
    ]
    return type(block), *numbers, *packed


def runs(transformer: nn.Module) -> list[Run]:
    """List a transformer's runs of equal blocks."""
    found = []
    for name, blocks in transformer.named_children():
        start = 0
        for _, equal in groupby(blocks if isinstance(blocks, nn.ModuleList) else (), kind):
            found.append(Run(name, start, len(list(equal))))
            start += found[-1].length
    return found


@contextmanager
def shortened(transformer: nn.Module, lengths: dict[Run, int]) -> Iterator[None]:
    """Leave so many blocks of each run inside."""
    whole = {run.name: getattr(transformer, run.name) for run in lengths}
    for name, blocks in whole.items():
        kept = [
            block
            for run, length in lengths.items()
            if run.name == name
            for block in blocks[run.start : run.start + length]
        ]
        setattr(transformer, name, nn.ModuleList(kept))
    try:
        yield
    finally:
        for name, blocks in whole.items():
            setattr(transformer, name, blocks)


def extrapolated(transformer: nn.Module, count: Callable[[], Sequence[int]]) -> list[int]:
    """Return what `count` would return on a whole transformer, from what it returns on few of its blocks."""

    def counted(lengths: dict[Run, int]) -> Sequence[int]:
        with shortened(transformer, lengths):
            return count()

    few = {run: min(run.length, FEW) for run in runs(transformer)}
    total = list(counted(few))
    # The first time a model makes tables that it keeps; they are in it once.
    base = counted(few)
    for run in few:
        if run.length > FEW:
            more = counted(few | {run: FEW + 1})
            total = [t + (run.length - FEW) * (m - b) for t, m, b in zip(total, more, base, strict=True)]
    return total
