"""FLUX.2 dev and klein (Black Forest Labs): guidance as an input (dev) or classifier-free (klein)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from comfy_g2rpo.lora.key_names import FLUX2

from .files import diffusers_folder
from .files.single_file import Held
from .files.sizes import channels_of_noise
from .flux import NORMS
from .shared.peft_policy import PeftPolicy, cells

if TYPE_CHECKING:
    from typing import Self

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


class Flux2(PeftPolicy):
    """A policy and a decoder over a Flux2Pipeline or Flux2KleinPipeline, with a peft LoRA on its transformer.

    Latents are [B, 128, h, w], as ComfyUI has them: 2×2 cells of the VAE in one, normalised channel by
    channel; a cell is a token.
    """

    pipeline_class = Flux2Pipeline
    guidance, max_sequence_length = 4.0, 512
    reads = "FLUX.2 reads its prompts by a language model"
    layout = NORMS
    cond = Cond
    # ComfyUI's ModelSamplingFlux shifts by e^2.02 at any size.
    comfyui_shift = math.exp(2.02)
    # Every ComfyUI that runs the model knows the native names; diffusers' own ones came later. Diffusers
    # wants `export --form diffusers`.
    lora_style, names = "native", FLUX2
    # In double blocks attn.to_out is a list, whose first is meant; in single blocks it is the layer itself.
    blocks = r"(transformer_blocks\.\d+(\.attn(?!\.to_out$))?|single_transformer_blocks\.\d+\.attn)"
    attention, feed_forward = ATTENTION, FEED_FORWARD

    def set_up(self) -> None:
        """Look at the pipeline, and refuse settings that the model does not take."""
        self.embedded = self.transformer.config.guidance_embeds
        self.blank = None if self.embedded else ""
        if self.pipeline.config.get("is_distilled") and self.guidance > 1:
            raise ValueError(
                f"model.guidance is {self.guidance:g}, but this FLUX.2 (klein, distilled) takes no "
                "guidance; set it to 1"
            )
        self._exact: tuple[Tensor, Tensor | None] | None = None
        embedding = self.transformer.time_guidance_embed
        embedding.register_forward_pre_hook(self._keep_exact)
        for part in (embedding.timestep_embedder, embedding.guidance_embedder):
            if part is not None:
                part.register_forward_pre_hook(self._to_weights)

    def _to_weights(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give layers waves that were made of an exact number in the precision of their weights."""
        return (given[0].to(self.dtype), *given[1:])

    def _keep_exact(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the embedding exact noise levels and guidance, which the model would round to 16 bit."""
        return given if self._exact is None else self._exact

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32; guidance is an input (dev) or classifier-free (klein)."""
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

    @classmethod
    def load(cls, section: ModelSection, path: Path | None, device: torch.device | str) -> Self:
        """Load the model of a configuration's section; dev's published tokenizer needs torchvision."""
        if cls.pipeline_of(path) is Flux2Pipeline:
            parts = diffusers_folder.components(path, Flux2Pipeline.__name__)
            tokenizer = parts.get("tokenizer", [None, None])[1]
            if tokenizer == "PixtralProcessor" and find_spec("torchvision") is None:
                needs = f"a {tokenizer}, which needs torchvision: pip install torchvision"
                raise ValueError(f"model.path {path}: FLUX.2 dev cuts its prompts by {needs}")
        return super().load(section, path, device)

    @classmethod
    def pipeline_of(cls, path: Path | None) -> Any:
        """Return klein's pipeline for files and klein's folders, dev's for any other folder."""
        folder = path is not None and path.is_dir()
        dev = folder and diffusers_folder.pipeline_name(path) != Flux2KleinPipeline.__name__
        return Flux2Pipeline if dev else Flux2KleinPipeline

    @classmethod
    def facts(cls, family: str, config: Mapping[str, Any], folder: Path | None) -> str:
        """Name the facts of klein, which serve dev's folder as well."""
        if config.get("guidance_embeds") and folder is None:
            needs = "FLUX.2 dev needs its folder; its transformer and VAE may be files of their own"
            raise ValueError(f"model.path is missing: {needs}")
        return "flux2_klein"

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a FLUX.2; dev has an input for guidance, klein has none."""
        width, channels = held.size("x_embedder.weight")
        return {
            "num_layers": held.count("transformer_blocks.{}.attn.to_q.weight"),
            "num_single_layers": held.count("single_transformer_blocks.{}.attn.to_out.weight"),
            "num_attention_heads": width // 128,
            "in_channels": channels_of_noise(held, channels, held.size("proj_out.weight")[0]),
            "joint_attention_dim": held.size("context_embedder.weight")[1],
            "guidance_embeds": held.has("time_guidance_embed.guidance_embedder.linear_1.weight"),
        }

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
        """Return noise levels [T+1] shifted by tokens and steps, by a fit of the model's authors."""
        return self.shifted_sigmas(num_steps, mu=compute_empirical_mu(shape[-2] * shape[-1], num_steps))

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
    """Return tokens' places: image [h·w, 4] (0, row, column, 0), text [L, 4] (0, 0, 0, place)."""
    one = torch.arange(1)
    image = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
    text = torch.cartesian_prod(one, one, one, torch.arange(length))
    return image.float().to(device), text.float().to(device)


POLICY = Flux2
