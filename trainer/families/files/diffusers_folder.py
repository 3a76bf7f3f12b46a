"""Diffusers folders: what is wrong is said before weights are read, with the command that mends it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from comfy_g2rpo.files.safe import FileError, read_header

from ...commands.exit_codes import ran_out
from ...config.family_names import FAMILIES, PIPELINES

# What diffusers and transformers read; other names are variants that nobody asks for here.
STEMS = ("diffusion_pytorch_model", "model")
# Where ComfyUI keeps models.
COMFYUI = ("checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae", "loras")


def load_pipeline(
    kind: Any,
    path: str | Path,
    dtype: torch.dtype,
    optional: Sequence[str] = (),
    replaced: Mapping[str, Any] | None = None,
    later: Sequence[str] = (),
) -> Any:
    """Load a diffusers folder as a pipeline class from this machine alone; `optional` components that it
    lacks stay away.

    `replaced` components are taken as they are given, and the folder's own are not looked at. Components that
    are loaded `later` are looked at and stay away.
    """
    folder = Path(path)
    parts = components(folder, kind.__name__)
    check_weights(folder, {name: part for name, part in parts.items() if name not in (replaced or {})})
    given = {
        name: None for name in optional if parts.get(name, [None, None])[1] is None and name in parts
    } | dict(replaced or {})
    pipeline = read(kind, folder, dtype, dict.fromkeys(later) | given)
    for name in (name for name in pipeline.components if name.startswith("tokenizer")):
        # transformers makes an empty vocabulary where a tokenizer's files are missing.
        tokenizer = getattr(pipeline, name)
        if (
            tokenizer is not None and len(getattr(tokenizer, "tokenizer", tokenizer)) < 256
        ):  # a processor has one inside
            raise ValueError(f"model.path {folder}: the files of its {name} are missing; {remedy(folder)}")
    return pipeline


def load_parts(kind: Any, path: Path, dtype: torch.dtype, names: Sequence[str]) -> dict[str, Any]:
    """Load some components of a folder alone; those that it does not have are left out."""
    parts = components(path, kind.__name__)
    wanted = [name for name in names if parts.get(name, [None, None])[1] is not None]
    loaded = read(kind, path, dtype, {name: None for name in parts if name not in wanted}) if wanted else None
    return {name: getattr(loaded, name) for name in wanted}


def read(kind: Any, folder: Path, dtype: torch.dtype, given: Mapping[str, Any]) -> Any:
    """Read a pipeline whose `given` components are not the folder's."""
    try:
        return kind.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, **given
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if ran_out(error):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.path {folder}: this folder cannot be loaded ({reason}); {remedy(folder)}"
        ) from error


def pipeline_name(folder: Path | None) -> str:
    """Read which pipeline a folder's index names; nothing where it does not say."""
    if folder is None:
        return ""
    try:
        content = json.loads((folder / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    return str(content.get("_class_name", "")) if isinstance(content, dict) else ""


def components(folder: Path, wanted: str) -> dict[str, list[str | None]]:
    """Read a folder's index: library and class of each component; another kind of model is refused."""
    index = folder / "model_index.json"
    if not index.is_file():
        title = FAMILIES[PIPELINES[wanted]].title
        raise FileNotFoundError(
            f"model.path {folder}: no model_index.json there; "
            f"{instead(folder) or f'give the folder of a diffusers {title} model'}"
        )
    try:
        content = json.loads(index.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{index}: not a JSON file ({error}); {remedy(folder)}") from error
    found = content.get("_class_name") if isinstance(content, dict) else None
    if found in PIPELINES and PIPELINES[found] != PIPELINES[wanted]:
        raise ValueError(
            f"model.path {folder}: it holds {FAMILIES[PIPELINES[found]].title}; set model.family: "
            f"{PIPELINES[found]}"
        )
    if not isinstance(content, dict) or found != wanted:
        given = f"a {found}" if found else "no pipeline's name"
        raise ValueError(
            f"model.path {folder}: its model_index.json holds {given}, not a {wanted}; give another folder"
        )
    return {name: value for name, value in content.items() if isinstance(value, list) and len(value) == 2}


def instead(folder: Path) -> str:
    """Say what to give in the place of a folder that is not one of diffusers, where it can be told."""
    if within := next(folder.glob("snapshots/*/model_index.json"), None):
        return f"this is the Hugging Face cache's own folder; give {within.parent}"
    if within := next(folder.glob("*/model_index.json"), None):
        return f"did you mean the folder {within.parent}?"
    if (folder.parent / "model_index.json").is_file():
        return f"this is one component of a model; give {folder.parent}"
    parts = {part for part in COMFYUI if (folder / part).is_dir() or (folder / "models" / part).is_dir()}
    if len(parts) > 1 or folder.name in COMFYUI:
        return (
            "this is a folder of ComfyUI, not a model; give model.path a file of models/checkpoints, or "
            "give files to model.transformer, model.text_encoders and model.vae"
        )
    if file := next((file for file in sorted(folder.glob("*.safetensors"))), None):
        return f"give the file itself, such as {file}, to model.path (a checkpoint) or model.transformer"
    return ""


def check_weights(folder: Path, parts: dict[str, list[str | None]]) -> None:
    """Refuse a folder with a missing component or shard, or an unfinished download."""
    for name, (library, kind) in parts.items():
        if kind is None or library is None:
            continue
        if not (folder / name).is_dir():
            raise ValueError(
                f"model.path {folder}: it lacks the folder {name} ({kind}); {remedy(folder, name)}"
            )
        for file in weight_files(folder / name):
            try:
                header = read_header(file)
            except FileError as error:
                raise ValueError(
                    f"model.path {folder}: {name}/{file.name} is incomplete ({error}); {remedy(folder, name)}"
                ) from error
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
            if (size := file.stat().st_size) != start + max(ends, default=0):
                want = start + max(ends, default=0)
                raise ValueError(
                    f"model.path {folder}: {name}/{file.name} has {size:,} of {want:,} bytes; "
                    f"{remedy(folder, name)}"
                )


def weight_files(part: Path) -> Iterator[Path]:
    """List a component's weight files; one that its index lists but that is absent is refused."""
    for stem in STEMS:
        index = part / f"{stem}.safetensors.index.json"
        if not index.is_file():
            yield from (file for file in (part / f"{stem}.safetensors",) if file.is_file())
            continue
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{index}: not an index of weight files; {remedy(part.parent, part.name)}"
            ) from error
        missing = [shard for shard in shards if not (part / shard).is_file()]
        if missing:
            count = f"{len(missing)} of its {len(shards)} weight files"
            raise ValueError(
                f"model.path {part.parent}: {part.name} lacks {count}, {missing[0]} first; "
                f"{remedy(part.parent, part.name)}"
            )
        yield from (part / shard for shard in shards)


def remedy(folder: Path, part: str | None = None) -> str:
    """Name the command that fetches a folder, or a component of it, again."""
    cached = re.search(
        r"models--([\w.-]+?)--([\w.-]+)" + re.escape(os.sep) + "snapshots", str(folder.absolute())
    )
    wanted = f" --include '{part}/*'" if part else ""
    if cached:
        return f"fetch it again with: hf download {cached[1]}/{cached[2]}{wanted}"
    return f"fetch it again with: hf download OWNER/NAME{wanted} --local-dir {folder}, or give another"
