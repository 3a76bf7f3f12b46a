"""What the widgets of blocks that train mean, and how they become fields of a recipe and of a run's pace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..recipes import FIELDS
from ..run import settings
from ..run.pace import FIELDS as PACE
from .train_presets import MEDIUM_FROM

TINY_MODEL, TINY_PARAMETERS = "tiny demo model", 4_000_000
"""What jobs call the bundled model, and the parameters of its transformer, nearly."""
OF_CHECKPOINT, NO_FILE = " (checkpoint)", "none"
"""What tells a checkpoint from a diffusion model of the same name in one list, and the choice of no file."""
ENCODERS = ("text_encoder_1", "text_encoder_2", "text_encoder_3")
"""Submit Training's widgets for them."""
LARGE_FROM = 1e9
"""Parameters from which on a recipe has activations computed again rather than kept."""
HELDOUT_SHARE = 0.2
"""Share of the prompts that a blank list of held-out prompts sets aside, where there are enough."""


def graph_pace(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the pace that the widgets give; the rest suits one GPU and large pictures."""
    names = ("steps", "prompts_per_step", "seed", "slots", "eval_every")
    return {
        **{name: typed[name] for name in names},
        "decode_batch": min(typed["slots"], 8),
        "micro_batch": max(typed["slots"] // 4, 1),
        "eval_prompts": 16,
        "checkpoint_every": 5,
    }


def block_fields(
    typed: Mapping[str, Any], numbers: Mapping[str, Any], changes: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe's fields and the pace's: the widgets, a preset's numbers, then the changes."""
    method, train = settings.parse(changes, "changes")
    paced = {name: value for name, value in numbers.items() if name in PACE}
    learned = {name: value for name, value in numbers.items() if name in FIELDS and name not in PACE}
    made = {"learning_rate": typed["learning_rate"], **learned, **method}
    return made, {**graph_pace(typed), **paced, **train}


def dtype_of(parameters: int) -> str:
    """Return the precision of a model of so many parameters: all but small ones compute in 16 bit, as in the
    bundled recipes and in ComfyUI on a GPU, whatever their file stores.
    """
    return "bf16" if parameters >= MEDIUM_FROM else "fp32"


def sets_aside(count: int) -> bool:
    """Return whether a blank list of held-out prompts sets some of so many prompts aside."""
    return count >= 1 / HELDOUT_SHARE
