"""Searches among start noises: best of N, coarse first, and mutation of the best."""

from __future__ import annotations

import heapq
import math

from .search import TOGETHER, Ask, Asking, Space, images, strided, whole
from .search_settings import SearchSettings

MUTANTS = 4
PATIENCE = 2
"""Rounds without success after which mutations become smaller."""


def best_of_n(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Make images from ⌊budget/T⌋ start noises, the first of them the given one."""
    yield from images(space, range(budget // space.num_steps))


def coarse_first(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Look at many starts roughly, and spend a quarter of the budget on the whole images of the best.

    The given noise's image is made whole in any case: what is found is no worse. Looks are ranked by the
    reward, or by how far guidance moves them (CFG-Rejection, arXiv 2505.23343), which needs no decoding.
    """
    num_steps, by_gap = space.num_steps, settings.score == "guidance_gap"
    yield whole(space, [0])
    rough = strided(num_steps, settings.stride)
    finals = max(1, budget // (4 * num_steps))
    looks = max(1, (budget - (finals + 1) * num_steps) // (len(rough) - 1))
    seen: list[tuple[float, int]] = []
    for first in range(1, looks + 1, TOGETHER):
        numbers = range(first, min(first + TOGETHER, looks + 1))
        told = yield Ask(space.mix(space.fresh(numbers)), rough, judged=not by_gap, by_gap=by_gap)
        losses = (-told.scores).nan_to_num(nan=math.inf).tolist()
        # Of equal looks the first one goes on.
        seen = heapq.nsmallest(finals, [*seen, *zip(losses, numbers, strict=False)])
    yield from images(space, [number for _, number in seen])


def noise_search(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Mutate the best start noise, z′ = √(1−ρ²)·z + ρ·ξ, which keeps the law N(0, 1) and ‖z‖.

    A quarter of the budget finds the start. DNO (arXiv 2405.18881) without gradients.
    """
    best, score = space.noise, -math.inf
    starts = max(1, budget // (4 * space.num_steps))
    for first in range(0, starts, TOGETHER):
        numbers = range(first, min(first + TOGETHER, starts))
        told = yield whole(space, numbers)
        scores = told.scores.nan_to_num(nan=-math.inf)
        if scores.max() > score:
            best, score = space.fresh([numbers[scores.argmax()]])[0], scores.max().item()
    share, failures, number = settings.mutation, 0, 0
    while True:
        mutants = math.sqrt(1 - share**2) * best + share * space.draw(MUTANTS, "mutant", number)
        number += 1
        names = [f"mutation {number}, {100 * share:.0f} % new"] * MUTANTS
        told = yield Ask(space.mix(mutants), tuple(range(space.num_steps + 1)), names)
        scores = told.scores.nan_to_num(nan=-math.inf)
        if scores.max() > score:
            best, score, failures = mutants[scores.argmax()], scores.max().item(), 0
            continue
        failures += 1
        if failures == PATIENCE:
            share, failures = share / 2, 0
