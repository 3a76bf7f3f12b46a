"""A flow model of a few numbers, and the plain loops that the engine must equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from comfy_g2rpo import kernels
from comfy_g2rpo.plan import ROOT, Plan
from comfy_g2rpo.recipes import RECIPES, Recipe
from comfy_g2rpo.rollout import state_noise

SHAPE = (2, 3, 3)


def small(name: str, num_steps: int, group_size: int) -> Recipe:
    """Make a named recipe small; a tree whose branches split again makes 2 · 2 images."""
    made = dataclasses.replace(RECIPES[name], num_steps=num_steps, group_size=group_size)
    if made.tree != "branching":
        return made
    splits = {"pick_size": 2} if made.branch_at is None else {"branch_at": (0, 2)}
    return dataclasses.replace(made, group_size=4, **splits)


class ToyPolicy:
    """A two-layer network with an additive adapter; `calls` records the batch sizes it was asked for."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = 18
        self.first, self.second = (
            torch.randn(a, b, generator=generator, dtype=torch.float64).to(dtype) / b**0.5
            for a, b in ((32, size + 2), (size, 32))
        )
        self.adapter = nn.Parameter(
            0.1 * torch.randn(size, 32, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.active = True
        self.calls: list[int] = []

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[float]) -> Tensor:
        self.calls.append(len(x))
        dtype = self.first.dtype
        extra = torch.stack([sigma.to(dtype), torch.tensor(list(cond), dtype=dtype)], 1)
        hidden = torch.tanh(torch.cat([x.flatten(1).to(dtype), extra], 1) @ self.first.T)
        weight = self.second + self.adapter if self.active else self.second
        return (hidden @ weight.T).view_as(x)

    def parameters(self) -> list[nn.Parameter]:
        return [self.adapter]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True

    @contextmanager
    def inference(self) -> Iterator[None]:
        with torch.no_grad():
            yield


def plain_states(
    policy: ToyPolicy, plan: Plan, sigmas: Tensor, cond: float, seed: int
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Walk every root-to-leaf path by itself, one sample at a time, sharing nothing: state → (x,
    velocity).
    """
    seen: dict[int, tuple[Tensor, Tensor | None]] = {}
    for leaf in plan.leaves:
        path = [leaf.state]
        while plan.states[path[0]].parent != ROOT:
            path.insert(0, plan.states[path[0]].parent)
        x = state_noise(plan, path[0], seed, SHAPE)[None]
        history: list[tuple[Tensor, float]] = []
        for here, there in pairwise(path):
            state = plan.states[there]
            sigma, sigma_next = sigmas[plan.states[here].index], sigmas[state.index]
            with torch.no_grad():
                v = policy.velocity(x, sigma.reshape(1), [cond])
            seen[here] = (x[0], v[0])
            if state.kernel == "dpm_2m":
                denoised = x - sigma * v
                past, before = history[-1] if history else (denoised, sigmas[0])
                a, b, c = kernels.dpm_2m_step(before, sigma, sigma_next)
                nxt = float(a) * x + float(b) * v + float(c) * past
            else:
                mean, std = kernels._transition(state.kernel, x, v, sigma, sigma_next, state.eta, sigmas[1])
                nxt = mean + std * state_noise(plan, there, seed, SHAPE)[None] if state.noise else mean
            history.append((x - sigma * v, sigma))
            x = nxt
        seen[path[-1]] = (x[0], None)
    return seen
