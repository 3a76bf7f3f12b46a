"""Weights that wait in main memory and come to the device ahead of their use, beside the computing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

SLOTS = 3
"""Layers whose weights are on the device at once: the one that computes, and the two to come."""
ALIGNED = 256  # bytes; what a slot's tensors start at


class Packed(Protocol):
    """A weight as it is kept."""

    def tensors(self) -> tuple[Tensor, ...]:
        """List what it consists of."""

    def like(self, tensors: Sequence[Tensor]) -> Packed:
        """Return a weight kept in the same way, of other tensors."""

    def to(self, device: torch.device) -> Packed:
        """Return it on a device."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Make the weight [out, in]."""


class Lane:
    """Copying to a device: beside its computing where it has streams (CUDA), in its place elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark(self) -> Any:
        """Return an event that comes when all that was computed until now is done."""
        return torch.cuda.current_stream(self.device).record_event() if self.stream else None

    def copy(self, there: Tensor, here: Tensor, after: Any) -> Any:
        """Copy after an event; return the event that comes when it is done."""
        if self.stream is None:
            there.copy_(here)
            return None
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            there.copy_(here, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for an event."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)


class WeightRing:
    """Room on a device for the weights of SLOTS layers, in which those of many take turns.

    What followed on two layers before follows on them again: forward, backward and recomputation each run in
    an order of their own, and after the first time their weights are under way before they are asked for.
    A slot is written to when what has read it is done, and read when what is written has come, whatever is
    foreseen; `misses` counts the weights that were not.
    """

    def __init__(self, device: torch.device, lane: Lane | None = None) -> None:
        self.device, self.lane = device, lane or Lane(device)
        self.homes: list[Tensor] = []
        self.kept: list[Packed] = []
        self.followers: dict[tuple[int | None, int | None], int] = {}
        self.before: int | None = None
        self.now: int | None = None
        self.held: list[int | None] = [None] * SLOTS
        self.slots: list[Tensor] = []
        self.left: list[Any] = []
        self.ready: list[Any] = [None] * SLOTS
        self.misses = 0
        # A compiler would take the turns of one pass for those of all. It is asked here, and not where the
        # method is defined, for torch then loads its compiler, which takes seconds, whoever imports this.
        self.at = torch.compiler.disable(self.turn_to)

    def add(self, packed: Packed) -> Waiting:
        """Take a weight into the computer's memory, page-locked for a GPU; return it as one that waits."""
        parts = packed.tensors()
        home = torch.empty(places(parts)[-1], dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        kept = packed.like(views(home, parts))
        for there, here in zip(kept.tensors(), parts, strict=True):
            there.copy_(here)
        self.homes.append(home)
        self.kept.append(kept)
        return Waiting(self, len(self.homes) - 1)

    def turn_to(self, number: int) -> Packed:
        """Return a layer's weight on the device; it stays until another is asked for."""
        if number != self.now:
            self.come_to(number)
        slot = self.slots[self.held.index(number)]
        return self.kept[number].like(views(slot, self.kept[number].tensors()))

    def come_to(self, number: int) -> None:
        """Leave the layer that computed, wait for another's weight, and send for those after it."""
        if not self.slots:
            size = max(home.nbytes for home in self.homes)
            self.slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
            # What the memory was used for before may be under way yet.
            self.left = [self.lane.mark() for _ in range(SLOTS)]
        if self.now is not None:
            self.left[self.held.index(self.now)] = self.lane.mark()
        if number not in self.held:
            self.misses += 1
            self.fetch(number, ())
        self.lane.wait(self.ready[self.held.index(number)])
        self.followers[self.before, self.now] = number
        self.before, self.now = self.now, number
        ahead = self.foreseen()
        for coming in ahead:
            if coming not in self.held:
                self.fetch(coming, (number, *ahead))

    def foreseen(self) -> list[int]:
        """List the layers that are likely to come next."""
        found: list[int] = []
        before, now = self.before, self.now
        while len(found) < SLOTS - 1 and (coming := self.followers.get((before, now))) is not None:
            found.append(coming)
            before, now = now, coming
        return found

    def fetch(self, number: int, needed: Collection[int]) -> None:
        """Send for a layer's weight, in place of one that is not needed."""
        slot = next(i for i, holder in enumerate(self.held) if holder not in needed)
        home = self.homes[number]
        self.ready[slot] = self.lane.copy(self.slots[slot][: home.nbytes], home, self.left[slot])
        self.held[slot] = number


class Waiting:
    """A weight in a ring."""

    def __init__(self, ring: WeightRing, number: int) -> None:
        self.ring, self.number = ring, number

    def tensors(self) -> tuple[Tensor, ...]:
        """List what it consists of, in the computer's memory."""
        return self.ring.kept[self.number].tensors()

    def like(self, tensors: Sequence[Tensor]) -> Packed:
        """Return a weight kept in the same way, of other tensors, which does not wait."""
        return self.ring.kept[self.number].like(tensors)

    def to(self, device: torch.device) -> Packed:
        """Return it on a device; on the ring's it stays until another of the ring is asked for."""
        if device.type != self.ring.device.type:
            return self.ring.kept[self.number].to(device)
        return self.ring.at(self.number)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Make the weight [out, in] in the computer's memory."""
        return self.ring.kept[self.number].weight(dtype)


def places(parts: Sequence[Tensor]) -> list[int]:
    """Return at which bytes tensors lie one after another, and where the last ends."""
    found, end = [], 0
    for part in parts:
        found.append(-(-end // ALIGNED) * ALIGNED)
        end = found[-1] + part.nbytes
    return [*found, end]


def views(room: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors like others within room [bytes]."""
    return [
        room[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for start, part in zip(places(parts), parts, strict=False)
    ]
