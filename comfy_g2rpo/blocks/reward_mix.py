"""What the block Mix Rewards makes of several rewards: weights multiply, gates stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..options import MIXES

MAX_WEIGHT, MAX_SCORE = 100.0, 1e9
MAX_GATES_TEXT = 2000
PALETTE = "palette"
_GATE = re.compile(
    r"\s*([\w.+-]{1,64})\s*=\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*", re.ASCII | re.IGNORECASE
)


@dataclass(frozen=True)
class Part:
    """A reward of a mix."""

    name: str
    weight: float = 1.0
    gate: float | None = None


@dataclass(frozen=True)
class Mix:
    """Some rewards, and how they become one."""

    parts: tuple[Part, ...]
    how: str = MIXES[0]


def within(name: str, value: float, low: float, high: float) -> float:
    """Return a number that may come over a link; raise ValueError unless it lies in its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]}; it must be a number from {low:g} to {high:g}")
    return value


def mixed(given: Iterable[tuple[int, Mix, float]], how: str, gates: Mapping[str, float]) -> Mix:
    """Make one mix of several, each with its number and weight; a reward that comes twice counts once."""
    total: dict[str, float] = {}
    limits: dict[str, float] = {}
    for i, mix, weight in given:
        within(f"weight_{i}", weight, -MAX_WEIGHT, MAX_WEIGHT)
        if len(mix.parts) > 1 and mix.how != how:
            raise ValueError(
                f"mix is {how}, and reward_{i} is itself a mix by {mix.how}; choose the same in both"
            )
        for part in mix.parts:
            total[part.name] = total.get(part.name, 0.0) + weight * part.weight
            if part.gate is not None and limits.setdefault(part.name, part.gate) != part.gate:
                raise ValueError(
                    f"reward_{i} has the gate {part.gate:g} for {part.name}, another "
                    f"{limits[part.name]:g}; keep one of them"
                )
    if unknown := [name for name in gates if name not in total]:
        raise ValueError(
            f"gates names {unknown[0]}, which is not among the rewards; there are: {', '.join(total)}"
        )
    if not any(total.values()):
        raise ValueError(
            "the weights leave nothing: every reward's weight is 0; set one of them to another number"
        )
    limits |= gates
    return Mix(tuple(Part(name, weight, limits.get(name)) for name, weight in total.items()), how)


def parse_gates(text: str) -> dict[str, float]:
    """Read 'reward = score' lines."""
    if len(text) > MAX_GATES_TEXT:
        raise ValueError(
            f"gates has {len(text)} characters; at most {MAX_GATES_TEXT} are allowed, write one "
            "'reward = score' a line"
        )
    found: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _GATE.fullmatch(line)
        if match is None:
            raise ValueError(f"gates, line {number} is {line[:40]!a}; write it as: sharpness = 50")
        if match[1] in found:
            raise ValueError(f"gates, line {number} names {match[1]} again; keep one line for it")
        found[match[1]] = within(f"gates, line {number}", float(match[2]), -MAX_SCORE, MAX_SCORE)
    return found


def colours_of(text: str) -> list[str]:
    """Read a palette as Reference Reward's widget has it."""
    return re.findall(r"[^\s,;]+", text[:1000])


def kind_named(name: str, kinds: Sequence[str]) -> str:
    """Return the kind of likeness that the block Reference Reward means by a name like palette-0a1b2c3d, or
    the name as it is.
    """
    kind, sign, digest = name.rpartition("-")
    return kind if sign and kind in kinds and re.fullmatch(r"[0-9a-f]{8}", digest) else name
