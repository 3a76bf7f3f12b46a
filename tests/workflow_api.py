"""What ComfyUI's page does with a workflow before it queues it: UI JSON to API graph, by /object_info."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
INPUTS = -10  # where a folded graph's wires from outside begin
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def declared(schema: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield the name, type and options of every input in order; a list of choices is a COMBO."""
    for part in ("required", "optional"):
        for name in schema["input_order"].get(part, []):
            kind, *rest = schema["input"][part][name]
            options = dict(rest[0]) if rest else {}
            if isinstance(kind, list):
                kind, options["options"] = "COMBO", kind
            yield name, kind, options


def is_widget(kind: str, options: Mapping[str, Any]) -> bool:
    """Tell whether the page keeps a value for an input."""
    return kind in WIDGETS and not options.get("forceInput")


def widget_values(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Name a node's widget values; one that the file does not have takes its default."""
    values, named = iter(node["widgets_values"]), {}
    for name, kind, options in declared(schema):
        if not is_widget(kind, options):
            continue
        named[name] = next(values, options.get("default"))
        # The page shows "control after generate" below seeds, whether the node declares it or not.
        if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
            next(values, None)
        if options.get("image_upload"):
            next(values, None)
    left = list(values)
    assert not left, f"{node['type']} has {len(left)} values too many: {left}"
    return named


@dataclass(frozen=True)
class Level:
    """A graph, or a graph that is folded into a node of the graph around it."""

    nodes: Mapping[int, Any]
    links: Mapping[int, tuple[int, int, str]]  # origin, its slot, type
    folded: Mapping[str, Any]  # definitions by id
    prefix: str = ""
    host: Mapping[str, Any] = field(default_factory=dict)
    around: Level | None = None

    def within(self, node: Mapping[str, Any]) -> Level:
        """Return what is folded into a node."""
        inner = self.folded[node["type"]]
        links = {
            link["id"]: (link["origin_id"], link["origin_slot"], link["type"]) for link in inner["links"]
        }
        nodes = {each["id"]: each for each in inner["nodes"]}
        return Level(nodes, links, self.folded, f"{self.prefix}{node['id']}:", node, self)

    def source(self, link: int | None) -> list[Any] | None:
        """Follow a link back to a node that runs: [its id, its slot]."""
        if link is None:
            return None
        origin, slot, kind = self.links[link]
        if origin == INPUTS:
            return self.around.source(self.host["inputs"][slot]["link"]) if self.around else None
        node = self.nodes[origin]
        if node["mode"] == MUTED:
            return None
        if node["mode"] == BYPASSED:
            same = next((entry for entry in node["inputs"] if entry["type"] == kind), None)
            return self.source(same["link"]) if same else None
        if node["type"] in self.folded:
            (last,) = self.folded[node["type"]]["outputs"][slot]["linkIds"]
            return self.within(node).source(last)
        return [f"{self.prefix}{origin}", slot]

    def running(self) -> Iterator[tuple[Level, Mapping[str, Any]]]:
        """Yield every node that runs, and where it is; notes and muted nodes are left out."""
        for node in self.nodes.values():
            if node["type"] in NOTES or node["mode"] in (MUTED, BYPASSED):
                continue
            if node["type"] in self.folded:
                yield from self.within(node).running()
            else:
                yield self, node


def top(workflow: Mapping[str, Any]) -> Level:
    """Return a file's graph."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2], link[5]) for link in workflow["links"]}
    inner = workflow.get("definitions", {}).get("subgraphs", [])
    return Level(nodes, links, {each["id"]: each for each in inner})


def to_api(workflow: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a workflow; bypassed nodes hand on what they get."""
    graph = {}
    for level, node in top(workflow).running():
        inputs = widget_values(node, schemas[node["type"]])
        for entry in node["inputs"]:
            origin = level.source(entry["link"])
            if origin:
                inputs[entry["name"]] = origin
        graph[f"{level.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    return graph


def every_node(workflow: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List a file's nodes, those that are folded in it instead of the nodes that stand for them."""
    inner = workflow.get("definitions", {}).get("subgraphs", [])
    folded = {each["id"] for each in inner}
    nodes = [*workflow["nodes"], *(node for each in inner for node in each["nodes"])]
    return [node for node in nodes if node["type"] not in folded]
