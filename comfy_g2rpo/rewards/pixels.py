"""Rewards that read single pictures and ignore the prompt: cheap, exact, and easily over-optimised.

Alone, each one has a trivial optimum, named below; beside a reward that reads the prompt they make a useful test of mixing.
All take images [B, H, W, 3] in [0, 1] and give [B] float32; all quantities are in 8-bit levels.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy

JPEG_QUALITY = 95


def jpeg(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure compressibility: minus the size of the picture as a JPEG of quality 95, in kilobytes (1000 bytes).

    Compressibility of DDPO (arXiv 2305.13301, §5.1). As a target it ends in blank pictures, and quickly: it is the easiest reward here.
    """
    pictures = (images * 255).round().clamp(0, 255).byte().cpu().numpy()
    return _scores([-_jpeg_bytes(picture) / 1000 for picture in pictures])


def sharpness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure the variance of the four-neighbour Laplacian of luma, in levels².

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000). As a target it ends in grain and checkerboards.
    """
    red, green, blue = _levels(images)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    centre = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * centre
    return _scores([row.var() for row in laplacian])


def colourfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure √(σ²(rg) + σ²(yb)) + 0.3 √(μ²(rg) + μ²(yb)) with rg = R − G and yb = (R + G)/2 − B, in levels.

    Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003), M³. As a target it ends in saturated blotches.
    """
    red, green, blue = _levels(images)
    opponents = [(rg, yb) for rg, yb in zip(red - green, (red + green) / 2 - blue, strict=True)]
    return _scores([np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()) for rg, yb in opponents])


def _jpeg_bytes(picture: np.ndarray) -> int:
    """Count the bytes of a picture [H, W, 3] uint8 as a JPEG."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


def _levels(images: Tensor) -> np.ndarray:
    """Lay the channels out as contiguous planes [3, B, H, W] of levels, so that a picture's score never depends on its batch."""
    return np.ascontiguousarray(np.moveaxis(images.cpu().numpy().astype(np.float64), -1, 0)) * 255


def _scores(values: Sequence[float]) -> Tensor:
    """Put scores into a float32 tensor."""
    return from_numpy(np.array(values, np.float32))
