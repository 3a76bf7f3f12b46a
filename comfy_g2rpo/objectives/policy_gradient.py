"""The policy gradient of stochastic steps: the exact on-policy cotangent, or the clipped ratio.

A stochastic step is x′ = mean(x, v) + sε with ∂mean/∂v = c. With a density that is averaged over the D
elements, ∇_v log p = cε/(sD), so the policy gradient of a whole group is one vector–Jacobian product with
−(c/(G·s·D))·Σ A_i ε_i. Against an older velocity the log-ratio is −(⟨ε, δ⟩ + ½⟨δ, δ⟩)/D with δ = c(v_old −
v)/s: exactly 0 at v = v_old, and no next latent has to be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import Sigma, over, step
from ..methods.recipe_options import Recipe
from .guard import guarded_loss
from .record_rows import Records


def cotangent(
    directions: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    eta: float,
    group_size: int,
    kernel: str = "flow_sde",
    sigma_max: Sigma = 1 - 1e-6,
) -> Tensor:
    """Return −(c/(G·s·D))·d on the velocity, for directions d = Σ A_i ε_i [N, …]; 0 where s = 0.

    The on-policy gradient of the group's mean loss: equal to autograd of the clipped loss at ratio 1 (method
    of arXiv 2510.01982, algebra in this module's docstring).
    """
    sigma = torch.as_tensor(sigma, dtype=directions.dtype, device=directions.device)
    _, v_coef, std = step(kernel, sigma, sigma_next, eta, sigma_max)
    return row_cotangent(directions, v_coef, std, torch.full_like(std, 1 / group_size))


def row_cotangent(direction: Tensor, v_coef: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    elements = direction[0].numel() if len(direction) else 1
    scale = torch.where(std > 0, -weight * v_coef / (std.clamp(min=1e-30) * elements), 0.0)
    return over(scale, direction) * direction


def log_ratio(velocity: Tensor, velocity_old: Tensor, made: Records) -> Tensor:
    """Return log p_new/p_old of each sample [S] from the velocities [N, …] of the rows."""
    scale = torch.where(made.std > 0, made.v_coef / made.std.clamp(min=1e-30), 0.0)
    delta = over(scale, velocity) * (velocity_old - velocity)
    square = delta.square().flatten(1).mean(1)
    return -((made.noise.to(delta.device) * delta[made.owner]).flatten(1).mean(1) + 0.5 * square[made.owner])


def clipped_loss(velocity: Tensor, velocity_old: Tensor, made: Records, clip: float) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped loss Σ w·max(−Aρ, −A·clip(ρ, 1±c)) and the ratios ρ [S]."""
    ratio = log_ratio(velocity, velocity_old, made).exp()
    worse = torch.maximum(-made.advantage * ratio, -made.advantage * ratio.clamp(1 - clip, 1 + clip))
    return (made.weight[made.owner] * worse).sum(), ratio


def on_policy(velocity: Tensor, made: Records, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ⟨v, cotangent⟩, whose gradient is the policy gradient at the rollout's own policy."""
    return (velocity * row_cotangent(made.direction, made.v_coef, made.std, made.weight)).sum(), {}


def clip(velocity: Tensor, made: Records, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped loss, and the ratio of every sample [S]."""
    found = guarded_loss if recipe.ratio_norm == "guard" else clipped_loss
    loss, ratio = found(velocity, made.velocity, made, recipe.clip)
    return loss, {"ratio": ratio}


def clip_metrics(found: dict[str, Tensor], recipe: Recipe) -> dict[str, float]:
    """Say of ratios [S] how far they went, and the share that the clip held."""
    away = (found["ratio"].double() - 1).abs()
    held = {"clip_share": (away > recipe.clip).double().mean().item()} if len(away) else {}
    return ratio_metrics(found["ratio"]) | held


def ratio_metrics(ratio: Tensor) -> dict[str, float]:
    """Say of ratios [S] how far they went."""
    if not len(ratio):
        return {}
    ratio = ratio.double()
    return {"ratio/mean": ratio.mean().item(), "ratio/max_deviation": (ratio - 1).abs().max().item()}


def kl_scale(made: Records, form: str) -> Tensor:
    """Return what mean‖v − v_ref‖²/D counts in a row's KL [N].

    velocity    1
    step        c²/(2s²): the KL of the step's two Gaussians, averaged over the D elements (Flow-GRPO,
    arXiv 2505.05470)
    published   c²|Δ|/(2s²): the same as its code has it, which divides by the noise per unit of time
    """
    if form == "velocity":
        return torch.ones_like(made.std)
    scale = torch.where(made.std > 0, (made.v_coef / made.std.clamp(min=1e-30)).square() / 2, 0.0)
    return scale * made.dt.abs() if form == "published" else scale
