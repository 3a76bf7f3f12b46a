"""Pictures for the input directory of a ComfyUI in which the workflows are run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("#ff8800", "#002244", "#2a9d5c", "#c23b5a", "#8a8a8a", "#e0c040")
SIZES = ((256, 256), (320, 240), (240, 320))


def put_pictures(base: Path) -> None:
    """Draw six pictures of three sizes, each with discs of two colours before a gradient, and their
    prompts as text files.
    """
    folder = base / "input"
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(COLOURS):
        random = np.random.default_rng(i)
        width, height = SIZES[i % len(SIZES)]
        shade = np.linspace(235, 90 + 20 * i, height).astype(np.uint8)
        picture = Image.fromarray(np.repeat(np.repeat(shade[:, None, None], width, 1), 3, 2))
        canvas = ImageDraw.Draw(picture)
        for k in range(6):
            x, y, r = random.integers(0, width), random.integers(0, height), random.integers(15, 60)
            canvas.ellipse(
                (x - r, y - r, x + r, y + r), fill=colour if k % 2 else COLOURS[(i + 1) % len(COLOURS)]
            )
        picture.save(folder / f"disc{i}.png")
        (folder / f"disc{i}.txt").write_text("discs before a gradient", "utf-8")
