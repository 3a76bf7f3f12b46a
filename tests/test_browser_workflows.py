"""The workflows in the real page, in every renderer: they open large enough to be read and as the generator
laid them out, the page queues what we read from them, and they look the same after they have run and after
they are saved and opened again.

Screenshots stay in pytest's temporary folder (see the path that -rP prints).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import workflow_geometry as geometry
from comfy_host import COMFYUIS, EVERY, Server, make_base, server, version
from test_workflows import NAMES, OLD, OLD_NAMES, TINY, read
from workflow_api import to_api

pytest.importorskip("playwright", reason="no playwright: pip install playwright, to test the page")
import workflow_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.comfyui,
    pytest.mark.xdist_group("served"),
    pytest.mark.skipif(
        not Path(workflow_page.CHROMIUM).exists(),
        reason="no Chromium: apt-get install chromium, to test the page",
    ),
]

LEAST_ZOOM, NEAR = 0.8, 2.5  # the page rounds sizes
SEEN = NAMES if EVERY else [name for name in NAMES if name.endswith(("tiny demo", "Z-Image"))]
LISTEN = """() => { window.ended = []; for (const name of ["execution_success", "execution_error", "execution_interrupted"])
  app.api.addEventListener(name, ({ detail }) => ended.push([name, detail?.exception_message ?? ""])); }"""  # noqa: E501


@pytest.fixture(scope="module", params=COMFYUIS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Start a ComfyUI with the pack and nothing else."""
    with server(request.param, make_base(tmp_path_factory.mktemp("base"), "comfy-g2rpo")) as running:
        yield running


@dataclass
class View:
    """The page in one renderer."""

    page: Any
    host: Server
    shots: Path
    schemas: Any

    def open(self, name: str) -> dict[str, Any]:
        """Open a template."""
        workflow = read(name)
        workflow_page.open_template(self.page, name, workflow)
        self.page.keyboard.press("Escape")  # the list of files that are missing
        return workflow

    def shoot(self, name: str) -> None:
        """Keep a picture of the page."""
        self.page.screenshot(path=self.shots / f"{name}.png")


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def view(
    request: pytest.FixtureRequest, host: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[View]:
    """Open the page with a renderer."""
    newer = request.param == "nodes2"
    if newer and version(host.root) < workflow_page.NODES2_SINCE:
        pytest.skip("this ComfyUI has Nodes 2.0 only as a hidden experiment")
    with workflow_page.opened(host, newer) as page:
        page.evaluate(LISTEN)
        yield View(page, host, tmp_path_factory.mktemp(f"shots-{request.param}"), host.get("/object_info"))


def moved(boxes: dict[int, workflow_page.Box], nodes: list[dict[str, Any]]) -> list[Any]:
    """List the nodes that do not stand where a file says, or not in its size."""
    return [
        (node.get("title") or node["type"], [*node["pos"], *node["size"]], [*box.pos, *box.size])
        for node in nodes
        for box in [boxes[node["id"]]]
        if not node["flags"].get("collapsed")
        and any(
            abs(a - b) > NEAR
            for a, b in zip((*node["pos"], *node["size"]), (*box.pos, *box.size), strict=True)
        )
    ]


def wires(boxes: dict[int, workflow_page.Box], workflow: dict[str, Any]) -> list[geometry.Wire]:
    """Return the wires between the sockets where the page has them."""
    return [
        geometry.Wire(tuple(boxes[origin].outputs[slot]), tuple(boxes[target].inputs[entry]), origin, target)
        for _, origin, slot, target, entry, _ in workflow["links"]
    ]


@pytest.mark.parametrize("name", SEEN)
def test_it_opens_as_it_was_laid_out_and_can_be_read(view: View, name: str) -> None:
    workflow = view.open(name)
    boxes = workflow_page.boxes(view.page)
    view.shoot(name)
    assert workflow_page.zoom(view.page) >= LEAST_ZOOM
    assert moved(boxes, workflow["nodes"]) == []
    around = geometry.rectangles(workflow["nodes"])
    assert geometry.behind(around, wires(boxes, workflow)) == []
    assert workflow_page.queued(view.page) == to_api(workflow, view.schemas)
    assert not workflow_page.refused(view.page)


@pytest.mark.parametrize("name", TINY)
def test_it_looks_the_same_after_a_run_and_after_it_is_saved_and_opened(
    view: View, name: str, tmp_path: Path
) -> None:
    workflow = view.open(name)
    view.page.evaluate("ended.length = 0")
    view.page.locator("[data-testid=queue-button]").first.click()
    view.page.wait_for_function("ended.length > 0", timeout=300_000)
    view.page.wait_for_timeout(1000)  # pictures appear
    view.shoot(f"{name} ran")
    assert view.page.evaluate("ended") == [["execution_success", ""]]
    assert moved(workflow_page.boxes(view.page), workflow["nodes"]) == []
    saved = tmp_path / "saved.json"
    saved.write_text(view.page.evaluate("JSON.stringify(app.graph.serialize())"), "utf-8")
    before = workflow_page.queued(view.page)
    workflow_page.load(view.page, saved)
    assert moved(workflow_page.boxes(view.page), workflow["nodes"]) == []
    assert workflow_page.queued(view.page) == before
    assert not workflow_page.refused(view.page)


@pytest.mark.parametrize("name", OLD_NAMES)
def test_an_old_workflow_still_loads(view: View, name: str) -> None:
    workflow = workflow_page.load(view.page, OLD / f"{name}.json")
    assert workflow_page.queued(view.page) == to_api(workflow, view.schemas)
    assert not workflow_page.refused(view.page)


def test_the_page_says_where_a_file_breaks_its_schema(view: View, tmp_path: Path) -> None:
    workflow = json.loads((OLD / f"{OLD_NAMES[0]}.json").read_text("utf-8"))
    workflow["nodes"][0]["mode"] = "odd"
    (tmp_path / "broken.json").write_text(json.dumps(workflow), "utf-8")
    workflow_page.load(view.page, tmp_path / "broken.json")
    assert workflow_page.refused(view.page)
