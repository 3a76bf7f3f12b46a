"""Paper, ink and letters: what the views draw with, on Pillow and numpy alone.

Sheets are drawn 1024 pixels wide with letters that are still readable when they are shown at 512. Pillow's
own font knows little more than ASCII, so that every text goes through `plain`.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, MARGIN, GAP = 1024, 28, 12
TITLE, BODY, SMALL = 34, 24, 20
INK, PALE, FAINT, PAPER = "#1a1a1a", "#666666", "#d9d9d9", "#ffffff"
UP, DOWN = "#0072B2", "#C04F00"  # blue and vermilion, told apart by colour-blind eyes
# After Okabe and Ito, the yellow darkened for white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07800", "#56B4E9")
LONGEST = 2000  # characters of a text that are looked at

# From DOWN over neutral to UP; both sides darken alike.
_RAMP = np.array([(148, 56, 0), (236, 150, 92), (245, 245, 245), (112, 178, 222), (0, 82, 140)], float)
_WORDS = dict.fromkeys("–—−·", "-") | dict.fromkeys("’‘", "'") | dict.fromkeys("“”", '"')
_WORDS |= {"×": "x", "→": "->", "…": "...", "ß": "ss", "±": "+/-", "≤": "<=", "≥": ">=", "≠": "!="}


@cache
def font(size: int) -> Any:
    """Return Pillow's own font; before 10.1 that has one small size."""
    try:
        return ImageFont.load_default(size=size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def plain(text: str) -> str:
    """Spell a text with the font's letters: accents go, other scripts become '?', control characters ' '."""
    spelt = "".join(_WORDS.get(c, c) for c in str(text)[:LONGEST])
    letters = [c for c in unicodedata.normalize("NFKD", spelt) if not unicodedata.combining(c)]
    return " ".join(
        "".join(c if " " <= c <= "~" else " " if c.isspace() or c < " " else "?" for c in letters).split()
    )


def length(text: str, size: int) -> float:
    """Measure a text in pixels."""
    return font(size).getlength(text)


def write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: str | tuple[int, int, int] = INK,
    size: int = SMALL,
    anchor: str | None = None,
) -> None:
    """Write a text at a place in pixels."""
    pen.text(place, text, colour, font(size), anchor=anchor)


def fitted(text: str, size: int, width: float) -> str:
    """Cut a text to a width in pixels."""
    text = plain(text)
    if length(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = length(text[:middle].rstrip() + "...", size) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].rstrip() + "..."


def wrapped(text: str, size: int, width: float, lines: int) -> list[str]:
    """Break a text between words into at most so many lines; the last one is cut."""
    words, made = plain(text).split(" "), []
    while words and len(made) < lines - 1:
        count = 1
        while count < len(words) and length(" ".join(words[: count + 1]), size) <= width:
            count += 1
        made.append(fitted(" ".join(words[:count]), size, width))
        words = words[count:]
    return [*made, fitted(" ".join(words), size, width)] if words else made


def signed(value: float, digits: int = 2) -> str:
    """Write a number with its sign; what rounds to zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text


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
    return Image.fromarray(np.where(striped[..., None], np.uint8(168), np.uint8(236)).repeat(3, 2))


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
        write(pen, (MARGIN, MARGIN + 40 + 28 * i), fitted(caption, SMALL, WIDTH - 2 * MARGIN), PALE)
    return made, pen


def heading(captions: list[str]) -> int:
    """Return the height of a sheet's heading."""
    return MARGIN + 52 + 28 * len(captions)


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
