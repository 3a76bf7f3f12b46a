"""FLUX.1 Kontext (Black Forest Labs): FLUX.1 dev that edits.

A picture's latent stands behind the one made, in a place of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from torch import Tensor

from ..model.prompt_cache import PICTURE_PARTS
from .files import diffusers_folder
from .files.parts import Parts
from .flux import Flux, pack, positions
from .shared.editing import Editing, by_size, picture_of

if TYPE_CHECKING:
    from ..config.sections import ModelSection

LEARNT = 1024  # side of the square whose area the model's own sizes have


class Cond(NamedTuple):
    """One prompt's text features, and its picture."""

    tokens: Tensor  # T5: [L, joint_attention_dim]
    pooled: Tensor  # CLIP: [pooled_projection_dim]
    picture: Tensor  # latent [C, h, w] as the model sees it; [C, 0, 0] for a prompt without


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> Kontext:
    """Load the model of a configuration's section onto a device.

    Files, and another FLUX.1's folder with its transformer, do as well.
    """
    bf16, length, size = section.dtype == "bf16", section.max_sequence_length, section.reference_size
    # The two differ in what they do when they are called, which nothing here does.
    kind = (
        FluxKontextPipeline
        if diffusers_folder.pipeline_name(path) == FluxKontextPipeline.__name__
        else FluxPipeline
    )
    parts = Parts(kind, "flux", section, path, device)
    policy = Kontext(
        parts.pipeline(),
        guidance=section.guidance,
        max_sequence_length=length,
        autocast=torch.bfloat16 if bf16 else None,
    )
    policy.start_from_pictures(size)
    return parts.attach(policy, "kontext", section.dtype, length, size, parts=PICTURE_PARTS)


class Kontext(Editing, Flux):
    """A policy and a decoder over the parts of a FluxKontextPipeline.

    Prompts may start from a picture, and need not.
    """

    cond = Cond

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32, with guidance as the model has learnt it."""
        return by_size(super().velocity, x, sigma, cond)

    def seen(self, x: Tensor, cond: Sequence[Cond]) -> tuple[Tensor, Tensor]:
        """Return the tokens that the model looks at, those of x [B, C, h, w] first and the pictures'
        behind, and where they are.
        """
        tokens, where = super().seen(x, cond)
        pictures = torch.stack([c.picture for c in cond])
        if not pictures.numel():
            return tokens, where
        height, width = pictures.shape[2] // 2, pictures.shape[3] // 2
        return torch.cat([tokens, pack(pictures).to(tokens)], 1), torch.cat(
            [where, positions(height, width, self.device, place=1)]
        )

    def encode_one(self, prompt: str) -> Cond:
        """Run CLIP (pooled) and T5 (tokens) on the text, and the VAE on the picture."""
        tokens, pooled = super().encode_one(str(prompt))
        image, processor, config = picture_of(prompt), self.pipeline.image_processor, self.vae.config
        if image is None:
            return Cond(
                tokens,
                pooled,
                torch.zeros(self.transformer.config.in_channels // 4, 0, 0, device=self.device),
            )
        height, width = processor.get_default_height_width(image)
        width, height = size_of(width / height, self.reference_size)
        pixels = processor.preprocess(processor.resize(image, height, width), height, width)
        latent = self.vae.encode(pixels.to(self.device, self.vae_dtype)).latent_dist.mode()[0]
        return Cond(tokens, pooled, ((latent - config.shift_factor) * config.scaling_factor).contiguous())


def size_of(ratio: float, size: int = LEARNT) -> tuple[int, int]:
    """Return (width, height) for a picture of a ratio: the nearest that the model has learnt, brought to
    the area of another square.
    """
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return tuple(max(round(side * size / LEARNT / 16), 1) * 16 for side in (width, height))
