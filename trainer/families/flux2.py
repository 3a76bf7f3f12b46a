"""FLUX.2 dev and klein (Black Forest Labs) on diffusers and peft: dev has guidance as an input, klein base
has it classifier-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from comfy_g2rpo.lora.key_names import FLUX2

from .files import diffusers_folder
from .files.parts import Parts
from .shared.peft_policy import Adapted, cells

if TYPE_CHECKING:
    from ..config.sections import ModelSection

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "to_qkv_mlp_proj",
    "to_out",
)
FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")


class Cond(NamedTuple):
    """One prompt's text features."""

    # three layers of the language model side by side: [L, joint_attention_dim], padded to the full length
    tokens: Tensor


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> Flux2:
    """Load the model of a configuration's section onto a device."""
    bf16, length = section.dtype == "bf16", section.max_sequence_length
    dev = (
        path is not None
        and path.is_dir()
        and diffusers_folder.pipeline_name(path) != Flux2KleinPipeline.__name__
    )
    kind = Flux2Pipeline if dev else Flux2KleinPipeline
    tokenizer = (
        diffusers_folder.components(path, kind.__name__).get("tokenizer", [None, None])[1] if dev else None
    )
    if tokenizer == "PixtralProcessor" and find_spec("torchvision") is None:
        raise ValueError(
            f"model.path {path}: FLUX.2 dev cuts its prompts by a {tokenizer}, which needs "
            "torchvision: pip install torchvision"
        )
    parts = Parts(kind, "flux2", section, path, device)
    policy = Flux2(
        parts.pipeline(),
        guidance=section.guidance,
        max_sequence_length=length,
        autocast=torch.bfloat16 if bf16 else None,
    )
    return parts.attach(policy, "flux2", section.dtype, length)


class Flux2(Adapted):
    """A policy and a decoder over a Flux2Pipeline or Flux2KleinPipeline, with a peft LoRA on its transformer.

    Latents are [B, 128, h, w], as ComfyUI has them: 2×2 cells of the VAE in one, normalised channel by
    channel; a cell is a token.
    """

    cond = Cond
    # ComfyUI's ModelSamplingFlux shifts by e^2.02 at any size.
    comfyui_shift = math.exp(2.02)
    # Every ComfyUI that runs the model knows the native names; diffusers' own ones came later. Diffusers
    # wants `export --form diffusers`.
    lora_style, names = "native", FLUX2
    # In double blocks attn.to_out is a list, whose first is meant; in single blocks it is the layer itself.
    blocks = r"(transformer_blocks\.\d+(\.attn(?!\.to_out$))?|single_transformer_blocks\.\d+\.attn)"
    attention, feed_forward = ATTENTION, FEED_FORWARD

    def __init__(
        self,
        pipeline: Flux2Pipeline | Flux2KleinPipeline,
        *,
        guidance: float = 4.0,
        max_sequence_length: int = 512,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(pipeline, autocast)
        self.embedded = self.transformer.config.guidance_embeds
        self.blank = None if self.embedded else ""
        if pipeline.config.get("is_distilled") and guidance > 1:
            raise ValueError(
                f"model.guidance is {guidance:g}, but this FLUX.2 (klein, distilled) takes no "
                "guidance; set it to 1"
            )
        if not max_sequence_length:
            raise ValueError(
                "model.max_sequence_length is 0, but FLUX.2 reads its prompts by a language model; set "
                "it to 512"
            )
        self.guidance, self.max_sequence_length = guidance, max_sequence_length
        self._exact: tuple[Tensor, Tensor | None] | None = None
        self.transformer.time_guidance_embed.register_forward_pre_hook(self._keep_exact)

    def _keep_exact(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the embedding the noise level and guidance as they are: the model rounds them to its own 16
        bit (0.9545 to 0.953).
        """
        return given if self._exact is None else self._exact

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32, with guidance as the model has it: an input (dev), or
        classifier-free (klein base).
        """
        return self._forward(x, sigma, cond) if self.embedded else super().velocity(x, sigma, cond)

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        height, width = x.shape[2:]
        guidance = torch.full_like(sigma, self.guidance) if self.embedded else None
        self._exact = sigma.float() * 1000, None if guidance is None else guidance.float() * 1000
        tokens = torch.stack([c.tokens for c in cond])
        image_ids, text_ids = positions(height, width, tokens.shape[1], self.device)
        try:
            with self.casting():
                velocity = self.transformer(
                    hidden_states=x.flatten(2).transpose(1, 2).to(self.dtype),
                    timestep=sigma,
                    guidance=guidance,
                    encoder_hidden_states=tokens.to(self.dtype),
                    img_ids=image_ids,
                    txt_ids=text_ids,
                    return_dict=False,
                )[0]
        finally:
            self._exact = None
        return velocity.float().transpose(1, 2).unflatten(2, (height, width))

    def encode_one(self, prompt: str) -> Cond:
        """Run Qwen3 (klein) or Mistral 3 (dev) on one prompt in its chat template."""
        tokens, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return Cond(tokens[0])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of the given size in pixels."""
        return self.transformer.config.in_channels, *cells(
            width, height, self.pipeline.vae_scale_factor * 2, 1
        )

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the pipelines' noise levels [T+1]: shifted by the number of tokens and of steps, by a fit
        of the model's authors.
        """
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        mu = compute_empirical_mu(shape[-2] * shape[-1], num_steps)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
        return scheduler.sigmas.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, H, W, 3] in [0, 1], float32 and contiguous."""
        norm = self.vae.bn
        std = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        raw = latents * std[:, None, None] + norm.running_mean.float()[:, None, None]
        raw = nn.functional.pixel_shuffle(raw, 2).to(self.vae_dtype, memory_format=torch.channels_last)
        images = self.vae.decode(raw, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


@lru_cache(maxsize=8)
def positions(height: int, width: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where tokens are: the picture's [h·w, 4] (0, row, column, 0), the text's [L, 4] (0, 0, 0,
    place).
    """
    one = torch.arange(1)
    image = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
    text = torch.cartesian_prod(one, one, one, torch.arange(length))
    return image.float().to(device), text.float().to(device)
