"""A graph described in Python, laid out in columns and written as the JSON that ComfyUI's page loads."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NEWER_WIDGETS = {("LoraModelLoader", "bypass")}
NEWER_OUTPUTS = {("PreviewImage", "images"), ("SaveImage", "images")}
"""What the oldest supported ComfyUI does not have; newer ones take their defaults."""
RENAMED = {("LoraModelLoader", "MODEL"): "model"}
"""Outputs that newer ones call otherwise."""
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
NORMAL, MUTED, BYPASSED = 0, 2, 4

TITLE, ROW, WIDGET, TEXT_LINE, MARGIN = 30, 24, 27, 20, 28
"""Heights of a node's parts in the page's newer renderer, which needs more room than the classic canvas."""
COLUMN_GAP, NODE_GAP, GROUP_PAD, GROUP_TITLE = 90, 50, 25, 40
NARROW, WIDE = 300, 400
COLOURS = {"note": ("#432", "#653"), "ours": ("#223", "#335")}


class Socket(NamedTuple):
    """An output of a node."""

    node: int
    slot: int
    type: str


@dataclass
class Node:
    """A placed node; node["name"] is its output of that name."""

    data: dict[str, Any]
    outputs: dict[str, Socket]

    def __getitem__(self, name: str) -> Socket:
        return self.outputs[name]

    @property
    def id(self) -> int:
        """Return its number in the graph."""
        return int(self.data["id"])


@dataclass
class Column:
    """Nodes below each other, with a frame around them."""

    title: str
    nodes: list[Node] = field(default_factory=list)


class Graph:
    """A graph that grows from left to right: each column() begins a new column, each add() goes below the
    last node.
    """

    def __init__(self, name: str, schemas: Mapping[str, Any]) -> None:
        self.name, self.schemas = name, schemas
        self.columns: list[Column] = []
        self.links: list[list[Any]] = []

    def column(self, title: str) -> None:
        """Begin a column."""
        self.columns.append(Column(title))

    def add(
        self,
        kind: str,
        values: Mapping[str, Any] | None = None,
        title: str = "",
        mode: int = NORMAL,
        size: tuple[int, int] | None = None,
        lines: int = 4,
    ) -> Node:
        """Add a node: `values` are sockets to connect and widgets to set, by input name.

        `lines` is the height of a text field.
        """
        schema = self.schemas[kind]
        declared = inputs_of(schema)
        given = dict(values or {})
        if unknown := set(given) - set(declared):
            raise ValueError(f"{self.name}: {kind} has no input {sorted(unknown)}; it has {list(declared)}")
        number = 1 + sum(len(column.nodes) for column in self.columns)
        shown = {name: spec for name, spec in declared.items() if (kind, name) not in NEWER_WIDGETS}
        entries = self._inputs(number, kind, shown, given)
        outputs = {
            RENAMED.get((kind, name), name): Socket(number, slot, type_)
            for slot, (name, type_) in enumerate(zip(schema["output_name"], schema["output"], strict=True))
            if (kind, name) not in NEWER_OUTPUTS
        }
        data = {
            "id": number,
            "type": kind,
            "pos": [0, 0],
            "size": list(size or estimate(shown, len(outputs), lines)),
            "flags": {},
            "order": number - 1,
            "mode": mode,
            "inputs": entries,
            "outputs": [{"name": name, "type": socket.type, "links": []} for name, socket in outputs.items()],
            "properties": {"Node name for S&R": kind},
            "widgets_values": widget_values(shown, given),
        }
        if title:
            data["title"] = title
        if kind.startswith("G2RPO_"):
            data["color"], data["bgcolor"] = COLOURS["ours"]
        node = Node(data, outputs)
        self.columns[-1].nodes.append(node)
        return node

    def _inputs(
        self, number: int, kind: str, shown: Mapping[str, Any], given: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        # As the page orders them: sockets first, then the widgets, which are sockets as well.
        entries = []
        for name, spec in sorted(shown.items(), key=lambda item: is_widget(item[1])):
            entry: dict[str, Any] = {"name": name, "type": type_of(spec), "link": None}
            if is_widget(spec):
                entry["widget"] = {"name": name}
            elif spec.optional:
                entry["shape"] = 7
            value = given.get(name)
            if isinstance(value, Socket):
                if value.type != entry["type"] and entry["type"] != "*":
                    raise ValueError(f"{self.name}: {kind}.{name} takes {entry['type']}, not {value.type}")
                entry["link"] = len(self.links) + 1
                self.links.append([entry["link"], value.node, value.slot, number, len(entries), value.type])
            elif not is_widget(spec) and not spec.optional:
                raise ValueError(f"{self.name}: {kind}.{name} is not connected")
            entries.append(entry)
        return entries

    def note(self, text: str, width: int = WIDE) -> None:
        """Add a note of Markdown."""
        # Proportional letters: about five pixels each.
        lines = sum(1 + len(line) * 5 // (width - 30) for line in text.splitlines())
        number = 1 + sum(len(column.nodes) for column in self.columns)
        data = {
            "id": number,
            "type": "MarkdownNote",
            "pos": [0, 0],
            "size": [width, 40 + 20 * lines],
            "flags": {},
            "order": number - 1,
            "mode": NORMAL,
            "inputs": [],
            "outputs": [],
            "title": "Read me",
            "properties": {},
            "widgets_values": [text],
            "color": COLOURS["note"][0],
            "bgcolor": COLOURS["note"][1],
        }
        self.columns[-1].nodes.append(Node(data, {}))

    def write(self) -> str:
        """Lay the graph out and return its JSON, a node per line."""
        nodes, groups = [node for column in self.columns for node in column.nodes], self._place()
        for number, origin, slot, *_ in self.links:
            nodes[origin - 1].data["outputs"][slot]["links"].append(number)
        whole = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"g2rpo.{self.name}")),
            "revision": 0,
            "last_node_id": len(nodes),
            "last_link_id": len(self.links),
            "nodes": [node.data for node in nodes],
            "links": self.links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 120]}},
            "version": 0.4,
        }
        parts = []
        for key, value in whole.items():
            rows = (
                [json.dumps(row, ensure_ascii=False) for row in value]
                if key in ("nodes", "links", "groups") and value
                else None
            )
            parts.append(
                f'"{key}": ' + ("[\n  " + ",\n  ".join(rows) + "\n ]" if rows else json.dumps(value))
            )
        return "{\n " + ",\n ".join(parts) + "\n}\n"

    def _place(self) -> list[dict[str, Any]]:
        x, groups = 0, []
        for number, column in enumerate(self.columns, start=1):
            width, y = max(node.data["size"][0] for node in column.nodes), 0
            for node in column.nodes:
                node.data["pos"] = [x, y]
                node.data["size"][0] = width if node.data["type"] != "MarkdownNote" else node.data["size"][0]
                y += node.data["size"][1] + TITLE + NODE_GAP
            top = -TITLE - GROUP_TITLE
            box = [x - GROUP_PAD, top, width + 2 * GROUP_PAD, y - TITLE - NODE_GAP + GROUP_PAD - top]
            groups.append(
                {
                    "id": number,
                    "title": column.title,
                    "bounding": box,
                    "color": "#3f5159",
                    "font_size": 22,
                    "flags": {},
                }
            )
            x += width + COLUMN_GAP
        return groups


class Spec(NamedTuple):
    """An input as /object_info declares it."""

    name: str
    kind: Any
    options: Mapping[str, Any]
    optional: bool


def inputs_of(schema: Mapping[str, Any]) -> dict[str, Spec]:
    """List a node's inputs in their order, required before optional."""
    found = {}
    for part in ("required", "optional"):
        for name in schema["input_order"].get(part, []):
            kind, *rest = schema["input"][part][name]
            found[name] = Spec(name, kind, rest[0] if rest else {}, part == "optional")
    return found


