"""The VAE of Wan and Qwen-Image: latents have frames, and every channel is normalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode_frames(vae: Any, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Decode latents [B, C, f, h, w] to frames [B, F, H, W, 3] in [0, 1], float32."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    frames = vae.decode((latents * std + mean).to(dtype), return_dict=False)[0]
    return (frames.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


@torch.no_grad()
def encode_picture(vae: Any, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """Encode images [B, 3, H, W] in [-1, 1] to the model's latents [B, C, h, w], by the mode."""
    latents = vae.encode(pixels[:, :, None].to(dtype)).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((latents - mean) / std)[:, :, 0].contiguous()
