"""Stable Diffusion 3 and 3.5 (and the bundled tiny model of the same architecture) on diffusers and peft."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from comfy_g2rpo.speed.joint_forward import PACKED, JointForward

from .cpu.sd3_forward import merged
from .files import diffusers_folder
from .files.single_file import Held
from .files.sizes import channels_of_noise
from .shared.peft_policy import PeftPolicy, cells

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # [L, joint_attention_dim]
    pooled: Tensor  # [pooled_projection_dim]


def load_pipeline(path: str | Path, dtype: torch.dtype) -> StableDiffusion3Pipeline:
    """Load a diffusers folder from this machine alone; a third text encoder that it lacks stays away."""
    return diffusers_folder.load_pipeline(
        StableDiffusion3Pipeline, path, dtype, optional=("text_encoder_3", "tokenizer_3")
    )


class SD3(PeftPolicy):
    """A policy and a decoder over a StableDiffusion3Pipeline, with a peft LoRA on its transformer."""

    pipeline_class = StableDiffusion3Pipeline
    optional = ("text_encoder_3", "tokenizer_3")
    clip_tokens = True
    layout = (
        (
            r"transformer_blocks\.(\d+)\.(attn2?)\.norm_([qk])\.weight",
            r"joint_blocks.\1.x_block.\2.ln_\3.weight",
        ),
        (
            r"transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight",
            r"joint_blocks.\1.context_block.attn.ln_\2.weight",
        ),
        (r"pos_embed\.pos_embed", "pos_embed"),
    )
    comfyui_shift, cond = 3.0, Cond
    blank = ""
    blocks, attention, feed_forward = r"transformer_blocks\.\d+(\.attn2?)?", ATTENTION, FEED_FORWARD
    _merged: JointForward | None = None

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        if self._merged:
            return self._merged(x.to(self.dtype), sigma, cond).float()
        tokens, pooled = torch.stack([c.tokens for c in cond]), torch.stack([c.pooled for c in cond])
        with self.casting():
            velocity = self.transformer(
                hidden_states=x.to(self.dtype),
                timestep=sigma * 1000,
                encoder_hidden_states=tokens.to(self.dtype),
                pooled_projections=pooled.to(self.dtype),
                return_dict=False,
            )[0]
        return velocity.float()

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluate without gradients, at full precision with the adapter merged into copied weights."""
        # In 16 bit a small adapter would drown in the weights' rounding.
        exact = self.autocast is None and self.dtype in (torch.float32, torch.float64) and not self.packed
        if not exact or self.transformer.config.qk_norm not in (None, "rms_norm"):
            with super().inference():
                yield
            return
        with torch.no_grad():
            self._merged = merged(self.transformer)
            try:
                yield
            finally:
                self._merged = None

    @contextmanager
    def completing(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Evaluate completions inside the context: the merged weights stand aside."""
        kept, self._merged = self._merged, None
        try:
            with super().completing(dtype):
                yield
        finally:
            self._merged = kept

    def rollout_copies(self) -> int:
        """Return the bytes of the weights that are copied: the adapter merged, and laid out for oneDNN."""
        merged = sum(layer.in_features * layer.out_features for layer in self.layers.values())
        named = self.transformer.transformer_blocks.named_parameters()
        plain = (weight for name, weight in named if "norm" not in name and "lora_" not in name)
        packed = [weight.numel() for weight in plain if weight.ndim == 2]
        return 4 * (merged + sum(count for count in packed if count <= PACKED))

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a Stable Diffusion 3 or 3.5: medium or large, with or without dual attention."""
        width, table = held.size("context_embedder.weight")[0], held.size("pos_embed.pos_embed")[1]
        layers = held.count("transformer_blocks.{}.attn.to_q.weight")
        dual = [block for block in range(layers) if held.has(f"transformer_blocks.{block}.attn2.to_q.weight")]
        return {
            "num_layers": layers,
            "num_attention_heads": width // 64,
            "caption_projection_dim": width,
            "in_channels": channels_of_noise(
                held, held.size("pos_embed.proj.weight")[1], held.size("proj_out.weight")[0] // 4
            ),
            "joint_attention_dim": held.size("context_embedder.weight")[1],
            "pooled_projection_dim": held.size("time_text_embed.text_embedder.linear_1.weight")[1],
            "pos_embed_max_size": math.isqrt(table),
            "dual_attention_layers": dual,
            "qk_norm": "rms_norm" if held.has("transformer_blocks.0.attn.norm_q.weight") else None,
        }

    def encode_one(self, prompt: str) -> Cond:
        """Run the text encoders on one prompt."""
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return Cond(tokens[0], pooled[0])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of the given size in pixels."""
        longest = self.transformer.config.pos_embed_max_size * self.pipeline.patch_size
        longest *= self.pipeline.vae_scale_factor
        if max(width, height) > longest:
            given = f"model.width and model.height are {width}×{height}"
            raise ValueError(f"{given}; this model has positions for sides of up to {longest} pixels")
        return self.transformer.config.in_channels, *cells(
            width, height, self.pipeline.vae_scale_factor, self.pipeline.patch_size
        )


POLICY = SD3
