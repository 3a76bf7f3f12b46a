"""ComfyUI's page in headless Chromium, to load workflows into it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from comfy_host import Server, version

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
]
SIZE = {"width": 1500, "height": 1000}
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Validation.Workflows": True,
}


NODES2_SINCE = [0, 4]
"""Older ComfyUIs have the newer renderer as a hidden experiment only."""
BOXES = """() => app.graph.nodes.map((node) => ({
  id: node.id, pos: [...node.pos], size: [...node.size], bounding: [...node.boundingRect],
  inputs: (node.inputs ?? []).map((_, i) => [...node.getInputPos(i)]),
  outputs: (node.outputs ?? []).map((_, i) => [...node.getOutputPos(i)]) }))"""


class Box(NamedTuple):
    """What the page gives a node, in the graph's units: [x, y] of its place without the title, [width,
    height] without the title, [x, y, width, height] with it, and [x, y] of its sockets.
    """

    pos: list[float]
    size: list[float]
    bounding: list[float]
    inputs: list[list[float]]
    outputs: list[list[float]]


def renderers(roots: list[Path]) -> list[tuple[Path, bool]]:
    """List ComfyUIs and whether to draw with the newer renderer: each as its users can."""
    return [
        (root, newer)
        for root in roots
        for newer in ((False, True) if version(root) >= NODES2_SINCE else (False,))
    ]


@contextmanager
def opened(server: Server, newer_renderer: bool) -> Iterator[Any]:
    """Open the page of a running ComfyUI and wait until it holds still."""
    from playwright.sync_api import sync_playwright

    server.request("POST", "/api/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": newer_renderer})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport=SIZE)
        page.goto(server.url)
        page.wait_for_function("window.app?.extensionManager && app.graph?.nodes", timeout=90_000)
        # The page opens a graph of its own; a graph that is loaded before would be replaced by it.
        page.wait_for_timeout(5000)
        yield page
        browser.close()


def load(page: Any, file: Path) -> dict[str, Any]:
    """Load a workflow file as a user does; return what it holds."""
    workflow = json.loads(file.read_text("utf-8"))
    page.evaluate("app.graph.clear()")
    page.set_input_files("#comfy-file-input", str(file))
    ids = [node["id"] for node in workflow["nodes"]]
    page.wait_for_function(
        "ids => app.graph.nodes.length === ids.length && ids.every(id => app.graph.getNodeById(id))", arg=ids
    )
    page.wait_for_timeout(500)
    return workflow


def open_template(page: Any, name: str, workflow: dict[str, Any]) -> None:
    """Open a workflow as the template browser does, and wait until it holds still."""
    page.evaluate(
        "([workflow, name]) => app.loadGraphData(workflow, true, true, name, { openSource: 'template' })",
        [workflow, name],
    )
    ids = [node["id"] for node in workflow["nodes"]]
    page.wait_for_function(
        "ids => app.graph.nodes.length === ids.length && ids.every(id => app.graph.getNodeById(id))", arg=ids
    )
    page.wait_for_timeout(700)


def boxes(page: Any) -> dict[int, Box]:
    """Return where the nodes of the graph stand, by their ids."""
    return {int(box.pop("id")): Box(**box) for box in page.evaluate(BOXES)}


def zoom(page: Any) -> float:
    """Return how large the graph is drawn; 1 is one pixel per unit."""
    return float(page.evaluate("app.canvas.ds.scale"))


def queued(page: Any) -> dict[str, Any]:
    """Return the API graph that the page would queue."""
    graph = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in graph.items()}


def refused(page: Any) -> bool:
    """Tell whether the page complains that the workflow breaks its schema."""
    return "zod" in page.inner_text("body").lower()
