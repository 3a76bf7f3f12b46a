"""Stable Diffusion 3 and 3.5 (and the bundled tiny model of the same architecture) on diffusers and peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from .cpu.sd3_forward import Merged
from .files import diffusers_folder
from .files.parts import Parts
from .shared.peft_policy import Adapted, cells

if TYPE_CHECKING:
    from ..config.sections import ModelSection

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


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> SD3:
    """Load the model of a configuration's section onto a device."""
    bf16, length = section.dtype == "bf16", section.max_sequence_length
    parts = Parts(
        StableDiffusion3Pipeline, "sd3", section, path, device, optional=("text_encoder_3", "tokenizer_3")
    )
    policy = SD3(
        parts.pipeline(),
        guidance=section.guidance,
        max_sequence_length=length,
        autocast=torch.bfloat16 if bf16 else None,
    )
    return parts.attach(policy, "sd3", section.dtype, length)


class SD3(Adapted):
    """A policy and a decoder over a StableDiffusion3Pipeline, with a peft LoRA on its transformer."""

    comfyui_shift, cond = 3.0, Cond
    blank = ""
    blocks, attention, feed_forward = r"transformer_blocks\.\d+(\.attn2?)?", ATTENTION, FEED_FORWARD

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        *,
        guidance: float = 1.0,
        max_sequence_length: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(pipeline, autocast)
        self.guidance, self.max_sequence_length = guidance, max_sequence_length
        self._merged: Merged | None = None

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
        """Evaluate without gradients and, at full precision, with the adapter merged into copies of the
        weights.
        """
        # In 16 bit a small adapter would drown in the weights' rounding.
        exact = self.autocast is None and self.dtype in (torch.float32, torch.float64) and not self.packed
        with torch.no_grad():
            self._merged = (
                Merged(self.transformer)
                if exact and self.transformer.config.qk_norm in (None, "rms_norm")
                else None
            )
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
        return self.transformer.config.in_channels, *cells(
            width, height, self.pipeline.vae_scale_factor, self.pipeline.patch_size
        )
