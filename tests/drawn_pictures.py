"""Pictures as files: to start from, or to score."""

from pathlib import Path

import numpy as np
from PIL import Image

from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.rollout import seeded_noise


def picture(path: Path, width: int, height: int) -> Path:
    """Write a picture of coloured noise that its size decides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = seeded_noise((height, width, 3), "picture", width, height).sigmoid().mul(255).byte()
    Image.fromarray(pixels.numpy()).save(path)
    return path


def starting(text: str, image: Path) -> Prompt:
    """Make a prompt that starts from a picture."""
    return Prompt(text, {"image": str(image)})


def colourful(strength: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    """Make noise whose colourfulness grows with its strength."""
    noise = np.random.default_rng(seed).random((size[1], size[0], 3))
    return Image.fromarray((noise * strength).astype(np.uint8))


def growing(folder: Path) -> Path:
    """Make a folder of pictures that grow more colourful from a1 to a10."""
    folder.mkdir()
    for i in range(1, 11):
        colourful(20 * i, seed=i).save(folder / f"a{i}.png")
    return folder
