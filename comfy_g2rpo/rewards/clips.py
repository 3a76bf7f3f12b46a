"""Rewards of clips: every frame judged and averaged, the worst frame, or frames side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..files.picture_files import strip
from ..options import CLIPS
from .protocol import Reward, Wrapped, checked

DEFAULT = CLIPS[0]
PIXELS = 2**25  # of frames that a reward is given at once
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OfFrames(Wrapped):
    """A reward, and how it judges a clip: one of CLIPS. In every other respect it is that reward."""

    reward: Reward
    frames: str = DEFAULT

    def __post_init__(self) -> None:
        if self.frames not in CLIPS:
            raise ValueError(f"frames is {self.frames!a}; choose one of: {', '.join(CLIPS)}")


def judged(reward: Reward, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score pictures [B, H, W, 3], or clips [B, F, H, W, 3] as the reward's `frames` says, by prompts [B]:
    [B] float32 on the CPU.

    Frames that it cannot judge are left out; NaN where it can judge none, or where a frame is broken.
    """
    if pictures.ndim != 5:
        return checked(reward, pictures, prompts)
    mode = reward.frames
    if mode == "strip":
        return checked(reward, strip(pictures), prompts)
    scores = by_frame(reward, pictures, prompts)
    known = ~scores.isnan()
    found = scores.nanmean(1) if mode == "mean" else torch.where(known, scores, torch.inf).amin(1)
    whole = ~pictures.flatten(1).isnan().any(1).cpu()
    return torch.where(known.any(1) & whole, found, torch.nan)


def by_frame(reward: Reward, clips: Tensor, prompts: Sequence[str]) -> Tensor:
    """Score every frame of clips [B, F, H, W, 3]: [B, F]; group rewards compare frames of one moment."""
    count, frames, height, width, _ = clips.shape
    if reward.needs_group:
        return torch.stack([checked(reward, clips[:, moment], prompts) for moment in range(frames)], 1)
    flat, texts = clips.flatten(0, 1), [prompt for prompt in prompts for _ in range(frames)]
    room = max(PIXELS // (height * width), 1)
    parts = [checked(reward, flat[at : at + room], texts[at : at + room]) for at in range(0, len(flat), room)]
    return torch.cat(parts).view(count, frames)


def described(describe: Callable[[Tensor], dict[str, Tensor]], pictures: Tensor) -> dict[str, Tensor]:
    """Describe images [B, H, W, 3], or clips frame by frame: [B, D] by measure."""
    if pictures.ndim != 5:
        return describe(pictures)
    found: dict[str, Any] = describe(pictures.flatten(0, 1))
    frames = pictures.shape[1]
    return {name: features.view(len(pictures), -1) / frames**0.5 for name, features in found.items()}
