"""Reward models under ComfyUI's models/g2rpo_rewards, loaded and unloaded like any model of a graph."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from torch import Tensor, nn

from ...comfy_g2rpo.files.safe import stamps
from ...comfy_g2rpo.options import nearest
from ...comfy_g2rpo.rewards import REWARDS, Reward, load
from ...comfy_g2rpo.rewards.models.installed import (
    FOLDER,
    KNOWN,
    beside,
    command_line,
    installed,
    load_installed,
)
from ...comfy_g2rpo.rewards.protocol import Wrapped

NOT_HERE = " (not installed: "
SCRIPT = Path(__file__).parents[2] / "fetch_rewards.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PICTURE_BYTES = 2**26  # that judging one picture takes beside the weights, amply

_loaded: WeakValueDictionary[tuple[Any, ...], Managed] = WeakValueDictionary()


def root() -> Path:
    """Return where ComfyUI keeps reward models."""
    return Path(folder_paths.models_dir) / FOLDER


def choices() -> list[str]:
    """List what can be chosen: built-in rules, reward models, and those that can be fetched, which say so."""
    present = [name for name in installed(root()) if name not in REWARDS]
    own = [name for name in present if name not in KNOWN]
    return [*REWARDS, *(name if name in present else label(name) for name in KNOWN), *own]


def label(name: str) -> str:
    """Describe a reward model that is not installed, in a line of the list."""
    return f"{name}{NOT_HERE}{KNOWN[name].gigabytes} GB, {KNOWN[name].licence})"


def chosen(value: object) -> str:
    """Return the name in a line of the list; the line may be older than the reward's installation."""
    return str(value).partition(NOT_HERE)[0]


def unknown(value: object) -> str:
    """Return what is wrong with the name of no reward; blank for one that is here or can be fetched."""
    name = chosen(value)
    known = list(dict.fromkeys([*REWARDS, *KNOWN, *installed(root())]))
    if name in known:
        return ""
    guess = nearest(name[:60], known)
    return f"reward {name[:60]!a} is unknown{guess}; choose one of: {', '.join(known)}"


def check(value: object) -> None:
    """Raise ValueError for what is no reward, or not installed; say how to get it."""
    if fault := unknown(value):
        raise ValueError(fault)
    name = chosen(value)
    if name not in REWARDS and name not in installed(root()):
        raise ValueError(f"reward {name} is not installed; get it on a command line by: {command(name)}")


def command(name: str) -> str:
    """Return the whole command that fetches a reward."""
    to = [] if beside(SCRIPT.parent) == root() else ["--to", str(root())]
    return command_line([sys.executable or "python", str(SCRIPT), name, *to])


def stamp(name: str) -> str:
    """Return what changes when an installed reward is fetched again; blank for a rule."""
    if name in REWARDS or name not in installed(root()):
        return ""
    return stamps(sorted((root() / name).iterdir()))


def find(name: str, dtype: str, batch: int) -> Reward:
    """Return a rule or an installed reward model; do not load one again that some graph still holds."""
    if name in REWARDS:
        return load(name)
    key = (name, stamp(name), dtype, batch)
    kept = _loaded.get(key)
    if kept is None:
        # Nodes run in inference mode, and what is made there could not be moved while a training runs.
        with torch.inference_mode(False):
            found = load_installed(root(), name, device="cpu", dtype=DTYPES[dtype], batch=batch)
            kept = Managed(found, batch)
        _loaded[key] = kept
    return kept


def how_to_get_more() -> str:
    """Return how more reward models come here, never from a graph; blank where all are here."""
    missing = [name for name in KNOWN if name not in installed(root())]
    how = f"To have more, run on a command line: {command('NAME')}\nNAME: {', '.join(missing)}\nThen press R."
    return how if missing else ""


class Held(nn.Module):
    """Hold a reward's weights for a ModelPatcher, which writes attributes into what it manages."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@dataclass(eq=False)
class Managed(Wrapped):
    """A reward model that asks ComfyUI for room on the device before it judges.

    It never runs beside the decoder in a thread, as ComfyUI's model management belongs to one thread.
    """

    reward: Reward
    batch: int
    module = None  # ComfyUI moves the weights
    runs_elsewhere = False

    def __post_init__(self) -> None:
        self.patcher = comfy.model_patcher.ModelPatcher(
            Held(self.reward.module),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        self.move_in()
        return self.reward.score(images, prompts)

    def differentiable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B], with a gradient."""
        self.move_in()
        return self.reward.differentiable(images, prompts)

    def noise(self) -> float:
        """Return how far apart scores of images that look the same may lie."""
        self.move_in()
        return self.reward.noise()

    def embed(self, images: Tensor) -> Tensor:
        """Return unit-norm features [B, D] of images [B, H, W, 3]."""
        self.move_in()
        return self.reward.embed(images)

    def move_in(self) -> None:
        """Move the weights to the device as a whole; other models may have to leave."""
        with torch.inference_mode(False):
            room = self.batch * PICTURE_BYTES
            comfy.model_management.load_models_gpu([self.patcher], memory_required=room, force_full_load=True)
            # Had core moved parts of it out for another model, they would stay where they are.
            self.patcher.model.to(self.patcher.load_device)
