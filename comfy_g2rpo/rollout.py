"""Run plans: one batch of slots with mixed sigmas over prompts, branch steps, branches and granularities."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import over
from .plan import ROOT, Coefficients, Plan
from .policy import Policy

Edge = tuple[int, int]
"""A prompt and the number of the state that an edge of its plan leads to."""
Sink = Callable[[list[int], list[int], Tensor], None]
"""Takes finished latents [n, …] with the prompt and the image (position in plan.images) of each."""


@dataclass(frozen=True)
class Rollout:
    """The fork states of every prompt, for the learner; all noise can be drawn again from the seeds."""

    plan: Plan
    coefficients: Coefficients
    seeds: tuple[int, ...]
    x: Tensor  # [P, F, …], in the order of plan.forks
    velocity: Tensor  # [P, F, …]
    latents: Tensor | None  # [P, images, …], unless a sink took them
    nfe: int

    def noise(self, prompt: int, state: int) -> Tensor:
        """Return the noise on the edge to `state`."""
        return state_noise(self.plan, state, self.seeds[prompt], self.x.shape[2:]).to(self.x.device)


def stream(*key: int | str) -> int:
    """Return the seed of the random stream that the key names; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seeded_noise(shape: Sequence[int], *key: int | str) -> Tensor:
    """Draw standard normal float32 noise on the CPU from a stream of its own, named by the key."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(stream(*key)))


def state_noise(plan: Plan, state: int, seed: int, shape: Sequence[int]) -> Tensor:
    """Draw the noise of one edge of a plan; a negative id mirrors its positive twin."""
    noise = plan.states[state].noise
    return seeded_noise(shape, "rollout", seed, abs(noise)) * (1 if noise > 0 else -1)


class Batch(NamedTuple):
    """Edges, the states [B, …] that they lead to, and their parents' denoised latents (multistep solvers)."""

    edges: list[Edge]
    x: Tensor
    denoised: Tensor | None

    def rows(self, which: Sequence[int]) -> Batch:
        """Return some of the rows."""
        picked = self.denoised[which] if self.denoised is not None else None
        return Batch([self.edges[i] for i in which], self.x[which], picked)


class _Value(NamedTuple):
    """An evaluated state, and the denoised latent of its parent for multistep solvers."""

    x: Tensor
    velocity: Tensor
    denoised_before: Tensor | None


