"""Inputs made from the recipes' own descriptions, lists of numbers typed as text, and what a block says
before a long run.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from server import PromptServer

from ...comfy_g2rpo.recipes import FIELDS

LONGEST_LIST = 1000


def recipe_input(
    name: str, default: Any = None, low: float | None = None, high: float | None = None, step: float = 0.01
) -> io.Input:
    """Make the input of a recipe's field, with its sentence, choices and bounds.

    `low` and `high` may only narrow them.
    """
    field = FIELDS[name]
    rule = field.metadata
    default = field.default if default is None else default
    if isinstance(default, bool):
        return io.Boolean.Input(name, default=default, tooltip=rule["help"])
    if rule["choices"]:
        return io.Combo.Input(name, options=list(rule["choices"]), default=default, tooltip=rule["help"])
    if isinstance(default, tuple):
        text = ",".join(map(str, default))
        return io.String.Input(
            name, default=text, tooltip=f"{rule['help']} Numbers with commas, or a range such as 0-3."
        )
    low = rule["low"] if low is None else max(low, rule["low"])
    high = rule["high"] if high is None else min(high, rule["high"])
    if isinstance(default, int):
        return io.Int.Input(name, default=default, min=int(low), max=int(high), tooltip=rule["help"])
    return io.Float.Input(
        name, default=default, min=low, max=high, step=step, round=False, tooltip=rule["help"]
    )


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


def announce(block: type[io.ComfyNode], text: str) -> None:
    """Say in the log and on the node what is about to be done."""
    logging.info("%s: %s", block.define_schema().display_name, text)
    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id(block) is not None:
        server.send_progress_text(text, node_id(block))


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
