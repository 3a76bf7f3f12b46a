"""Text features on disk, so that a prompt is encoded once per model and not once per run.

    <root>/<model key>/<first two digits>/<hash of the text>.safetensors

Every prompt is a file of its own, written whole or not at all: an interrupted run continues where it stopped,
and processes may share the folder. Nothing is ever removed; the whole folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from comfy_g2rpo.files.safe import FileError, read_tensors, write_tensors

FORMAT = 1
SMALL = 100 * 2**20
"""Text encoders below so many bytes are quicker than the disk."""
READ_WHOLE = 4 * 2**20
PARTS = ("text_encoder", "tokenizer")
PICTURE_PARTS = (*PARTS, "processor", "vae")
"""What features depend on where a prompt has a picture."""


class PromptCache:
    """The features of one model's prompts."""

    def __init__(self, root: Path, key: str) -> None:
        self.folder = root / key

    def get(self, text: str) -> dict[str, Tensor] | None:
        """Return a prompt's features, or None where they are not known; a damaged file is not known."""
        path = self.place(text)
        try:
            return read_tensors(path)[0] if path.is_file() else None
        except FileError:
            return None

    def put(self, text: str, features: Mapping[str, Tensor]) -> None:
        """Keep a prompt's features."""
        path = self.place(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, features)

    def place(self, text: str) -> Path:
        """Return the file of a prompt."""
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"


def default_root() -> Path:
    """Return where features are kept: $G2RPO_PROMPTS, or the user's cache."""
    return Path(os.environ.get("G2RPO_PROMPTS") or Path.home() / ".cache" / "g2rpo" / "prompts").expanduser()


def for_model(folder: Path, *settings: object, parts: Sequence[str] = PARTS) -> PromptCache | None:
    """Return the cache of a diffusers folder's text encoders, None where they are small."""
    return for_files(
        {path.relative_to(folder).as_posix(): path for path in encoder_files(folder, parts)}, *settings
    )


def for_files(files: Mapping[str, Path], *settings: object) -> PromptCache | None:
    """Return the cache of text encoders in files, by names that stay when they move, or None."""
    if sum(path.stat().st_size for path in files.values()) < SMALL:
        return None
    return PromptCache(default_root(), fingerprint(files, settings))


def encoder_files(folder: Path, parts: Sequence[str] = PARTS) -> list[Path]:
    """List the files that features depend on: those of the components whose names begin so."""
    found = (part for part in folder.iterdir() if part.name.startswith(tuple(parts)))
    return sorted(path for part in found for path in part.rglob("*") if path.is_file())


def fingerprint(files: Mapping[str, Path], settings: tuple[object, ...]) -> str:
    """Tell models apart: small files by their content, large ones by beginning, size and time."""
    facts: list[object] = [FORMAT, [str(setting) for setting in settings]]
    for name, path in files.items():
        state = path.stat()
        with path.open("rb") as file:
            begin = hashlib.sha256(file.read(READ_WHOLE)).hexdigest()
        time = state.st_mtime_ns if state.st_size > READ_WHOLE else 0
        facts.append([name, state.st_size, time, begin])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
