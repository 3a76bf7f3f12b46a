"""VarGrad: a least-squares fit of the branches' log-ratios to their rewards (arXiv 2402.05098, off-policy
training).

Per fork, the target is p_ref·exp(R/τ) of one stochastic step, and the loss ½·Var_i(ℓ_i − R_i/τ) over its
branches, whose own mean stands for the unknown log Z. ℓ is the log-ratio of a whole latent, a sum: −(⟨ε, δ⟩ +
½⟨δ, δ⟩) with δ = c(v_ref − v)/s. The quadratic term is common to a fork's branches and drops out. At v =
v_ref the gradient is the policy gradient with A = (R − R̄)/τ. The branches may be those of any policy: no
importance weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import over
from ..methods.recipe_options import Recipe
from .policy_gradient import ratio_metrics
from .record_rows import Records


def vargrad_loss(
    velocity: Tensor, velocity_ref: Tensor, made: Records, tau: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Σ w·G·½Var_i(ℓ_i − R_i/τ) over the rows, and of every sample [S] ρ, and what is fitted and left.

    `w` holds 1/G, the number of branches. A sample's R is `value`; ρ is the ratio by the mean over elements.
    """
    scale = torch.where(made.std > 0, made.v_coef / made.std.clamp(min=1e-30), 0.0)
    delta = over(scale, velocity) * (velocity_ref - velocity)
    inner = -(made.noise.to(delta.device) * delta[made.owner]).flatten(1).sum(1)
    wanted = within(made.value, made) / tau
    left = within(inner, made) - wanted
    loss = (made.weight[made.owner] * 0.5 * left.square()).sum()
    ratio = ((inner - 0.5 * delta.square().flatten(1).sum(1)[made.owner]) / delta[0].numel()).exp()
    return loss, {"ratio": ratio, "left": left.square(), "wanted": wanted.square()}


def within(values: Tensor, made: Records) -> Tensor:
    """Return values [S] less their mean over the samples of the same row."""
    total, count = (
        values.new_zeros(len(made)).index_add(0, made.owner, v) for v in (values, torch.ones_like(values))
    )
    return values - (total / count.clamp(min=1))[made.owner]


def vargrad(velocity: Tensor, made: Records, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss at the recipe's temperature, and its values."""
    return vargrad_loss(velocity, made.velocity, made, recipe.vargrad_tau)


def vargrad_metrics(found: dict[str, Tensor], recipe: Recipe) -> dict[str, float]:
    """Say how far ratios [S] went, and which share of the rewards' variance they leave unexplained."""
    wanted, left = (found[name].double().sum().item() for name in ("wanted", "left"))
    share = {"vargrad/unexplained": left / wanted} if wanted else {}
    return ratio_metrics(found["ratio"]) | share
