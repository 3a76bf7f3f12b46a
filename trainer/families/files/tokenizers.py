"""Tokenizers for models that come as files: from a folder that the user names, from his ComfyUI's own tree,
or from inside a file.

They are read as files and nothing is imported; a ComfyUI is found upwards from the model's files or by
COMFYUI_PATH.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from .single_file import Held

MARK = "comfy/sd1_tokenizer"
SMALLEST = 256


def load_tokenizers(
    facts: Mapping[str, Any], folder: str | None, model: Path, encoders: Mapping[str, Held]
) -> dict[str, Any]:
    """Load the tokenizers that a model's `facts` name, for the text encoders that it has."""
    near = [model, *(held.path for held in encoders.values())]
    return {
        name: load_one(name, fact, facts["hub"], folder, near, encoders)
        for name, fact in facts["tokenizers"].items()
        if name.replace("tokenizer", "text_encoder") in encoders
    }


def load_one(
    name: str,
    fact: Mapping[str, Any],
    hub: str,
    folder: str | None,
    near: list[Path],
    encoders: Mapping[str, Held],
) -> Any:
    """Load one tokenizer, from the folder where one is named."""
    remedy = f"hf download {hub} --include 'tokenizer*/*' --local-dir {folder or 'FOLDER'}"
    kind = getattr(transformers, fact["class"])
    if folder:
        made = from_files(kind, Path(folder) / name, {})
        if made is None:
            raise ValueError(
                f"model.tokenizers {folder}: it lacks the folder {name} with the files of a "
                f"{fact['class']}; run: {remedy}"
            )
        return made
    inside = fact.get("inside")
    holder = next((held for held in encoders.values() if inside in held.tensors), None)
    if inside and holder:
        return from_sentencepiece(kind, holder, inside, fact["settings"])
    root = comfyui(near)
    made = from_files(kind, root / fact["comfyui"], fact["settings"]) if root and "comfyui" in fact else None
    if made is None:
        looked = (
            f"{root} has none for it" if root else "the files lie in no ComfyUI, and COMFYUI_PATH names none"
        )
        raise ValueError(
            f"model.tokenizers is missing, and {looked}; run {remedy.replace('FOLDER', 'tokens')} and "
            "set it to that folder"
        )
    if "chat_template" in fact:
        made.chat_template = fact["chat_template"]
    return made


def from_files(kind: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Load a tokenizer's folder, or return None where its files are not there."""
    if not folder.is_dir():
        return None
    try:
        made = kind.from_pretrained(folder, local_files_only=True, **settings)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}: this tokenizer cannot be loaded ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    # transformers makes an empty vocabulary where files are missing.
    return made if len(made) >= SMALLEST else None


def from_sentencepiece(kind: Any, held: Held, key: str, settings: Mapping[str, Any]) -> Any:
    """Make a tokenizer of the SentencePiece model that a text encoder's file carries as bytes."""
    if missing := [name for name in ("sentencepiece", "google.protobuf") if not present(name)]:
        raise ValueError(
            f"{held.path}: the tokenizer in this file needs {missing[0]}; run: pip install "
            "sentencepiece protobuf"
        )
    with tempfile.TemporaryDirectory() as folder:
        stored = held.tensors[key]
        (Path(folder) / "spiece.model").write_bytes(b"".join(stored.chunks()))
        made = from_files(kind, Path(folder), {**settings, "extra_ids": 0})
    if made is None:
        raise ValueError(
            f"{held.path}: {key} holds no SentencePiece model; download it again, or set model.tokenizers"
        )
    return made


def present(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def comfyui(near: Iterable[Path]) -> Path | None:
    """Return the ComfyUI that the files lie in, or the one that COMFYUI_PATH names."""
    places = [parent for file in near for parent in file.absolute().parents]
    if named := os.environ.get("COMFYUI_PATH"):
        places.append(Path(named).expanduser())
    return next((place for place in places if (place / MARK).is_dir()), None)
