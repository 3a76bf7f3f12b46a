"""Model families: one module each, that loads a model as a policy with its text encoding, its schedule and
its decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from comfy_g2rpo.lora import Pairs
from comfy_g2rpo.policy import Trainee
from comfy_g2rpo.schedule import shifted_sigmas

if TYPE_CHECKING:
    import torch

    from comfy_g2rpo.recipes import Recipe

    from ..config.sections import ModelSection
from ..config.family_names import EDITS, FAMILIES, SINGLE_FILES, Schedule


class FamilyPolicy(Trainee, Protocol):
    """What `load` returns: a trainee that the headless host can also prepare, schedule and continue."""

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


def load(section: ModelSection, folder: Path | None, device: torch.device | str) -> FamilyPolicy:
    """Load the model of a configuration's section onto a device, from its folder or checkpoint and from
    files of their own.
    """
    if section.frames > 1 and section.family != "wan":
        raise ValueError(
            f"model.frames is {section.frames}, but {FAMILIES[section.family]} makes single pictures; "
            "set it to 1"
        )
    if section.edits and EDITS[section.edits] != section.family:
        remedy = f"set model.family: {EDITS[section.edits]}, or remove model.edits"
        raise ValueError(f"model.edits is {section.edits}, which is no {FAMILIES[section.family]}; {remedy}")
    given = [name for name in ("transformer", "text_encoders", "vae", "tokenizers") if getattr(section, name)]
    if section.family not in SINGLE_FILES and (given or folder is None or folder.is_file()):
        remedy = f"remove {given[0]}" if given else "give its folder"
        raise ValueError(
            f"model.{(given or ['path'])[0]}: {FAMILIES[section.family]} is loaded from its folder "
            f"alone; {remedy}"
        )
    policy: Any = import_module(f".{section.family}", __name__).load(section, folder, device)
    return policy


def sigmas(policy: FamilyPolicy, schedule: Schedule, recipe: Recipe, shape: Sequence[int]) -> Tensor:
    """Return the noise levels [T+1] of a run: by the method's shift, as the family's pipeline samples, or
    as ComfyUI does.
    """
    if schedule == "pipeline":
        return policy.pipeline_sigmas(recipe.num_steps, shape)
    return shifted_sigmas(recipe.num_steps, policy.comfyui_shift if schedule == "comfyui" else recipe.shift)
