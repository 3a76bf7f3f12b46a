"""A graph described in Python and written as the JSON that ComfyUI's page loads: nodes, wires, and graphs
that are folded into one node.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

NEWER_WIDGETS = {("LoraModelLoader", "bypass")}
NEWER_OUTPUTS = {("PreviewImage", "images"), ("SaveImage", "images")}
"""What the oldest supported ComfyUI does not have; newer ones take their defaults."""
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")
NORMAL, MUTED = 0, 2
INPUTS, OUTPUTS = -10, -20
"""The two ends of a folded graph, as the page numbers them."""
OPTIONAL = 7  # the shape of a socket that may stay free
NAMES = uuid.NAMESPACE_DNS

NOTE = ("#432", "#653")
COLOURS = {
    "judge": ("#323", "#535"),
    "sample": ("#223", "#335"),
    "train": ("#232", "#353"),
    "look": ("#233", "#355"),
}
ROLES = {
    "judge": ("LoadReward", "MixRewards", "ReferenceReward", "ScoreImages", "ScoreRollout", "VoteRollout"),
    "sample": (
        "ApplyNoisePrior",
        "EarlyFilter",
        "LoadImageFolder",
        "LoadNoisePrior",
        "OptimizeNoise",
        "Rollout",
        "SearchSampler",
        "SelectBest",
        "SingularSDESampler",
        "TinyDemoLoader",
    ),
    "train": (
        "Advantages",
        "LoRAPolicy",
        "SaveLoRA",
        "SubmitTraining",
        "TrainLoRA",
        "UpdateFromVotes",
        "UpdateLoRA",
    ),
    "look": ("CompareLoRA", "RunMonitor", "SaveScoredImages", "TrainingResult"),
}
"""As web/roles.mjs has them."""
ROLE = {f"G2RPO_{name}": role for role, names in ROLES.items() for name in names}


class Socket(NamedTuple):
    """An output of a node."""

    node: int
    slot: int
    type: str


@dataclass
class Node:
    """A node; node["name"] is its output of that name."""

    data: dict[str, Any]
    outputs: dict[str, Socket]
    key: str  # what its least height is known by; none for notes and collapsed ones
    grow: float = 0.0

    def __getitem__(self, name: str) -> Socket:
        return self.outputs[name]

    @property
    def collapsed(self) -> bool:
        """Tell whether only its title is shown."""
        return bool(self.data["flags"].get("collapsed"))


@dataclass
class Column:
    """Nodes below each other, from `top` down to `bottom` where one of them grows."""

    x: int
    width: int
    top: int
    bottom: int
    nodes: list[Node] = field(default_factory=list)


class Graph:
    """A graph that is filled column by column: each column() begins a new one, each add() goes below the last
    node.
    """

    def __init__(
        self, name: str, schemas: Mapping[str, Any], heights: Mapping[str, int], whole: Graph | None = None
    ) -> None:
        self.name, self.schemas, self.heights = name, schemas, heights
        self.whole = whole or self
        self.columns: list[Column] = []
        self.links: list[list[Any]] = []
        self.folds: list[Fold] = []
        self.numbers, self.wires = count(1), count(1)  # of nodes and links, folded ones included

    def column(self, x: int, width: int, top: int = 0, bottom: int = 0) -> None:
        """Begin a column at `x`, its first title at `top`."""
        self.columns.append(Column(x, width, top, bottom))

    @property
    def nodes(self) -> list[Node]:
        """List the nodes in the order in which they were added."""
        return [node for column in self.columns for node in column.nodes]

    def add(
        self,
        kind: str,
        values: Mapping[str, Any] | None = None,
        title: str = "",
        grow: float = 0.0,
        mode: int = NORMAL,
        collapsed: bool = False,
        models: Mapping[str, tuple[str, str]] | None = None,
    ) -> Node:
        """Add a node: `values` are sockets to connect and widgets to set, by input name.

        `grow` is its share of the height that its column has left; a `collapsed` one shows its title alone;
        `models` are the address and the folder of the files that it loads.
        """
        schema = self.schemas[kind]
        declared = inputs_of(schema)
        given = dict(values or {})
        if unknown := set(given) - set(declared):
            raise ValueError(f"{self.name}: {kind} has no input {sorted(unknown)}; it has {list(declared)}")
        shown = {name: spec for name, spec in declared.items() if (kind, name) not in NEWER_WIDGETS}
        outputs = [
            (name, str(type_))
            for name, type_ in zip(schema["output_name"], schema["output"], strict=True)
            if (kind, name) not in NEWER_OUTPUTS
        ]
        data = self._data(kind, title, mode) | {"widgets_values": widget_values(shown, given)}
        data["flags"] = {"collapsed": True} if collapsed else {}
        data["inputs"] = self._inputs(data["id"], kind, shown, given)
        data["properties"] = {"Node name for S&R": kind}
        if models:
            data["properties"]["models"] = [
                {"name": name, "url": url, "directory": folder} for name, (url, folder) in models.items()
            ]
        if kind in ROLE:
            data["color"], data["bgcolor"] = COLOURS[ROLE[kind]]
        return self._put(data, outputs, "" if collapsed else kind, grow)

    def note(self, text: str, grow: float = 0.0) -> None:
        """Add a note of Markdown."""
        data = self._data("MarkdownNote", "Read me", NORMAL) | {"widgets_values": [text], "inputs": []}
        data |= {"properties": {}, "color": NOTE[0], "bgcolor": NOTE[1]}
        self._put(data, [], "", grow)

    def fold(self, title: str) -> Fold:
        """Begin a graph that folded() shows as one node."""
        made = Fold(title, self.whole)
        self.whole.folds.append(made)
        return made

    def folded(self, inner: Fold, values: Mapping[str, Socket], role: str = "", grow: float = 0.0) -> Node:
        """Add a folded graph as a node, with `values` for its sockets."""
        if unknown := set(values) - {name for name, *_ in inner.inputs}:
            raise ValueError(f"{self.name}: {inner.name} has no input {sorted(unknown)}")
        data = self._data(inner.id, inner.name, NORMAL) | {
            "inputs": [],
            "widgets_values": [],
            "properties": {},
        }
        for name, type_, shown, _ in inner.inputs:
            entry: dict[str, Any] = {"name": name, "type": type_, "link": None}
            if shown:
                entry |= {"widget": {"name": name}, "label": shown}
            if name in values:
                entry["link"] = self._link(values[name], data["id"], len(data["inputs"]))
            data["inputs"].append(entry)
        if role:
            data["color"], data["bgcolor"] = COLOURS[role]
        return self._put(data, [(name, socket.type) for name, socket in inner.outputs], inner.key, grow)

    def _data(self, kind: str, title: str, mode: int) -> dict[str, Any]:
        data = {"id": next(self.whole.numbers), "type": kind, "pos": [0, 0], "size": [0, 0], "flags": {}}
        return data | {"order": len(self.nodes), "mode": mode} | ({"title": title} if title else {})

    def _put(self, data: dict[str, Any], outputs: Sequence[tuple[str, str]], key: str, grow: float) -> Node:
        data["outputs"] = [{"name": name, "type": type_, "links": []} for name, type_ in outputs]
        sockets = {name: Socket(data["id"], slot, type_) for slot, (name, type_) in enumerate(outputs)}
        node = Node(data, sockets, key, grow)
        self.columns[-1].nodes.append(node)
        return node

    def _link(self, origin: Socket, node: int, slot: int) -> int:
        number = next(self.whole.wires)
        self.links.append([number, origin.node, origin.slot, node, slot, origin.type])
        return number

    def _inputs(
        self, number: int, kind: str, shown: Mapping[str, Spec], given: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        # As the page orders them: sockets first, then the widgets, which are sockets as well.
        entries = []
        for name, spec in sorted(shown.items(), key=lambda item: is_widget(item[1])):
            entry: dict[str, Any] = {"name": name, "type": type_of(spec), "link": None}
            if is_widget(spec):
                entry["widget"] = {"name": name}
            elif spec.optional:
                entry["shape"] = OPTIONAL
            value = given.get(name)
            if isinstance(value, Socket):
                if value.type != entry["type"] and entry["type"] != "*":
                    raise ValueError(f"{self.name}: {kind}.{name} takes {entry['type']}, not {value.type}")
                entry["link"] = self._link(value, number, len(entries))
            elif not is_widget(spec) and not spec.optional:
                raise ValueError(f"{self.name}: {kind}.{name} is not connected")
            entries.append(entry)
        return entries

    def finish(self) -> None:
        """Tell every output which wires begin there."""
        outputs = {node.data["id"]: node.data["outputs"] for node in self.nodes}
        for number, origin, slot, *_ in self.links:
            if origin != INPUTS:
                outputs[origin][slot]["links"].append(number)

    def write(self) -> str:
        """Return the JSON of a graph that is laid out, a node per line."""
        for graph in (self, *self.folds):
            graph.finish()
        whole = {
            "id": str(uuid.uuid5(NAMES, f"g2rpo.{self.name}")),
            "revision": 0,
            "last_node_id": next(self.numbers) - 1,
            "last_link_id": next(self.wires) - 1,
            "nodes": [node.data for node in self.nodes],
            "links": self.links,
            "groups": [],
            "definitions": {"subgraphs": [inner.definition() for inner in self.folds]},
            "config": {},
            "extra": {},
            "version": 0.4,
        }
        parts = []
        for key, value in whole.items():
            rows = [json.dumps(row, ensure_ascii=False) for row in value] if key in ("nodes", "links") else []
            text = "[\n  " + ",\n  ".join(rows) + "\n ]" if rows else json.dumps(value, ensure_ascii=False)
            parts.append(f'"{key}": {text}')
        return "{\n " + ",\n ".join(parts) + "\n}\n"


class Fold(Graph):
    """A graph within a graph: what it takes and gives are the sockets of one node, and the widgets that it
    promotes are that node's widgets.
    """

    def __init__(self, title: str, whole: Graph) -> None:
        super().__init__(title, whole.schemas, whole.heights, whole)
        self.id = str(uuid.uuid5(NAMES, f"g2rpo.{whole.name}.{title}"))
        self.inputs: list[tuple[str, str, str, list[int]]] = []  # name, type, label of a widget, links
        self.outputs: list[tuple[str, Socket]] = []

    @property
    def key(self) -> str:
        """Return what the height of its node depends on: its sockets and its widgets."""
        shown = [f"{label}:{type_}" for _, type_, label, _ in self.inputs if label]
        return f"{len(self.inputs) - len(shown)} in, {len(self.outputs)} out, {', '.join(shown)}"

    def take(self, name: str, kind: str) -> Socket:
        """Declare a socket on the left; return what comes in there."""
        self.inputs.append((name, kind, "", []))
        return Socket(INPUTS, len(self.inputs) - 1, kind)

    def promote(self, node: Node, widget: str, label: str) -> None:
        """Show a widget of a node within on the folded node."""
        slot, entry = next((i, each) for i, each in enumerate(node.data["inputs"]) if each["name"] == widget)
        self.inputs.append((label, entry["type"], label, []))
        socket = Socket(INPUTS, len(self.inputs) - 1, entry["type"])
        entry["link"] = self._link(socket, node.data["id"], slot)

    def give(self, name: str, socket: Socket) -> None:
        """Declare a socket on the right."""
        self.outputs.append((name, socket))
        self._link(socket, OUTPUTS, len(self.outputs) - 1)

    def definition(self) -> dict[str, Any]:
        """Return what the file holds about it."""
        left = min(column.x for column in self.columns) - 240
        right = max(column.x + column.width for column in self.columns) + 120
        ends = [self._end(i, slot) for i, slot in ((INPUTS, 1), (OUTPUTS, 3))]
        links = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return {
            "id": self.id,
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": max(node.data["id"] for node in self.nodes),
                "lastLinkId": max(link[0] for link in self.links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": INPUTS, "bounding": [left, 0, 120, 40 + 20 * len(self.inputs)]},
            "outputNode": {"id": OUTPUTS, "bounding": [right, 0, 120, 40 + 20 * len(self.outputs)]},
            "inputs": [
                self._port("in", i, name, type_, ends[0][i], (left + 100, 20 + 20 * i))
                | ({"label": label} if label else {})
                for i, (name, type_, label, _) in enumerate(self.inputs)
            ],
            "outputs": [
                self._port("out", i, name, socket.type, ends[1][i], (right + 20, 20 + 20 * i))
                for i, (name, socket) in enumerate(self.outputs)
            ],
            "widgets": [],
            "nodes": [node.data for node in self.nodes],
            "groups": [],
            "links": [dict(zip(links, link, strict=True)) for link in self.links],
            "extra": {},
        }

    def _end(self, node: int, place: int) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for link in self.links:
            if link[place] == node:
                found.setdefault(link[place + 1], []).append(link[0])
        return found

    def _port(
        self, end: str, slot: int, name: str, kind: str, links: list[int], at: tuple[int, int]
    ) -> dict[str, Any]:
        number = str(uuid.uuid5(NAMES, f"{self.id}.{end}.{slot}"))
        return {"id": number, "name": name, "type": kind, "linkIds": links, "pos": list(at)}


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
