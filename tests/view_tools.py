"""What the tests of drawings share: the views without ComfyUI, and a look at their pixels."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    """Import a module of nodes/ as part of a pack whose door, which needs a ComfyUI, stays shut."""
    if "g2rpo_pack_for_views" not in sys.modules:
        package = ModuleType("g2rpo_pack_for_views")
        package.__path__ = [str(ROOT / "nodes")]
        sys.modules["g2rpo_pack_for_views"] = package
    return importlib.import_module(f"g2rpo_pack_for_views.{name}")


def pixels(sheet: torch.Tensor) -> np.ndarray:
    """Check a view's form and return its 8-bit pixels [H, W, 3]."""
    assert sheet.dtype == torch.float32
    assert sheet.ndim == 4
    assert sheet.shape[0] == 1
    assert sheet.shape[2:] == (1024, 3)
    assert sheet.min() >= 0 and sheet.max() <= 1
    return (sheet[0].numpy() * 255).round().astype(np.uint8)


def rgb(colour: Sequence[int] | str) -> tuple[int, ...]:
    """Return a colour's three levels."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) if isinstance(colour, str) else tuple(colour)


def where(picture: np.ndarray, colour: Sequence[int] | str) -> np.ndarray:
    """Return the places [N, 2] of the pixels of exactly one colour."""
    return np.argwhere((picture == rgb(colour)).all(-1))


def plain_image(red: float, green: float, blue: float, height: int = 8, width: int = 8) -> torch.Tensor:
    """Make an image [H, W, 3] of one colour."""
    return torch.tensor([red, green, blue]).expand(height, width, 3)
