"""Losses of pairs: of two branches of one fork, the preferred one becomes likelier against the other.

The branches i of a fork share x, v and the step's coefficients. Against the velocity v_ref that drew them,
with δ = c(v_ref − v)/s, a whole latent's log-ratio is ℓ_i = log p/p_ref = −(⟨ε_i, δ⟩ + ½⟨δ, δ⟩), a sum over
its elements. In ℓ_w − ℓ_l the squares cancel: one forward serves all pairs of a fork, and none is needed for
the reference. At v = v_ref the gradient of a whole ranking is the policy gradient with the Borda counts (wins
minus losses) as advantages; from there on only pairs know by how much the model has already moved.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..kernels import over
from ..methods.recipe_options import Recipe
from .record_rows import Records

EPSILON, MOST = 1e-6, 10.0
"""What keeps PG-DPO's ratio of scores finite, and its largest size: ours, for scores near 0 or below it."""


@dataclass(frozen=True)
class Pairs:
    """Pairs [Q] of a step's rows: their places, how often each was preferred, and what the loss makes of
    them.
    """

    row: Tensor
    winner: Tensor
    loser: Tensor
    count: Tensor
    won: Tensor  # ℓ_w
    lost: Tensor  # ℓ_l
    margin: Tensor  # u
    loss: Tensor


def dpo(u: Tensor) -> Tensor:
    """Return −log σ(u) of margins u = β(ℓ_w − ℓ_l) [Q] (Diffusion-DPO, arXiv 2311.12908)."""
    return -logsigmoid(u)


def ropo(u: Tensor, alpha: float) -> Tensor:
    """Return N(−log σ(u) + α·σ(−u)) [Q], N = 4α/(1+α)² (ROPO, arXiv 2404.04102, eq. 6).

    Its slope is at most 1, a little below u = 0, and falls to N where the model contradicts a vote firmly.
    """
    return 4 * alpha / (1 + alpha) ** 2 * (dpo(u) + alpha * torch.sigmoid(-u))


def rejected_share(better: Tensor, worse: Tensor, scale: float) -> Tensor:
    """Return α = σ(K(r_w − r_l)/(|r_l| + ϵ)) [Q], the rejected one's share (PG-DPO, arXiv 2511.19049).

    The absolute value and the bound on the ratio are ours: the paper divides by r_l + ϵ.
    """
    return torch.sigmoid(scale * ((better - worse) / (worse.abs() + EPSILON)).clamp(-MOST, MOST))


def slope(u: Tensor, recipe: Recipe) -> Tensor:
    """Return −∂loss/∂u [Q]: how much each pair still teaches, 1 at most."""
    rest = torch.sigmoid(-u)
    if recipe.pair_loss != "ropo":
        return rest
    alpha = recipe.pair_alpha
    return 4 * alpha / (1 + alpha) ** 2 * rest * (1 + alpha * torch.sigmoid(u))


def compared(velocity: Tensor, made: Records, recipe: Recipe) -> Pairs:
    """Compare the branches of rows by the velocities [N, …] of the model as it stands."""
    delta = over(made.v_coef / made.std, velocity) * (made.velocity - velocity)
    along = (made.branches * delta[:, None]).flatten(2).sum(2)
    half = 0.5 * delta.square().flatten(1).sum(1)
    row, winner, loser = made.wins.nonzero(as_tuple=True)
    won, lost = -(along[row, winner] + half[row]), -(along[row, loser] + half[row])
    share: Tensor | float = 1.0
    if recipe.pair_loss == "pg_dpo":
        better, worse = (made.scores[row, side] for side in (winner, loser))
        known = ~(better.isnan() | worse.isnan())
        better, worse = torch.where(known, better, won.detach()), torch.where(known, worse, lost.detach())
        share = rejected_share(better, worse, recipe.pair_scale)
    # β(ℓ_w − αℓ_l), with the squares together: where α is 1 they cancel to the last digit.
    u = recipe.pair_beta * (share * along[row, loser] - along[row, winner] - (1 - share) * half[row])
    loss = ropo(u, recipe.pair_alpha) if recipe.pair_loss == "ropo" else dpo(u)
    loss = loss + recipe.pair_anchor * (-won).clamp(min=0)
    return Pairs(row, winner, loser, made.wins[row, winner, loser], won, lost, u, loss)


def pairs(velocity: Tensor, made: Records, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted loss of all pairs of the rows, and of every pair what metrics tell."""
    found = compared(velocity, made, recipe)
    values = {"won": found.won, "lost": found.lost, "margin": found.margin, "count": found.count}
    return (made.weight[found.row] * found.count * found.loss).sum(), values


def pair_metrics(found: dict[str, Tensor], recipe: Recipe) -> dict[str, float]:
    """Say how the model ranks pairs [Q] by now; a tie, as before the first update, is half right."""
    won, lost, count = (found[name].double() for name in ("won", "lost", "count"))

    def mean(values: Tensor) -> float:
        return ((values.double() * count).sum() / count.sum().clamp(min=1e-30)).item()

    return {
        "pairs/accuracy": mean((won > lost).double() + 0.5 * (won == lost)),
        "pairs/margin": mean(found["margin"]),
        "pairs/displacement": mean(won < 0),
        "pairs/weight": mean(slope(found["margin"], recipe)),
    }


def least_loss(velocity: Tensor, made: Records, recipe: Recipe) -> Records:
    """Keep the share `pair_keep` of the pairs, those with the least loss at velocities [N, …]."""
    found = compared(velocity, made, recipe)
    kept = found.loss.argsort(stable=True)[: max(round(recipe.pair_keep * len(found.loss)), 1)]
    wins = torch.zeros_like(made.wins)
    wins[found.row[kept], found.winner[kept], found.loser[kept]] = found.count[kept]
    return dataclasses.replace(made, wins=wins, weight=pair_weights(wins))


def pair_weights(wins: Tensor) -> Tensor:
    """Return the weight of every row [N] of wins [N, G, G] with which losses add up to their mean."""
    return (1 / wins.sum().clamp(min=1e-30)).expand(len(wins))
