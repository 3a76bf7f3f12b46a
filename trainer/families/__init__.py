"""Model families: one module each. `load` chooses one for a configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from comfy_g2rpo.lora import Pairs
from comfy_g2rpo.policy import Trainee
from comfy_g2rpo.schedule import shifted_sigmas

if TYPE_CHECKING:
    import torch

    from comfy_g2rpo.recipes import Recipe

    from ..config.sections import ModelSection
    from .shared.peft_policy import PeftPolicy
from ..config.family_names import EDITS, FAMILIES, Schedule
from .files import diffusers_folder


class FamilyPolicy(Trainee, Protocol):
    """What `load` returns: a trainee that the headless host can also prepare, schedule and continue."""

    transformer: torch.nn.Module
    comfyui_shift: float
    """The shift that ComfyUI's graphs have for this family unless a block changes it."""
    lora_style: str
    """The form of LoRA files, one of `lora.STYLES`, that both ComfyUI and diffusers load for this family."""

    def rename(self, pairs: Pairs) -> Pairs:
        """Give modules the names that they have in LoRA files."""
        ...

    def add_lora(self, rank: int, alpha: float, seed: int, feed_forward: bool = False) -> None:
        """Put a fresh adapter on the attention projections (and the feed-forward ones)."""
        ...

    def load_lora(self, path: Path) -> None:
        """Put the adapter of a file on the model, to draw with."""
        ...

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory once every prompt has been encoded."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return (C, h, w) of a picture of the given size in pixels, or refuse the size."""
        ...

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels [T+1] of the family's own diffusers pipeline for latents of a shape."""
        ...


def policy_class(section: ModelSection, path: Path | None) -> type[PeftPolicy]:
    """Return the class that loads a configuration's model: the family's, or that of its editing models."""
    family = FAMILIES[section.family]
    named = family.pipelines.get(diffusers_folder.pipeline_name(path), section.family)
    module = import_module(f".{family.edits.get(section.edits, named)}", __name__)
    kind: type[PeftPolicy] = module.POLICY
    return kind


def load(section: ModelSection, path: Path | None, device: torch.device | str) -> FamilyPolicy:
    """Load the model of a configuration's section onto a device, from its folder, checkpoint or files."""
    title = FAMILIES[section.family].title
    if section.edits and EDITS[section.edits] != section.family:
        remedy = f"set model.family: {EDITS[section.edits]}, or remove model.edits"
        raise ValueError(f"model.edits is {section.edits}, which is no {title}; {remedy}")
    kind = policy_class(section, path)
    if section.frames > 1 and not kind.makes_clips:
        remedy = f"but {title} makes single pictures; set it to 1"
        raise ValueError(f"model.frames is {section.frames}, {remedy}")
    policy = kind.load(section, path, device)
    if section.negative_prompt is not None:
        policy.avoid(section.negative_prompt)
    return policy


def step_shapes(policy: FamilyPolicy, section: ModelSection) -> list[tuple[int, ...]]:
    """List the latents' shapes of the sizes that steps take; ValueError for what the model cannot draw."""
    shapes = []
    for width, height in section.step_sizes:
        try:
            shapes.append(policy.latent_shape(width, height))
        except ValueError as error:
            if not section.sizes:
                raise
            raise ValueError(f"model.sizes has {width}x{height}: {str(error).partition('; ')[2]}") from error
    return shapes


def largest_shape(policy: FamilyPolicy, section: ModelSection) -> tuple[int, ...]:
    """Return the shape of a run's largest latents, those of evaluations among them."""
    shapes = [policy.latent_shape(section.width, section.height), *step_shapes(policy, section)]
    return max(shapes, key=math.prod)


def sigmas(policy: FamilyPolicy, schedule: Schedule, recipe: Recipe, shape: Sequence[int]) -> Tensor:
    """Return a run's noise levels [T+1]: the method's, the pipeline's or ComfyUI's."""
    if schedule == "pipeline":
        return policy.pipeline_sigmas(recipe.num_steps, shape)
    return shifted_sigmas(recipe.num_steps, policy.comfyui_shift if schedule == "comfyui" else recipe.shift)