class Frontier:
    """The edges of a rollout whose parents are known, waiting for one of `slots` places in a forward."""

    def __init__(
        self,
        plan: Plan,
        coefficients: Coefficients,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str,
        slots: int,
        start: Tensor | None,
    ) -> None:
        self.plan, self.coefficients, self.seeds, self.shape = plan, coefficients, tuple(seeds), tuple(shape)
        self.device, self.slots, self.start = torch.device(device), slots, start
        self.image = {state: i for i, state in enumerate(plan.images)}
        self.fork = {state: i for i, state in enumerate(plan.forks)}
        self.fork_x = torch.zeros(len(seeds), len(plan.forks), *shape, device=device)
        self.fork_v = torch.zeros_like(self.fork_x)
        self.multistep = any(state.kernel == "dpm_2m" for state in plan.states)
        zero = torch.zeros(self.shape, device=device)
        self.known = {(p, ROOT): _Value(zero, zero, zero) for p in range(len(seeds))}
        self.waiting = {(p, ROOT): -1 for p in range(len(seeds))}
        self.queue: list[tuple[tuple[bool, int], int, int]] = []
        self.finished: list[Edge] = []
        for state in (i for i, state in enumerate(plan.states) if state.parent == ROOT):
            for p in range(len(seeds)):
                self.open(p, state)

    def open(self, p: int, state: int) -> None:
        """Queue the edge to a state: the trunk first, then the deepest."""
        if self.plan.children[state]:
            heappush(self.queue, ((not self.plan.trunk[state], -self.plan.states[state].index), p, state))
        else:
            self.finished.append((p, state))

    def take(self) -> Batch:
        """Compute the next states that must be evaluated, as many as there are slots."""
        return self.advance([heappop(self.queue)[1:] for _ in range(min(self.slots, len(self.queue)))])

    def evaluate(
        self, policy: Policy, batch: Batch, conds: Sequence[Any], check: Callable[[], None]
    ) -> Tensor:
        """Return the velocity [B, …] of a batch in float32, one conditioning object per row."""
        check()
        return policy.velocity(batch.x, self.sigma(batch.edges), conds).float()

    def sigma(self, edges: Sequence[Edge]) -> Tensor:
        """Return the noise levels of states as float32 [B]."""
        return self.coefficients.sigma[[state for _, state in edges]].to(self.device)

    def advance(self, edges: list[Edge]) -> Batch:
        """Compute the states [B, …] that edges lead to, and forget parents that nothing waits for."""
        c, states = self.coefficients, [self.plan.states[state] for _, state in edges]
        parents = [(p, state.parent) for (p, _), state in zip(edges, states, strict=True)]
        before = [self.known[parent] for parent in parents]
        x, velocity = map(torch.stack, zip(*((value.x, value.velocity) for value in before), strict=True))
        rows = c.table[[state for _, state in edges]].to(self.device)  # one copy: each stops a GPU's queue
        a, b, past, std = (over(row, x) for row in rows.unbind(1))
        out = a * x + b * velocity
        if any(state.noise for state in states):
            noise = torch.zeros(len(edges), *self.shape)
            for i in (i for i, state in enumerate(states) if state.noise):
                noise[i] = state_noise(self.plan, edges[i][1], self.seeds[edges[i][0]], self.shape)
            out += std * noise.to(self.device)
        if self.multistep:
            out += past * torch.stack([value.denoised_before for value in before])
        for i in (i for i, s in enumerate(states) if self.start is not None and s.parent == ROOT):
            out[i] = self.start[edges[i][0]]
        denoised = None
        if self.multistep:
            levels = [c.sigma[s] if s != ROOT else c.sigma.new_ones(()) for _, s in parents]
            denoised = x - over(torch.stack(levels).to(self.device), x) * velocity
        self.release(parents)
        return Batch(edges, out, denoised)

    def file(self, batch: Batch, velocity: Tensor) -> None:
        """Keep evaluated states until their children have been computed, and open those."""
        denoised = [None] * len(batch.edges) if batch.denoised is None else batch.denoised
        for (p, state), *found in zip(batch.edges, batch.x, velocity, denoised, strict=True):
            value, fork = _Value(*found), self.fork.get(state)
            if fork is not None:
                # A fork waits long for all its branches: a copy of its own does not hold the whole batch.
                self.fork_x[p, fork], self.fork_v[p, fork] = value.x, value.velocity
                value = _Value(self.fork_x[p, fork], self.fork_v[p, fork], value.denoised_before)
            self.known[p, state] = value
            self.waiting[p, state] = len(self.plan.children[state])
            for child in self.plan.children[state]:
                self.open(p, child)

    def release(self, parents: list[Edge]) -> None:
        """Count a child of each parent as computed; forget parents without any left."""
        for parent in parents:
            self.waiting[parent] -= 1
            if self.waiting[parent] == 0:
                del self.known[parent], self.waiting[parent]


@torch.no_grad()
def roll_out(
    policy: Policy,
    plan: Plan,
    sigmas: Tensor,
    conds: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    *,
    slots: int = 64,
    sink: Sink | None = None,
    check: Callable[[], None] | None = None,
    device: torch.device | str = "cpu",
    start: Tensor | None = None,
    frontier: Callable[..., Frontier] = Frontier,
) -> Rollout:
    """Run the plan once per prompt (conds[p], seeds[p]); latents have `shape` [C, H, W].

    `start` [P, …] are states to begin with, in place of noise drawn from the seeds. At most `slots` states
    are evaluated at a time and the deepest go first, so that memory does not grow with the group. Each
    distinct state is evaluated once, and results do not depend on `slots`. `check` is called before every
    forward and may raise to stop. `frontier` makes another frontier than the plain one (`speed/`).
    """
    run = frontier(plan, plan.coefficients(sigmas), seeds, shape, device, slots, start)
    latents = None if sink else torch.empty(len(seeds), len(plan.images), *shape, device=device)
    nfe = 0
    with policy.inference():
        while run.queue or run.finished:
            if run.queue and (batch := run.take()).edges:
                rows = [conds[p] for p, _ in batch.edges]
                run.file(batch, run.evaluate(policy, batch, rows, check or (lambda: None)))
                nfe += len(rows)
            while len(run.finished) >= run.slots or (run.finished and not run.queue):
                done, run.finished = run.finished[: run.slots], run.finished[run.slots :]
                prompts, images = [p for p, _ in done], [run.image[state] for _, state in done]
                finished = run.advance(done).x
                if sink:
                    sink(prompts, images, finished)
                else:
                    latents[prompts, images] = finished
    return Rollout(plan, run.coefficients, run.seeds, run.fork_x, run.fork_v, latents, nfe)
