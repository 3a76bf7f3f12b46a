"""What ComfyUI's page does with a workflow before it queues it: UI JSON to API graph, by /object_info."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
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


def to_api(workflow: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a workflow; notes and muted nodes are left out, bypassed ones hand on what they get."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    graph = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node["mode"] in (MUTED, BYPASSED):
            continue
        inputs = widget_values(node, schemas[node["type"]])
        for entry in node["inputs"]:
            origin = source(entry["link"], nodes, links)
            if origin:
                inputs[entry["name"]] = origin
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def source(link: int | None, nodes: Mapping[int, Any], links: Mapping[int, Any]) -> list[Any] | None:
    """Follow a link back to a node that runs: [its id, its slot]."""
    if link is None:
        return None
    _, origin, slot, *_, kind = links[link]
    if nodes[origin]["mode"] == MUTED:
        return None
    if nodes[origin]["mode"] == BYPASSED:
        same = next((entry for entry in nodes[origin]["inputs"] if entry["type"] == kind), None)
        return source(same["link"], nodes, links) if same else None
    return [str(origin), slot]
