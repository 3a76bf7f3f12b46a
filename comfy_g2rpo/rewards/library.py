"""Installed model-backed rewards: which there are in a folder, and how one is loaded. Files only; nothing is downloaded here.

    <root>/<name>/reward.json         {"kind": …, "source": …, "revision": …}
                  config.json         the model's configuration, in transformers' layout
                  model.safetensors   its weights
                  tokenizer files, preprocessor_config.json
"""

from __future__ import annotations

from pathlib import Path

import torch

from .known import KNOWN, Known
from .protocol import Reward, RewardError


def installed(root: Path) -> list[str]:
    """List the rewards that lie in a folder, by name; a folder that is not there holds none."""
    return []


def load_installed(
    root: Path, name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, batch: int = 32
) -> Reward:
    """Load an installed reward: the trunk in `dtype`, the head in float32, at most `batch` pictures at a time."""
    if name in KNOWN:
        raise RewardError(f"reward '{name}' is not installed in {root}; get it with: {KNOWN[name].how_to_get}")
    raise RewardError(f"reward {name[:80]!a} is unknown; installed: {', '.join(installed(root)) or 'none'}, known: {', '.join(KNOWN)}")


__all__ = ["KNOWN", "Known", "installed", "load_installed"]
