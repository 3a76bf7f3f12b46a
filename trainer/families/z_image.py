"""Z-Image and Z-Image-Turbo (Alibaba) on diffusers and peft: time runs from 0 to 1, texts of any length
are padded inside the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from torch import Tensor

from .files.parts import Parts
from .shared.peft_policy import Adapted, cells

if TYPE_CHECKING:
    from ..config.sections import ModelSection

PATCH = 2


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # Qwen3, the layer before the last: [L, cap_feat_dim], as many as the prompt has


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> ZImage:
    """Load the model of a configuration's section onto a device."""
    bf16, length = section.dtype == "bf16", section.max_sequence_length
    parts = Parts(ZImagePipeline, "z_image", section, path, device)
    policy = ZImage(
        parts.pipeline(),
        guidance=section.guidance,
        max_sequence_length=length,
        autocast=torch.bfloat16 if bf16 else None,
    )
    return parts.attach(policy, "z_image", section.dtype, length)


class ZImage(Adapted):
    """A policy and a decoder over a ZImagePipeline, with a peft LoRA on its transformer. Latents are [B, 16,
    h, w].

    `guidance` is ComfyUI's cfg, one above what diffusers calls guidance_scale here.
    """

    cond = Cond
    blank = ""
    comfyui_shift = 3.0
    # Under this prefix ComfyUI and diffusers both read diffusers' names with alphas; q, k and v need not be
    # fused.
    lora_style = "native"
    blocks = r"(layers|noise_refiner|context_refiner)\.\d+"
    attention = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    feed_forward = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def __init__(
        self,
        pipeline: ZImagePipeline,
        *,
        guidance: float = 1.0,
        max_sequence_length: int = 512,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(pipeline, autocast)
        if not max_sequence_length:
            raise ValueError(
                "model.max_sequence_length is 0, but Z-Image reads its prompts by a language model; "
                "set it to 512"
            )
        self.guidance, self.max_sequence_length = guidance, max_sequence_length

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Run the transformer, whose time is 1 − σ and whose output is x₀ − ε."""
        time = (1000 - sigma.float() * 1000) / 1000
        with self.casting():
            pictures = list(x[:, :, None].to(self.dtype).unbind())
            outputs = self.transformer(
                pictures, time, [c.tokens.to(self.dtype) for c in cond], return_dict=False
            )[0]
        return -torch.stack(outputs)[:, :, 0].float()

    def encode_one(self, prompt: str) -> Cond:
        """Run Qwen3 on one prompt in its chat template."""
        tokens, _ = self.pipeline.encode_prompt(
            prompt,
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Cond(tokens[0])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of the given size in pixels."""
        return self.transformer.in_channels, *cells(width, height, self.pipeline.vae_scale_factor, PATCH)

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return ZImagePipeline's noise levels [T+1].

        Mu counts only where the folder's scheduler shifts by resolution.
        """
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        bounds = (scheduler.config.get(name, default) for name, default in names.items())
        mu = calculate_shift((shape[-2] // PATCH) * (shape[-1] // PATCH), *bounds)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
        return scheduler.sigmas.float().cpu()
