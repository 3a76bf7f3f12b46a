"""A graph that is written down as the JSON that ComfyUI's page opens, column by column."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from .node_table import KINDS

WIDTH, GAP, TITLE, ROW, AREA = 340, 60, 30, 26, 90
"""Pixels: of a node, between nodes, of a title, of a widget or socket, and of a text of several lines."""
AREAS = ("prompts", "heldout_prompts", "negative", "changes", "gates")
OPTIONAL = 7  # the shape of a socket that may stay free
NOTE = {"color": "#432", "bgcolor": "#653"}


class Socket(NamedTuple):
    """An output of a node on the canvas."""

    node: int
    slot: int
    type: str


@dataclass
class Canvas:
    """Nodes and wires; each column() begins a new one, each add() goes below the last node."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[list[Any]] = field(default_factory=list)
    left: int = -WIDTH - GAP
    below: int = 0
    numbers: count[int] = field(default_factory=lambda: count(1))

    def column(self) -> None:
        """Begin a column."""
        self.left, self.below = self.left + WIDTH + GAP, TITLE

    def add(self, kind: str, values: Mapping[str, Any], title: str = "") -> list[Socket]:
        """Add a node, its sockets and widgets by name; return its outputs."""
        known, number = KINDS[kind], next(self.numbers)
        inputs: list[dict[str, Any]] = []
        for name, type_ in known.sockets.items():
            entry: dict[str, Any] = {"name": name, "type": type_, "link": None}
            if name in known.optional:
                entry["shape"] = OPTIONAL
            if name in values:
                entry["link"] = self._link(values[name], number, len(inputs))
            inputs.append(entry)
        written: list[Any] = []
        for name, widget in known.widgets.items():
            inputs.append({"name": name, "type": widget.type, "link": None, "widget": {"name": name}})
            written += [values.get(name, widget.default), *(["image"] if widget.more else [])]
        outputs = [{"name": name, "type": type_, "links": []} for name, type_ in known.outputs]
        tall = sum(name in AREAS for name in known.widgets)
        rows = max(len(known.sockets), len(outputs)) + len(known.widgets) - tall
        self._put(number, kind, title, rows * ROW + tall * AREA, written, inputs, outputs)
        return [Socket(number, slot, type_) for slot, (_, type_) in enumerate(known.outputs)]

    def note(self, text: str) -> None:
        """Add a note of Markdown."""
        height = AREA + sum(ROW * (1 + len(line) // 45) for line in text.splitlines())
        self._put(next(self.numbers), "MarkdownNote", "Read me", height, [text], [], [])
        self.nodes[-1] |= NOTE

    def _link(self, origin: Socket, node: int, slot: int) -> int:
        number = len(self.links) + 1
        self.links.append([number, origin.node, origin.slot, node, slot, origin.type])
        return number

    def _put(
        self,
        number: int,
        kind: str,
        title: str,
        height: int,
        values: list[Any],
        inputs: list[dict[str, Any]],
        outputs: list[dict[str, Any]],
    ) -> None:
        node = {"id": number, "type": kind, "pos": [self.left, self.below], "size": [WIDTH, height + 20]}
        node |= {"flags": {}, "order": len(self.nodes), "mode": 0}
        node |= {"title": title} if title else {}
        node |= {"inputs": inputs, "outputs": outputs, "widgets_values": values}
        node["properties"] = {} if kind == "MarkdownNote" else {"Node name for S&R": kind}
        self.nodes.append(node)
        self.below += height + 20 + GAP

    def tree(self, name: str) -> dict[str, Any]:
        """Return the workflow as nested tables."""
        for node in self.nodes:
            for slot, output in enumerate(node["outputs"]):
                output["links"] = [link[0] for link in self.links if link[1:3] == [node["id"], slot]]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"g2rpo.{name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def written(tree: Mapping[str, Any]) -> str:
    """Return a workflow's JSON, which browsers read with any letter in it."""
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"
