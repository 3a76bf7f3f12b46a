"""Presets for cards of a size, and the check before a run: what it needs, and what the card has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config.bundled import bundled_folder
from ..config.family_names import DEFAULT_FAMILY
from ..config.file_checks import check_files, check_model_files
from ..config.reading import Config, ConfigError, apply_overrides, find_recipe, from_dict, read_yaml
from ..model.cpu_refusal import refuse_cpu
from ..model.inference import device
from ..model.placing import check_card
from .card_memory import CARD, Footprint, UnknownMemoryError, footprint_of, sized
from .remembered import counts_of

SIZES = {"8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24, "48gb": 48, "80gb": 80, "141gb": 141}
"""GiB of a card, by the preset's name."""
USABLE = 0.95
"""Share of a card's memory that a run may count on: allocators leave gaps."""
SMALL = 0.05
"""A model below this share of the computer's memory is not asked about on a CPU."""


@lru_cache(maxsize=1)
def presets() -> dict[str, dict[str, dict[str, Any]]]:
    """Read the settings of every family's presets, dotted names by size."""
    folder = bundled_folder("recipes") / "presets"
    return {file.stem: yaml.safe_load(file.read_text("utf-8")) for file in sorted(folder.glob("*.yaml"))}


def preset_settings(
    recipe: str | Mapping[str, Any], name: str | None, settings: Sequence[str] = ()
) -> list[str]:
    """Return a preset's settings in front of those that are given; ConfigError for an unknown name.

    `recipe` is its name or its content.
    """
    if name is None:
        return list(settings)
    name = preset_named(name)
    tree = read_yaml(find_recipe(recipe)) if isinstance(recipe, str) else recipe
    model = apply_overrides(tree, settings).get("model")
    family = model.get("family", DEFAULT_FAMILY) if isinstance(model, dict) else DEFAULT_FAMILY
    if family not in presets():
        raise ConfigError(f"--preset: {family!r} has no presets; those that have are: {', '.join(presets())}")
    return [*written(presets()[family][name]), *settings]


def preset_named(given: str) -> str:
    """Return the preset that is meant, such as 24gb by 24GB; ConfigError names the one to take instead."""
    size = re.fullmatch(r"\s*(\d{1,6})\s*(g|gb|gib)?\s*", given, re.IGNORECASE)
    if size is None:
        raise ConfigError(f"--preset {given[:80]!r} is unknown; choose one of: {', '.join(SIZES)}")
    if (name := f"{int(size[1])}gb") in SIZES:
        return name
    smaller = [each for each, gib in SIZES.items() if gib < int(size[1])]
    remedy = (
        f"a card of {int(size[1])} GB takes {smaller[-1]}"
        if smaller
        else f"the smallest is {next(iter(SIZES))}, which a card of {int(size[1])} GB does not hold"
    )
    raise ConfigError(f"--preset {given[:80]!r} is unknown; {remedy}; there are: {', '.join(SIZES)}")


def written(changes: Mapping[str, Any]) -> list[str]:
    """Write changes as settings of the command line."""
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    ]


@dataclass(frozen=True)
class Card:
    """What a run has: bytes that are free, and their owner's name."""

    name: str
    free: int

    def fits(self, estimate: Footprint) -> bool:
        """Return whether a run fits."""
        return self.need(estimate) <= self.free

    def need(self, estimate: Footprint) -> int:
        """Return what a run takes here, gaps and libraries among it."""
        return int((estimate.need + (CARD if self.name != "memory" else 0)) / USABLE)


def this_card(device: torch.device) -> Card:
    """Look at a device: a GPU's free memory, or the computer's."""
    if device.type == "cuda":
        return Card(torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0])
    if not hasattr(os, "sysconf"):
        return Card("memory", 2**62)  # Windows does not say, and a run is not refused for that
    return Card("memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def says(card: Card, estimate: Footprint) -> str:
    """Return what is needed, and what there is."""
    return (
        f"needs ≈ {sized(card.need(estimate))} (estimate; most in {estimate.phase}), you have "
        f"{sized(card.free)} ({card.name})"
    )


def preflight(config: Config, card: Card, force: bool = False) -> str:
    """Estimate a run's memory and say it; ConfigError where it does not fit, with the preset that would."""
    try:
        estimate = footprint_of(config, counts_of(config))
    except UnknownMemoryError as error:
        return str(error)
    sentence = says(card, estimate)
    if force or card.fits(estimate):
        return sentence
    raise ConfigError(f"memory: {sentence}; {remedy(config, card)}, or go on with --force")


def remedy(config: Config, card: Card) -> str:
    """Name the largest preset with which a run would fit."""
    own = presets().get(str(config.model.family), {})
    for name in sorted(own, key=lambda name: -SIZES[name]):
        if SIZES[name] * 2**30 > 1.1 * card.free:
            continue
        changed = with_preset(config, own[name])
        estimate = footprint_of(changed, counts_of(changed))
        if card.fits(estimate):
            return f"start it with --preset {name} (≈ {sized(card.need(estimate))})"
    return "no preset fits: lower model.width and model.height, or take a smaller model"


def with_preset(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a configuration with a preset's settings."""
    return from_dict(apply_overrides(config.model_dump(mode="json"), written(changes)))


def is_small(config: Config, card: Card) -> bool:
    """Return whether a model's files are so small that nobody need ask about memory."""
    places = [
        config.model.path,
        config.model.transformer,
        config.model.vae,
        *(config.model.text_encoders or ()),
    ]
    files = [
        file
        for place in map(Path, filter(None, places))
        for file in (place.rglob("*.safetensors") if place.is_dir() else [place])
    ]
    return (
        bool(files)
        and all(file.is_file() for file in files)
        and sum(file.stat().st_size for file in files) < SMALL * card.free
    )


def before_training(config: Config, force: bool) -> list[str]:
    """Return what a run needs and has, unless it is small and on a CPU; ConfigError if too little.

    In the order of their price: whether there is a GPU, the files, and the memory.
    """
    where = device()
    remarks = [refuse_cpu(config.model, where, force)]
    check_files(config)
    card = this_card(where)
    remarks.append(check_card(config.model, config.memory, where))
    if where.type != "cpu" or not is_small(config, card):
        remarks.append(preflight(config, card, force))
    return list(filter(None, remarks))


def before_drawing(config: Config, force: bool) -> list[str]:
    """Return what is to be said before pictures are drawn; a large model without a GPU is refused."""
    remark = refuse_cpu(config.model, device(), force)
    check_model_files(config.model)
    return [remark] if remark else []
