"""Rewards that read single pictures and ignore the prompt: cheap, exact, and easily over-optimised.

Alone, each one has a trivial optimum, named below; beside a reward that reads the prompt they make a useful
test of mixing. All take images [B, H, W, 3] in [0, 1] and give [B] float32; quantities are in 8-bit levels
unless it is said otherwise.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy

from .protocol import RewardError

JPEG_QUALITY = 95
WEBP_QUALITY, WEBP_SIDE = 80, 16383  # the side is the format's own limit, in pixels
EXPOSURE_SPREAD = 0.2 * 255  # levels around mid grey
CONTRAST = 1.0  # levels²: a picture that varies less has no symmetry to speak of


def jpeg(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure compressibility: minus the size of the picture as a JPEG of quality 95, in kilobytes (1000
    bytes).

    Compressibility of DDPO (arXiv 2305.13301, §5.1). As a target it ends in blank pictures, and quickly: it
    is the easiest reward here.
    """
    return _scores([-_file_bytes(image, "JPEG", JPEG_QUALITY) / 1000 for image in images])


def webp(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure compressibility: minus the size of the picture as a WebP of quality 80, in kilobytes (1000
    bytes).

    As `jpeg`, by a codec that predicts from neighbours (RFC 9649), so it forgives smooth gradients and is
    hard on texture. As a target it ends in blank pictures.
    """
    if max(images.shape[1:3], default=0) > WEBP_SIDE:
        raise RewardError(
            f"reward 'webp' got pictures of {images.shape[2]}x{images.shape[1]}; WebP allows "
            f"{WEBP_SIDE} pixels a side"
        )
    return _scores([-_file_bytes(image, "WEBP", WEBP_QUALITY) / 1000 for image in images])


def exposure(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure well-exposedness, the mean over pixels of Π_c exp(−(i_c − ½)² / (2 · 0.2²)) over the channels
    i_c in [0, 1]: in [0, 1].

    Mertens, Kautz and Van Reeth, "Exposure Fusion" (2007). Clipped pixels, black or white, score near 0. As a
    target it ends in flat mid grey.
    """
    return _scores([_exposed(_levels(image)) for image in images])


def _exposed(levels: np.ndarray) -> float:
    """Measure one picture's exposure."""
    red, green, blue = (levels - 127.5) ** 2
    return np.exp(-(red + green + blue) / (2 * EXPOSURE_SPREAD**2)).mean()


def symmetry(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure left–right symmetry: the correlation of a picture with its mirror image, over all channels, in
    [−1, 1].

    Σ (x − μ_c)(x' − μ_c) / (Σ (x − μ_c)² + N), where N, one level² per value, gives a blank picture 0. As a
    target it ends in kaleidoscopes; a picture of horizontal stripes has it all.
    """
    return _scores([_symmetric(_levels(image)) for image in images])


def _symmetric(levels: np.ndarray) -> float:
    """Measure one picture's symmetry."""
    centred = levels - levels.mean((1, 2), keepdims=True)
    return (centred * centred[..., ::-1]).mean() / ((centred * centred).mean() + CONTRAST)


def sharpness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure the variance of the four-neighbour Laplacian of luma, in levels².

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000). As a target it ends in grain
    and checkerboards.
    """
    return _scores([_sharp(_levels(image)) for image in images])


def _sharp(levels: np.ndarray) -> float:
    """Measure one picture's sharpness."""
    red, green, blue = levels
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return (luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]).var()


def colourfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure √(σ²(rg) + σ²(yb)) + 0.3 √(μ²(rg) + μ²(yb)) with rg = R − G and yb = (R + G)/2 − B, in levels.

    Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003), M³. As a target it ends in
    saturated blotches.
    """
    return _scores([_colourful(_levels(image)) for image in images])


def _colourful(levels: np.ndarray) -> float:
    """Measure one picture's colourfulness."""
    red, green, blue = levels
    rg, yb = red - green, (red + green) / 2 - blue
    return np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())


def _file_bytes(image: Tensor, kind: str, quality: int) -> int:
    """Count the bytes of a picture [H, W, 3] in [0, 1] as a file of a kind."""
    buffer = BytesIO()
    Image.fromarray((image * 255).round().clamp(0, 255).byte().cpu().numpy()).save(
        buffer, kind, quality=quality
    )
    return buffer.tell()


def _levels(image: Tensor) -> np.ndarray:
    """Return an image's channels as planes [3, H, W] of levels, one image at a time."""
    return np.ascontiguousarray(np.moveaxis(image.cpu().numpy().astype(np.float64), -1, 0)) * 255


def _scores(values: Sequence[float]) -> Tensor:
    """Put scores into a float32 tensor."""
    return from_numpy(np.array(values, np.float32))
