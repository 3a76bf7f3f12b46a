"""Where LoRAs go: under models/loras/g2rpo, with a picture of their run beside them.

A run has one file there, by its name; it is replaced when the same run goes on. The file says whose it is: a
file of another run, or of anybody else, stays, and a number is added to the name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...comfy_g2rpo import __version__
from ...comfy_g2rpo.files.safe import (
    LEFTOVER,
    FileError,
    RunError,
    finite,
    join_file,
    read_header,
    split_file,
    write_bytes,
)
from ...comfy_g2rpo.lora.modelspec import DATE, SETTINGS, Base, about_run, base_of_model, date_of, handed_out
from ...comfy_g2rpo.lora.preview import SUFFIX, save_preview
from ...comfy_g2rpo.run.folder import MAY_CHANGE, RunFolder
from .changed_settings import MAY_GO_ON, without
from .comfyui import contained, lora_listing, lora_place, loras_root


def metadata(
    model: Any, recipe: str, rewards: Mapping[str, float], size: tuple[int, int] | None = None
) -> dict[str, str]:
    """Return what a LoRA file says about itself; `size` is the training images' width and height."""
    said = {name: f"{weight:g} {name}" for name, weight in rewards.items()}
    return {
        "g2rpo.version": __version__,
        "g2rpo.base_model": type(model.model).__name__,
        "g2rpo.recipe": recipe,
        "g2rpo.rewards": ", ".join(said.values()),
        **about_run(base_of(model), recipe, said, size),
    }


def base_of(model: Any) -> Base:
    """Return the names of a MODEL's base model."""
    weights = model.model.diffusion_model.named_parameters()
    shapes = {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in weights}
    return base_of_model(shapes, type(model.model).__name__)


def publish(folder: RunFolder, name: str) -> Path:
    """Put the run's LoRA where LoraLoader lists it, and a picture beside it; write what differs alone."""
    chosen = folder.outcome()
    source = chosen / "lora.safetensors"
    content = source.read_bytes()
    former = contained(loras_root(), f"{name[:48]}_{int(chosen.name):06d}.safetensors", "run")
    if former.is_file() and former.read_bytes() == content:
        return former  # An earlier version has put it there, with the step in its name.
    mine = identity(folder)
    notes = mine | date_of(source.stat().st_mtime)

    def strange(place: Path) -> bool:
        return os.path.lexists(place) and not mine.items() <= notes_of(place).items()

    place = lora_place(name, "run", strange)
    try:
        write_where_it_differs(place, handed_out(content, place.stem, notes))
    except RunError:
        if not place.exists():
            raise
        # Windows replaces no file that a loader holds: the run's new LoRA is worth a name of its own.
        place = lora_place(name, "run")
        write_bytes(place, handed_out(content, place.stem, notes))
    tell(folder.path.name, place, save_preview(place, folder, int(chosen.name)))
    return place


def identity(folder: RunFolder) -> dict[str, str]:
    """Return by what a file is known as a run's: its name, and the settings that stay while it goes on."""
    settled = dict(folder.config()["config"])
    for free in (MAY_CHANGE, MAY_GO_ON):
        settled |= {name: without(settled[name], fields) for name, fields in free.items() if name in settled}
    content = json.dumps(finite(settled), sort_keys=True).encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return {"g2rpo.run": folder.path.name, SETTINGS: digest}


def notes_of(place: Path) -> dict[str, Any]:
    """Return a file's metadata; none of what is no LoRA file."""
    try:
        return dict(read_header(place)["__metadata__"])
    except (FileError, TypeError, ValueError):
        return {}


def write_where_it_differs(place: Path, content: bytes) -> None:
    """Write a run's file unless it holds this already; remove what a kill has left of one, or its picture."""
    names = (place.name, place.stem + SUFFIX)
    for path in place.parent.glob(".*") if place.parent.is_dir() else ():
        if LEFTOVER.fullmatch(path.name) and path.name[1:-9] in names:
            with suppress(OSError):
                path.unlink()
    if not place.is_file() or place.read_bytes() != content:
        write_bytes(place, content)


def save_named(stem: str, content: bytes, run: RunFolder | None) -> Path:
    """Put a LoRA under a name that somebody chose, and its run's picture beside it; overwrite nothing.

    A file of the same content, but for its date, is the one that was asked for.
    """

    def other(place: Path) -> bool:
        if not os.path.lexists(place):
            return False
        wanted = handed_out(content, place.stem)
        return not place.is_file() or undated(place.read_bytes()) != undated(wanted)

    place = lora_place(stem, "name", other)
    if not place.exists():
        write_bytes(place, handed_out(content, place.stem, date_of(time.time())))
    if run is not None and (chosen := run.outcome()):
        tell(run.path.name, place, save_preview(place, run, int(chosen.name)))
    return place


def undated(content: bytes) -> bytes:
    """Return a LoRA file without its date; what is no such file as it is."""
    try:
        header, data = split_file(content)
        header["__metadata__"].pop(DATE, None)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return content
    return join_file(header, data)


def tell(run: str, place: Path, remark: str) -> None:
    """Write into ComfyUI's log where a run's LoRA lies, and why it has no picture."""
    logging.info("G²RPO run %s: LoRA %s%s", run, place, f"; {remark}" if remark else "")


def file_ui(place: Path) -> dict[str, list[str]]:
    """Return what the page and API users are told of a file: its name in LoraLoader's list, and no path."""
    return {"g2rpo_file": [lora_listing(place)]}
