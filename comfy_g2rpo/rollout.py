"""Run plans against a policy: one batch of slots with mixed sigmas over prompts, branch steps, branches
and granularities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import over
from .plan import ROOT, Coefficients, Plan
from .policy import Policy
from .speed.fitting_batch import Limit, limit_of
from .speed.step_cache import Memory, Shortcut, Velocity, foreseen, remember

Sink = Callable[[list[int], list[int], Tensor], None]
"""Takes finished latents [n, …] with the prompt and the image (position in plan.images) of each."""


@dataclass(frozen=True)
class Rollout:
    """What a rollout leaves for the learner: the fork states of every prompt.

    All noise can be drawn again from the seeds.
    """

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


class _Value(NamedTuple):
    """An evaluated state, and the denoised latent of its parent for multistep solvers.

    What a shortcut remembers of a completion.
    """

    x: Tensor
    velocity: Tensor
    denoised_before: Tensor | None
    memory: Memory | None = None


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


@torch.no_grad()
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
) -> Rollout:
    """Run the plan once per prompt (conds[p], seeds[p]); latents have `shape` [C, H, W].

    `start` [P, …] are states to begin with, in place of noise drawn from the seeds.
    At most `slots` states are evaluated at a time and the deepest go first, so that memory does not grow with
    the group. Each distinct state is evaluated once. `check` is called before every forward and may raise to
    stop. Results do not depend on `slots`: where memory runs out, they are halved and the rollout goes on. A
    `shortcut` says how completions, the states that no noise follows, are evaluated, in batches of their own.
    """
    run = _Run(
        plan, plan.coefficients(sigmas), tuple(seeds), tuple(shape), torch.device(device), start, shortcut
    )
    latents = None if sink else torch.empty(len(seeds), len(plan.images), *shape, device=device)

    def keep(prompts: list[int], images: list[int], finished: Tensor) -> None:
        latents[prompts, images] = finished

    nfe, limit = 0, limit_of(slots)
    with policy.inference():
        while run.queue or run.finished:
            if run.queue and (batch := run.take(limit.rows)).edges:
                rows = [conds[p] for p, _ in batch.edges]
                sigma, evaluate = (
                    run.sigma([state for _, state in batch.edges]),
                    run.evaluator(batch) or policy.velocity,
                )
                velocity = limit.parts(partial(_evaluated, evaluate, batch.x, sigma, rows, check), len(rows))
                nfe += len(batch.edges)
                run.file(batch, velocity)
            while len(run.finished) >= limit.rows or (run.finished and not run.queue):
                done, run.finished = run.finished[: limit.rows], run.finished[limit.rows :]
                (sink or keep)(
                    [p for p, _ in done], [run.image[state] for _, state in done], run.advance(done).x
                )
    return Rollout(plan, run.coefficients, run.seeds, run.fork_x, run.fork_v, latents, nfe)


def _evaluated(
    evaluate: Velocity,
    x: Tensor,
    sigma: Tensor,
    conds: Sequence[Any],
    check: Callable[[], None] | None,
    part: slice,
) -> Tensor:
    """Evaluate some rows of a batch, in float32."""
    if check:
        check()
    return evaluate(x[part], sigma[part], conds[part]).float()


class _Batch(NamedTuple):
    """Edges, the states [B, …] that they lead to, their parents' denoised latents for multistep solvers,
    and what shortcuts remember.
    """

    edges: list[tuple[int, int]]
    x: Tensor
    denoised: Tensor | None
    memories: list[Memory | None]

    def rows(self, which: Sequence[int]) -> _Batch:
        """Return some of the rows."""
        picked = self.denoised[which] if self.denoised is not None else None
        return _Batch(
            [self.edges[i] for i in which], self.x[which], picked, [self.memories[i] for i in which]
        )


class _Run:
    """The frontier of a rollout: edges whose parents are known, waiting for a slot."""

    def __init__(
        self,
        plan: Plan,
        coefficients: Coefficients,
        seeds: tuple[int, ...],
        shape: tuple[int, ...],
        device: torch.device,
        start: Tensor | None,
        shortcut: Shortcut | None,
    ) -> None:
        self.start, self.shortcut = start, shortcut
        self.plan, self.coefficients, self.seeds, self.shape, self.device = (
            plan,
            coefficients,
            seeds,
            shape,
            device,
        )
        self.image = {state: i for i, state in enumerate(plan.images)}
        self.fork = {state: i for i, state in enumerate(plan.forks)}
        self.fork_x = torch.zeros(len(seeds), len(plan.forks), *shape, device=device)
        self.fork_v = torch.zeros_like(self.fork_x)
        self.multistep = any(state.kernel == "dpm_2m" for state in plan.states)
        zero = torch.zeros(shape, device=device)
        self.known = {(p, ROOT): _Value(zero, zero, zero) for p in range(len(seeds))}
        self.waiting = {(p, ROOT): -1 for p in range(len(seeds))}
        self.queue: list[tuple[tuple[bool, int], int, int]] = []
        self.finished: list[tuple[int, int]] = []
        roots = [i for i, state in enumerate(plan.states) if state.parent == ROOT]
        for state in roots:
            for p in range(len(seeds)):
                self.open(p, state)

    def open(self, p: int, state: int) -> None:
        """Queue the edge to a state: the trunk first, then the deepest."""
        if self.plan.children[state]:
            heappush(self.queue, ((not self.plan.trunk[state], -self.plan.states[state].index), p, state))
        else:
            self.finished.append((p, state))

    def take(self, slots: int) -> _Batch:
        """Compute the next states that must be evaluated, as many as there are slots: with a shortcut,
        those of one kind alone.
        """
        if not self.shortcut:
            return self.advance([heappop(self.queue)[1:] for _ in range(min(slots, len(self.queue)))])
        trunk, parts, count = self.queue[0][0][0], [], 0
        while self.queue and self.queue[0][0][0] == trunk and count < slots:
            edges = []
            while self.queue and self.queue[0][0][0] == trunk and count + len(edges) < slots:
                edges.append(heappop(self.queue)[1:])
            parts.append(self.foresee(self.advance(edges)))
            count += len(parts[-1].edges)
        if len(parts) == 1:
            return parts[0]
        edges, memories = (
            [one for part in parts for one in getattr(part, name)] for name in ("edges", "memories")
        )
        denoised = torch.cat([part.denoised for part in parts]) if self.multistep else None
        return _Batch(edges, torch.cat([part.x for part in parts]), denoised, memories)

    def foresee(self, batch: _Batch) -> _Batch:
        """File the states whose velocity a shortcut foresees, and return the others."""
        if not self.shortcut.cache:
            return batch
        done, velocity = foreseen(
            batch.memories, batch.x, self.sigma([state for _, state in batch.edges]), self.shortcut.cache
        )
        if not any(done):
            return batch
        skipped = batch.rows([i for i, known in enumerate(done) if known])
        self._keep(skipped, velocity, skipped.memories)
        return batch.rows([i for i, known in enumerate(done) if not known])

    def evaluator(self, batch: _Batch) -> Velocity | None:
        """Return the shortcut's velocity for a batch of completions."""
        return self.shortcut.velocity if self.shortcut and not self.plan.trunk[batch.edges[0][1]] else None

    def sigma(self, states: list[int]) -> Tensor:
        """Return the noise levels of states as float32 [B]."""
        return self.coefficients.sigma[states].to(self.device)

    def advance(self, edges: list[tuple[int, int]]) -> _Batch:
        """Compute the states [B, …] that edges lead to, and forget parents that nothing waits for any
        more.
        """
        states = [state for _, state in edges]
        parents = [(p, self.plan.states[state].parent) for p, state in edges]
        before = [self.known[parent] for parent in parents]
        x = torch.stack([value.x for value in before])
        velocity = torch.stack([value.velocity for value in before])
        c = self.coefficients
        a, b, past, std = (
            over(row[states].to(self.device), x) for row in (c.x_coef, c.v_coef, c.past_coef, c.std)
        )
        out = a * x + b * velocity
        for i, (p, state) in enumerate(edges):
            if self.start is not None and self.plan.states[state].parent == ROOT:
                out[i] = self.start[p]
            elif self.plan.states[state].noise:
                out[i] += std[i] * state_noise(self.plan, state, self.seeds[p], self.shape).to(self.device)
            if self.plan.states[state].kernel == "dpm_2m" and past[i] != 0:
                out[i] += past[i] * before[i].denoised_before
        denoised = None
        if self.multistep:
            sigma = over(
                torch.stack([c.sigma[s] if s != ROOT else c.sigma.new_ones(()) for _, s in parents]).to(
                    self.device
                ),
                x,
            )
            denoised = x - sigma * velocity
        self._release(parents)
        return _Batch(edges, out, denoised, [value.memory for value in before])

    def file(self, batch: _Batch, velocity: Tensor) -> None:
        """Keep evaluated states until their children have been computed, and open those."""
        memories: list[Memory | None] = [None] * len(batch.edges)
        if self.shortcut and self.shortcut.cache and not self.plan.trunk[batch.edges[0][1]]:
            memories = [
                *remember(batch.memories, batch.x, velocity, self.sigma([state for _, state in batch.edges]))
            ]
        self._keep(batch, velocity, memories)

    def _keep(self, batch: _Batch, velocity: Tensor, memories: Sequence[Memory | None]) -> None:
        denoised = [None] * len(batch.edges) if batch.denoised is None else batch.denoised
        for (p, state), *found in zip(batch.edges, batch.x, velocity, denoised, memories, strict=True):
            value, fork = _Value(*found), self.fork.get(state)
            if fork is not None:
                # A fork waits long for all its branches: a copy of its own does not hold the whole batch.
                self.fork_x[p, fork], self.fork_v[p, fork] = value.x, value.velocity
                value = _Value(self.fork_x[p, fork], self.fork_v[p, fork], value.denoised_before)
            self.known[p, state] = value
            self.waiting[p, state] = len(self.plan.children[state])
            for child in self.plan.children[state]:
                self.open(p, child)

    def _release(self, parents: list[tuple[int, int]]) -> None:
        for parent in parents:
            self.waiting[parent] -= 1
            if self.waiting[parent] == 0:
                del self.known[parent], self.waiting[parent]
