"""What is known of nodes: their sockets, their widgets in the page's order, and what those start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .graph_file import Raw, WorkflowError

TABLE = Path(__file__).with_name("node_table.json")
CONTROLS = ("fixed", "increment", "decrement", "randomize")
"""What the page keeps behind the value of a seed: what happens to it after a run."""
LATER = 2
"""Widgets that training blocks got at once after the first ones; saved lists have all or lack these."""


@dataclass(frozen=True)
class Widget:
    """A widget: its type, its value before anybody touches it, and how many values the page adds to it."""

    type: str
    default: Any = None
    more: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of node."""

    sockets: Mapping[str, str]
    optional: tuple[str, ...]
    widgets: Mapping[str, Widget]
    outputs: tuple[tuple[str, str], ...]


def _read() -> Mapping[str, Kind]:
    """Read the table."""
    made = {}
    for name, entry in json.loads(TABLE.read_text("utf-8")).items():
        widgets = {key: Widget(**each) for key, each in entry["widgets"].items()}
        outputs = tuple((key, type_) for key, type_ in entry["outputs"])
        made[name] = Kind(entry["sockets"], tuple(entry["optional"]), widgets, outputs)
    return made


KINDS = _read()
"""Every kind of node that is known, by its name."""


def widget_values(node: Raw, label: str) -> Mapping[str, Any]:
    """Name the values of a node's widgets; those that an older file lacks are left out."""
    kind, given = KINDS[node["type"]], node.get("widgets_values")
    if isinstance(given, dict):
        return given
    if given is None:
        given = []
    if not isinstance(given, list):
        raise WorkflowError(f"{label}: widgets_values is no list; save the workflow anew in ComfyUI")
    named, at = {}, 0
    for name, widget in kind.widgets.items():
        if at < len(given):
            named[name] = given[at]
        at += 1 + widget.more
        # Some versions of the page add it to every seed, whatever the node declares.
        odd = len(given) > len(kind.widgets) or len(given) == len(kind.widgets) + 1 - LATER
        added = name == "seed" and not widget.more and odd
        if added and any(each == given[at] for each in CONTROLS if at < len(given)):
            at += 1
    if at < len(given) and node["type"].startswith("G2RPO_"):
        raise WorkflowError(
            f"{label} has {len(given) - at} values more than it has widgets; it is of another version: put "
            "the node anew and save the workflow"
        )
    return named
