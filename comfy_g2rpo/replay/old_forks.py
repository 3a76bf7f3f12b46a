"""Forks that are kept, and which of them an update takes: no image is made again, and no old velocity.

A fork is small, two latents: the state and the velocity that its branches were drawn with. Their noise is
drawn again from its seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods.recipe_options import Recipe
from ..rollout import stream
from ..sampling.budgeted import acceptance, draw

MOST_BYTES = 10**9
LEAST_PULL = 1e-3  # of the greatest: below it a fork would come back seldom, and then too strongly


@dataclass(frozen=True)
class Fork:
    """A state that has branched, and all that an update needs of it; tensors lie on the CPU."""

    x: Tensor  # […]
    velocity: Tensor  # […], of the policy that drew the branches
    members: Tensor  # [3, g]: advantage, value (rewards in their own units), number of the noise
    sigma: float
    v_coef: float
    std: float
    weight: float  # step weight / group size
    dt: float  # of its step, below 0
    step: int  # schedule index
    made: int  # the run's step that made it
    pull: float  # Σ |A|·ρ over its members, as last seen
    prompt: str
    seed: int

    @property
    def best(self) -> float:
        """Return the best reward of a branch, −∞ where none has one."""
        known = self.members[1][~self.members[1].isnan()]
        return known.max().item() if len(known) else -math.inf


class Chosen(NamedTuple):
    """A fork by its place in the buffer, and what its weight is multiplied by."""

    place: int
    factor: float


def refuse_too_many(recipe: Recipe, shapes: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where the forks that a recipe keeps may take more than `MOST_BYTES`.

    They lie in memory and in every checkpoint; `shapes` are those of the latents.
    """
    one = bytes_of_fork(max(map(math.prod, shapes)))
    if recipe.replay and one * recipe.replay_size > MOST_BYTES:
        much = f"{one * recipe.replay_size / 1e9:.1f} GB in memory and in every checkpoint"
        fits = f"set it to {MOST_BYTES // one}" if one <= MOST_BYTES else "set replay: 0"
        raise ValueError(f"replay_size is {recipe.replay_size}: {much}, above 1 GB; {fits}, or less")


def bytes_of_fork(numbers: int) -> int:
    """Return the bytes of a fork whose latent has so many numbers."""
    return 2 * 4 * numbers


def remembered(forks: Sequence[Fork], new: Sequence[Fork], recipe: Recipe, step: int) -> list[Fork]:
    """Return the forks and new ones, oldest first, less those that are too old for `step` or too many."""
    young = [fork for fork in (*forks, *new) if step - fork.made <= recipe.replay_age]
    return young[-recipe.replay_size :]


def choose(forks: Sequence[Fork], places: Sequence[int], count: int, by: str, seed: int) -> list[Chosen]:
    """Choose `count` of the forks at `places` without repetition, all where there are no more.

    uniform   evenly
    rank      by weight 1/(.01·n + rank), rank 0 for the best reward (arXiv 2402.05098)
    draw      by optimal budgeted rejection, w = Σ|A|ρ as last seen; their weights are divided by their
              acceptance, so that the gradient is that of an even choice on average
    """
    total = len(places)
    if total <= count:
        return [Chosen(place, 1.0) for place in places]
    generator = torch.Generator().manual_seed(stream("replay", by, seed))
    if by == "draw":
        pulls = torch.tensor([forks[place].pull for place in places], dtype=torch.float64).nan_to_num(0.0)
        accepted = acceptance(
            pulls.clamp(min=LEAST_PULL * pulls.max().clamp(1e-30, 1e30)).log(), count / total
        )
        found = draw(accepted, seed).nonzero().flatten()
        return [Chosen(places[i], count / total / accepted[i].item()) for i in found.tolist()]
    if by == "rank":
        best = torch.tensor([forks[place].best for place in places], dtype=torch.float64)
        rank = best.argsort(descending=True, stable=True).argsort()
        found = torch.multinomial(1 / (0.01 * total + rank), count, generator=generator)
    else:
        found = torch.randperm(total, generator=generator)[:count]
    return [Chosen(places[i], 1.0) for i in sorted(found.tolist())]
