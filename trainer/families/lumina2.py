"""Lumina-Image 2.0 (Alpha-VLLM): time runs from 0 to 1, guidance keeps the norm of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import Lumina2Pipeline
from torch import Tensor

from comfy_g2rpo.lora.key_names import LUMINA2

from .files.single_file import Held
from .files.sizes import channels_of_noise
from .qwen_image import padded
from .shared.peft_policy import PeftPolicy, cells

PATCH = 2


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # Gemma 2, the layer before the last: [L, cap_feat_dim], as many as the prompt has


class Lumina2(PeftPolicy):
    """A policy and decoder over a Lumina2Pipeline. Latents are [B, 16, h, w]."""

    pipeline_class = Lumina2Pipeline
    guidance, max_sequence_length = 4.0, 256
    reads = "Lumina-Image 2.0 reads its prompts by a language model"
    fills_text = False
    layout = (
        (r"(.+)\.attn\.norm_([qk])\.weight", r"\1.attention.\2_norm.weight"),
        (r"(.+)\.norm1\.norm\.weight", r"\1.attention_norm1.weight"),
        (r"(context_refiner\.\d+)\.norm1\.weight", r"\1.attention_norm1.weight"),
        (r"(.+)\.norm2\.weight", r"\1.attention_norm2.weight"),
        (r"time_caption_embed\.caption_embedder\.0\.weight", "cap_embedder.0.weight"),
    )
    cond = Cond
    blank = ""
    comfyui_shift = 6.0
    # ComfyUI knows the native names alone, under which q, k and v are one; diffusers wants `export --form
    # diffusers`.
    lora_style, names = "native", LUMINA2
    blocks = r"(layers|noise_refiner|context_refiner)\.\d+"
    attention = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    feed_forward = ("feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Return the guided velocity, whose rows are as long as those of the prediction."""
        guided = super().guide(given, without)
        return guided * (given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Run the transformer (time 1 − σ, output x₀ − ε); no token looks at the padding of texts."""
        tokens, mask = padded([c.tokens for c in cond])
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        with self.casting():
            output = self.transformer(
                x.to(self.dtype), 1 - sigma.float(), tokens.to(self.dtype), mask, return_dict=False
            )[0]
        return -output.float()

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a Lumina-Image 2.0."""
        width, patch = held.size("x_embedder.weight")
        head = held.size("layers.0.attn.norm_q.weight")[0]
        return {
            "hidden_size": width,
            "in_channels": channels_of_noise(held, patch, held.size("norm_out.linear_2.weight")[0]) // 4,
            "num_layers": held.count("layers.{}.attn.to_q.weight"),
            "num_refiner_layers": held.count("noise_refiner.{}.attn.to_q.weight"),
            "num_attention_heads": width // head,
            "num_kv_heads": held.size("layers.0.attn.to_k.weight")[0] // head,
            "cap_feat_dim": held.size("time_caption_embed.caption_embedder.1.weight")[1],
        }

    def key(self, prompt: str) -> str:
        """Return a key of a prompt's features, which differ where it is the negative one."""
        own = super().key(prompt)
        return f"{own}\nnegative" if own and own == self.blank else own

    def encode_one(self, prompt: str) -> Cond:
        """Run Gemma 2 on a prompt behind the model's instruction, which the negative one lacks."""
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
        """Return Lumina2Pipeline's noise levels [T+1]; it takes channels for the number of tokens."""
        return self.shifted_sigmas(num_steps, shape[0])


POLICY = Lumina2
