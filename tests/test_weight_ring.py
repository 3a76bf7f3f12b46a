"""Weights that wait in main memory: always the right ones, in whatever order they are asked for and however
long copies take; after the first time under way before they are asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from g2rpo_trainer.model.stored_linear import PACKINGS, Float8, NormalFloat4, Whole, store, stored
from g2rpo_trainer.model.weight_ring import SLOTS, Lane, WeightRing

CPU = torch.device("cpu")


class Late(Lane):
    """A device whose computing and copying are two queues that only events hold together, run at random."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.device, self.choose, self.done = CPU, choose, set()
        self.queues: tuple[deque, deque] = (deque(), deque())
        self.marks = 0

    def event(self, queue: int) -> int:
        self.marks += 1
        number = self.marks
        self.queues[queue].append((None, lambda: self.done.add(number)))
        return number

    def mark(self) -> int:
        return self.event(0)

    def copy(self, there: torch.Tensor, here: torch.Tensor, after: int) -> int:
        self.queues[1].append((after, lambda: there.copy_(here)))
        return self.event(1)

    def wait(self, event: int) -> None:
        self.queues[0].append((event, lambda: None))

    def compute(self, work: Callable[[], None]) -> None:
        self.queues[0].append((None, work))

    def run(self, steps: int | None = None) -> None:
        """Run some of what is queued, all of it unless told how much."""
        while any(self.queues) and (steps is None or steps > 0):
            free = [q for q in self.queues if q and (q[0][0] is None or q[0][0] in self.done)]
            assert free, "computing and copying wait for each other"
            free[self.choose(len(free))].popleft()[1]()
            steps = None if steps is None else steps - 1


@given(st.lists(st.integers(0, 6), max_size=40), st.randoms(use_true_random=False))
def test_what_is_computed_sees_the_right_weights_however_late_copies_are(order, chance):
    lane = Late(chance.randrange)
    ring = WeightRing(CPU, lane)
    waiting = [ring.add(Whole(torch.full((2, 3 + i), float(i)))) for i in range(7)]
    seen = []
    for number in order * 3:
        weight = waiting[number].to(CPU).weight(torch.float32)
        lane.compute(lambda weight=weight: seen.append((tuple(weight.shape), weight.unique().tolist())))
        lane.run(chance.randrange(6))
    lane.run()
    assert seen == [((2, 3 + i), [float(i)]) for i in order * 3]


def test_a_device_without_the_marks_would_see_wrong_weights():
    """The test above can fail: copies that wait for nobody overwrite what is still to be read."""
    lane = Late(lambda count: count - 1)
    lane.copy = lambda there, here, after: Late.copy(lane, there, here, None)
    ring = WeightRing(CPU, lane)
    waiting = [ring.add(Whole(torch.full((2, 2), float(i)))) for i in range(7)]
    seen = []
    for number in [*range(7)] * 3:
        weight = waiting[number].to(CPU).weight(torch.float32)
        lane.compute(lambda weight=weight: seen.append(weight[0, 0].item()))
    lane.run()
    assert seen != [float(i) for i in [*range(7)] * 3]


class Blocks(nn.Module):
    """Blocks of two layers each, recomputed in the backward pass if asked for."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(5)
        )
        self.requires_grad_(False)
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("quantization", PACKINGS)
def test_after_the_first_time_no_weight_is_waited_for(quantization: str, recompute: bool) -> None:
    model, whole = Blocks(recompute), Blocks()
    store(model, quantization, 4, CPU)
    store(whole, quantization, 0, CPU)
    ring = stored(model)[0].packed.ring
    misses, found = [], []
    for _ in range(3):
        before = ring.misses
        with torch.no_grad():
            model(torch.ones(2, 64))
        misses.append(ring.misses - before)
    for _ in range(3):
        before = ring.misses
        for each in (model, whole):
            x = torch.ones(2, 64, requires_grad=True)
            each(x).square().sum().backward()
            found.append(x.grad)
        misses.append(ring.misses - before)
    assert misses[0] == 8 and misses[2] == 0 and misses[5] == 0
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("quantization", PACKINGS)
def test_the_room_is_that_of_a_few_layers(quantization: str) -> None:
    model = Blocks()
    store(model, quantization, 5, CPU)
    model(torch.ones(2, 64))
    ring = stored(model)[0].packed.ring
    largest = max(sum(part.nbytes for part in layer.packed.tensors()) for layer in stored(model))
    assert len(ring.slots) == SLOTS and all(slot.nbytes < largest + 512 for slot in ring.slots)


def test_a_weight_that_somebody_keeps_is_a_copy() -> None:
    model = Blocks()
    store(model, "none", 5, CPU)
    kept = [layer.weight for layer in stored(model)]
    for _ in range(2):
        model(torch.ones(2, 64))
    assert all(
        map(torch.equal, kept, [layer.weight for layer in Blocks().modules() if hasattr(layer, "weight")])
    )


def test_compiled_blocks_take_their_turns_too() -> None:
    model, whole = Blocks(), Blocks()
    store(model, "none", 5, CPU)
    blocks = [torch.compile(block, backend="eager") for block in model.blocks]
    for _ in range(2):
        x = y = torch.ones(2, 64)
        for block in blocks:
            x = block(x)
        assert torch.equal(x, whole(y))
    ring = stored(model)[0].packed.ring
    before = ring.misses
    for block in blocks:
        y = block(y)
    assert torch.equal(x, y) and ring.misses == before


@pytest.mark.parametrize("made", [Whole, Float8.of, NormalFloat4.of], ids=["whole", "fp8", "nf4"])
def test_a_weight_comes_back_as_it_was(made) -> None:
    weight = torch.randn(33, 64, generator=torch.Generator().manual_seed(0))
    packed, ring = made(weight), WeightRing(CPU)
    waiting = ring.add(packed)
    exact = packed.weight(torch.float32)
    assert torch.equal(waiting.to(CPU).weight(torch.float32), exact)
    assert torch.equal(waiting.weight(torch.float32), exact)
    assert [part.dtype for part in waiting.tensors()] == [part.dtype for part in packed.tensors()]


@pytest.mark.gpu
def test_on_a_gpu_weights_that_come_beside_the_computing_are_the_right_ones() -> None:
    card = torch.device("cuda")

    def model(swapped: int) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Module()
        layers = (nn.Linear(4096, 4096, dtype=torch.bfloat16) for _ in range(24))
        made.blocks = nn.ModuleList(nn.Sequential(layer, nn.Tanh()) for layer in layers)
        store(made.requires_grad_(False), "none", swapped, card)
        return made.to(card)

    swapped, resident = model(24), model(0)
    for _ in range(4):
        found = []
        for each in (swapped, resident):
            given = x = torch.ones(512, 4096, dtype=torch.bfloat16, device=card, requires_grad=True)
            for block in each.blocks:
                x = block(x)
            x.float().square().sum().backward()
            found.append((x.detach(), given.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert stored(swapped)[0].packed.ring.misses <= 24 + 48
