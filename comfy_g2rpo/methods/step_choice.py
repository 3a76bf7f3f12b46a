"""Which steps a recipe may take, and how many times a branch splits; needs no torch."""

from __future__ import annotations

import random

from .recipe_options import Recipe

MOST = 10  # splits in two that make no more images than a group may have


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


def split_count(made: Recipe) -> int:
    """Count the steps at which the branches of a branching tree split."""
    if made.branch_at is not None:
        return len(set(made.branch_at))
    steps = len(candidate_steps(made))
    return steps if made.pick == "every" else min(made.pick_size, steps)


def split_factor(group_size: int, splits: int) -> int:
    """Return into how many a branch splits so that `splits` splits make G images: the root of G.

    ValueError names the nearest group sizes where that is no whole number.
    """
    factor = round(group_size ** (1 / splits)) if splits else 0
    if splits and factor**splits == group_size:
        return factor
    sizes = [str(each**splits) for each in (max(factor, 2), max(factor, 2) + 1) if splits <= MOST]
    remedy = f"{splits} splits of a branch make {' or '.join(sizes) or 'more'} images: set that, or branch_at"
    raise ValueError(f"group_size is {group_size}; {remedy}")
