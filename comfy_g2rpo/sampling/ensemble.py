"""Ensemble Kalman guidance (EnKG, arXiv 2409.20175) for rewards: members move along what covaries with a
better score. No gradients, but it wants hundreds of members where a search has a few: experimental.
"""

from __future__ import annotations

from torch import Tensor

from .search import Ask, Asking, Space
from .search_settings import SearchSettings

ACTIVE = (0.3, 0.95)
"""Noise levels between which members move: above, a look says little; below, little can change."""
MOST = 256
"""Members, whose latents are all kept."""


def ensemble(space: Space, settings: SearchSettings, budget: int) -> Asking:
    """Take all steps without noise, and between them move the members by how well they will look.

    A step that moves takes three forwards: two for the look, and one for the velocity where they then are.
    """
    num_steps = space.num_steps
    moving = [k for k in range(num_steps - 1) if ACTIVE[0] < float(space.sigmas[k]) < ACTIVE[1]]
    count = min(MOST, max(1, budget // (num_steps + 2 * len(moving))))
    x = space.mix(space.draw(count, "member"))
    for k in range(num_steps):
        if k in moving:
            told = yield Ask(x, (k, k + 1, num_steps), kept=True)
            x = moved(told.x[:, 0], told.scores[:, None], settings.pull)
        last = k == num_steps - 1
        names = [f"member {i + 1}" for i in range(len(x))] if last else ()
        told = yield Ask(x, (k, num_steps), names, judged=last, kept=True)
        x = space.euler_step(k, told.x[:, 0], told.velocity[:, 0])


def moved(x: Tensor, scores: Tensor, pull: float) -> Tensor:
    """Move members [N, …] towards better scores [N, R]: x_i − pull/‖C‖ · Σ_j C_ij (x_j − x̄).

    C_ij = ⟨R_i − R*, R_j − R̄⟩/N with ‖C‖ its Frobenius norm; the target R* is the ensemble's best plus its
    standard deviation. Members without a score (NaN) stay where they are; where all are equal, all stay.
    """
    known = ~scores.isnan().any(1)
    if known.sum() < 2:
        return x
    members, found = x[known], scores[known].double()
    target = found.amax(0) + found.std(0, correction=0)
    pairs = (found - target) @ (found - found.mean(0)).T / len(found)
    size = pairs.norm()
    if size == 0:
        return x
    away = (members - members.mean(0)).flatten(1).double()
    step = ((pairs / size).to(away) @ away).to(x.dtype).view_as(members)
    made = x.clone()
    made[known] = members - pull * step
    return made
