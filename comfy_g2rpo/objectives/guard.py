"""GRPO-Guard (arXiv 2510.22319): a clip that means the same at every step, and steps that pull alike."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import over
from .record_rows import Records


def guarded_log_ratio(velocity: Tensor, velocity_old: Tensor, made: Records) -> Tensor:
    """Return the re-centred and scaled log-ratio of each sample [S] from the velocities [N, …] of the rows.

        s·(log p_new − log p_old + ‖μ − μ_old‖²/(2s²D)) = ⟨ε, μ − μ_old⟩/D,    μ − μ_old = c(v − v_old)

    The paper's RatioNorm (eq. 8), with s the whole step's noise and μ its mean. The plain log-ratio lies
    ‖μ − μ_old‖²/(2s²D) below 0 on average and spreads with 1/s; this one lies around 0. It is 0 where s = 0.
    """
    shift = over(torch.where(made.std > 0, made.v_coef, 0.0), velocity) * (velocity - velocity_old)
    return (made.noise * shift[made.owner]).flatten(1).mean(1)


def guarded_loss(velocity: Tensor, velocity_old: Tensor, made: Records, clip: float) -> tuple[Tensor, Tensor]:
    """Return Σ w·max(−Aρ, −A·clip(ρ, 1±c))/|Δ| and the guarded ratios ρ [S].

    The paper's gradient reweighting by the step Δ = σ′ − σ: at ρ = 1 the gradient on v is −wAcε/(|Δ|D), and
    c/Δ is 1 + η²/2 at every step of `flow_sde` after the first, which has 1.
    """
    ratio = guarded_log_ratio(velocity, velocity_old, made).exp()
    worse = torch.maximum(-made.advantage * ratio, -made.advantage * ratio.clamp(1 - clip, 1 + clip))
    return ((made.weight / made.dt.abs())[made.owner] * worse).sum(), ratio
