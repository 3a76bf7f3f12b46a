"""FLUX.1 dev and schnell (Black Forest Labs): packed latents, guidance as input, shift by resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from .files.single_file import Held
from .files.sizes import channels_of_noise
from .shared.peft_policy import PeftPolicy, cells

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
NORMS = tuple(
    [
        (rf"{theirs}\.norm_{added}{letter}\.weight", rf"{ours}.norm.{word}_norm.{leaf}")
        for theirs, added, ours in (
            (r"transformer_blocks\.(\d+)\.attn", "", r"double_blocks.\1.img_attn"),
            (r"transformer_blocks\.(\d+)\.attn", "added_", r"double_blocks.\1.txt_attn"),
            (r"single_transformer_blocks\.(\d+)\.attn", "", r"single_blocks.\1"),
        )
        for letter, word in (("q", "query"), ("k", "key"))
        for leaf in ("scale", "weight")
    ]
)


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # T5: [L, joint_attention_dim]
    pooled: Tensor  # CLIP: [pooled_projection_dim]


class Flux(PeftPolicy):
    """A policy and decoder over a FluxPipeline. Latents are [B, 16, h, w], packed inside."""

    pipeline_class = FluxPipeline
    guidance, max_sequence_length = 3.5, 512
    reads = "FLUX.1 reads its prompts by T5"
    layout = NORMS
    cond = Cond
    blocks, attention, feed_forward = r"(single_)?transformer_blocks\.\d+(\.attn)?", ATTENTION, FEED_FORWARD

    def set_up(self) -> None:
        """Look at the pipeline, and refuse settings that the model does not take."""
        self.guided = self.transformer.config.guidance_embeds
        # ComfyUI's ModelSamplingFlux shifts dev by e^1.15 at any size; schnell is not shifted.
        self.comfyui_shift = math.exp(1.15) if self.guided else 1.0
        if not self.guided and self.guidance > 1:
            remedy = "but this FLUX.1 (schnell) takes no guidance; set it to 1"
            raise ValueError(f"model.guidance is {self.guidance:g}, {remedy}")
        if not self.guided and self.max_sequence_length > SCHNELL_TOKENS:
            raise ValueError(
                f"model.max_sequence_length is {self.max_sequence_length}; FLUX.1 schnell takes "
                f"{SCHNELL_TOKENS} at most"
            )
        self._exact: tuple[Tensor, ...] = ()
        self.transformer.time_text_embed.register_forward_pre_hook(self._keep_exact)

    def _keep_exact(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the embedding exact noise levels and guidance, which the model would round to 16 bit."""
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
        """Return the tokens [B, n, 4C] that the model sees, those of x first, and their places [n, 3]."""
        return pack(x), positions(x.shape[2] // 2, x.shape[3] // 2, self.device)

    @classmethod
    def facts(cls, family: str, config: Mapping[str, Any], folder: Path | None) -> str:
        """Name the facts of dev or schnell, which has no input for guidance."""
        return "flux_dev" if config.get("guidance_embeds") else "flux_schnell"

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a FLUX.1; dev has an input for guidance, schnell has none."""
        width, channels = held.size("x_embedder.weight")
        return {
            "num_layers": held.count("transformer_blocks.{}.attn.to_q.weight"),
            "num_single_layers": held.count("single_transformer_blocks.{}.attn.to_q.weight"),
            "num_attention_heads": width // 128,
            "in_channels": channels_of_noise(held, channels, held.size("proj_out.weight")[0]),
            "joint_attention_dim": held.size("context_embedder.weight")[1],
            "pooled_projection_dim": held.size("time_text_embed.text_embedder.linear_1.weight")[1],
            "guidance_embeds": held.has("time_text_embed.guidance_embedder.linear_1.weight"),
        }

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
        """Return FluxPipeline's noise levels [T+1]: dev's shifted by the tokens, schnell's not at all."""
        return self.shifted_sigmas(num_steps, shape[-2] * shape[-1] // 4)


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
    """Return where an image's tokens are: [h·w, 3] (place, row, column); the one made is at place 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, place), rows, columns], -1).flatten(0, 1).float().to(device)


POLICY = Flux
