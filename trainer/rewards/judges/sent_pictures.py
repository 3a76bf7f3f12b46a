"""Pictures on their way to a judge: 8-bit levels, PNG, base64, and the checks on what comes back."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

MAX_PIXELS = 2**24  # of all pictures of a request: sixteen of 1024²
MAX_SIDE = 4096
SIGNATURE = b"\x89PNG\r\n\x1a\n"


class PictureError(ValueError):
    """A picture that cannot be judged, in one line."""


def levels(images: Tensor) -> np.ndarray:
    """Turn images [B, H, W, 3] in [0, 1] into 8-bit levels."""
    return (images * 255).round().clamp(0, 255).byte().cpu().numpy()


def to_base64(picture: np.ndarray) -> str:
    """Write a picture [H, W, 3] uint8 as a PNG in base64."""
    buffer = io.BytesIO()
    # Speed of packing counts here, not size.
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_base64(text: Any, place: str) -> np.ndarray:
    """Read a PNG in base64 as [H, W, 3] uint8; its size is checked before it is unpacked."""
    if not isinstance(text, str):
        raise PictureError(f"{place} is not text; send a PNG in base64")
    try:
        content = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise PictureError(f"{place} is not base64; send a PNG in base64") from error
    if not content.startswith(SIGNATURE):
        raise PictureError(f"{place} is not a PNG; send a PNG in base64")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            width, height = image.size
            if max(width, height) > MAX_SIDE:
                raise PictureError(f"{place} is {width}×{height}; at most {MAX_SIDE} a side are taken")
            if image.mode != "RGB":
                raise PictureError(f"{place} is of mode {image.mode}; send RGB without alpha")
            return np.asarray(image)
    except PictureError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise PictureError(f"{place} is damaged; send a PNG in base64") from error
