"""Paper, ink and numbers: what the views draw with, on Pillow and numpy alone.

Sheets are drawn 1024 pixels wide with letters that are still readable when they are shown at 512. A picture
on a wire cannot know the page's theme, so that the ground is as dark as ComfyUI's, and stands out in the
light one.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .letters import fitted, write

WIDTH, MARGIN, GAP = 1024, 28, 12
TITLE, BODY, SMALL = 36, 27, 22
LINE = 31  # from one line of small letters to the next
INK, PALE, FAINT, CARD, PAPER = "#eceef1", "#aab0ba", "#43474f", "#2b2e34", "#1e2024"
UP, DOWN = "#62b5f0", "#ff9a5c"  # blue and orange, told apart by colour-blind eyes
# The page's curves in the same order, lightened for the dark ground.
COLOURS = ("#56b0ee", "#ff8a47", "#2fc59a", "#e08cc0", "#ab93f0", "#d9b13b")
UNKNOWN, STRIPE = (84, 88, 95), 118  # a cell without a value; the level of hatching

# From DOWN over neutral to UP; both sides brighten alike.
_RAMP = np.array([(255, 168, 112), (164, 86, 38), (54, 54, 54), (54, 108, 164), (118, 196, 250)], float)


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


def stride_words(stride: int) -> str:
    """Say which steps a completion of a granularity takes."""
    if stride == 1:
        return "every step"
    teen, last = stride // 10 % 10 == 1, stride % 10
    ending = "th" if teen else {1: "st", 2: "nd", 3: "rd"}.get(last, "th")
    return f"every {stride}{ending} step"


def change(old: float, new: float) -> str:
    """Write a difference with its sign."""
    text = number(new - old)
    return text if text.startswith("-") or not float(text) else f"+{text}"


def number(value: float) -> str:
    """Write a score in at most eight characters; 'n/a' where there is none."""
    if not np.isfinite(value):
        return "n/a"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.1e}"
    digits = 0 if size >= 1e4 else 1 if size >= 100 else 2 if size >= 10 else 3
    return f"{value:.{digits}f}"


def diverging(share: float) -> tuple[int, int, int]:
    """Return the colour of a share, cut to [-1, 1]: vermilion below, neutral at 0, blue above."""
    place = (float(np.clip(share, -1, 1)) + 1) * 2
    low = min(int(place), 3)
    return tuple(round(c) for c in _RAMP[low] + (place - low) * (_RAMP[low + 1] - _RAMP[low]))


def luminance(colour: tuple[int, int, int]) -> float:
    """Return the relative luminance of WCAG 2 in [0, 1]."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ink_on(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Choose black or white letters, whichever stand out more."""
    return (0, 0, 0) if luminance(colour) > 0.179 else (255, 255, 255)


def hatch(width: int, height: int) -> Image.Image:
    """Make a hatched patch, for a group that cannot teach anything."""
    y, x = np.mgrid[:height, :width]
    striped = (x + y) % 14 < 3
    return Image.fromarray(np.where(striped[..., None], np.uint8(STRIPE), np.uint8(46)).repeat(3, 2))


def picture(image: Tensor, width: int, height: int) -> Image.Image:
    """Fit an image [H, W, C] into a box; small ones keep their pixels, what is not finite is black."""
    levels = image.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(0, 1).mul(255)
    pixels = levels.round().to(torch.uint8).numpy()
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, -1)
    shown = Image.fromarray(np.ascontiguousarray(pixels))
    scale = min(width / shown.width, height / shown.height)
    size = (max(round(shown.width * scale), 1), max(round(shown.height * scale), 1))
    return shown.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def sheet(height: int, title: str, captions: list[str]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Open a sheet with its heading; `heading` says where the rest begins."""
    made = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(made)
    write(pen, (MARGIN, MARGIN - 8), fitted(title, TITLE, WIDTH - 2 * MARGIN), INK, TITLE)
    for i, caption in enumerate(captions):
        place = (MARGIN, MARGIN + 44 + LINE * i)
        write(pen, place, fitted(caption, SMALL, WIDTH - 2 * MARGIN), PALE, SMALL)
    return made, pen


def heading(captions: list[str]) -> int:
    """Return the height of a sheet's heading."""
    return MARGIN + 58 + LINE * len(captions)


def dashed(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: str, width: int) -> None:
    """Outline a box with dashes."""
    left, top, right, bottom = box
    for start in range(left, right + 1, 22):
        end = min(start + 12, right)
        pen.rectangle((start, top, end, top + width - 1), colour)
        pen.rectangle((start, bottom - width + 1, end, bottom), colour)
    for start in range(top, bottom + 1, 22):
        end = min(start + 12, bottom)
        pen.rectangle((left, start, left + width - 1, end), colour)
        pen.rectangle((right - width + 1, start, right, end), colour)


def to_tensor(made: Image.Image) -> Tensor:
    """Turn a sheet into an IMAGE [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.array(made, np.float32) / 255)[None]
