"""Pictures of the toy world, drawn to order."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from comfy_g2rpo.rewards.shapes.vocabulary import BACKGROUND, COLOURS


def draw(
    *objects: tuple[str, str, float, float, float], background: tuple[int, int, int] = BACKGROUND
) -> Tensor:
    """Draw objects (colour, shape, x, y, size) anti-aliased: [1, 64, 64, 3] in [0, 1]."""
    picture = Image.new("RGB", (512, 512), background)
    canvas = ImageDraw.Draw(picture)
    for colour, shape, x, y, size in objects:
        left, top, right, bottom = (
            8 * x - 4 * size,
            8 * y - 4 * size,
            8 * x + 4 * size - 1,
            8 * y + 4 * size - 1,
        )
        if shape == "circle":
            canvas.ellipse((left, top, right, bottom), fill=COLOURS[colour])
        elif shape == "square":
            canvas.rectangle((left, top, right, bottom), fill=COLOURS[colour])
        else:
            canvas.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=COLOURS[colour])
    return torch.from_numpy(np.asarray(picture.resize((64, 64), Image.Resampling.BOX)) / np.float32(255))[
        None
    ]


def circles(number: int) -> Tensor:
    """Draw red circles in rows of four."""
    return draw(*[("red", "circle", 9 + 15 * (i % 4), 12 + 18 * (i // 4), 12) for i in range(number)])


def blank(levels: tuple[int, int, int] = BACKGROUND, size: int = 64) -> Tensor:
    """Fill a picture with one colour."""
    return (torch.tensor(levels) / 255).expand(1, size, size, 3).contiguous()
