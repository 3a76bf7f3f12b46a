"""Funnel: many starts are looked at roughly and early, and the better half goes on as particles.

This project's own. A start noise decides most of what is in an image, and that shows after a few steps: so
the cheapest look takes those steps in one jump. Particles then share what is left of the budget.
"""

from __future__ import annotations

import torch

from .particles import MOST, Swarm, filled, resampling, steps_on
from .search import Ask, Asking, Space
from .search_settings import SearchSettings


def funnel(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Jump with all starts to the step before the first of `judge_at`, `stride` steps at a time; look; go on
    with the better half.

    A start takes the forwards of its jump and one for the look, whose velocity is its particle's first.
    """
    num_steps = space.num_steps
    enter = min(max(min(settings.judge_at) - 1, 0), num_steps - 1)
    way = (*range(0, enter, settings.stride), enter)
    rest = num_steps - 1 - enter
    count, chance = int(budget / (len(way) + rest / 2)), resampling(space)
    for number, first in enumerate(range(0, count, 2 * MOST)):
        rows = min(2 * MOST, count - first)
        starts = space.mix(space.draw(rows, "particle", number))
        # With no steps left the looks are the images.
        names = () if rest else [f"start {i + 1} of pass {number + 1}" for i in range(rows)]
        told = yield Ask(starts, (*way, num_steps), names, kept=True)
        seen = filled(told.scores, torch.zeros(len(told.scores), dtype=torch.float64))
        best = seen.argsort(descending=True, stable=True)[: max(1, rows // 2)]
        x, velocity = told.x[best, -1], told.velocity[best, -1]
        # Of the rough look nothing but the choice is kept: weights begin with the particles' first look.
        none = torch.zeros(len(best), dtype=torch.float64)
        swarm = Swarm((x,), (velocity,), (none,), none)
        if rest:
            noise = space.draw(len(best), "particle", number, enter)
            x = space.noisy_step(enter, x, velocity, noise, settings)
            yield from steps_on(space, settings, swarm, x, enter + 1, chance, number)
