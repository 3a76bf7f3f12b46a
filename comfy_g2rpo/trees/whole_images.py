"""Images without noise on the way, and the levels at which an update learns from them.

What a forward-process objective compares are the start noises: the roots of the tree carry the places that
stochastic steps have elsewhere. No state of the way is kept, for the update makes its own: it brings every
finished image x₀ back to some levels, x_σ = (1−σ)x₀ + σε.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import Plan, PlanBuilder, State
from ..schedule import completion_indices


@dataclass(frozen=True)
class ImagePlan(Plan):
    """G deterministic trajectories; image i is that of member i."""

    levels: tuple[int, ...] = ()
    """Schedule indices of the noise levels that the update may learn at."""
    draws: int = 0
    """To how many of them each image is brought."""

    @property
    def rows(self) -> int:
        """Count the states at which an update differentiates."""
        return len(self.images) * self.draws

    def levels_of(self, image: int, seed: int) -> list[int]:
        """Draw an image's levels: the same for a prompt's seed, whatever else there is."""
        return sorted(random.Random(f"levels {seed} {image}").sample(self.levels, self.draws))


def whole_images(
    num_steps: int, group_size: int, levels: Sequence[int], draws: int, coarsest: int = 1
) -> ImagePlan:
    """Plan G trajectories by the ODE, each from a start noise of its own.

    `coarsest` > 1 approximates them, but for the first step: at that stride, by the second-order solver.
    """
    tree = PlanBuilder(num_steps)
    for member in range(group_size):
        state = tree.add(State(0, noise=tree.draw(), group=0, member=member))
        if coarsest == 1:
            state = tree.follow(state, range(1, num_steps + 1))
        else:
            indices = completion_indices(num_steps, 0, coarsest)
            state = tree.follow(state, indices[:1])
            state = tree.finish(state, indices[1:], "dpm_2m") if indices[1:] else state
        tree.score(state)
    return ImagePlan(num_steps, tuple(tree.states), tuple(tree.leaves), tuple(levels), draws)
