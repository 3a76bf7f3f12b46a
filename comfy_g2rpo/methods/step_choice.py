"""Which steps a recipe may take; needs no torch."""

from __future__ import annotations

import random

from .recipe_options import Recipe


def candidate_steps(made: Recipe) -> list[int]:
    """List the steps that may be stochastic."""
    steps = made.num_steps
    count = {"first_half": max(steps // 2, 1), "all": steps, "all_but_last": max(steps - 1, 1)}
    return list(range(count[made.steps]))


def drawn_steps(
    steps: list[int], size: int, shares: tuple[float, ...] | None, rng: random.Random
) -> list[int]:
    """Draw `size` of the steps without putting any back, each alike or in proportion to its share.

    A step's gradient is not divided by its probability: over many updates a step then counts in proportion to
    its share, which is the point of it. Dividing would give the even mean over the steps again, with rare
    steps as the loudest; and it would be undone wherever `max_grad_norm` scales each update to one length.
    """
    if shares is None:
        return sorted(rng.sample(steps, size))
    left, chosen = dict(zip(steps, shares, strict=True)), []
    for _ in range(size):
        chosen.append(rng.choices(list(left), list(left.values()))[0])
        del left[chosen[-1]]
    return sorted(chosen)
