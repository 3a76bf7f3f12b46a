"""Models by the names that ComfyUI's loaders list them under, and what a file's header says of it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import folder_paths

from ...comfy_g2rpo.blocks.block_settings import NO_FILE, OF_CHECKPOINT, TINY_MODEL, TINY_PARAMETERS
from ...comfy_g2rpo.files.safe import FileError, read_header
from ...comfy_g2rpo.lora.key_names import FAMILIES, SD3, family_of_model
from ..host.write_job import Model

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")


def listed(folder: str) -> list[str]:
    """List the files of a kind that a worker can read, as the loaders name them."""
    try:
        names = folder_paths.get_filename_list(folder)
    except KeyError:  # a ComfyUI without this kind
        return []
    return [name for name in names if name.lower().endswith((".safetensors", ".sft"))]


def model_choices() -> list[str]:
    """List what can be trained: the bundled model, diffusion models, checkpoints."""
    whole = (name + OF_CHECKPOINT for name in listed("checkpoints"))
    return [TINY_MODEL, *listed("diffusion_models"), *whole]


def file_choices(folder: str) -> list[str]:
    """List the files of a kind, or none of them."""
    return [NO_FILE, *listed(folder)]


def model_named(choice: str) -> Model:
    """Return the model of a choice; ValueError where its file holds none that a worker can train."""
    if choice == TINY_MODEL:
        return Model(TINY_MODEL, TINY_MODEL, SD3.name, TINY_PARAMETERS)
    folder = "checkpoints" if choice.endswith(OF_CHECKPOINT) else "diffusion_models"
    name = choice.removesuffix(OF_CHECKPOINT)
    place = folder_paths.get_full_path(folder, name)
    if place is None:
        raise ValueError(f"model: {choice[:80]!a} has gone; press R and choose another one")
    try:
        header = read_header(Path(place))
    except FileError as error:
        raise ValueError(f"model: {str(error).replace(place, name)}") from error
    sizes = {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in sizes)), "")
    own = {key.removeprefix(prefix): size for key, size in sizes.items() if key.startswith(prefix)}
    known = family_of_model(key.rpartition(".")[0] for key in own)
    if known is None:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise ValueError(f"model: {name[:80]!a} holds no flow model that a worker can train; choose {titles}")
    family, count = known[0], sum(map(math.prod, own.values()))
    return Model(folder, spelt(name), family.name, count, family.guidance_is_input)


def spelt(name: str) -> str:
    """Return a file's name as every system writes it."""
    return name.replace(os.sep, "/")
