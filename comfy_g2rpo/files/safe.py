"""Files that are whole or absent: written beside their target and moved into place."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

HEADER_BYTES = 100_000_000  # the limit of safetensors itself
HEADER_TENSORS = 20_000
PICKLE = "a pickle, as torch.save writes it; pickles can run foreign code, get this model as safetensors"
KINDS = {
    b"GGUF": "a GGUF file; get this model as safetensors",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; get it with git lfs pull",
    b"<": "a web page or XML file, as a download without login gives; download it in a browser, logged in",
    b"PK\x03\x04": PICKLE,
    **{bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)},
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"{": "a JSON file",
    b"\x1f\x8b": "a packed file; unpack it",
    b"7z\xbc\xaf": "a packed file; unpack it",
}
"""What files start with that people take for safetensors: what each is, and what to do."""
LEFTOVER = re.compile(
    r"\.(filling-|replaced-).*|\..+\.partial|\..+\.(json|jsonl|png|webp|safetensors)\.[a-z0-9_]{8}"
)
"""What an interrupted write leaves: the name of a temporary file or folder."""


class FileError(ValueError):
    """A file that cannot be read or written, in one line that names it and the remedy."""


class RunError(FileError):
    """A run folder that cannot be used as asked."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write into one line."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RunError(
            f"cannot write {path}: {reason}; make room or choose another folder (--out)"
        ) from error


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read its bytes.

    Raise OSError for a pipe, socket, device or folder, the first of which would be waited for without end.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    handle = os.open(path, os.O_RDONLY | sum(flags))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is a folder, pipe or device", str(path))
    return os.fdopen(handle, "rb")


def stamps(files: Iterable[Path]) -> str:
    """Return what changes where one of the files does; one that cannot be looked at hides no other."""
    lines = []
    for path in files:
        try:
            state = path.stat()
            lines.append(f"{path} {state.st_size} {state.st_mtime_ns}")
        except OSError as error:
            lines.append(f"{path} {error.strerror}")
    return "\n".join(lines)


def on_disk(file: IO[bytes]) -> None:
    """Have what was written to an open file on the disk before going on."""
    file.flush()
    os.fsync(file.fileno())


def folder_on_disk(folder: Path) -> None:
    """Have the names in a folder on the disk before going on, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what interrupted writes have left anywhere in a folder."""
    for path in (found for found in Path(folder).rglob(".*") if LEFTOVER.fullmatch(found.name)):
        with writing(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing, readable by everybody."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                on_disk(file)
            os.chmod(name, 0o644)
            os.replace(name, path)
            folder_on_disk(path.parent)
        finally:
            Path(name).unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Replace what JSON cannot say (NaN, ±∞) by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def spelt_out(part: Any) -> dict[str, Any]:
    """Name what a section of a configuration holds: its fields, or `place.field` in a list of sections."""
    if isinstance(part, list) and all(isinstance(item, dict) for item in part):
        return {f"{place}.{key}": value for place, item in enumerate(part) for key, value in item.items()}
    return dict(part) if isinstance(part, dict) else {"": part}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; NaN becomes null."""
    write_bytes(
        path, (json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def read_json(path: Path) -> Any:
    """Read a JSON file of a run."""
    try:
        with open_file(path) as file:
            return json.loads(file.read().decode("utf-8"))
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}; is this a run folder?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged (not JSON); restore it or start a new run") from error


def read_table(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run that holds a table."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged (no table); restore it or start a new run")
    return content


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole or not at all."""
    write_bytes(path, tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return tensors as a safetensors file has them."""
    ready = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header, data = split_file(save_tensors(ready, {"format": "pt", **(metadata or {})}))
    return join_file(header, data)


def split_file(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Take a safetensors file that we wrote apart: its header, and the bytes of its tensors."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_file(header: Mapping[str, Any], data: bytes) -> bytes:
    """Make a safetensors file whose metadata are sorted, so that equal contents are equal files."""
    notes = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps({**header, "__metadata__": notes}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def read_header(path: Path) -> dict[str, Any]:
    """Read a safetensors header after capping its size, before anything else of the file is trusted."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError(f"{path} is a folder, pipe or device; choose a file")
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if kind := kind_of(start + file.read(56)):
                raise FileError(f"{path} is not a safetensors file, but {kind}")
            if not 2 <= length <= HEADER_BYTES:
                raise FileError(
                    f"{path} is not a safetensors file (its header claims {length} bytes); choose "
                    "another file"
                )
            file.seek(8)
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise FileError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is damaged: its header is not JSON; download or save it again") from error
    if not isinstance(header, dict) or len(header) > HEADER_TENSORS:
        raise FileError(f"{path} is refused: its header must be a table of at most {HEADER_TENSORS} tensors")
    header["__metadata__"] = header.get("__metadata__") or {}
    return header


def kind_of(start: bytes) -> str:
    """Name the kind of a file that is no safetensors file by how it starts; nothing where it may be one."""
    if start[8:9] == b"{":
        return ""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((kind for magic, kind in KINDS.items() if text.startswith(magic)), "")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata."""
    header = read_header(path)
    try:
        with safe_open(path, "pt"):  # see that it is as long as its header says before it is read
            pass
        tensors = load_tensors(Path(path).read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged: {error}; download or save it again") from error
    return tensors, dict(header["__metadata__"])


def sound(tensor: Tensor, least: float = -math.inf) -> bool:
    """Return whether a tensor holds finite floating-point numbers, none below `least`."""
    return tensor.is_floating_point() and bool((tensor.isfinite() & (tensor >= least)).all())
