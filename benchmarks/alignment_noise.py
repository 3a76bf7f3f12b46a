"""Noise optimisation (DNO) beside the searches of benchmarks/alignment.py, by an estimated gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

PROBES = 4
RATE, REGULARISE = 0.2, 0.1
"""The larger rate of the two that were tried where the specification was written; the block's is .05."""


class Found(NamedTuple):
    """A latent [C, h, w], and what it took."""

    latent: Any
    forwards: int
    scored: int


def optimised(host: Any, prompt: str, seed: int, budget: int) -> Found:
    """Move a seed's noise for as many steps as a budget of forwards pays for, a backward counted 2."""
    import torch

    from comfy_g2rpo.sampling.noise_optimizing import (
        Climb,
        Seen,
        backpropagate,
        estimated_gradient,
        nearby,
        optimise,
    )
    from comfy_g2rpo.sampling.search import Ask, answer

    setup, policy = host.setup, host.setup.policy
    cond, walk = policy.encode([prompt])[0], tuple(range(len(setup.sigmas)))
    count = len(walk) - 1
    steps = (budget - count) // (count * (1 + PROBES + 2))
    spent, best = [0, 0], {}

    def walked(noise: Any) -> Any:
        spent[0] += count * len(noise)
        spent[1] += len(noise)
        judge = host.judge(host.reward, prompt)
        with torch.no_grad(), policy.inference():
            return answer(Ask(noise, walk, kept=True), policy, cond, setup.sigmas, judge)

    def look(noise: Any, number: int, wanted: bool) -> Any:
        told = walked(noise)
        score = told.scores[0].item()
        if not best or score > best["score"]:
            best.update(score=score, latent=told.latents[0])
        if not wanted:
            return Seen(score, None)
        probes = walked(nearby(noise, PROBES, seed, number))
        images = host.images(torch.cat([told.latents, probes.latents]))
        pull = estimated_gradient(images[1:], images[0], probes.scores, score)
        vae, end = policy.vae, told.latents.clone().requires_grad_()
        with torch.enable_grad():
            raw = end / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            image = vae.decode(raw, return_dict=False)[0].permute(0, 2, 3, 1) / 2 + 0.5
            (back,) = torch.autograd.grad(image, end, pull[None])
        spent[0] += 2 * count
        states = list(told.x[0][:, None])
        return Seen(
            score, backpropagate(lambda x, s: policy.velocity(x, s, [cond]), states, setup.sigmas, back)
        )

    noise = torch.randn((1, *setup.shape), generator=torch.Generator().manual_seed(seed))
    optimise(noise, Climb(steps, RATE, REGULARISE), seed, look)
    return Found(best["latent"], *spent)
