"""The rewards of pixels.py that have a gradient, in terms of torch: images [B, H, W, 3] in [0, 1] give [B].

They are the same quantities, of images that are not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .pixels import CONTRAST, EXPOSURE_SPREAD

TINY = 1e-6  # levels²: keeps a square root's slope finite in a grey picture


def exposure(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure well-exposedness."""
    away = (_levels(images) - 127.5).square().sum(1)
    return (-away / (2 * EXPOSURE_SPREAD**2)).exp().mean((1, 2))


def symmetry(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure left–right symmetry."""
    levels = _levels(images)
    centred = levels - levels.mean((2, 3), keepdim=True)
    own = centred.square().mean((1, 2, 3))
    return (centred * centred.flip(3)).mean((1, 2, 3)) / (own + CONTRAST)


def sharpness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure the variance of the Laplacian of luma."""
    red, green, blue = _levels(images).unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    rows = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1]
    columns = luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return (rows + columns - 4 * luma[:, 1:-1, 1:-1]).var((1, 2), correction=0)


def colourfulness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Measure colourfulness."""
    red, green, blue = _levels(images).flatten(2).unbind(1)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = rg.var(1, correction=0) + yb.var(1, correction=0)
    mean = rg.mean(1).square() + yb.mean(1).square()
    return (spread + TINY).sqrt() + 0.3 * (mean + TINY).sqrt()


def _levels(images: Tensor) -> Tensor:
    """Return images as planes [B, 3, H, W] of levels."""
    return images.movedim(-1, 1) * 255
