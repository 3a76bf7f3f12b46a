"""Z-Image and Z-Image-Turbo (Alibaba): time runs from 0 to 1, the model pads texts itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from torch import Tensor

from .files.single_file import Held
from .shared.peft_policy import PeftPolicy, cells

PATCH = 2


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # Qwen3, the layer before the last: [L, cap_feat_dim], as many as the prompt has


class ZImage(PeftPolicy):
    """A policy and a decoder over a ZImagePipeline, with a peft LoRA on its transformer. Latents are [B, 16,
    h, w].

    `guidance` is ComfyUI's cfg, one above what diffusers calls guidance_scale here.
    """

    pipeline_class = ZImagePipeline
    guidance, max_sequence_length = 1.0, 512
    reads = "Z-Image reads its prompts by a language model"
    fills_text = False
    layout = ((r"(.+)\.attention\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),)
    cond = Cond
    blank = ""
    comfyui_shift = 3.0
    # Under this prefix ComfyUI and diffusers both read diffusers' names with alphas; q, k and v need not be
    # fused.
    lora_style = "native"
    blocks = r"(layers|noise_refiner|context_refiner)\.\d+"
    attention = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    feed_forward = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Run the transformer, whose time is 1 − σ and whose output is x₀ − ε."""
        time = (1000 - sigma.float() * 1000) / 1000
        with self.casting():
            pictures = list(x[:, :, None].to(self.dtype).unbind())
            outputs = self.transformer(
                pictures, time, [c.tokens.to(self.dtype) for c in cond], return_dict=False
            )[0]
        return -torch.stack(outputs)[:, :, 0].float()

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a Z-Image."""
        width, patch = held.size("all_x_embedder.2-1.weight")
        heads = width // held.size("layers.0.attention.norm_q.weight")[0]
        return {
            "dim": width,
            "in_channels": patch // 4,
            "n_layers": held.count("layers.{}.attention.to_q.weight"),
            "n_refiner_layers": held.count("noise_refiner.{}.attention.to_q.weight"),
            "n_heads": heads,
            "n_kv_heads": heads,
            "cap_feat_dim": held.size("cap_embedder.1.weight")[1],
        }

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
        """Return ZImagePipeline's noise levels [T+1]; mu counts where the scheduler shifts by resolution."""
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        bounds = (scheduler.config.get(name, default) for name, default in names.items())
        mu = calculate_shift((shape[-2] // PATCH) * (shape[-1] // PATCH), *bounds)
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
        return scheduler.sigmas.float().cpu()


POLICY = ZImage
