"""Where a graph's nodes stand: columns side by side in a frame that the page opens at 80 % and more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from workflow_graph import Column, Graph, Node

HEIGHTS = Path(__file__).with_name("node_heights.json")
"""The least height of every node in the three pages, which make_workflows.py --measure writes."""
TITLE, GAP = 30, 24
WIDTH, HEIGHT = 1340, 868
"""The page fits a graph, and ten pixels around it, into three quarters of its canvas: 1460 × 960 in a window
of 1500 × 1000.
"""
MAP = 700
"""Below this the page's small map covers the right end."""
NOTE, TALL_NOTE = 170, 240
"""Heights of a note of five lines with its title: on a broad node, and on one where most lines are two."""
UNKNOWN = 20


def known_heights() -> dict[str, int]:
    """Read the table of heights."""
    return dict(json.loads(HEIGHTS.read_text("utf-8"))) if HEIGHTS.is_file() else {}


def lay_out(graph: Graph, heights: Mapping[str, int]) -> None:
    """Place the nodes of a graph and of what is folded in it."""
    for one in (graph, *graph.folds):
        for column in one.columns:
            place(column, heights)


def place(column: Column, heights: Mapping[str, int]) -> None:
    """Place a column's nodes below each other; those that grow share what is left above its bottom."""
    least = [0 if node.collapsed else heights.get(node.key, UNKNOWN) for node in column.nodes]
    shares = [node.grow for node in column.nodes]
    used = column.top + sum(least) + len(least) * TITLE + (len(least) - 1) * GAP
    left = max(0, column.bottom - used) if any(shares) and heights else 0
    y = column.top
    for node, height, share in zip(column.nodes, least, shares, strict=True):
        whole = height + (round(left * share / sum(shares)) if share else 0)
        put(node, column, y + TITLE, whole)
        y += TITLE + whole + GAP


def put(node: Node, column: Column, y: int, height: int) -> None:
    """Give a node its place and its size."""
    node.data["pos"], node.data["size"] = [column.x, y], [column.width, height or UNKNOWN]
