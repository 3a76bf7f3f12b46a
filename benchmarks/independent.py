"""One training step of independent trajectories as trainers on diffusers and peft take it, for comparison.

A batch of trajectories goes through the pipeline's transformer with peft's layers and through its VAE, under
autocast in 16 bit, with noise at every step. Every step keeps its latents and log-probability; the update
recomputes both for every trajectory and step but the last, and takes one optimizer step on the clipped ratio:
Flow-GRPO's published loop (arXiv 2505.05470), and that of frameworks built like it (Flow-Factory).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comfy_g2rpo.rewards import Reward
from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.run.scorer import to_8_bit
from comfy_g2rpo.schedule import shifted_sigmas

ETA, CLIP = 0.7, 1e-4


class Step(NamedTuple):
    """What is kept of a step of all trajectories of a batch."""

    x: Tensor
    sigma: float
    to: float
    then: Tensor
    log_probability: Tensor


def moments(x: Tensor, velocity: Tensor, sigma: float, to: float) -> tuple[Tensor, float]:
    """Return the mean of the next latents and their standard deviation (eq. 9), bounded at σ = .95."""
    std, dt = ETA * math.sqrt(sigma / (1 - min(sigma, 0.95))), to - sigma
    mean = x * (1 + std**2 / (2 * sigma) * dt) + velocity * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * math.sqrt(-dt)


def log_probability(then: Tensor, mean: Tensor, spread: float) -> Tensor:
    """Return the mean log-density [B] of the next latents."""
    found = -((then - mean) ** 2) / (2 * spread**2) - math.log(spread * math.sqrt(2 * math.pi))
    return found.flatten(1).mean(1)


@torch.no_grad()
def trajectories(
    policy: Any,
    decode: Callable[[Tensor], Tensor],
    reward: Reward,
    prompts: Sequence[str],
    num_steps: int,
    seed: int,
) -> tuple[Tensor, list[Step]]:
    """Draw and judge one picture per prompt, all in one batch; return the scores [B] and the steps."""
    shape, sigmas = policy.latent_shape(64, 64), shifted_sigmas(num_steps).tolist()
    x, cond = seeded_noise((len(prompts), *shape), "start", seed), policy.encode(prompts)
    kept = []
    for k, (sigma, to) in enumerate(pairwise(sigmas)):
        velocity = policy.velocity(x, torch.full((len(x),), sigma), cond)
        mean, spread = moments(x, velocity, sigma, to)
        then = mean + spread * seeded_noise(x.shape, "step", seed, k)
        kept.append(Step(x, sigma, to, then, log_probability(then, mean, spread)))
        x = then
    return reward.score(to_8_bit(decode(x)), prompts), kept


def update(
    policy: Any,
    steps: Sequence[Step],
    prompts: Sequence[str],
    advantages: Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Take one optimizer step on the clipped ratio of every trajectory and step but the last."""
    cond = policy.encode(prompts)
    optimizer.zero_grad()
    for step in steps[:-1]:
        velocity = policy.velocity(step.x, torch.full((len(step.x),), step.sigma), cond)
        mean, spread = moments(step.x, velocity, step.sigma, step.to)
        ratio = (log_probability(step.then, mean, spread) - step.log_probability).exp()
        worse = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        (worse.mean() / (len(steps) - 1)).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
