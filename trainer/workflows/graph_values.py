"""What the inputs of nodes hold, checked as ComfyUI's own blocks check them."""

from __future__ import annotations

import re
from typing import Any, Protocol

from .graph_canvas import AREAS
from .graph_file import WorkflowError, shown
from .page_graph import Node, Nothing, Output

MAX_TEXT = 1_000_000  # characters, as in the graph
MAX_NAME = 1000  # of names, choices and colours
_STRANGE = re.compile(r"[\0\ud800-\udfff]")
PRIMITIVES = (
    "PrimitiveInt",
    "PrimitiveFloat",
    "PrimitiveString",
    "PrimitiveStringMultiline",
    "PrimitiveBoolean",
)


class Graph(Protocol):
    """A workflow in one of its two formats."""

    def given(self, node: Node, name: str) -> Output | Nothing | Any:
        """Return what an input of a node that is known gets: an output, a value, or nothing."""
        ...


def value_of(graph: Graph, node: Node, name: str) -> Any:
    """Return the value of a widget, wherever it is typed; None where there is none."""
    found = graph.given(node, name)
    while isinstance(found, Output):
        if found.node.kind not in PRIMITIVES:
            raise WorkflowError(
                f"{found.node.label} gives {name} of {node.label}, and its value is known in ComfyUI alone; "
                f"type {name} into its widget, or connect one of: {', '.join(PRIMITIVES)}"
            )
        found = graph.given(found.node, "value")
    return None if isinstance(found, Nothing) else found


def text_of(graph: Graph, node: Node, name: str) -> str:
    """Return a text."""
    found = value_of(graph, node, name)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise WorkflowError(f"{node.label}: {name} is {shown(found)}; it must be a text")
    limit = MAX_TEXT if name in AREAS else MAX_NAME
    if len(found) > limit:
        raise WorkflowError(
            f"{node.label}: {name} has {len(found)} characters; at most {limit} are allowed, shorten it"
        )
    if strange := _STRANGE.search(found):
        raise WorkflowError(f"{node.label}: {name} holds U+{ord(strange[0]):04X}, which is no character")
    return found


def number_in(graph: Graph, node: Node, name: str, default: float | None = None) -> float:
    """Return a number."""
    found = value_of(graph, node, name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < 1e300:
        raise WorkflowError(f"{node.label}: {name} is {shown(found)}; it must be a number")
    return found


def whole_in(graph: Graph, node: Node, name: str) -> int:
    """Return a whole number."""
    found = number_in(graph, node, name)
    if int(found) != found:
        raise WorkflowError(f"{node.label}: {name} is {shown(found)}; it must be a whole number")
    return int(found)


def output_into(graph: Graph, node: Node, name: str, remedy: str) -> Output:
    """Return the output that goes into a socket, which must be connected."""
    found = graph.given(node, name)
    if isinstance(found, Output):
        return found
    if isinstance(found, Nothing) and found.off:
        raise WorkflowError(f"{node.label} needs {name}, and {found.off}; switch it on")
    raise WorkflowError(f"{node.label}: {name} is not connected; connect {remedy}")
