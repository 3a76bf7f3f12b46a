"""The prompt that a ComfyUI graph (in its API form) gives to its sampler, where the graph holds that text.

Only nodes whose text is known from the graph alone are followed. What a language model, a captioner, a
wildcard or a template makes of its inputs is not in the graph: then there is no prompt rather than a wrong
one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..prompts import MAX_CHARACTERS

DEPTH = 12  # nodes between a sampler and the text that it follows
CONDITIONS = ("positive", "conditioning")
SENTENCES = ("t5xxl", "llama", "mt5xl", "qwen25_7b")  # fields of encoders that a language model reads
FIELDS = ("text", "prompt", "user_prompt", "text_g", "text_l", "clip_g", "clip_l", "bert")
# Nodes that hand a text on as it is, and the input that it comes from. Impact's server has replaced
# populated_text by what its wildcards gave before the graph is saved.
TEXTS = {
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "ShowText|pysssss": "text",
    "CR Prompt Text": "prompt",
    "ImpactWildcardProcessor": "populated_text",
}
TEMPLATE = re.compile(r"\{[^{}\"]*\|[^{}\"]*\}|__[\w/*.-]+?__")  # {a|b} and __colour__


def of_graph(graph: Any) -> str:
    """Follow a ComfyUI graph's positive conditioning to its text; blank unless exactly one is certain."""
    if not isinstance(graph, dict):
        return ""
    found: set[str | None] = set()
    for node in graph.values():
        inputs = inputs_of(node)
        # A sampler or guider; what merely passes conditioning on has no model.
        if linked(inputs.get("model")) or linked(inputs.get("guider")):
            links = [inputs[name] for name in CONDITIONS if linked(inputs.get(name))]
            found |= {of_conditioning(graph, link, DEPTH) for link in links}
    return (found.pop() or "") if len(found) == 1 else ""


def inputs_of(node: Any) -> Mapping[str, Any]:
    """Return a node's inputs, whatever was written there."""
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def kind_of(node: Any) -> str:
    """Return a node's type, whatever was written there."""
    return str(node.get("class_type")) if isinstance(node, dict) else ""


def linked(value: Any) -> bool:
    """Return whether an input comes from another node: [its id, the number of the output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def of_conditioning(graph: Mapping[str, Any], link: list[Any], depth: int) -> str | None:
    """Return the text behind a conditioning; None where it is not certain."""
    inputs = inputs_of(graph.get(link[0]))
    written = {name: inputs[name] for name in (*SENTENCES, *FIELDS) if name in inputs}
    before = inputs.get("conditioning", inputs.get("positive" if link[1] == 0 else "negative"))
    if depth == 0 or (written and linked(before)):
        return None
    if linked(before):
        return of_conditioning(graph, before, depth - 1)
    encodes = "TextEncode" in kind_of(graph.get(link[0])) and link[1] == 0
    return of_encoder(graph, written, depth) if encodes else None


def of_encoder(graph: Mapping[str, Any], written: Mapping[str, Any], depth: int) -> str | None:
    """Return what an encoder of one or more texts was given: the sentence rather than CLIP's short form."""
    for names in (SENTENCES, FIELDS):
        texts = [of_text(graph, written[name], depth - 1) for name in names if name in written]
        if None in texts:
            return None
        if longest := max(texts, key=len, default=""):
            return longest
    return "" if written else None


def of_text(graph: Mapping[str, Any], value: Any, depth: int) -> str | None:
    """Return a text that stands in a node, or that nodes hand on; None where it is not certain."""
    if isinstance(value, str):
        return None if len(value) > MAX_CHARACTERS or TEMPLATE.search(value) else value.strip()
    if depth <= 0 or not linked(value):
        return None
    kind, inputs = kind_of(graph.get(value[0])), inputs_of(graph.get(value[0]))
    if kind == "StringConcatenate":
        parts = [of_text(graph, inputs.get(name), depth - 1) for name in ("string_a", "string_b")]
        between = inputs.get("delimiter")
        whole = not (None in parts or not isinstance(between, str)) and between.join(parts)
        return of_text(graph, whole, depth)
    return of_text(graph, inputs.get(TEXTS[kind]), depth - 1) if kind in TEXTS and value[1] == 0 else None
