"""One field of a recipe or a run: its sentence, its bounds and its choices."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any


def option(
    default: Any,
    text: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field with its sentence and its bounds or choices."""
    return dataclasses.field(
        default=default, metadata={"help": text, "low": low, "high": high, "choices": choices}
    )


def nearest(name: str, known: Any) -> str:
    """Return " (did you mean …?)" for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
