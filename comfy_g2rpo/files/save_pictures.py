"""Write pictures, clips and what is noted of them, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .captions import CHUNK
from .picture_files import PictureError, clip_bytes, shown_frames, strip
from .picture_files import read as read_picture
from .safe import finite, on_disk, write_bytes, writing


def save_picture(path: Path, image: Tensor, note: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write a picture [H, W, 3] in [0, 1]; a clip [F, H, W, 3] of levels as frames side by side and, beside
    that, as WebP.

    `note` is kept in the PNG. Return what an index says of a clip beside its picture's name.
    """
    if image.ndim == 3:
        save_png(path, image, note)
        return {}
    save_png(path, strip(image).float() / 255, note)
    write_bytes(path.with_suffix(".webp"), clip_bytes(image))
    return {"clip": path.with_suffix(".webp").name, "frames": len(shown_frames(len(image)))}


def save_start(path: Path, start: Path) -> dict[str, Any]:
    """Keep the image that an edit starts from; return what an index says of it, nothing if unreadable."""
    try:
        save_png(path, read_picture(start))
    except PictureError:
        return {}
    return {"start": path.name}


def save_png(path: Path, image: Tensor, note: Mapping[str, Any] | None = None) -> None:
    """Write a picture [H, W, 3] in [0, 1], with what is noted of it in a text chunk."""
    chunks = PngInfo()
    if note:
        chunks.add_text(CHUNK, json.dumps(finite(note)))
    pixels = np.asarray(image.detach().cpu().clamp(0, 1).mul(255).round().to(torch.uint8))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            Image.fromarray(pixels).save(file, format="png", pnginfo=chunks)
            on_disk(file)
        os.replace(partial, path)
