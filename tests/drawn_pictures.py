"""Pictures to start from, as files."""

from pathlib import Path

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
