"""Rollouts that fit into memory and may complete for less: the method's rollout with another frontier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from heapq import heapify, heappop
from typing import Any

import torch
from torch import Tensor

from ..plan import Coefficients, Plan
from ..policy import Policy
from ..rollout import Batch, Edge, Frontier, Rollout, Sink
from ..rollout import roll_out as roll_out_plain
from .fitting_batch import Limit, limit_of
from .step_cache import Memory, Shortcut, predict_velocity, remember

FEW = 2
"""Times the slots that may wait before the deepest states go first."""


def heights(plan: Plan) -> list[int]:
    """Return how many states are evaluated one after another from each state of a plan on."""
    found = [0] * len(plan.states)
    for state in reversed(range(len(plan.states))):
        found[state] = max((1 + found[child] for child in plan.children[state]), default=0)
    return found


class FittingFrontier(Frontier):
    """Halves the slots where memory runs out, fills the last forwards too, and evaluates completions as a
    shortcut says.

    Completions are the states that no noise follows; with a shortcut they come in batches of their own.
    """

    def __init__(
        self,
        plan: Plan,
        coefficients: Coefficients,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str,
        slots: int | Limit,
        start: Tensor | None,
        shortcut: Shortcut | None = None,
    ) -> None:
        self.limit, self.shortcut, self.height = limit_of(slots), shortcut, heights(plan)
        self.memories: dict[Edge, Memory] = {}  # of evaluated states that wait for their children
        self.before: dict[Edge, Memory] = {}  # of the parents of states that are not filed yet
        super().__init__(plan, coefficients, seeds, shape, device, self.limit.rows, start)

    def take(self) -> Batch:
        """Compute the next states that must be evaluated; with a shortcut, those of one kind alone.

        Of many the deepest, so that few wait; of few those with the longest way to go, which takes the fewest
        forwards from there on (T. C. Hu, Parallel sequencing and assembly line problems, 1961).
        """
        if not self.shortcut and len(self.queue) <= FEW * self.slots:
            self.queue.sort(key=lambda entry: (-self.height[entry[2]], entry))
            chosen, self.queue = self.queue[: self.slots], self.queue[self.slots :]
            heapify(self.queue)
            return self.advance([entry[1:] for entry in chosen])
        if not self.shortcut:
            return super().take()
        trunk, parts, count = self.queue[0][0][0], [], 0
        while self.queue and self.queue[0][0][0] == trunk and count < self.slots:
            edges = []
            while self.queue and self.queue[0][0][0] == trunk and count + len(edges) < self.slots:
                edges.append(heappop(self.queue)[1:])
            parts.append(self.skip(self.advance(edges)))
            count += len(parts[-1].edges)
        if len(parts) == 1:
            return parts[0]
        denoised = torch.cat([part.denoised for part in parts]) if self.multistep else None
        return Batch(
            [edge for part in parts for edge in part.edges], torch.cat([p.x for p in parts]), denoised
        )

    def skip(self, batch: Batch) -> Batch:
        """File the states whose velocity the shortcut predicts, and return the others."""
        if not self.shortcut.cache:
            return batch
        memories = [self.before.get(edge) for edge in batch.edges]
        done, velocity = predict_velocity(memories, batch.x, self.sigma(batch.edges), self.shortcut.cache)
        if not any(done):
            return batch
        skipped = batch.rows([i for i, known in enumerate(done) if known])
        for edge in skipped.edges:
            self.memories[edge] = self.before.pop(edge)
        super().file(skipped, velocity)
        return batch.rows([i for i, known in enumerate(done) if not known])

    def advance(self, edges: list[Edge]) -> Batch:
        """Compute the states that edges lead to, and keep what is remembered of their parents."""
        for p, state in edges:
            memory = self.memories.get((p, self.plan.states[state].parent))
            if memory is not None and self.plan.children[state]:
                self.before[p, state] = memory
        return super().advance(edges)

    def evaluate(
        self, policy: Policy, batch: Batch, conds: Sequence[Any], check: Callable[[], None]
    ) -> Tensor:
        """Return the velocity of a batch, of as many rows at once as fit."""
        completes = self.shortcut and not self.plan.trunk[batch.edges[0][1]]
        velocity = (self.shortcut.velocity if completes else None) or policy.velocity
        sigma = self.sigma(batch.edges)

        def some(part: slice) -> Tensor:
            check()
            return velocity(batch.x[part], sigma[part], conds[part]).float()

        found = self.limit.parts(some, len(conds))
        self.slots = self.limit.rows
        return found

    def file(self, batch: Batch, velocity: Tensor) -> None:
        """Keep evaluated states, and what the next steps may be predicted from."""
        if self.shortcut and self.shortcut.cache and not self.plan.trunk[batch.edges[0][1]]:
            memories = [self.before.pop(edge, None) for edge in batch.edges]
            made = remember(memories, batch.x, velocity, self.sigma(batch.edges))
            self.memories |= zip(batch.edges, made, strict=True)
        super().file(batch, velocity)

    def release(self, parents: list[Edge]) -> None:
        """Forget what nothing waits for any more."""
        super().release(parents)
        for parent in parents:
            if parent not in self.known:
                self.memories.pop(parent, None)


def roll_out(
    policy: Policy,
    plan: Plan,
    sigmas: Tensor,
    conds: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    slots: int | Limit = 64,
    sink: Sink | None = None,
    check: Callable[[], None] | None = None,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    shortcut: Shortcut | None = None,
    frontier: Callable[..., Frontier] = FittingFrontier,
) -> Rollout:
    """Run a plan per prompt as `rollout.roll_out` does, with as many slots as memory has room for.

    Where memory runs out, `slots` are halved and the rollout goes on. A `shortcut` says how completions are
    evaluated; forks are always exact. `frontier` makes a frontier of the same parameters.
    """
    return roll_out_plain(
        policy,
        plan,
        sigmas,
        conds,
        seeds,
        shape,
        slots=slots,
        sink=sink,
        check=check,
        device=device,
        start=start,
        frontier=partial(frontier, shortcut=shortcut),
    )
