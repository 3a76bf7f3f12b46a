"""Greedy search over the singular tree: what one stochastic step changes is kept where it scores higher."""

from __future__ import annotations

import math

from torch import Tensor

from ..schedule import completion_indices
from .search import TOGETHER, Ask, Asking, Space, images
from .search_settings import SearchSettings


def branch_search(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Let branches leave the best image's trajectory step by step; the best image's own is the next.

    A quarter of the budget finds the start. A branch is x_{k+1} of the SDE step from the trajectory's x_k and
    v_k, which are known, so that it takes the forwards of its completion alone: with stride 1,
    M·T + G·Σ_k (T−k−1) forwards for M starts and G branches. With a larger stride the branches are looked at
    roughly, and the best of a step is then finished: only whole images are compared with the best so far.
    """
    num_steps = space.num_steps
    steps = [k for k in sorted(set(settings.steps)) if k < num_steps]
    ways = {k: tuple(completion_indices(num_steps, k, settings.stride)) for k in steps}
    starts = max(1, budget // (4 * num_steps))
    left = budget - starts * num_steps - sum(len(rest(k, ways[k])) for k in steps)
    group = settings.group or left // max(1, sum(len(way) - 1 for way in ways.values()))
    if group < 1 or not steps:
        return
    score, x, velocity = math.nan, [], []
    for ask in images(space, range(starts)):
        told = yield ask._replace(kept=True)
        best = best_of(told.scores)
        if not x or better(told.scores[best].item(), score):
            score, x, velocity = told.scores[best].item(), list(told.x[best]), list(told.velocity[best])
    for k in steps:
        name, way_x, way_v, found = "", [], [], math.nan
        for first in range(0, group, TOGETHER):
            numbers = range(first, min(first + TOGETHER, group))
            noise = space.streams(numbers, "branch", k)
            branches = space.noisy_step(k, x[k][None], velocity[k][None], noise, settings)
            names = [f"branch {number + 1} of step {k}" for number in numbers]
            told = yield Ask(branches, ways[k], () if rest(k, ways[k]) else names, kept=True)
            best = best_of(told.scores)
            if not name or better(told.scores[best].item(), found):
                name, found = names[best], told.scores[best].item()
                way_x, way_v = list(told.x[best]), list(told.velocity[best])
        if finish := rest(k, ways[k]):
            here = space.euler_step(k + 2, way_x[1], way_v[1])[None]
            told = yield Ask(here, finish, [name], kept=True)
            way_x, way_v = [*way_x[:2], *told.x[0]], [*way_v[:2], *told.velocity[0]]
            found = told.scores[0].item()
        if better(found, score):
            score, x[k + 1 :], velocity[k + 1 :] = found, way_x, way_v


def rest(k: int, way: tuple[int, ...]) -> tuple[int, ...]:
    """List the indices that finish a branch of step k beyond those that its rough way has: none where that
    left out nothing. The states k+1 and k+2 are on the way.
    """
    num_steps = way[-1]
    return () if way == tuple(range(k + 1, num_steps + 1)) else tuple(range(k + 3, num_steps + 1))


def best_of(scores: Tensor) -> int:
    """Return the position of the highest score, the first of equals; what was not judged is never it."""
    return int(scores.nan_to_num(nan=-math.inf).argmax())


def better(score: float, than: float) -> bool:
    """Return whether a score is above another; any is above one that is not known."""
    return score > than or (math.isnan(than) and not math.isnan(score))