def type_of(spec: Spec) -> str:
    """Return an input's type; a list of choices is a COMBO."""
    return "COMBO" if isinstance(spec.kind, list) else str(spec.kind)


def is_widget(spec: Spec) -> bool:
    """Tell whether the page shows a widget for an input."""
    return type_of(spec) in WIDGETS and not spec.options.get("forceInput")


def has_control(spec: Spec) -> bool:
    """Tell whether the page adds "control after generate" below an input."""
    return bool(spec.options.get("control_after_generate", type_of(spec) == "INT" and spec.name in SEEDS))


def default_of(spec: Spec) -> Any:
    """Return what a widget holds before anybody touches it."""
    choices = spec.kind if isinstance(spec.kind, list) else spec.options.get("options", [])
    empty = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}.get(
        type_of(spec), next(iter(choices), None)
    )
    return spec.options.get("default", empty)


def widget_values(shown: Mapping[str, Spec], given: Mapping[str, Any]) -> list[Any]:
    """List the widgets' values in the page's order; seeds stay as they are from run to run."""
    values = []
    for spec in filter(is_widget, shown.values()):
        value = given.get(spec.name, default_of(spec))
        values.append(default_of(spec) if isinstance(value, Socket) else value)
        if has_control(spec):
            values.append("fixed")
        if spec.options.get("image_upload"):
            values.append("image")
    return values


def estimate(shown: Mapping[str, Spec], outputs: int, lines: int) -> tuple[int, int]:
    """Estimate a node's size in the page."""
    widgets = [spec for spec in shown.values() if is_widget(spec)]
    texts = [spec for spec in widgets if spec.options.get("multiline")]
    rows = len(widgets) - len(texts) + sum(has_control(spec) for spec in widgets)
    height = (
        ROW * max(len(shown) - len(widgets), outputs)
        + WIDGET * rows
        + len(texts) * (10 + TEXT_LINE * lines)
        + MARGIN
    )
    return WIDE if texts else NARROW, height
