"""One step σ → σ′ of a flow model: every kernel is affine in the state and the velocity, plus Gaussian noise.

    x′ = a·x + c·v + s·ε

`x` is the latent at σ, `velocity` is v = ε − x₀, `dt` = σ′ − σ < 0. Sigmas are floats or tensors that
broadcast against x.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Sigma = float | Tensor


class Step(NamedTuple):
    """The coefficients of one step: mean = x_coef·x + v_coef·v, standard deviation std."""

    x_coef: Tensor
    v_coef: Tensor
    std: Tensor


def _sde_step(g: Tensor, sigma: Tensor, dt: Tensor) -> Step:
    """Discretise the reverse SDE that keeps the flow's marginals (Flow-GRPO, arXiv 2505.05470, eq. 9)."""
    return Step(1 + g**2 * dt / (2 * sigma), (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt, g * torch.sqrt(-dt))


def ode_step(sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: Sigma) -> Step:
    """Euler's step; eta and sigma_max play no part."""
    dt = sigma_next - sigma
    return Step(torch.ones_like(dt), dt, torch.zeros_like(dt))


def flow_sde_step(sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: Sigma) -> Step:
    """Flow-GRPO's noise g = η·√(σ/(1−σ)).

    Only the first step has σ above sigma_max = σ_1, which then stands in under the root.
    """
    below_one = torch.minimum(sigma, torch.as_tensor(sigma_max, dtype=sigma.dtype, device=sigma.device))
    return _sde_step(eta * torch.sqrt(sigma / (1 - below_one)), sigma, sigma_next - sigma)


def dance_sde_step(sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: Sigma) -> Step:
    """DanceGRPO's constant noise g = η (arXiv 2505.07818)."""
    return _sde_step(torch.full_like(sigma, eta), sigma, sigma_next - sigma)


def cps_step(sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: Sigma) -> Step:
    """Flow-CPS (arXiv 2509.05952): fresh and kept noise together have exactly the level σ′."""
    std = sigma_next * math.sin(eta * math.pi / 2)
    kept = sigma_next * math.cos(eta * math.pi / 2)
    clean = 1 - sigma_next
    return Step(clean + kept, kept * (1 - sigma) - clean * sigma, std)


def ddim_step(sigma: Tensor, sigma_next: Tensor, eta: float, sigma_max: Sigma) -> Step:
    """DDIM's noise (arXiv 2010.02502, eq. 16) for a flow; any eta keeps the marginals (arXiv 2510.10767).

    s = min(η·σ′·√(1 − SNR/SNR′), σ′) with SNR = ((1−σ)/σ)². η = 1 is ancestral sampling; at the bound, which
    η = 1 reaches at σ = 1, all noise is fresh.
    """
    clean = 1 - sigma_next
    noisier = ((1 - sigma) * sigma_next / (sigma * clean)) ** 2
    std = torch.minimum(eta * sigma_next * torch.sqrt(1 - noisier), sigma_next)
    kept = torch.sqrt(sigma_next**2 - std**2)
    return Step(clean + kept, kept * (1 - sigma) - clean * sigma, std)


STEPS = {
    "ode": ode_step,
    "flow_sde": flow_sde_step,
    "dance_sde": dance_sde_step,
    "cps": cps_step,
    "ddim": ddim_step,
}


def step(kernel: str, sigma: Sigma, sigma_next: Sigma, eta: float, sigma_max: Sigma) -> Step:
    """Return the coefficients of one step of the named kernel."""
    sigma = torch.as_tensor(sigma)
    sigma_next = torch.as_tensor(sigma_next, dtype=sigma.dtype, device=sigma.device)
    return STEPS[kernel](sigma, sigma_next, eta, sigma_max)


def _transition(
    kernel: str, x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, eta: float, sigma_max: Sigma
) -> tuple[Tensor, Tensor]:
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    a, c, std = step(kernel, sigma, sigma_next, eta, sigma_max)
    return over(a, x) * x + over(c, x) * velocity, std


def ode(x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma) -> tuple[Tensor, Tensor]:
    """Return (mean, std) of Euler's step: x + v·dt, 0."""
    return _transition("ode", x, velocity, sigma, sigma_next, 0.0, 1.0)


def flow_sde(
    x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, eta: float, sigma_max: Sigma
) -> tuple[Tensor, Tensor]:
    """Return (mean, std) of Flow-GRPO's SDE step; x, velocity: [B, …], sigmas: scalar or [B]."""
    return _transition("flow_sde", x, velocity, sigma, sigma_next, eta, sigma_max)


def dance_sde(
    x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, eta: float, sigma_max: Sigma
) -> tuple[Tensor, Tensor]:
    """Return (mean, std) of DanceGRPO's SDE step; x, velocity: [B, …], sigmas: scalar or [B]."""
    return _transition("dance_sde", x, velocity, sigma, sigma_next, eta, sigma_max)


def cps(
    x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, eta: float, sigma_max: Sigma
) -> tuple[Tensor, Tensor]:
    """Return (mean, std) of the coefficients-preserving step; x, velocity: [B, …], sigmas: scalar or [B]."""
    return _transition("cps", x, velocity, sigma, sigma_next, eta, sigma_max)


def ddim(
    x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, eta: float, sigma_max: Sigma
) -> tuple[Tensor, Tensor]:
    """Return (mean, std) of DDIM's step; x, velocity: [B, …], sigmas: scalar or [B]."""
    return _transition("ddim", x, velocity, sigma, sigma_next, eta, sigma_max)


def dpm_2m_step(sigma_before: Sigma, sigma: Sigma, sigma_next: Sigma) -> tuple[Tensor, Tensor, Tensor]:
    """Return DPM-Solver++(2M)'s coefficients (arXiv 2211.01095, algorithm 2) on x, v and the last x − σv.

    With λ = log((1−σ)/σ) for a flow. First order where λ is infinite: after σ = 1, and into σ′ = 0.
    """
    before, here, there = (torch.as_tensor(s, dtype=torch.float64) for s in (sigma_before, sigma, sigma_next))
    log_snr = [torch.log((1 - s) / s) for s in (before, here, there)]
    lean = (log_snr[2] - log_snr[1]) / (2 * (log_snr[1] - log_snr[0]))
    lean = torch.where(torch.isfinite(lean), lean, 0.0)
    kept = there / here
    return kept + (1 - kept) * (1 + lean), -(1 - kept) * (1 + lean) * here, -(1 - kept) * lean


def log_prob(x_next: Tensor, mean: Tensor, std: Sigma) -> Tensor:
    """Return the Gaussian log-density of x_next [B, …] as [B], the mean over elements; std is above 0."""
    std = over(torch.as_tensor(std, dtype=x_next.dtype, device=x_next.device), x_next)
    density = -0.5 * ((x_next - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def over(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a scalar or [B] to broadcast against `like` [B, …]."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim())) if value.dim() else value
