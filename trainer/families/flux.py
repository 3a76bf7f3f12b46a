"""FLUX.1 dev and schnell (Black Forest Labs) on diffusers and peft: packed latents, guidance as an input,
a shift by resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from .files import diffusers_folder
from .files.parts import Parts
from .shared.peft_policy import Adapted, cells

if TYPE_CHECKING:
    from ..config.sections import ModelSection

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = (
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)
SCHNELL_TOKENS = 256


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # T5: [L, joint_attention_dim]
    pooled: Tensor  # CLIP: [pooled_projection_dim]


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> Flux:
    """Load the model of a configuration's section onto a device.

    Kontext as the model that edits a picture.
    """
    if section.edits or diffusers_folder.pipeline_name(path) == "FluxKontextPipeline":
        from . import kontext

        return kontext.load(section, path, device)
    bf16, length = section.dtype == "bf16", section.max_sequence_length
    parts = Parts(FluxPipeline, "flux", section, path, device)
    policy = Flux(
        parts.pipeline(),
        guidance=section.guidance,
        max_sequence_length=length,
        autocast=torch.bfloat16 if bf16 else None,
    )
    return parts.attach(policy, "flux", section.dtype, length)


class Flux(Adapted):
    """A policy and a decoder over a FluxPipeline, with a peft LoRA on its transformer.

    Latents are [B, 16, h, w], packed inside.
    """

    cond = Cond
    blocks, attention, feed_forward = r"(single_)?transformer_blocks\.\d+(\.attn)?", ATTENTION, FEED_FORWARD

    def __init__(
        self,
        pipeline: FluxPipeline,
        *,
        guidance: float = 3.5,
        max_sequence_length: int = 512,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(pipeline, autocast)
        self.guided = self.transformer.config.guidance_embeds
        # ComfyUI's ModelSamplingFlux shifts dev by e^1.15 at any size; schnell is not shifted.
        self.comfyui_shift = math.exp(1.15) if self.guided else 1.0
        if not self.guided and guidance > 1:
            raise ValueError(
                f"model.guidance is {guidance:g}, but this FLUX.1 (schnell) takes no guidance; set it to 1"
            )
        if not self.guided and max_sequence_length > SCHNELL_TOKENS:
            raise ValueError(
                f"model.max_sequence_length is {max_sequence_length}; FLUX.1 schnell takes "
                f"{SCHNELL_TOKENS} at most"
            )
        if not max_sequence_length:
            raise ValueError(
                "model.max_sequence_length is 0, but FLUX.1 reads its prompts by T5; set it to 512 "
                "(schnell: 256)"
            )
        self.guidance, self.max_sequence_length = guidance, max_sequence_length
        self._exact: tuple[Tensor, ...] = ()
        self.transformer.time_text_embed.register_forward_pre_hook(self._keep_exact)

    def _keep_exact(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the embedding the noise level and guidance as they are: the model rounds them to its own 16
        bit (0.9545 to 0.953).
        """
        return (*self._exact, given[-1]) if self._exact else given

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32, with guidance as the model has learnt it."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        seen, image_ids = self.seen(x, cond)
        guidance = torch.full_like(sigma, self.guidance) if self.guided else None
        self._exact = tuple(level.float() * 1000 for level in (sigma, guidance) if level is not None)
        tokens, pooled = torch.stack([c.tokens for c in cond]), torch.stack([c.pooled for c in cond])
        text_ids = torch.zeros(tokens.shape[1], 3, device=self.device)
        try:
            with self.casting():
                velocity = self.transformer(
                    hidden_states=seen.to(self.dtype),
                    timestep=sigma,
                    guidance=guidance,
                    pooled_projections=pooled.to(self.dtype),
                    encoder_hidden_states=tokens.to(self.dtype),
                    img_ids=image_ids,
                    txt_ids=text_ids,
                    return_dict=False,
                )[0]
        finally:
            self._exact = ()
        return unpack(velocity[:, : height * width].float(), height, width)

    def seen(self, x: Tensor, cond: Sequence[Cond]) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, n, 4C] that the model looks at, those of x [B, C, h, w] first, and where
        they are [n, 3].
        """
        return pack(x), positions(x.shape[2] // 2, x.shape[3] // 2, self.device)

    def encode_one(self, prompt: str) -> Cond:
        """Run CLIP (pooled) and T5 (tokens) on one prompt."""
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Cond(tokens[0], pooled[0])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of the given size in pixels."""
        return self.transformer.config.in_channels // 4, *cells(
            width, height, self.pipeline.vae_scale_factor, 2
        )

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return FluxPipeline's noise levels [T+1]: dev's are shifted by the number of tokens, schnell's
        not at all.
        """
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(shape[-2] * shape[-1] // 4, *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.float().cpu()


def pack(x: Tensor) -> Tensor:
    """Make tokens of 2×2 cells: [B, C, 2h, 2w] → [B, h·w, 4C]."""
    cells = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack`: [B, h·w, 4C] → [B, C, 2h, 2w]."""
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height, width))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@lru_cache(maxsize=64)
def positions(height: int, width: int, device: torch.device, place: int = 0) -> Tensor:
    """Return where a picture's tokens are: [h·w, 3] (place, row, column), the picture that is made at
    place 0.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, place), rows, columns], -1).flatten(0, 1).float().to(device)
