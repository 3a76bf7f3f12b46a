"""Wan 2.1 and Wan 2.2 5B (Alibaba) on diffusers and peft: single pictures, which are videos of one frame,
and short videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.nn.functional import pad

from comfy_g2rpo.lora.key_names import WAN

from .files import diffusers_folder
from .files.parts import Parts
from .shared.peft_policy import Adapted, cells
from .shared.video_vae import decode_frames

if TYPE_CHECKING:
    from ..config.sections import ModelSection

ALMOST_ONE = 1 - 2e-6


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # UMT5: [L, text_dim], without the zeros that the model sees behind them


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> Wan:
    """Load the model of a configuration's section onto a device."""
    bf16, length = section.dtype == "bf16", section.max_sequence_length
    if (
        path
        and path.is_dir()
        and diffusers_folder.components(path, WanPipeline.__name__).get("transformer_2", [None, None])[1]
    ):
        raise ValueError(
            f"model.path {path}: a Wan of two transformers (2.2 A14B) cannot be trained here; take Wan "
            "2.1 or Wan 2.2 TI2V 5B"
        )
    parts = Parts(WanPipeline, "wan", section, path, device, optional=("transformer_2",))
    settings = {
        "frames": section.frames,
        "max_sequence_length": length,
        "autocast": torch.bfloat16 if bf16 else None,
    }
    policy = Wan(parts.pipeline(), guidance=section.guidance, **settings)
    return parts.attach(policy, "wan", section.dtype, length)


class Wan(Adapted):
    """A policy and a decoder over a WanPipeline, with a peft LoRA on its transformer.

    Latents are [B, C, h, w], of clips [B, C, f, …].
    """

    cond = Cond
    blank = ""
    comfyui_shift = 8.0
    # ComfyUI knows the native names alone; diffusers reads these files, too.
    lora_style, names = "native", WAN
    blocks, attention = r"blocks\.\d+(\.attn[12])?", ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("ffn.net.0.proj", "ffn.net.2")

    def __init__(
        self,
        pipeline: WanPipeline,
        *,
        guidance: float = 5.0,
        max_sequence_length: int = 512,
        frames: int = 1,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(pipeline, autocast)
        if not max_sequence_length:
            raise ValueError(
                "model.max_sequence_length is 0, but Wan reads its prompts by UMT5; set it to 512"
            )
        if (frames - 1) % pipeline.vae_scale_factor_temporal:
            near = (frames - 1) // pipeline.vae_scale_factor_temporal * pipeline.vae_scale_factor_temporal + 1
            raise ValueError(
                f"model.frames is {frames}; it must be 1, or 1 more than a multiple of 4: set it to {near}"
            )
        self.guidance, self.max_sequence_length, self.frames = guidance, max_sequence_length, frames

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        # The model has no mask: it attends to zeros up to the full length, and has learnt to.
        tokens = torch.stack(
            [pad(c.tokens, (0, 0, 0, self.max_sequence_length - len(c.tokens))) for c in cond]
        )
        with self.casting():
            velocity = self.transformer(
                hidden_states=video(x).to(self.dtype),
                timestep=sigma.float() * 1000,
                encoder_hidden_states=tokens.to(self.dtype),
                return_dict=False,
            )[0]
        return velocity.reshape(x.shape).float()

    def encode_one(self, prompt: str) -> Cond:
        """Run UMT5 on one prompt."""
        tokens, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return Cond(tokens[0, : int(tokens[0].any(-1).sum())].clone())

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to images [B, H, W, 3], those of clips to [B, F, H, W, 3], in [0, 1], float32 and
        contiguous.
        """
        frames = decode_frames(self.vae, video(latents), self.vae_dtype)
        return (frames if latents.ndim == 5 else frames[:, 0]).contiguous()

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return (C, h, w) of a picture, (C, f, h, w) of a clip, of the given size in pixels."""
        config, along = (
            self.transformer.config,
            (self.frames - 1) // self.pipeline.vae_scale_factor_temporal + 1,
        )
        size = cells(width, height, self.pipeline.vae_scale_factor_spatial, config.patch_size[-1])
        return config.in_channels, *((along,) if self.frames > 1 else ()), *size

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return WanPipeline's noise levels [T+1].

        Its solver stays a millionth below 1 for a logarithm that nothing here takes.
        """
        sigmas = super().pipeline_sigmas(num_steps, shape)
        return torch.where(sigmas > ALMOST_ONE, 1.0, sigmas)


def video(x: Tensor) -> Tensor:
    """Give latents of pictures [B, C, h, w] their one frame; those of clips [B, C, f, h, w] have theirs."""
    return x if x.ndim == 5 else x[:, :, None]
