"""Rewards that compare a picture with another one, or with a palette; none reads the prompt's words.

All take images [B, H, W, 3] in [0, 1] and give [B] in [0, 1] (SSIM: [−1, 1]), 1 = alike; a reference of
another size or shape is stretched. As targets they end in copies: what each cannot see, named below, is what
is free to go wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, from_numpy
from torch.nn.functional import interpolate

from .protocol import Reward, RewardError

HASH_SIDE, HASH_BITS = 32, 8  # pixels that a picture is shrunk to; frequencies a side that are kept of them
BINS = 8  # a channel
SSIM_SIDE = 11  # pixels of its window
MAX_COLOURS = 16
FAR = 20.0  # ΔE at which a colour's likeness to one of the palette has fallen to 1/e
# sRGB to XYZ under D65 (IEC 61966-2-1), rows divided by the white point.
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_XYZ = _XYZ / _XYZ.sum(1, keepdims=True)


@dataclass(frozen=True)
class Kind:
    """A way to compare: what is kept of a reference, and how like it images [B, H, W, 3] are."""

    keep: Callable[[Any], Any]
    likeness: Callable[[Tensor, Any], np.ndarray]
    note: str
    about: str


@dataclass(frozen=True)
class Likeness(Reward):
    """Judges by the likeness to each prompt's reference: what `find` returns, None for none."""

    name: str
    find: Callable[[str], Any]
    refuse: Callable[[Sequence[str]], None] = lambda prompts: None
    licence: str = "Apache-2.0"
    compares_across_prompts: bool = True
    needs = "a reference, for all images or in a column of the prompt list"

    @property
    def about(self) -> str:
        """Return what the reward likes, in words for users."""
        return KINDS[self.name].about

    @property
    def note(self) -> str:
        """Return how the reward fails as a target."""
        return KINDS[self.name].note

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts whose reference cannot be used."""
        self.refuse(prompts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B], NaN for a prompt without a reference."""
        references = [self.find(prompt) for prompt in prompts]
        scores = np.full(len(prompts), np.nan, np.float32)
        for reference in {id(each): each for each in references if each is not None}.values():
            rows = [row for row, each in enumerate(references) if each is reference]
            scores[rows] = KINDS[self.name].likeness(images[rows].cpu(), reference)
        return from_numpy(scores)


def reference_reward(kind: str, reference: Any) -> Likeness:
    """Make the reward of one of KINDS for one reference: an image [H, W, 3], or hex colours (`palette`)."""
    if kind not in KINDS:
        raise RewardError(f"kind is {str(kind)[:40]!a}; choose one of: {', '.join(KINDS)}")
    kept = KINDS[kind].keep(reference)
    return Likeness(kind, lambda prompt: kept)


def picture(reference: Tensor) -> Tensor:
    """Take a reference picture: [1, H, W, 3] float32 in [0, 1]."""
    found = reference[None] if isinstance(reference, Tensor) and reference.ndim == 3 else reference
    if (
        not isinstance(found, Tensor)
        or found.ndim != 4
        or found.shape[0] != 1
        or found.shape[-1] != 3
        or 0 in found.shape
    ):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise RewardError(f"reference is {shape}; give one picture, [height, width, 3] in [0, 1]")
    found = found.detach().float().cpu()
    if not found.isfinite().all() or found.min() < 0 or found.max() > 1:
        raise RewardError(
            "reference has values outside of [0, 1] or that are no numbers; give a picture in [0, 1]"
        )
    return found


def hash_bits(images: Tensor) -> np.ndarray:
    """Hash pictures by their low frequencies: [B, 63] boolean.

    The luma is shrunk to 32 × 32 by area and transformed by the DCT-II; a bit says whether one of the 8 × 8
    lowest frequencies, the mean left out, lies above their median. (Zauner, "Implementation and benchmarking
    of perceptual image hash functions", 2010, §3.2.1.)
    """
    from scipy.fft import dctn  # slow to import, and few ask for this

    luma = images.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    small = interpolate(luma[:, None] * 255, (HASH_SIDE, HASH_SIDE), mode="area")[:, 0].numpy()
    low = dctn(small, axes=(1, 2), norm="ortho")[:, :HASH_BITS, :HASH_BITS].reshape(len(small), -1)[:, 1:]
    # Rounded, so that what a blank picture leaves of rounding is no bit.
    low = np.round(low, 6)
    return low > np.median(low, axis=1, keepdims=True)


def hash_likeness(images: Tensor, reference: np.ndarray) -> np.ndarray:
    """Count the equal bits of the perceptual hash: 1 − (Hamming distance) / 63, in [0, 1]; unlike pictures
    have about ½.

    Sees the coarse layout of light and dark, neither colour nor detail.
    """
    return (hash_bits(images) == reference).mean(1)


