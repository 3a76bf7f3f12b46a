"""One setting: its sentence, its bounds or choices, and the one place that checks a value against them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

# Choices that options name, and the code that obeys them, which needs torch and is not loaded for the former.
MIXES = ("zscore", "sum", "minimum", "rank_product")
MAX_CHARACTERS = 2000  # of a prompt
CLIPS = ("mean", "min", "strip")


def option(
    default: Any,
    text: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a field with its sentence and its bounds or choices; a tuple may be empty if its default is."""
    rule = {"help": text, "low": low, "high": high, "choices": choices, "may_be_empty": default == ()}
    return dataclasses.field(default=default, metadata=rule)


def complaint(
    name: str, value: Any, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()
) -> str:
    """Return what is wrong with the value of a setting, in one line that names it; nothing if it is sound.

    Of a tuple, every element must lie within the bounds, and there must be at least one.
    """
    if choices and value not in choices:
        return f"{name} is {value!r:.80}{nearest(str(value), choices)}; choose one of: {', '.join(choices)}"
    if value == ():
        return f"{name} is empty; list at least one"
    numbers = value if isinstance(value, tuple) else (value,)
    if low is None or all(low <= number <= high for number in numbers):
        return ""
    return f"{name} is {value!r:.80}; it must lie between {low:.10g} and {high:.10g}"


def check_value(
    name: str, value: Any, low: float | None = None, high: float | None = None, choices: Sequence[str] = ()
) -> None:
    """Raise ValueError with the complaint about a value, if there is one."""
    if wrong := complaint(name, value, low, high, choices):
        raise ValueError(wrong)


def check_fields(made: Any) -> None:
    """Raise ValueError for the first field of a dataclass of options that is out of its bounds."""
    for field in dataclasses.fields(made):
        rule, value = field.metadata, getattr(made, field.name)
        if value is not None and not (value == () and rule["may_be_empty"]):
            check_value(field.name, value, rule["low"], rule["high"], rule["choices"])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
