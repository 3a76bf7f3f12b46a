"""FLUX.1 Kontext (Black Forest Labs): FLUX.1 dev that edits an image, whose latent stands behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    from typing import Self

    from ..config.sections import ModelSection

LEARNT = 1024  # side of the square whose area the model's own sizes have


class Cond(NamedTuple):
    """One prompt's text features, and its picture."""

    tokens: Tensor  # T5: [L, joint_attention_dim]
    pooled: Tensor  # CLIP: [pooled_projection_dim]
    picture: Tensor  # latent [C, h, w] as the model sees it; [C, 0, 0] for a prompt without


class Kontext(Editing, Flux):
    """A policy and decoder over a FluxKontextPipeline; prompts may start from an image, and need not."""

    pipeline_class, cond = FluxPipeline, Cond

    @classmethod
    def load(cls, section: ModelSection, path: Path | None, device: torch.device | str) -> Self:
        """Load the model of a section; another FLUX.1's folder with Kontext's transformer will do."""
        parts, size = Parts(cls, section, path, device), section.reference_size
        policy = cls.of(section, parts.pipeline())
        policy.start_from_pictures(size)
        length = section.max_sequence_length
        return parts.attach(policy, "kontext", section.dtype, length, size, parts=PICTURE_PARTS)

    @classmethod
    def pipeline_of(cls, path: Path | None) -> Any:
        """Return Kontext's pipeline for its own folder, else dev's, which has the same parts."""
        own = diffusers_folder.pipeline_name(path) == FluxKontextPipeline.__name__
        return FluxKontextPipeline if own else FluxPipeline

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32, with guidance as the model has learnt it."""
        return by_size(super().velocity, x, sigma, cond)

    def seen(self, x: Tensor, cond: Sequence[Cond]) -> tuple[Tensor, Tensor]:
        """Return the tokens that the model sees, x's first and the images' behind, and their places."""
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
    """Return (width, height) of the nearest ratio that the model learnt, at another square's area."""
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return tuple(max(round(side * size / LEARNT / 16), 1) * 16 for side in (width, height))


POLICY = Kontext