def colour_histogram(images: Tensor) -> np.ndarray:
    """Return the share of each of 8 × 8 × 8 RGB cells, shared out trilinearly: [B, 512]."""
    place = images.double().numpy().reshape(-1, 3).T.clip(0, 1) * (BINS - 1)
    low = np.minimum(np.floor(place), BINS - 2)
    shares = np.stack([1 - (place - low), place - low])
    pixels = images.shape[1] * images.shape[2]
    cell = np.array((BINS**2, BINS, 1)) @ low.astype(np.int64) + np.repeat(
        np.arange(len(images)) * BINS**3, pixels
    )
    total = np.zeros(len(images) * BINS**3)
    for r, g, b in product((0, 1), repeat=3):
        weight = shares[r, 0] * shares[g, 1] * shares[b, 2]
        total += np.bincount(cell + (r * BINS**2 + g * BINS + b), weight, len(total))
    return total.reshape(len(images), -1) / max(pixels, 1)


def histogram_likeness(images: Tensor, reference: np.ndarray) -> np.ndarray:
    """Intersect the colour histograms: Σ_cells min(h, h_reference), in [0, 1].

    Swain and Ballard, "Color indexing" (1991). Sees how much there is of each colour, not where.
    """
    return np.minimum(colour_histogram(images), reference).sum(1)


def ssim_likeness(images: Tensor, reference: Tensor) -> np.ndarray:
    """Measure the structural similarity with an 11 × 11 Gaussian window (σ 1.5), the mean over the channels,
    in [−1, 1].

    Wang et al., "Image quality assessment: from error visibility to structural similarity" (2004), as
    scikit-image computes it. Sees structure pixel by pixel: the same thing a few pixels aside is another one.
    """
    height, width = images.shape[1:3]
    if min(height, width) < SSIM_SIDE:
        raise RewardError(
            f"reward 'ssim' got pictures of {width}x{height}; they must have at least {SSIM_SIDE} "
            "pixels a side"
        )
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise RewardError(
            "reward 'ssim' needs scikit-image; install it with: pip install scikit-image"
        ) from error
    same = reference.shape[1:3] == (height, width)
    fitted = reference if same else resized(reference, height, width)
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1.0,
        "channel_axis": -1,
    }
    return np.array(
        [structural_similarity(image, fitted[0].numpy(), **settings) for image in images.float().numpy()]
    )


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Stretch images [B, H, W, 3] to another size, bicubic with antialiasing."""
    return (
        interpolate(images.movedim(-1, 1), (height, width), mode="bicubic", antialias=True)
        .clamp(0, 1)
        .movedim(1, -1)
    )


def palette(colours: Sequence[str]) -> np.ndarray:
    """Read hex colours such as #ff8800: CIELAB [P, 3]."""
    if isinstance(colours, str) or not isinstance(colours, Sequence) or not 1 <= len(colours) <= MAX_COLOURS:
        raise RewardError(
            f"palette is {str(colours)[:60]!a}; give a list of 1 to {MAX_COLOURS} colours such as "
            '["#ff8800", "#002244"]'
        )
    for colour in colours:
        if not isinstance(colour, str) or not re.fullmatch(r"#?[0-9a-fA-F]{6}", colour):
            raise RewardError(f"palette has the colour {str(colour)[:20]!a}; write it as #ff8800")
    return lab(np.array([[int(colour[-6:][i : i + 2], 16) / 255 for i in (0, 2, 4)] for colour in colours]))


def palette_likeness(images: Tensor, reference: np.ndarray) -> np.ndarray:
    """Measure Σ_j min(s_j, 1/P), s_j = the mean over all pixels of exp(−ΔE/20) where the palette's colour j
    is the nearest; in [0, 1].

    ΔE is the distance in CIELAB (CIE 1976). All P colours in equal shares, and no other, score 1, wherever
    they are.
    """
    found = []
    for image in images.double().numpy():
        colour = lab(image.reshape(-1, 3).clip(0, 1))
        # |a − b|² written out, because a million pixels times sixteen colours times three would be large.
        squared = (colour**2).sum(1)[:, None] + (reference**2).sum(1) - 2 * colour @ reference.T
        nearest = squared.argmin(1)
        closeness = np.exp(-np.sqrt(np.maximum(squared.min(1), 0)) / FAR)
        share = np.bincount(nearest, closeness, len(reference)) / max(len(colour), 1)
        found.append(np.minimum(share, 1 / len(reference)).sum())
    return np.array(found)


def lab(colour: np.ndarray) -> np.ndarray:
    """Turn sRGB [N, 3] in [0, 1] into CIELAB under D65 [N, 3]."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    relative = linear @ _XYZ.T
    x, y, z = np.where(relative > (6 / 29) ** 3, np.cbrt(relative), relative / (3 * (6 / 29) ** 2) + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


KINDS: dict[str, Kind] = {
    "phash": Kind(
        lambda image: hash_bits(picture(image))[0],
        hash_likeness,
        "keeps the reference's layout of light and dark alone",
        "likes the reference's layout of light and dark: up to 1, and about ½ for unlike pictures",
    ),
    "histogram": Kind(
        lambda image: colour_histogram(picture(image))[0],
        histogram_likeness,
        "keeps the reference's colours in any arrangement",
        "likes as much of each colour as the reference has, wherever it lies: from 0 to 1",
    ),
    "ssim": Kind(
        picture,
        ssim_likeness,
        "ends in copies of the reference",
        "likes the reference's structure, place by place: from −1 to 1",
    ),
    "palette": Kind(
        palette,
        palette_likeness,
        "ends in flat areas of the palette's colours",
        "likes the palette's colours in equal shares: from 0 to 1",
    ),
}
