"""The names of model families, of their diffusers pipelines and of their editing models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass


FAMILIES: dict[str, str] = {
    "sd3": "Stable Diffusion 3 and 3.5",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "qwen_image": "Qwen-Image",
    "wan": "Wan 2.1 and 2.2",
    "z_image": "Z-Image",
    "lumina2": "Lumina-Image 2.0",
}
"""Every family: the name of its module, which has a function `load(section, folder, device)`, and what it
stands for.
"""
PIPELINES: dict[str, str] = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2Pipeline": "flux2",
    "Flux2KleinPipeline": "flux2",
    "FluxKontextPipeline": "flux",
    "QwenImagePipeline": "qwen_image",
    "QwenImageEditPipeline": "qwen_image",
    "QwenImageEditPlusPipeline": "qwen_image",
    "WanPipeline": "wan",
    "ZImagePipeline": "z_image",
    "Lumina2Pipeline": "lumina2",
}
"""The family that a folder belongs to, by the diffusers pipeline that it names."""
SINGLE_FILES = ("sd3", "flux", "flux2", "qwen_image", "wan", "z_image", "lumina2")
"""Families whose parts may come from files of their own."""

EDITS = {
    "kontext": "flux",
    "qwen_edit": "qwen_image",
    "qwen_edit_2509": "qwen_image",
    "qwen_edit_2511": "qwen_image",
}
"""Models that start from a prompt's picture, and the family of each."""

Schedule = Literal["method", "pipeline", "comfyui"]
