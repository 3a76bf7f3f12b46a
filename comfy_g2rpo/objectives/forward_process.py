"""Forward-process objectives: they learn from finished images x₀ and their rewards, by any sampler.

An image is brought back to a noise level by fresh noise, x_σ = (1−σ)x₀ + σε, where a model that had drawn it
for certain would answer u = ε − x₀. Rewards say towards which images the model's answer v should turn, and
from which away. v_old is the answer of the policy that drew the images; at v = v_old, with a = A/clamp:

    DiffusionNFT   ∂loss/∂v = 2·clamp·a·σ(v − u)/(D·mean|v − u|), whatever β
    AWM            ∂loss/∂v = 2·a·w(v − u)/D, with w as of `likelihood`
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import over
from ..methods.recipe_options import Recipe
from ..rollout import Rollout, seeded_noise
from ..trees.whole_images import ImagePlan
from .record_rows import Records

LEAST = 1e-5
"""Smallest mean error that DiffusionNFT divides by."""
EPSILON, POWER = 1e-10, 0.25
"""The generalised Huber form of AWM's published code."""


def image_rows(rollout: Rollout, latents: Tensor, advantages: Sequence[Tensor], sigmas: Tensor) -> Records:
    """Bring finished latents [P, G, …] back to their noise levels, one row for each image and level.

    `advantages` is one table [1, G] per prompt; sigmas: [T+1]. Levels and noise depend on the rollout's seeds
    alone, so that a resumed run draws them again.
    """
    plan = rollout.plan
    if not isinstance(plan, ImagePlan):
        raise TypeError("rows of finished images need a plan of whole images")
    places = [
        (p, image, level)
        for p, seed in enumerate(rollout.seeds)
        for image in range(len(plan.images))
        for level in plan.levels_of(image, seed)
    ]
    noise = [seeded_noise(latents.shape[2:], "forward", rollout.seeds[p], i, k) for p, i, k in places]
    prompt, image, step = torch.tensor(places, device=latents.device).T
    noise, clean = torch.stack(noise).to(latents.device), latents[prompt, image]
    sigma = sigmas.to(latents.device)[step]
    blank = torch.zeros_like(sigma)
    return Records(
        x=clean + over(sigma, clean) * (noise - clean),
        target=noise - clean,
        sigma=sigma,
        v_coef=blank,
        std=blank,
        weight=torch.full_like(sigma, 1 / len(places)),
        step=step,
        prompt=prompt,
        advantage=torch.stack([*advantages]).to(latents.device)[prompt, 0, image],
        owner=torch.arange(len(places), device=latents.device),
    )


def likelihood(velocity: Tensor, made: Records, weight: str) -> Tensor:
    """Return AWM's stand-in for log p(x₀) [N]: minus the flow-matching error e = mean (v − u)².

    uniform   −e
    sigma     −σ·e
    ghuber    −σ·((e + 1e-10)^¼ − 1e-10^¼)/¼, under which large errors count less
    """
    error = (velocity - made.target).square().flatten(1).mean(1)
    if weight == "ghuber":
        error = ((error + EPSILON) ** POWER - EPSILON**POWER) / POWER
    return -error if weight == "uniform" else -made.sigma * error


def awm(velocity: Tensor, made: Records, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Σ w·max(−aρ, −a·clip(ρ, 1±c)) and the ratios ρ of likelihoods [S].

    Advantage weighted matching (arXiv 2509.25050) as in its published code, form "exp_first". Left out is the
    pull to a second moving average that the code adds beside the KL.
    """
    old = likelihood(made.velocity, made, recipe.awm_weight)
    ratio = (likelihood(velocity, made, recipe.awm_weight) - old)[made.owner].exp()
    share = made.advantage / recipe.clamp
    worse = torch.maximum(-share * ratio, -share * ratio.clamp(1 - recipe.clip, 1 + recipe.clip))
    return (made.weight[made.owner] * worse).sum(), {"ratio": ratio}


def optimality(advantage: Tensor, clamp: float) -> Tensor:
    """Return DiffusionNFT's r = ½ + ½·clip(A/clamp, −1, 1) [S]: how likely an image is a good one."""
    return 0.5 + 0.5 * (advantage / clamp).clamp(-1, 1)


def nft(velocity: Tensor, made: Records, recipe: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """Return Σ w·(clamp/β)(r·E(v⁺) + (1−r)·E(v⁻)) with v± = v_old ± β(v − v_old), and ‖v − v_old‖²/D [N].

    DiffusionNFT (arXiv 2509.16117). Its policy loss is E(v±) = ‖v± − u‖²/D; as in the published code E is
    that of x̂₀ = x_σ − σv±, divided by its own mean absolute error, which counts as a constant.
    """
    beta, old = recipe.nft_beta, made.velocity

    def error(moved: Tensor) -> Tensor:
        away = over(made.sigma, moved) * (moved - made.target)
        size = away.detach().abs().flatten(1).mean(1).clamp(min=LEAST)
        return away.square().flatten(1).mean(1) / size

    good, bad = (error(old + way * (velocity - old))[made.owner] for way in (beta, -beta))
    r = optimality(made.advantage, recipe.clamp)
    loss = recipe.clamp / beta * (r * good + (1 - r) * bad)
    return (made.weight[made.owner] * loss).sum(), {"old": (velocity - old).square().flatten(1).mean(1)}


def nft_metrics(found: dict[str, Tensor], recipe: Recipe) -> dict[str, float]:
    """Say how far velocities [N] have moved from those of the policy that drew the images."""
    return {"old_policy/velocity": found["old"].double().mean().item()}
