"""Installed model-backed rewards: which there are in a folder, and how one is loaded. Files only; nothing is
downloaded here.

    <root>/<name>/reward.json         {"kind": …, "source": …, "revision": …}
                  config.json         the model's configuration, in transformers' layout
                  model.safetensors   its weights
                  tokenizer files; for CLIPScore preprocessor_config.json

A name is that of `KNOWN`, or any other: a CLIP of your own is a folder "clipscore_mine" whose reward.json
says {"kind": "clipscore"}.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..protocol import RewardError
from .catalogue import KNOWN, Known
from .safe_folder import NAME, Folder

if TYPE_CHECKING:
    from .clip import ModelReward

FOLDER = "g2rpo_rewards"
KINDS = frozenset(known.kind for known in KNOWN.values())


def loaders() -> dict[str, Callable[[Folder, str, torch.dtype, int], ModelReward]]:
    """Return what loads a reward, by kind; imported here, so that listing names stays quick."""
    from . import aesthetic, aesthetic_v25, clipscore, hpsv2, imagereward, owlv2, pickscore

    return {
        "pickscore": pickscore.load,
        "hpsv2": hpsv2.load,
        "clipscore": clipscore.load,
        "imagereward": imagereward.load,
        "aesthetic": aesthetic.load,
        "aesthetic_v2.5": aesthetic_v25.load,
        "owlv2": owlv2.load,
    }


def beside(pack: Path) -> Path | None:
    """Return ComfyUI's folder of reward models for a pack in its custom_nodes; None where that is not so."""
    models = pack.parent.parent / "models"
    return models / FOLDER if pack.parent.name == "custom_nodes" and models.is_dir() else None


def command_line(words: Sequence[str], windows: bool = os.name == "nt") -> str:
    """Return words as one line to be pasted into this system's shell."""
    if not windows:
        return shlex.join(words)
    line = " ".join(f'"{word}"' if set(word) & set(" &()^;,=!'") else word for word in words)
    # PowerShell takes a quoted program for a text unless & stands before it, which cmd does not know.
    return f"{line} (in PowerShell with & before it)" if line.startswith('"') else line


def installed(root: Path) -> list[str]:
    """List the rewards that lie in a folder, by name; a folder that is not there holds none."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return []
    return [name for name in names if NAME.fullmatch(name) and kind_of(root, name) in KINDS]


def kind_of(root: Path, name: str) -> str | None:
    """Return of which kind an installed reward is; None for a folder that is no reward."""
    try:
        kind = Folder.of(root, name).json("reward.json").get("kind")
    except RewardError:
        return None
    return kind if isinstance(kind, str) else None


def load_installed(
    root: Path,
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 32,
) -> ModelReward:
    """Load an installed reward: trunk in `dtype`, head in float32, at most `batch` images at a time."""
    present = installed(root)
    if name not in present:
        raise RewardError(_absent(root, name, present))
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise RewardError(
            f"reward '{name}' needs transformers: pip install transformers (ComfyUI brings it)"
        ) from error
    return loaders()[str(kind_of(root, name))](Folder.of(root, name), name, dtype, batch).to(device)


def _absent(root: Path, name: str, present: list[str]) -> str:
    """Return why a reward cannot be loaded, and what to do."""
    if name in KNOWN:
        return f"reward '{name}' is not installed in {root}; get it with: {KNOWN[name].how_to_get}"
    choices = list(dict.fromkeys([*present, *KNOWN]))
    nearest = "".join(f", did you mean '{near}'?" for near in get_close_matches(name[:80], choices, 1))
    there = f"installed: {', '.join(present) or 'none'}, known: {', '.join(KNOWN)}"
    return f"reward {name[:80]!a} is not installed in {root}{nearest or ';'} {there}"


__all__ = ["KNOWN", "Known", "installed", "kind_of", "load_installed", "loaders"]
