"""What models that edit share: a prompt brings an image, and its features hold what was seen of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfy_g2rpo.files.picture_files import read
from comfy_g2rpo.prompts import image_of

Velocity = Callable[[Tensor, Tensor, Sequence[Any]], Tensor]


class Editing:
    """A family whose prompts start from images; `Cond.picture` [C, h, w] is the image's latent."""

    edits = True
    reference_size: int
    _digests: dict[str, str]

    def start_from_pictures(self, reference_size: int) -> None:
        """Say to what size pictures are brought: the area of a square with this side."""
        self.reference_size, self._digests = reference_size, {}

    def key(self, prompt: str) -> str:
        """Return a key of a prompt's features: its text, and its image's content when first seen."""
        place = image_of(prompt)
        if place is None:
            return str(prompt)
        if place not in self._digests:
            self._digests[place] = hashlib.sha256(Path(place).read_bytes()).hexdigest()
        return f"{prompt}\n{self._digests[place]}"


def picture_of(prompt: str) -> Image.Image | None:
    """Read the picture that a prompt starts from, as 8-bit RGB; None where it has none."""
    place = image_of(prompt)
    return Image.fromarray(np.asarray(read(Path(place)) * 255).round().astype(np.uint8)) if place else None


def by_size(velocity: Velocity, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
    """Call a velocity per size of the prompts' pictures: the transformers place all rows of a batch alike."""
    groups: dict[torch.Size, list[int]] = {}
    for row, each in enumerate(cond):
        groups.setdefault(each.picture.shape, []).append(row)
    if len(groups) == 1:
        return velocity(x, sigma, cond)
    order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
    found = [velocity(x[rows], sigma[rows], [cond[row] for row in rows]) for rows in groups.values()]
    return torch.cat(found)[order.argsort()]
