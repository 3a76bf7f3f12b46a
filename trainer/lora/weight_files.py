"""Models on disk, a file or a folder of shards: headers alone are read, tensors copied singly."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from comfy_g2rpo.files.safe import FileError, read_header

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NUMBERS = {**DTYPES, **FP8}
SCALES = ("scale_weight", "weight_scale")
"""What the scale of an fp8 weight is called, beside it."""
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
CHUNK = 1 << 24


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    size: int

    def read(self) -> Tensor:
        """Load the tensor."""
        if self.dtype not in NUMBERS:
            raise FileError(
                f"{self.file}: weights of type {self.dtype} cannot be computed with; give the model in "
                "16 bit, 32 bit or fp8"
            )
        with open(self.file, "rb") as file:
            file.seek(self.begin)
            content = bytearray(file.read(self.size))
        return (
            torch.frombuffer(content, dtype=NUMBERS[self.dtype]).reshape(self.shape)
            if content
            else torch.empty(self.shape)
        )

    def rows(self, begin: int, end: int) -> Tensor:
        """Load rows of the tensor, which may be in fp8; a number has one row."""
        shape = self.shape or (1,)
        row = self.size // shape[0] if shape[0] else 0
        content = bytearray((end - begin) * row)
        with open(self.file, "rb") as file:
            file.seek(self.begin + begin * row)
            if file.readinto(content) != len(content):
                raise FileError(f"{self.file} ends too early; download or save it again")
        kind, wanted = NUMBERS[self.dtype], (end - begin, *shape[1:])
        return (
            torch.frombuffer(content, dtype=kind).reshape(wanted)
            if content
            else torch.empty(wanted, dtype=kind)
        )

    def chunks(self) -> Iterator[bytes]:
        """Read the tensor's bytes piece by piece."""
        with open(self.file, "rb") as file:
            file.seek(self.begin)
            left = self.size
            while left:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    raise FileError(f"{self.file} ends too early; download or save it again")
                left -= len(piece)
                yield piece


@dataclass(frozen=True)
class Model:
    """The tensors of a model by their keys."""

    path: Path
    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def modules(self) -> dict[str, str]:
        """Map every module that has a weight to the weight's key."""
        prefix = next(
            (prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in self.tensors)), ""
        )
        weights = [key for key in self.tensors if key.startswith(prefix) and key.endswith(".weight")]
        return {key[len(prefix) : -len(".weight")]: key for key in weights}


def look_at(path: Path) -> Model:
    """Read the headers of a safetensors file, or of a folder's shards (diffusers: its transformer's)."""
    tensors: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for file in files_of(Path(path)):
        header = read_header(file)
        try:
            with safe_open(file, "pt"):  # checks that every tensor lies within the file
                pass
        except (OSError, SafetensorError) as error:
            raise FileError(f"{file} is damaged: {error}; download or save it again") from error
        with open(file, "rb") as opened:
            start = 8 + struct.unpack("<Q", opened.read(8))[0]
        metadata |= header.pop("__metadata__", {})
        for key, entry in header.items():
            if key in tensors:
                raise FileError(
                    f"{path}: {key[:200]!a} lies in {tensors[key].file.name} and in {file.name}; give "
                    "one of the two files"
                )
            begin, end = entry["data_offsets"]
            tensors[key] = Stored(file, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
    return Model(Path(path), tensors, metadata)


def files_of(path: Path) -> list[Path]:
    """List the safetensors files of a model."""
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise FileError(
            f"{folder} has {len(indices)} indices of shards; give the file of one of them, or a folder "
            "with one"
        )
    if not indices:
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise FileError(f"{path} is no safetensors file and no folder of such; check the path")
        return found
    try:
        names = set(json.loads(indices[0].read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise FileError(f"{indices[0]} is no index of shards; download it again") from error
    if strange := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise FileError(
            f"{indices[0]} names {str(strange[0])[:100]!a}, which is no file beside it; download it again"
        )
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise FileError(f"{folder} lacks {missing[0]}; finish the download")
    return [folder / name for name in sorted(names)]


def check_free(path: Path) -> None:
    """Refuse a place that is taken."""
    if os.path.lexists(path):
        raise FileError(f"{path} exists and is never overwritten; choose another --out")


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that is there whole or not at all, and never in the place of another."""
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.chmod(name, 0o644)
            check_free(path)
            os.rename(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; make room or choose "
            "another --out"
        ) from error


def rewrite(
    model: Model,
    path: Path,
    change: Callable[[str, Tensor], Tensor],
    keys: set[str],
    metadata: Mapping[str, str],
) -> None:
    """Copy a model to a new file of the same keys and types; some tensors go through `change`."""
    header: dict[str, Any] = {"__metadata__": {**model.metadata, **metadata}}
    place = 0
    for key, stored in model.tensors.items():
        header[key] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [place, place + stored.size],
        }
        place += stored.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, stored in model.tensors.items():
            if key in keys:
                changed = change(key, stored.read()).to(NUMBERS[stored.dtype]).contiguous()
                file.write(changed.flatten().view(torch.uint8).numpy().tobytes())
            else:
                for piece in stored.chunks():
                    file.write(piece)
