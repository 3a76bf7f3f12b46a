"""Pictures on disk: read whatever their mode, turned as a camera says, and the texts that they carry.

read(path) -> [H, W, 3] float32 in [0, 1]
strip(clips) -> some of their frames side by side; clip_bytes(clip) -> an animated WebP
listed(folder) -> its pictures in the order of their names, numbers by value
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .safe import open_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 2**26  # of one picture
STRIP = 6  # frames of a clip that are shown at most, evenly spaced, the first and the last among them
FRAMES_PER_SECOND = 16
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION, EXIF_TAGS, COMMENT = 0x0112, 0x8769, 0x9286
PNG = b"\x89PNG\r\n\x1a\n"
NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that its pixels do not need
LONG_NOTE = 2**20
# What Pillow's readers raise on broken files, besides OSError.
BROKEN = (
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class PictureError(ValueError):
    """A picture that cannot be read, in one line that names it."""


def listed(folder: Path, deep: bool = False) -> list[Path]:
    """List a folder's images, with `deep` those of its folders too; no hidden ones, no links elsewhere."""
    root = Path(folder).resolve()
    found = (path for path in root.glob("**/*" if deep else "*") if path.suffix.lower() in SUFFIXES)
    kept = [path for path in found if path.is_file() and path.resolve().is_relative_to(root)]
    visible = [
        path.relative_to(root)
        for path in kept
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    return [Path(folder) / path for path in sorted(visible, key=lambda path: natural(str(path)))]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Make a key that sorts "a2" before "a10"."""
    parts = re.split(r"([0-9]{1,18})", name.lower())
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]


def size_of(path: Path) -> tuple[int, int]:
    """Read an image's width and height from its header, as `read` will give them."""

    def look(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        # Asked for its EXIF, a PNG without any is read to its end.
        turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(
            ORIENTATION
        ) in TURNED
        return (height, width) if turned else (width, height)

    return looked_at(path, look)


def read(path: Path) -> Tensor:
    """Read an image as [H, W, 3] float32 in [0, 1]: first frame, upright, without alpha, as ComfyUI does."""
    return looked_at(path, lambda image: torch.from_numpy(levels(ImageOps.exif_transpose(image))))


Seen = TypeVar("Seen")


def looked_at(path: Path, look: Callable[[Image.Image], Seen]) -> Seen:
    """Return what `look` sees in a picture; large or damaged notes of a PNG do not make it unreadable."""
    try:
        with opened(path) as image:
            return look(image)
    except PictureError:
        if (content := without_notes(path)) is None:
            raise
        with opened(path, content) as image:
            return look(image)


def without_notes(path: Path) -> BytesIO | None:
    """Return a PNG without the notes that Pillow may refuse; None for other files.

    These are colour profiles and texts that are compressed, long, or not what their checksum says.
    """
    kept = BytesIO()
    try:
        with open_file(path) as file:
            if file.read(len(PNG)) != PNG:
                return None
            kept.write(PNG)
            while len(head := file.read(8)) == 8:
                length, kind = struct.unpack(">I4s", head)
                body = file.read(length + 4)
                if kind not in NOTES or harmless(kind, body[:-4], body[-4:]):
                    kept.write(head + body)
    except OSError:
        return None
    kept.seek(0)
    return kept


def harmless(kind: bytes, text: bytes, checksum: bytes) -> bool:
    """Return whether a note of a PNG is short, plain and whole."""
    packed = kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and text.partition(b"\0")[2][:1] != b"\0")
    return not packed and len(text) <= LONG_NOTE and checksum == struct.pack(">I", zlib.crc32(kind + text))


@contextmanager
def opened(path: Path, content: BytesIO | None = None) -> Iterator[Image.Image]:
    """Open a picture of a sane size; whatever its file does becomes one line that names it."""
    try:
        with content or open_file(path) as file, Image.open(file) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PictureError(
                    f"{path} has {width} × {height} pixels; at most {MAX_PIXELS // 10**6} megapixels "
                    "are read, make it smaller"
                )
            yield image
    except PictureError:
        raise
    except (UnidentifiedImageError, *BROKEN) as error:
        raise PictureError(f"{path} is not a picture that can be read; save it as PNG or JPEG") from error
    except OSError as error:
        # Without a number it is Pillow that speaks of the content, not the system of the file.
        if error.errno is None:
            raise PictureError(f"{path} is damaged: {error}; save or download it again") from error
        raise PictureError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error


def levels(image: Image.Image) -> np.ndarray:
    """Turn any mode into [H, W, 3] in [0, 1]: 16-bit grey by 65535, float grey as it is or by 255."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
        top = 65535.0 if image.mode != "F" else 255.0 if grey.size and grey.max() > 1 else 1.0
        return np.repeat((grey / top).clip(0, 1).astype(np.float32)[..., None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # otherwise Pillow warns, and takes the colour behind it all the same
    return np.asarray(image.convert("RGB"), np.float32) / 255


def texts(path: Path) -> dict[str, str]:
    """Read the text chunks before a PNG's pixels, and of EXIF what ComfyUI and web UIs write.

    ComfyUI's graph is "prompt", the user comment "parameters". Empty for what is unreadable.
    """

    def look(image: Image.Image) -> dict[str, str]:
        found = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
        # Asked for its EXIF, a PNG without any is read to its end.
        exif = image.format in ("JPEG", "WEBP") or "exif" in image.info
        return exif_texts(image.getexif()) | found if exif else found

    try:
        return looked_at(path, look)
    except PictureError:
        return {}


def exif_texts(exif: Image.Exif) -> dict[str, str]:
    """Take from EXIF the graph that ComfyUI writes into a free tag, as prompt:…, and the user comment."""
    found = {}
    for value in exif.values():
        if isinstance(value, str) and value[:7].lower() == "prompt:":
            found["prompt"] = value[7:]
    # Fooocus puts the comment beside the folder of EXIF tags that it belongs into.
    comment = exif.get(COMMENT) or exif.get_ifd(EXIF_TAGS).get(COMMENT)
    return found | ({"parameters": commented(comment)} if comment else {})


def commented(comment: Any) -> str:
    """Decode an EXIF user comment: eight bytes say how the others are to be read."""
    if not isinstance(comment, bytes):
        return str(comment)
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0" and b"\0" in text:
        # Programs disagree on the order of bytes; of the letters of Latin scripts the upper byte is 0.
        big = text[::2].count(0) > text[1::2].count(0)
        return text.decode("utf-16-be" if big else "utf-16-le", errors="replace").strip("\0\ufeff")
    known = code in (b"UNICODE\0", b"ASCII\0\0\0", bytes(8))
    return (text if known else comment).decode("utf-8", errors="replace").strip("\0")


def batches(sizes: Sequence[tuple[int, int]], count: int, pixels: int) -> list[list[int]]:
    """Put images of one size together, at most `count` and about `pixels` in a batch: their positions."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes):
        groups.setdefault(size, []).append(i)
    made = []
    for (width, height), members in groups.items():
        room = max(min(count, pixels // max(width * height, 1)), 1)
        made += [members[start : start + room] for start in range(0, len(members), room)]
    return made


def shown_frames(count: int) -> list[int]:
    """Choose at most STRIP of a clip's frames, evenly spaced, the first and the last among them."""
    return sorted({round(i * (count - 1) / (STRIP - 1)) for i in range(STRIP)})


def strip(clips: Tensor) -> Tensor:
    """Put some frames of clips [..., F, H, W, 3] side by side: [..., H, n·W, 3]."""
    return clips[..., shown_frames(clips.shape[-4]), :, :, :].transpose(-4, -3).flatten(-3, -2)


def clip_bytes(clip: Tensor) -> bytes:
    """Write a clip [F, H, W, 3] of 8-bit levels as an animated WebP that starts again at its end."""
    first, *others = (Image.fromarray(frame) for frame in clip.numpy())
    file, shown = BytesIO(), {"duration": round(1000 / FRAMES_PER_SECOND), "loop": 0}
    first.save(file, format="webp", save_all=True, append_images=others, quality=90, **shown)
    return file.getvalue()
