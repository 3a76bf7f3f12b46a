"""Where ComfyUI's page draws a workflow's nodes and wires, and which wires run behind nodes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from math import dist
from typing import Any, NamedTuple

TITLE, SLOT, WIDGET, INSIDE = 30, 20, 24, 10
"""Heights of a title, a socket and a widget in the classic canvas; sockets lie a little inside the edge."""
PARTS = 60
Point = tuple[float, float]


class Rectangle(NamedTuple):
    """A node with its title."""

    left: float
    top: float
    right: float
    bottom: float


class Wire(NamedTuple):
    """A wire from a node's output to another's input."""

    start: Point
    end: Point
    origin: int
    target: int


def rectangles(nodes: Iterable[Mapping[str, Any]]) -> dict[int, Rectangle]:
    """Return the nodes of a file by id."""
    return {node["id"]: rectangle(node["pos"], shown_size(node)) for node in nodes}


def shown_size(node: Mapping[str, Any]) -> list[float]:
    """Return a node's size as it is drawn: of a collapsed one only the title."""
    return [node["size"][0], 0] if node["flags"].get("collapsed") else node["size"]


def rectangle(pos: list[float], size: list[float]) -> Rectangle:
    """Return a node's rectangle; its title stands above its position."""
    return Rectangle(pos[0], pos[1] - TITLE, pos[0] + size[0], pos[1] + size[1])


def wires(nodes: Iterable[Mapping[str, Any]], links: Iterable[list[Any]]) -> Iterator[Wire]:
    """Yield the wires of a file as the classic canvas places them."""
    known = {node["id"]: node for node in nodes}
    for _, origin, slot, target, entry, _ in links:
        (x, y), (width, _) = known[origin]["pos"], known[origin]["size"]
        start = (x + width + 1 - INSIDE, y + (slot + 0.7) * SLOT)
        yield Wire(start, entrance(known[target], entry), origin, target)


def entrance(node: Mapping[str, Any], entry: int) -> Point:
    """Return where an input is; a widget's lies beside the widget, below all sockets."""
    sockets = sum("widget" not in each for each in node["inputs"])
    rows = max(sockets, len(node["outputs"]))
    down = (entry + 0.7) * SLOT if entry < sockets else rows * SLOT + (entry - sockets + 0.75) * WIDGET
    return node["pos"][0] + INSIDE, node["pos"][1] + down


def spline(wire: Wire) -> Iterator[Point]:
    """Yield points of the curve that the page draws: its ends go straight on for a quarter of the way."""
    (x0, y0), (x3, y3) = wire.start, wire.end
    reach = dist(wire.start, wire.end) / 4
    for i in range(PARTS + 1):
        t = i / PARTS
        a, b, c, d = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        yield a * x0 + b * (x0 + reach) + c * (x3 - reach) + d * x3, (a + b) * y0 + (c + d) * y3


def overlapping(boxes: Mapping[int, Rectangle], apart: float = 0) -> list[tuple[int, int]]:
    """List the pairs of nodes that touch or come closer than `apart`."""
    return [
        (one, other)
        for (one, a), (other, b) in combinations(boxes.items(), 2)
        if a.left < b.right + apart
        and b.left < a.right + apart
        and a.top < b.bottom + apart
        and b.top < a.bottom + apart
    ]


def behind(boxes: Mapping[int, Rectangle], drawn: Iterable[Wire]) -> list[tuple[int, int, int]]:
    """List (origin, target, node) for wires that run behind a node; at its own ends a wire may come as far
    in as its sockets lie.
    """
    found = []
    for wire in drawn:
        points = list(spline(wire))
        for number, box in boxes.items():
            inside = INSIDE + 2 if number in (wire.origin, wire.target) else 0
            if any(hidden(point, box, inside) for point in points):
                found.append((wire.origin, wire.target, number))
    return found


def hidden(point: Point, box: Rectangle, inside: float) -> bool:
    """Tell whether a point lies within a rectangle, `inside` from its left and right edge."""
    return box.left + inside < point[0] < box.right - inside and box.top < point[1] < box.bottom


def frame(boxes: Iterable[Rectangle]) -> tuple[float, float]:
    """Return width and height of what all nodes cover."""
    left, top, right, bottom = zip(*boxes, strict=True)
    return max(right) - min(left), max(bottom) - min(top)


def turning_back(drawn: Iterable[Wire]) -> list[Wire]:
    """List the wires that do not run to the right."""
    return [wire for wire in drawn if wire.start[0] >= wire.end[0]]
