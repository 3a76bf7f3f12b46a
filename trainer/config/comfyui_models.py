"""Where ComfyUI keeps files of models, and what may be the name of one there."""

from __future__ import annotations

import os
from typing import Any

FOLDERS = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "loras": ("loras",),
}
"""Folders below a models folder by the kind of their files, with their former names."""
LONGEST = 512  # characters of a name


def is_file_name(name: Any) -> bool:
    """Return whether a name means a file below a folder, on every system: no path that leaves it or begins
    elsewhere.
    """
    if not isinstance(name, str) or len(name) > LONGEST or not name.isprintable() or ":" in name:
        return False
    return not {"", ".", ".."} & set(name.replace("\\", "/").split("/"))


def within(root: str, place: str) -> bool:
    """Return whether a real path lies in a real folder."""
    try:
        return os.path.commonpath((root, place)) == root
    except ValueError:  # on Windows: another drive
        return False
