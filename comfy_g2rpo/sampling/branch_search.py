"""Greedy search over the singular tree: what one stochastic step changes is kept where it looks better."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field

from torch import Tensor

from ..schedule import completion_indices
from .search import TOGETHER, Ask, Asking, Space, Told, whole
from .search_settings import SearchSettings


@dataclass
class Leader:
    """The best trajectory so far, of which the states that were visited one by one are known."""

    score: float = math.nan
    name: str = ""
    spent: int = 0
    """Forwards so far."""
    x: list[Tensor] = field(default_factory=list)
    velocity: list[Tensor] = field(default_factory=list)

    def challenge(self, told: Told, names: list[str], way: tuple[int, ...]) -> None:
        """Give way to the best of some rows, walked by `way`, where it scores higher."""
        self.spent += len(told.latents) * (len(way) - 1)
        best = int(told.scores.nan_to_num(nan=-math.inf).argmax())
        score = told.scores[best].item()
        if not (score > self.score or (math.isnan(self.score) and not math.isnan(score)) or not self.x):
            return
        first = way[0]
        # Up to the first jump, each state leads to the next of the schedule.
        fine = next((i for i in range(1, len(way)) if way[i] != first + i), len(way))
        known = min(fine, len(told.x[best]))
        self.score, self.name = score, names[best]
        self.x = [*self.x[:first], *told.x[best][:known]]
        self.velocity = [*self.velocity[:first], *told.velocity[best][:known]]

    def finish(self, space: Space) -> Generator[Ask, Told, None]:
        """Take the steps that it left out, and score its whole image."""
        at = len(self.x)
        here = space.euler_step(at - 1, self.x[-1], self.velocity[-1])[None]
        told = yield Ask(here, tuple(range(at, space.num_steps + 1)), [self.name], kept=True)
        self.spent += space.num_steps - at
        self.x, self.velocity = [*self.x, *told.x[0]], [*self.velocity, *told.velocity[0]]
        self.score = told.scores[0].item()


def branch_search(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Let branches leave the best trajectory step by step; the best of them is the next.

    Half of the budget finds the start: the given noise's image, whole, and other starts by rough looks. A
    branch is x_{k+1} of the SDE step from the trajectory's x_k and v_k, which are known, so that it takes the
    forwards of its completion alone: with stride 1, M·T + G·Σ_k (T−k−1) for M starts and G branches. With a
    larger stride rough looks are compared, and the leader is finished where its next state is not known, and
    at the end: what is returned is whole.
    """
    num_steps = space.num_steps
    steps = [k for k in sorted(set(settings.steps)) if k < num_steps]
    ways = {k: tuple(completion_indices(num_steps, k, settings.stride)) for k in steps}
    first = (0, *completion_indices(num_steps, 0, settings.stride))
    looks = max(0, budget // 2 - num_steps) // (len(first) - 1)
    left = budget - num_steps - looks * (len(first) - 1) - (num_steps - 3) * (settings.stride > 1)
    group = settings.group or left // max(1, sum(len(way) - 1 for way in ways.values()))
    if group < 1 or not steps:
        return
    leader = Leader()
    given = whole(space, [0])
    leader.challenge((yield given._replace(kept=True)), [*given.names], given.indices)
    for numbers in some_at_a_time(1, looks + 1):
        names = [f"start {number}" for number in numbers]
        yield from look(leader, space.mix(space.fresh(numbers)), names, first, num_steps)
    for k in steps:
        if len(leader.x) <= k:
            yield from leader.finish(space)
        x, velocity = leader.x[k][None], leader.velocity[k][None]
        # What finishes the leader stays.
        reserve = (num_steps - k - 1) * (settings.stride > 1)
        rows = min(group, (budget - leader.spent - reserve) // max(1, len(ways[k]) - 1))
        for numbers in some_at_a_time(0, rows):
            branches = space.noisy_step(k, x, velocity, space.streams(numbers, "branch", k), settings)
            names = [f"branch {number + 1} of step {k}" for number in numbers]
            yield from look(leader, branches, names, ways[k], num_steps)
    if len(leader.x) < num_steps:
        yield from leader.finish(space)


def look(
    leader: Leader, states: Tensor, names: list[str], way: tuple[int, ...], num_steps: int
) -> Generator[Ask, Told, None]:
    """Walk from states at way[0]; the best goes on from there if it is better than the leader."""
    exact = way == tuple(range(way[0], num_steps + 1))
    told = yield Ask(states, way, names if exact else (), kept=True)
    leader.challenge(told, names, way)


def some_at_a_time(first: int, end: int) -> list[range]:
    """Split numbers into requests that fit into memory."""
    return [range(at, min(at + TOGETHER, end)) for at in range(first, end, TOGETHER)]
