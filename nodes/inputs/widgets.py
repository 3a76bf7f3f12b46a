"""Inputs and outputs that several blocks declare alike, lists of numbers typed as text, and what a block
tells the user while it runs.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer
from torch import Tensor

from ...comfy_g2rpo.blocks.reward_mix import MAX_SCORE
from ...comfy_g2rpo.prompts import MAX_CHARACTERS
from ...comfy_g2rpo.recipes import FIELDS
from ...comfy_g2rpo.run.scorer import to_8_bit
from ..host.comfyui import NAME_TIP, asking_client
from ..model.adapter import TARGETS
from ..types import RewardWire

LONGEST_LIST = 1000
TEXT_EVENT = "g2rpo.text"
PREVIEW = 512  # pixels of a side


def recipe_input(
    name: str, default: Any = None, low: float | None = None, high: float | None = None, step: float = 0.01
) -> io.Input:
    """Make the input of a recipe's field, with its sentence, choices and bounds.

    `low` and `high` may only narrow them.
    """
    return option_input(FIELDS[name], default, low, high, step)


def option_input(
    field: dataclasses.Field[Any],
    default: Any = None,
    low: float | None = None,
    high: float | None = None,
    step: float = 0.01,
) -> io.Input:
    """Make the input of an option of any kind of settings, as `recipe_input` does of a recipe's."""
    rule, name = field.metadata, field.name
    default = field.default if default is None else default
    if isinstance(default, bool):
        return io.Boolean.Input(name, default=default, tooltip=rule["help"])
    if rule["choices"]:
        return io.Combo.Input(name, options=list(rule["choices"]), default=default, tooltip=rule["help"])
    if isinstance(default, tuple):
        tip = f"{rule['help']} Numbers with commas, or a range such as 0-3."
        return io.String.Input(name, default=",".join(map(str, default)), tooltip=tip)
    low = rule["low"] if low is None else max(low, rule["low"])
    high = rule["high"] if high is None else min(high, rule["high"])
    if isinstance(default, int):
        return int_input(name, default, int(low), int(high), rule["help"])
    return io.Float.Input(
        name, default=default, min=low, max=high, step=step, round=False, tooltip=rule["help"]
    )


def int_input(name: str, default: int, low: int, high: int, tip: str, step: int | None = None) -> io.Input:
    """Make the input of a whole number."""
    return io.Int.Input(name, default=default, min=low, max=high, step=step, tooltip=tip)


def text_area(name: str, tip: str) -> io.Input:
    """Make the input of a text of several lines."""
    return io.String.Input(name, multiline=True, default="", tooltip=tip)


def linked_text(name: str, tip: str) -> io.Input:
    """Make an input that takes text from another block, or stays open."""
    return io.String.Input(name, optional=True, force_input=True, tooltip=tip)


def trained_model_input() -> io.Input:
    """Make the input of the model that training starts from."""
    return io.Model.Input("model", tooltip="The flow model that is aligned. It is not changed.")


def lora_inputs() -> list[io.Input]:
    """Make the inputs that shape a fresh LoRA."""
    alpha = {"default": 16.0, "min": 0.01, "max": 4096.0, "step": 1.0}
    return [
        int_input("rank", 16, 1, 512, "Size of the LoRA: more can learn more, and makes a larger file."),
        io.Float.Input(
            "alpha", tooltip=("The LoRA works at strength alpha / rank. Keep it equal to the rank."), **alpha
        ),
        io.Combo.Input(
            "targets",
            options=list(TARGETS),
            default=TARGETS[0],
            tooltip=(
                "Layers that learn: attention is usual, feed_forward learns more and takes more memory."
            ),
        ),
    ]


def learning_rate_input() -> io.Input:
    """Make the input of AdamW's step size."""
    return recipe_input("learning_rate", step=1e-6)


def drawing_inputs(cost: str = "") -> list[io.Input]:
    """Make the inputs of how pictures are drawn; `cost` goes on the sentence about guidance."""
    guidance = {"default": 1.0, "min": 1.0, "max": 30.0, "step": 0.1}
    return [
        text_area("negative", "Negative prompt. It counts only where guidance is above 1."),
        io.Float.Input("guidance", tooltip=f"Classifier-free guidance; 1 is none{cost}.", **guidance),
        int_input("width", 512, 16, 4096, "Width of the images in pixels.", step=8),
        int_input("height", 512, 16, 4096, "Height of the images in pixels.", step=8),
    ]


