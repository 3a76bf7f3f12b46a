"""Plain loops over a rollout plan: what the engine is measured against, and must equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from comfy_g2rpo.kernels import over
from comfy_g2rpo.plan import DETERMINISTIC, ROOT, Plan
from comfy_g2rpo.policy import Decoder, Policy
from comfy_g2rpo.rewards import Reward, score_all
from comfy_g2rpo.rollout import state_noise
from comfy_g2rpo.run.scorer import to_8_bit


@dataclass
class PlainLoop:
    """One prompt group, run by plain loops.

    `forwards` counts what they spend, `known` holds the states that they share, x [1, …].
    """

    policy: Policy
    decode: Decoder
    rewards: Sequence[Reward]
    plan: Plan
    sigmas: Tensor
    prompt: str
    cond: Any
    seed: int
    shape: tuple[int, ...]
    forwards: int = 0
    known: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coefficients = self.plan.coefficients(self.sigmas)

    @torch.no_grad()
    def as_published(self) -> Tensor:
        """Score the images [R, images] one sample at a time, as the published code of arXiv 2510.01982 does.

        The anchor runs to its end, every branch evaluates the velocity at its x_k anew, and every granularity
        is completed by itself.
        """
        for root in self.roots():
            self.run_anchor(root)
        scores = {}
        for leaf in self.plan.leaves:
            path = self.path(leaf.state)
            start = max(i for i, state in enumerate(path) if state in self.known)
            x = self.known[path[start]]
            for here, there in pairwise(path[start:]):
                x = self.step(x, self.velocity(x, self.plan.states[here].index), [there])
                if self.plan.states[there].noise:
                    self.known[there] = x
            scores[leaf.state] = self.score(x)[:, 0]
        return torch.stack([scores[state] for state in self.plan.images], 1)

    @torch.no_grad()
    def batched(self) -> Tensor:
        """Score the images [R, images] in batches of one group and granularity (singular trees): the
        anchor is shared, nothing else is.
        """
        velocity = {}
        for root in self.roots():
            for here in self.anchor(root):
                velocity[here] = self.velocity(self.known[here], self.plan.states[here].index)
                for there in self.plan.children[here]:
                    if not self.plan.states[there].noise:
                        self.known[there] = self.step(self.known[here], velocity[here], [there])
        batches = defaultdict(list)
        for leaf in self.plan.leaves:
            path = self.path(leaf.state)
            fork = max(i for i, state in enumerate(path) if state in self.known)
            batches[path[fork], leaf.granularity].append(path[fork + 1 :])
        scores = {}
        for (fork, _), paths in batches.items():
            columns = list(zip(*paths, strict=True))
            x = self.step(
                self.known[fork].expand(len(paths), *self.shape),
                velocity[fork].expand(len(paths), *self.shape),
                columns[0],
            )
            for here, there in pairwise(columns):
                x = self.step(x, self.velocity(x, self.plan.states[here[0]].index), there)
            scores |= dict(zip(columns[-1], self.score(x).unbind(1), strict=True))
        return torch.stack([scores[state] for state in self.plan.images], 1)

    def roots(self) -> list[int]:
        """List the start states, and draw them."""
        found = [i for i, state in enumerate(self.plan.states) if state.parent == ROOT]
        self.known |= {root: state_noise(self.plan, root, self.seed, self.shape)[None] for root in found}
        return found

    def anchor(self, root: int) -> list[int]:
        """List the states that are reached from a root without noise and that noise leaves further on."""
        states = [root]
        while calm := [
            child
            for child in self.plan.children[states[-1]]
            if self.plan.trunk[child] and not self.plan.states[child].noise
        ]:
            states.append(calm[0])
        return states

    def run_anchor(self, root: int) -> None:
        """Run the deterministic trajectory to its end and keep the states that branches leave from."""
        states = self.anchor(root)
        if len(states) == 1:
            return
        x = self.known[root]
        for index in range(self.plan.num_steps):
            velocity = self.velocity(x, index)
            if index + 1 < len(states):
                x = self.known[states[index + 1]] = self.step(x, velocity, [states[index + 1]])
            else:
                x = x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity

    def path(self, state: int) -> list[int]:
        """List the states from the root to a state."""
        path = [state]
        while (parent := self.plan.states[path[0]].parent) != ROOT:
            path.insert(0, parent)
        return path

    def velocity(self, x: Tensor, index: int) -> Tensor:
        """Evaluate the policy on x [B, …], which all stands at one schedule index."""
        self.forwards += len(x)
        return self.policy.velocity(x, self.sigmas[index].expand(len(x)), [self.cond] * len(x))

    def step(self, x: Tensor, velocity: Tensor, states: Sequence[int]) -> Tensor:
        """Take x [B, …] along the edges that lead to `states`."""
        a, b, std = (
            over(row[list(states)], x)
            for row in (self.coefficients.x_coef, self.coefficients.v_coef, self.coefficients.std)
        )
        mean = a * x + b * velocity
        if self.plan.states[states[0]].kernel in DETERMINISTIC:
            return mean
        return mean + std * torch.stack(
            [state_noise(self.plan, state, self.seed, self.shape) for state in states]
        )

    def score(self, latents: Tensor) -> Tensor:
        """Decode and judge latents [B, …]: [R, B]."""
        return score_all(self.rewards, to_8_bit(self.decode(latents)), [self.prompt] * len(latents))
