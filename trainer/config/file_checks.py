"""The files of a run, looked at before anything is loaded or computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import read_header
from comfy_g2rpo.prompts import Prompts
from comfy_g2rpo.prompts import load as load_prompts

from ..families.files import diffusers_folder
from .family_names import FAMILIES
from .reading import Config, ConfigError, model_folder
from .sections import ModelSection

PUBLISHED = Path(__file__).parent.parent / "families/facts/published.json"


def published() -> dict[str, Any]:
    """Read the sizes of the published models, by the name under which the hub has them."""
    return json.loads(PUBLISHED.read_text("utf-8"))


def read_prompts(config: Config) -> Prompts:
    """Read the prompts of a run; ValueError or OSError says what is wrong with their files."""
    given = config.prompts
    return load_prompts(given.train, given.heldout or None, given.heldout_share, config.train.seed)


def check_files(config: Config) -> Prompts:
    """Refuse prompts that cannot be read, and files of the model that are missing, cut short or of another
    kind, by their headers alone; return the prompts.
    """
    found = read_prompts(config)
    check_model_files(config.model)
    if config.lora.init:
        read_header(Path(config.lora.init))
    return found


def check_model_files(section: ModelSection) -> None:
    """Refuse a model that cannot be loaded, as far as its folder's index and its headers tell."""
    place = model_folder(section.path, bool(section.transformer))
    if place is not None and place.is_dir():
        pipelines = FAMILIES[section.family].pipelines
        named = diffusers_folder.pipeline_name(place)
        parts = diffusers_folder.components(place, named if named in pipelines else next(iter(pipelines)))
        own = {"transformer": section.transformer, "vae": section.vae, "text_encoder": section.text_encoders}
        given = tuple(name for name, file in own.items() if file)
        diffusers_folder.check_weights(
            place, {name: part for name, part in parts.items() if not name.startswith(given)}
        )
    files = [place if place and place.is_file() else None, section.transformer, section.vae]
    for file in filter(None, [*files, *section.text_encoders, *(each.path for each in section.lora)]):
        read_header(Path(file))


def parameters_of(section: ModelSection) -> int | None:
    """Count a transformer's numbers by its files' headers, or by its name; None where nothing tells."""
    try:
        headers = list(transformer_headers(section))
    except (OSError, ValueError):
        headers = []
    shapes = [entry["shape"] for header in headers for key, entry in header.items() if key != "__metadata__"]
    known = published().get(section.path or "", {}).get("parameters")
    return sum(map(math.prod, shapes)) if shapes else known


def transformer_headers(section: ModelSection) -> Iterator[Mapping[str, Any]]:
    """Read the headers of the files that hold a transformer; a checkpoint's with all that is in it."""
    place = Path(section.transformer) if section.transformer else model_folder(section.path)
    if place is None:
        raise ConfigError("model.path is missing")
    files = [place] if place.is_file() else diffusers_folder.weight_files(place / "transformer")
    for file in files:
        yield read_header(file)
