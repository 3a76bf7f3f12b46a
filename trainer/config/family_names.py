"""Every model family by name: the one list that a new family is added to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Family:
    """What can be said of a family without loading anything; the rest is in its module of `families/`."""

    title: str
    pipelines: Mapping[str, str]
    """The module that loads a folder, by the diffusers pipeline that it names; the usual one first."""
    edits: Mapping[str, str] = field(default_factory=dict)
    """The module of each model that starts from a prompt's image, by its name in `model.edits`."""
    recipe: str = ""
    """The bundled recipe that presets for cards of a size are made for."""


QWEN = {"QwenImagePipeline": "qwen_image"} | dict.fromkeys(
    ("QwenImageEditPipeline", "QwenImageEditPlusPipeline"), "qwen_edit"
)
FAMILIES = {
    "sd3": Family("Stable Diffusion 3 and 3.5", {"StableDiffusion3Pipeline": "sd3"}, recipe="sd35_medium"),
    "flux": Family(
        "FLUX.1",
        {"FluxPipeline": "flux", "FluxKontextPipeline": "kontext"},
        {"kontext": "kontext"},
        "flux_dev",
    ),
    "flux2": Family(
        "FLUX.2", {"Flux2Pipeline": "flux2", "Flux2KleinPipeline": "flux2"}, recipe="flux2_klein"
    ),
    "qwen_image": Family(
        "Qwen-Image",
        QWEN,
        dict.fromkeys(("qwen_edit", "qwen_edit_2509", "qwen_edit_2511"), "qwen_edit"),
        "qwen_image",
    ),
    "wan": Family("Wan 2.1 and 2.2", {"WanPipeline": "wan"}, recipe="wan21"),
    "z_image": Family("Z-Image", {"ZImagePipeline": "z_image"}, recipe="z_image"),
    "lumina2": Family("Lumina-Image 2.0", {"Lumina2Pipeline": "lumina2"}, recipe="lumina2"),
}
DEFAULT_FAMILY = next(iter(FAMILIES))

PIPELINES = {pipeline: name for name, family in FAMILIES.items() for pipeline in family.pipelines}
"""The family that a folder belongs to, by the diffusers pipeline that it names."""
EDITS = {edits: name for name, family in FAMILIES.items() for edits in family.edits}
"""Models that start from a prompt's image, and the family of each."""

Schedule = Literal["method", "pipeline", "comfyui"]
