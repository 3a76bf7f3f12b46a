"""Pictures as a reward model's own preprocessing would hand them over, without torchvision.

    crop     the short edge to `size`, then the middle: CLIP and everything made from it
    squash   both edges to `size`: SigLIP, DFN5B
    corner   black below or to the right makes a square, then both edges to `size`: OWLv2
    pad      the long edge to `size`, zeros around: HPSv2, which does it on numbers instead of a PIL picture

Every step but normalisation is in levels of 8 bits, as the originals read files. Rows never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from torch import Tensor

from ..protocol import RewardError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
MAX_ASPECT = 32  # beyond it a resized picture takes gigabytes, and its middle shows nothing of it


@dataclass(frozen=True)
class Pictures:
    """Return how images become a model's input; `rounds` as torchvision does an odd rest."""

    size: int
    fit: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    kernel: int = int(Image.Resampling.BICUBIC)
    rounds: bool = False

    def __call__(self, images: Tensor, name: str = "reward") -> Tensor:
        """Prepare images [B, H, W, 3] in [0, 1]: [B, 3, size, size] float32 on the CPU."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise RewardError(
                f"reward '{name}' got images of shape {list(images.shape)}; give [B, H, W, 3], without "
                "an alpha channel"
            )
        height, width = images.shape[1:3]
        if not height or not width or max(height, width) > MAX_ASPECT * min(height, width):
            raise RewardError(
                f"reward '{name}' got pictures of {width} × {height}; no side may be over {MAX_ASPECT} "
                "times the other"
            )
        fit = {"pad": self._padded, "corner": self._cornered}.get(self.fit, self._resized)
        fitted = (
            torch.stack([fit(levels(picture)) for picture in images])
            if len(images)
            else torch.zeros(0, 3, self.size, self.size)
        )
        return self._normalised(fitted)

    def with_gradient(self, images: Tensor, name: str = "reward") -> Tensor:
        """Prepare images as a call does, with the gradient of a resizing without bytes (straight-through)."""
        exact = self(images, name)
        smooth = self._normalised(self._smooth(images.movedim(-1, 1).float().cpu()))
        return exact + (smooth - smooth.detach())

    def _normalised(self, fitted: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (fitted - mean) / std

    def _smooth(self, planes: Tensor) -> Tensor:
        """Resize planes [B, 3, H, W] as this model's pictures are: [B, 3, size, size]."""
        height, width = planes.shape[2:]
        long = self.size / max(height, width)
        rows, columns = {
            "squash": (self.size, self.size),
            "pad": (max(1, round(height * long)), max(1, round(width * long))),
        }.get(self.fit, short_edge(height, width, self.size))
        made = torch.nn.functional.interpolate(
            planes, (rows, columns), mode="bicubic", antialias=True, align_corners=False
        )
        if self.fit == "pad":
            top, left = -((self.size - rows) // 2), -((self.size - columns) // 2)
        else:
            top, left = middle(rows - self.size, self.rounds), middle(columns - self.size, self.rounds)
        # Negative padding cuts.
        right, bottom = columns - self.size - left, rows - self.size - top
        return torch.nn.functional.pad(made, (-left, -right, -top, -bottom))

    def _resized(self, picture: Tensor) -> Tensor:
        """Resize a picture [H, W, 3] of bytes by PIL and take the middle: [3, size, size] in [0, 1]."""
        height, width = picture.shape[:2]
        rows, columns = (
            (self.size, self.size) if self.fit == "squash" else short_edge(height, width, self.size)
        )
        top, left = middle(rows - self.size, self.rounds), middle(columns - self.size, self.rounds)
        resized = np.asarray(Image.fromarray(picture.numpy()).resize((columns, rows), self.kernel))
        return (
            torch.from_numpy(resized[top : top + self.size, left : left + self.size].copy())
            .permute(2, 0, 1)
            .float()
            / 255
        )

    def _padded(self, picture: Tensor) -> Tensor:
        """Resize bytes [H, W, 3] by the long edge, bicubic: [3, size, size], zeros around."""
        height, width = picture.shape[:2]
        scale = self.size / float(max(height, width))
        rows, columns = (max(1, round(edge * scale)) for edge in (height, width))
        unit = picture.permute(2, 0, 1)[None].float() / 255
        if (rows, columns) != (height, width):
            unit = torch.nn.functional.interpolate(
                unit, (rows, columns), mode="bicubic", antialias=True, align_corners=False
            )
        fitted = torch.zeros(3, self.size, self.size)
        top, left = (self.size - rows) // 2, (self.size - columns) // 2
        fitted[:, top : top + rows, left : left + columns] = unit[0]
        return fitted

    def _cornered(self, picture: Tensor) -> Tensor:
        """Make bytes [H, W, 3] a square, black below or to the right, blur and resize: [3, size, size]."""
        height, width = picture.shape[:2]
        side = max(height, width)
        square = np.zeros((side, side, 3), np.float32)
        square[:height, :width] = picture.numpy().astype(np.float32) / 255
        blur = max(side / self.size - 1, 0) / 2
        blurred = gaussian_filter(square, (blur, blur, 0), mode="mirror") if blur else square
        zoomed = zoom(
            blurred, (self.size / side, self.size / side, 1), order=1, mode="mirror", grid_mode=True
        )
        return torch.from_numpy(zoomed.clip(blurred.min(), blurred.max())).permute(2, 0, 1)


def levels(picture: Tensor) -> Tensor:
    """Round a picture [H, W, 3] in [0, 1] to bytes on the CPU; NaN becomes black."""
    return (
        picture.detach()
        .to(torch.float32, copy=True)
        .nan_to_num_(0.0)
        .mul_(255)
        .round_()
        .clamp_(0, 255)
        .byte()
        .cpu()
    )


def short_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Return (height, width) once the short edge is `size`; the long one is cut off below, not rounded."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def middle(rest: int, rounds: bool) -> int:
    """Return where the middle begins: half the rest, down (transformers) or half to even (torchvision)."""
    return round(rest / 2) if rounds else rest // 2


def three(values: object, name: str) -> tuple[float, ...]:
    """Return a mean or deviation of three channels from a preprocessor's file."""
    sound = (
        isinstance(values, Sequence)
        and len(values) == 3
        and all(type(value) in (int, float) and 0 < value <= 1 for value in values)
    )
    if not sound:
        raise RewardError(
            f"preprocessor_config.json: {name} is {str(values)[:80]!a}; it must be three numbers in (0, 1]"
        )
    return tuple(float(value) for value in values)
