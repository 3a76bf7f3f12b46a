"""Decode and score finished latents in batches, as the rollout hands them over."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .policy import Decoder
from .rewards import Reward, score_all


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
    """Round images in [0, 1] to what a saved file holds: that is what is judged."""
    return (images.float().clamp(0, 1) * 255).round() / 255
