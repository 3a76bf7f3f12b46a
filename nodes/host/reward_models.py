"""Reward models under ComfyUI's models/g2rpo_rewards: listed, loaded, and moved on and off the device like
every other model of a graph.
"""

from __future__ import annotations

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

from ...comfy_g2rpo.rewards import REWARDS, Reward, load
from ...comfy_g2rpo.rewards.models.installed import KNOWN, installed, load_installed

FOLDER = "g2rpo_rewards"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PICTURE_BYTES = 2**26  # that judging one picture takes beside the weights, amply

_loaded: WeakValueDictionary[tuple[Any, ...], Managed] = WeakValueDictionary()


def root() -> Path:
    """Return where ComfyUI keeps reward models."""
    return Path(folder_paths.models_dir) / FOLDER


def choices() -> list[str]:
    """List what can be loaded: the built-in rules, then the reward models that are installed."""
    return [*REWARDS, *(name for name in installed(root()) if name not in REWARDS)]


def stamp(name: str) -> str:
    """Tell an installed reward from the same one after it was fetched again; blank for a rule."""
    if name in REWARDS or name not in choices():
        return ""
    files = sorted((root() / name).iterdir())
    return " ".join(
        f"{file.name} {status.st_size} {status.st_mtime_ns}" for file in files if (status := file.stat())
    )


def find(name: str, dtype: str, batch: int) -> Reward:
    """Load a rule or an installed reward model; one that some graph still holds is not loaded again."""
    if name in REWARDS:
        return load(name)
    key = (name, stamp(name), dtype, batch)
    kept = _loaded.get(key)
    if kept is None:
        # Nodes run in inference mode, and what is made there could not be moved while a training runs.
        with torch.inference_mode(False):
            kept = Managed(
                load_installed(root(), name, device="cpu", dtype=DTYPES[dtype], batch=batch), batch
            )
        _loaded[key] = kept
    return kept


def how_to_get_more() -> str:
    """Say how reward models come here: never from a graph."""
    missing = [name for name in KNOWN if name not in installed(root())]
    command = f"g2rpo rewards fetch NAME --to models/{FOLDER}"
    return (
        f"To have more, run on the command line: {command}\nNAME: {', '.join(missing)}\nThen press R."
        if missing
        else ""
    )


class Held(nn.Module):
    """Hold a reward's weights for a ModelPatcher, which writes attributes into what it manages."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@dataclass(eq=False)
class Managed:
    """A reward model that asks ComfyUI for room on the device before it judges.

    It never runs beside the decoder in a thread, as ComfyUI's model management belongs to one thread.
    """

    inner: Any
    batch: int

    def __post_init__(self) -> None:
        device, rest = (
            comfy.model_management.get_torch_device(),
            comfy.model_management.text_encoder_offload_device(),
        )
        self.patcher = comfy.model_patcher.ModelPatcher(
            Held(self.inner.module), load_device=device, offload_device=rest
        )

    @property
    def name(self) -> str:
        """Name the reward."""
        return str(self.inner.name)

    @property
    def licence(self) -> str:
        """Name the licence of its weights."""
        return str(self.inner.licence)

    @property
    def compares_across_prompts(self) -> bool:
        """Say whether a score means the same for every prompt."""
        return bool(self.inner.compares_across_prompts)

    @property
    def note(self) -> str:
        """Say how it fails as a target."""
        return str(self.inner.note)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        self.move_in()
        return self.inner.score(images, prompts)

    def embed(self, images: Tensor) -> Tensor:
        """Return unit-norm features [B, D] of images [B, H, W, 3]."""
        self.move_in()
        return self.inner.embed(images)

    def move_in(self) -> None:
        """Have the weights on the device; others may have to leave.

        The towers are plain modules, so that they come whole or not at all.
        """
        with torch.inference_mode(False):
            room = self.batch * PICTURE_BYTES
            comfy.model_management.load_models_gpu([self.patcher], memory_required=room, force_full_load=True)
            # Had core moved parts of it out for another model, they would stay where they are.
            self.patcher.model.to(self.patcher.load_device)
