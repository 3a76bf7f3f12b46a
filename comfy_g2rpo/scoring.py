"""Decode and score finished latents in batches, as the rollout hands them over."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .plan import Plan
from .policy import Decoder, Trainee
from .rewards import Reward, score_all
from .rollout import Rollout, roll_out


@dataclass
class Scorer:
    """A rollout's sink: fills scores [R, P, images] and keeps the pictures of the prompts (by position) in `keep` alone."""

    decode: Decoder
    rewards: Sequence[Reward]
    prompts: Sequence[str]
    images: int
    batch: int = 64
    keep: Collection[int] = ()
    check: Callable[[], None] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "reward": 0.0})

    def __post_init__(self) -> None:
        self.scores = torch.full((len(self.rewards), len(self.prompts), self.images), torch.nan)
        self.pictures: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: list[int], images: list[int], latents: Tensor) -> None:
        """Score latents [n, …] of the given prompts and image positions."""
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            if self.check:
                self.check()
            begin = time.perf_counter()
            pictures = to_8_bit(self.decode(latents[part]))
            decoded = time.perf_counter()
            scores = score_all(self.rewards, pictures, [self.prompts[p] for p in prompts[part]])
            self.scores[:, prompts[part], images[part]] = scores.cpu()
            self.seconds["decode"] += decoded - begin
            self.seconds["reward"] += time.perf_counter() - decoded
            for prompt, image, picture in zip(prompts[part], images[part], pictures, strict=True):
                if prompt in self.keep:
                    self.pictures[prompt, image] = picture.cpu().clone()


def to_8_bit(images: Tensor) -> Tensor:
    """Round images in [0, 1] to what a saved file holds: that is what is judged. Infinite numbers become NaN, not white."""
    images = images.float()
    return (torch.where(images.isinf(), torch.nan, images).clamp(0, 1) * 255).round() / 255


def roll_out_and_score(
    policy: Trainee,
    plan: Plan,
    sigmas: Tensor,
    conds: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    scorer: Scorer,
    slots: int,
    check: Callable[[], None] | None = None,
) -> Rollout:
    """Run a plan per prompt and hand every finished latent to the scorer: while rolling, or afterwards where the host wants that."""
    sink = scorer if policy.decodes_while_rolling else None
    rollout = roll_out(policy, plan, sigmas, conds, seeds, shape, slots=slots, sink=sink, check=check, device=policy.device)
    if sink:
        return rollout
    images = list(range(len(plan.images)))
    scorer([p for p in range(len(seeds)) for _ in images], images * len(seeds), rollout.latents.flatten(0, 1))
    return dataclasses.replace(rollout, latents=None)
