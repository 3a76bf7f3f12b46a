"""Lumina-Image 2.0 (Alpha-VLLM) on diffusers and peft: time runs from 0 to 1, guidance keeps the norm of
every row of the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from diffusers import Lumina2Pipeline
from diffusers.pipelines.lumina2.pipeline_lumina2 import calculate_shift
from torch import Tensor

from comfy_g2rpo.lora.key_names import LUMINA2

from .files.parts import Parts
from .qwen_image import padded
from .shared.peft_policy import Adapted, cells

if TYPE_CHECKING:
    from ..config.sections import ModelSection

PATCH = 2


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # Gemma 2, the layer before the last: [L, cap_feat_dim], as many as the prompt has


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> Lumina2:
    """Load the model of a configuration's section onto a device."""
    bf16, length = section.dtype == "bf16", section.max_sequence_length
    parts = Parts(Lumina2Pipeline, "lumina2", section, path, device)
    policy = Lumina2(
        parts.pipeline(),
        guidance=section.guidance,
        max_sequence_length=length,
        autocast=torch.bfloat16 if bf16 else None,
    )
    return parts.attach(policy, "lumina2", section.dtype, length)


class Lumina2(Adapted):
    """A policy and a decoder over a Lumina2Pipeline, with a peft LoRA on its transformer.

    Latents are [B, 16, h, w].
    """

    cond = Cond
    blank = ""
    comfyui_shift = 6.0
    # ComfyUI knows the native names alone, under which q, k and v are one; diffusers wants `export --form
    # diffusers`.
    lora_style, names = "native", LUMINA2
    blocks = r"(layers|noise_refiner|context_refiner)\.\d+"
    attention = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    feed_forward = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")

    def __init__(
        self,
        pipeline: Lumina2Pipeline,
        *,
        guidance: float = 4.0,
        max_sequence_length: int = 256,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(pipeline, autocast)
        if not max_sequence_length:
            raise ValueError(
                "model.max_sequence_length is 0, but Lumina-Image 2.0 reads its prompts by a language "
                "model; set it to 256"
            )
        self.guidance, self.max_sequence_length = guidance, max_sequence_length

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32.

        Guidance above 1 is classifier-free, its rows as long as those of the prediction.
        """
        if self.guidance <= 1:
            return self._forward(x, sigma, cond)
        blank = self.encode([self.blank]) * len(cond)
        given, without = self._forward(torch.cat([x, x]), sigma.repeat(2), [*cond, *blank]).chunk(2)
        guided = without + self.guidance * (given - without)
        return guided * (given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Run the transformer, whose time is 1 − σ and whose output is x₀ − ε.

        No token looks at the padding of texts.
        """
        tokens, mask = padded([c.tokens for c in cond])
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        with self.casting():
            output = self.transformer(
                x.to(self.dtype), 1 - sigma.float(), tokens.to(self.dtype), mask, return_dict=False
            )[0]
        return -output.float()

    def encode_one(self, prompt: str) -> Cond:
        """Run Gemma 2 on one prompt behind the model's instruction.

        The empty one, which guidance moves away from, has none.
        """
        empty = prompt == self.blank
        *given, tokens, mask = self.pipeline.encode_prompt(
            prompt,
            empty,
            negative_prompt=prompt,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        tokens, mask = (tokens, mask) if empty else given
        return Cond(tokens[0, : int(mask[0].sum())].clone())

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of the given size in pixels."""
        return self.transformer.config.in_channels, *cells(
            width, height, self.pipeline.vae_scale_factor, PATCH
        )

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return Lumina2Pipeline's noise levels [T+1].

        To shift by resolution, it takes channels for the number of tokens.
        """
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(
            shape[0], *(scheduler.config.get(name, default) for name, default in names.items())
        )
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.float().cpu()
