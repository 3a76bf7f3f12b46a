"""A workflow in ComfyUI's API format: nodes that run, each with its inputs by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .graph_file import MAX_PARTS, Raw, WorkflowError, number_of, shown
from .node_table import KINDS
from .page_graph import MAX_BLOCKS, MAX_HOPS, Node, Nothing, Output


class ApiGraph:
    """A workflow as it is sent to ComfyUI."""

    def __init__(self, tree: Raw) -> None:
        self.hops = 0
        self.named: dict[str, Node] = {}
        for key, raw in tree.items():
            if not isinstance(raw, dict) or not isinstance(raw.get("class_type"), str):
                raise WorkflowError(f"node {shown(key)} has no class_type; save it anew in the API format")
            meta = raw.get("_meta")
            title = meta.get("title") if isinstance(meta, dict) else ""
            name = number_of(key, "the id of a node")
            self.named[name] = Node(raw["class_type"], title if isinstance(title, str) else "", name, raw)

    def nodes(self, kind: str) -> tuple[list[Node], list[Node]]:
        """Return the nodes of a kind; all of them run."""
        return [node for node in self.named.values() if node.kind == kind][:MAX_BLOCKS], []

    def hidden(self, kind: str) -> str:
        """Return nothing: no node is in another."""
        return ""

    def every_kind(self) -> Iterator[Node]:
        """Yield the nodes, to name what a workflow is made of."""
        yield from self.named.values()

    def given(self, node: Node, name: str) -> Output | Nothing | Any:
        """Return what an input of a node that is known gets: an output, a value, or nothing."""
        self.hops += 1
        if self.hops > MAX_HOPS:
            raise WorkflowError("its wires go in a circle; remove it")
        inputs, widgets = node.raw.get("inputs"), KINDS[node.kind].widgets
        value = inputs.get(name) if isinstance(inputs, dict) else None
        if isinstance(value, dict) and "__value__" in value:
            return value["__value__"]
        if isinstance(value, list):
            return self._output(node, name, value)
        if value is not None:
            return value
        return widgets[name].default if name in widgets else Nothing()

    def _output(self, node: Node, name: str, wire: list[Any]) -> Output:
        """Return the output that a wire comes from."""
        key, slot = wire if len(wire) == 2 else (None, None)
        if type(slot) is not int or not 0 <= slot < MAX_PARTS or not isinstance(key, (str, int)):
            raise WorkflowError(f"{node.label}: {name} is a list that is no wire; save the workflow anew")
        origin = self.named.get(number_of(key, f"{node.label}: the node that gives {name}"))
        if origin is None:
            raise WorkflowError(f"{node.label}: {name} comes from node {shown(key)}, which is not there")
        return Output(origin, slot)