def slots_input(tip: str, high: int = 4096) -> io.Input:
    """Make the input of how many latents share a forward."""
    return int_input("slots", 8, 1, high, tip)


def seed_input(tip: str, optional: bool = False) -> io.Input:
    """Make the input of a seed, which stays the same from run to run."""
    limits = {"default": 0, "min": 0, "max": 2**31 - 1}
    return io.Int.Input("seed", control_after_generate=False, optional=optional, tooltip=tip, **limits)


def name_input(name: str, tip: str, default: str = "") -> io.Input:
    """Make the input of the name of a run or file; its rules follow the tip."""
    return io.String.Input(name, default=default, tooltip=f"{tip} {NAME_TIP}")


def reward_input() -> io.Input:
    """Make the input of the reward that judges pictures."""
    return RewardWire.Input("reward", tooltip="From Load Reward, or several from Mix Rewards.")


def scores_input(origin: str) -> io.Input:
    """Make the input of images' scores; `origin` says where they may come from."""
    tip = f"One score per image in the same order, from {origin}."
    return io.Float.Input("scores", force_input=True, min=-MAX_SCORE, max=MAX_SCORE, tooltip=tip)


def rollout_prompt_input(use: str, multiline: bool = False) -> io.Input:
    """Make the input of a rollout's prompt; `use` says who reads it."""
    tip = f"The prompt that the rollout was made with, at most {MAX_CHARACTERS} characters; {use}."
    return io.String.Input("prompt", default="", multiline=multiline, tooltip=tip)


def output(kind: Any, name: str | None, tip: str, shown: str = "", many: bool = False) -> io.Output:
    """Make an output of a kind, which the page shows under its name or another one."""
    return kind.Output(name, display_name=shown or name, tooltip=tip, is_output_list=many)


def int_list(text: str, name: str, low: int, high: int) -> tuple[int, ...]:
    """Read "0,1,2" or "0-3" as distinct numbers within bounds, in the order given."""
    parts = [part.strip() for part in text[:10000].split(",") if part.strip()]
    numbers: dict[int, None] = {}
    for part in parts:
        found = re.fullmatch(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if first > last or last - first >= LONGEST_LIST:
            raise ValueError(
                f"{name}: {part[:40]!r} is not understood; write numbers with commas such as 0,1,2 or "
                "a range such as 0-3"
            )
        numbers |= dict.fromkeys(range(first, last + 1))
    if not numbers or len(numbers) > LONGEST_LIST or len(text) > 10000:
        raise ValueError(
            f"{name}: it names {len(numbers)} numbers; write at least 1 and at most {LONGEST_LIST}, "
            "such as 0,1,2 or 0-3"
        )
    for number in numbers:
        if not low <= number <= high:
            raise ValueError(f"{name}: {number} is out of range; choose from {low} to {high}")
    return tuple(numbers)


def node_id(block: type[io.ComfyNode]) -> str | None:
    """Return the running node's id in the graph, for progress bars; None where no graph runs."""
    return getattr(block.hidden, "unique_id", None)


def show(block: type[io.ComfyNode], text: str) -> ui.PreviewText:
    """Show a text on the node of the client who asked; return it for the node's outputs, where it stays.

    It goes to our own place on the node: core's progress text is drawn as Markdown and enlarges the node.
    """
    client = asking_client()
    if client is not None and node_id(block) is not None:
        PromptServer.instance.send_sync(TEXT_EVENT, {"node": node_id(block), "text": text}, client)
    return ui.PreviewText(text)


def announce(block: type[io.ComfyNode], text: str) -> None:
    """Tell the log and the node what comes next."""
    logging.info("%s: %s", block.define_schema().display_name, text)
    show(block, text)


class Progress:
    """Count forwards on the node's bar, and stop between two of them when the user interrupts."""

    def __init__(self, block: type[io.ComfyNode], total: int) -> None:
        self.bar = comfy.utils.ProgressBar(total, node_id=node_id(block))

    def check(self) -> None:
        """Raise core's own exception if the user has interrupted."""
        comfy.model_management.throw_exception_if_processing_interrupted()

    def done(self, forwards: int) -> None:
        """Move the bar."""
        self.bar.update(forwards)

    def picture(self, image: Tensor) -> None:
        """Show an image [H, W, 3] in [0, 1] on the node."""
        levels = to_8_bit(image.nan_to_num(0.0)).mul(255).byte().numpy()
        preview = ("JPEG", Image.fromarray(levels), PREVIEW)
        self.bar.update_absolute(self.bar.current, self.bar.total, preview)
