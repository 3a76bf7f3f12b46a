"""Sequential Monte Carlo over denoising: particles that look poor are replaced by copies of those that look
good, and particle Gibbs, which does that again around a trajectory that it keeps (PG-DLM, arXiv 2507.08390).

The target is p(x₀)·exp(λR(x₀)). A step's weight is exp(λ(R(x̂₀ at k) − R(x̂₀ judged before))), so that the
product of all is exp(λR(x₀)), whichever steps are judged.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rollout import stream
from .search import Ask, Asking, Space, Told
from .search_settings import SearchSettings

MOST = 64
"""Particles of one pass, whose latents are all kept."""


@dataclass(frozen=True)
class Swarm:
    """Trajectories so far, each row one, and what is known of them."""

    x: tuple[Tensor, ...]  # of every step so far [n, …], or of the last one alone
    velocity: tuple[Tensor, ...]
    seen: tuple[Tensor, ...]
    """Scores [n] of the looks at each step; those of the look before where a step was not judged."""
    log_weights: Tensor  # [n] float64

    def rows(self, which: Tensor | slice) -> Swarm:
        """Return some of the rows, or copies of them."""
        made = (tuple(part[which] for part in parts) for parts in (self.x, self.velocity, self.seen))
        return Swarm(*made, self.log_weights[which])

    def now(self) -> Swarm:
        """Return them without what was before the last step."""
        return Swarm(self.x[-1:], self.velocity[-1:], self.seen[-1:], self.log_weights)


def particles(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Go through all steps with as many particles as the budget pays for: at most 64, then again."""
    chance, count = resampling(space), budget // space.num_steps
    for number, first in enumerate(range(0, count, MOST)):
        yield from one_pass(space, settings, min(MOST, count - first), chance, number, history=False)


def particle_gibbs(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Go through all steps several times; each goes around a trajectory that the one before has drawn.

    The reference takes no forwards: its states, velocities and scores are known.
    """
    rows = min(MOST, max(1, budget // (space.num_steps * settings.iterations)))
    chance, reference = resampling(space), None
    for number in range(settings.iterations):
        swarm = yield from one_pass(space, settings, rows, chance, number, reference)
        reference = swarm.rows(multinomial(swarm.log_weights, 1, chance))


def resampling(space: Space) -> random.Random:
    """Return the random choices of a search among its particles."""
    return random.Random(stream("search", space.seed, "resampling"))


def one_pass(
    space: Space,
    settings: SearchSettings,
    rows: int,
    chance: random.Random,
    number: int = 0,
    reference: Swarm | None = None,
    history: bool = True,
) -> Generator[Ask, Told, Swarm]:
    """Bring particles through all steps; return them with their weights, and with all their states if there
    is to be a history.

    With a reference this is conditional SMC: row 0 is the reference at every step and is never replaced.
    """
    swarm = Swarm((), (), (), torch.zeros(rows + (reference is not None), dtype=torch.float64))
    x = space.mix(space.draw(rows, "particle", number))
    return (yield from steps_on(space, settings, swarm, x, 0, chance, number, reference, history))


def steps_on(
    space: Space,
    settings: SearchSettings,
    swarm: Swarm,
    x: Tensor,
    first: int,
    chance: random.Random,
    number: int,
    reference: Swarm | None = None,
    history: bool = False,
) -> Generator[Ask, Told, Swarm]:
    """Bring particles that are at states x [n, …] of step `first` through the rest."""
    last, own = space.num_steps - 1, slice(reference is not None, None)
    for k in range(first, last + 1):
        judged = k == last or k in settings.judge_at
        names = [f"particle {i + 1} of pass {number + 1}" for i in range(len(x))] if k == last else ()
        told = yield Ask(x, (k, last + 1), names, judged, kept=True)
        swarm = grown(swarm, told, k, judged, settings.strength, reference)
        swarm = swarm if history else swarm.now()
        if k < last:
            if judged and effective(swarm.log_weights) < len(swarm.log_weights) / 2:
                swarm = replaced(swarm, chance, pinned=reference is not None)
            noise = space.draw(len(told.latents), "particle", number, k)
            x = space.noisy_step(k, swarm.x[-1][own], swarm.velocity[-1][own], noise, settings)
    return swarm


def grown(swarm: Swarm, told: Told, k: int, judged: bool, strength: float, reference: Swarm | None) -> Swarm:
    """Add a step to all trajectories; where fewer were affordable than there are, the last ones end."""
    x, velocity, scores = told.x[:, 0], told.velocity[:, 0], told.scores
    if reference is not None:
        x, velocity = torch.cat([reference.x[k], x]), torch.cat([reference.velocity[k], velocity])
        scores = torch.cat([reference.seen[k], scores])
    swarm = swarm.rows(slice(len(x)))
    before = swarm.seen[-1] if swarm.seen else torch.zeros(len(x), dtype=torch.float64)
    seen = filled(scores, before) if judged else before
    return Swarm(
        (*swarm.x, x),
        (*swarm.velocity, velocity),
        (*swarm.seen, seen),
        swarm.log_weights + strength * (seen - before),
    )


def filled(scores: Tensor, before: Tensor) -> Tensor:
    """Give what could not be judged [n] the worst score that was; where there is none, those of before."""
    known = scores[~scores.isnan()]
    return torch.where(scores.isnan(), known.min(), scores) if len(known) else before


def replaced(swarm: Swarm, chance: random.Random, pinned: bool) -> Swarm:
    """Draw rows by their weights, which are equal then. A pinned first row stays, the rest by independent
    draws, for which conditional SMC leaves the target as it is; without, systematically.
    """
    count = len(swarm.log_weights)
    if pinned:
        rest = multinomial(swarm.log_weights, count - 1, chance)
        rows = torch.cat([torch.zeros(1, dtype=torch.long), rest])
    else:
        rows = systematic(swarm.log_weights.softmax(0), chance.random())
    return replace(swarm.rows(rows), log_weights=torch.zeros(count, dtype=torch.float64))


def effective(log_weights: Tensor) -> float:
    """Return the effective number of particles, 1/Σw² of weights [n] that sum to 1."""
    return 1 / log_weights.softmax(0).square().sum().item()


def systematic(weights: Tensor, point: float) -> Tensor:
    """Draw n of n by weights [n] that sum to 1, at equal distances: each comes within 1 of n·w times."""
    count = len(weights)
    ends = weights.double().cumsum(0)
    ends[-1] = 1.0 + 1e-9  # nothing is lost to rounding
    points = (point + torch.arange(count, dtype=torch.float64)) / count
    return torch.searchsorted(ends, points, right=True)


def multinomial(log_weights: Tensor, count: int, chance: random.Random) -> Tensor:
    """Draw rows independently by their log weights [n]."""
    weights = log_weights.softmax(0).tolist()
    return torch.tensor(chance.choices(range(len(weights)), weights, k=count), dtype=torch.long)
