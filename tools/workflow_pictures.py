"""The .jpg beside every workflow: a result of the tiny graphs, a photograph of the page for the others."""

from __future__ import annotations

import json
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import comfy_host
import torch
import workflow_api
import workflow_inputs
import workflow_page
from PIL import Image

MAX_BYTES = 150_000
WIDTH = 800
RESULTS = {
    "g2rpo_score_images_tiny": "Ranked, best first",
    "g2rpo_rank_folder_tiny": "Ranked, best first",
    "g2rpo_look_at_rollout_tiny": "Heat map: step × granularity",
    "g2rpo_train_lora_tiny": "Curve",
    "g2rpo_graph_loop_tiny": "Ranked, best first",
    "g2rpo_resume_compare_tiny": "Before and after",
}
"""Workflow and the title of the preview that is kept.

Resuming comes after training, so that it has something to go on with.
"""
VOTED = "g2rpo_vote_and_train_tiny"
"""Photographed with a group in it and some votes on that."""
RUN = Path(comfy_host.__file__).with_name("comfy_child_workflows.py")
SIZE = {"width": 3000, "height": 1900}
"""Large enough for the page to draw a node's text however wide the graph is."""
PANELS = {"left": 100, "top": 300, "right": 60, "bottom": 130}
FIT = """([width, height, left, top]) => {
    const boxes = app.graph.groups.map(group => group._bounding), view = app.canvas.ds, page = app.canvas.canvas.getBoundingClientRect()
    const x = Math.min(...boxes.map(b => b[0])), y = Math.min(...boxes.map(b => b[1]))
    const wide = Math.max(...boxes.map(b => b[0] + b[2])) - x, high = Math.max(...boxes.map(b => b[1] + b[3])) - y
    view.scale = Math.min(width / wide, height / high)
    view.offset = [(left - page.x) / view.scale - x, (top - page.y) / view.scale - y]
    app.canvas.setDirty(true, true)
    return [wide * view.scale, high * view.scale]
}"""  # noqa: E501


def make(comfyui: Path, folder: Path) -> None:
    """Make all pictures."""
    for part in (results, photographs):
        with tempfile.TemporaryDirectory() as place:
            base = comfy_host.make_base(Path(place), "comfy_g2rpo")
            workflow_inputs.put_pictures(base)
            part(comfyui, base, folder)


def results(comfyui: Path, base: Path, folder: Path) -> None:
    """Run the tiny graphs and keep one picture of each."""
    with comfy_host.server(comfyui, base) as server:
        schemas = server.get("/object_info")
    jobs = []
    for name, title in RESULTS.items():
        workflow = json.loads((folder / f"{name}.json").read_text("utf-8"))
        wanted = next(str(node["id"]) for node in workflow["nodes"] if node.get("title") == title)
        graph = workflow_api.to_api(workflow, schemas)
        jobs.append({"name": name, "graph": graph, "want": {name: graph[wanted]["inputs"]["images"]}})
    answer = comfy_host.run_script(comfyui, RUN, base, jobs, timeout=1200)
    for name, image in answer.tensors.items():
        pixels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        keep(Image.fromarray(pixels), folder / f"{name}.jpg")


def photographs(comfyui: Path, base: Path, folder: Path) -> None:
    """Load the other graphs into the page and photograph them."""
    with (
        comfy_host.server(comfyui, base) as server,
        workflow_page.opened(server, newer_renderer=False) as page,
    ):
        page.set_viewport_size(SIZE)
        for file in sorted(folder.glob("*.json")):
            if file.stem not in RESULTS:
                keep(photograph(page, file), folder / f"{file.stem}.jpg")


def photograph(page: Any, file: Path) -> Image.Image:
    """Return the picture of a loaded graph."""
    workflow_page.load(page, file)
    left, top = PANELS["left"], PANELS["top"]
    room = [SIZE["width"] - left - PANELS["right"], SIZE["height"] - top - PANELS["bottom"]]
    width, height = page.evaluate(FIT, [*room, left, top])
    page.wait_for_timeout(2000)
    if file.stem == VOTED:
        vote(page)
    # The model files are not on this machine, which says nothing about the graph.
    page.evaluate(
        "() => { app.graph.nodes.forEach(node => { node.has_errors = false }); "
        "app.canvas.setDirty(true, true) }"
    )
    page.wait_for_timeout(300)
    clip = {"x": left - 20, "y": top - 20, "width": width + 40, "height": height + 40}
    return Image.open(BytesIO(page.screenshot(clip=clip))).convert("RGB")


def vote(page: Any) -> None:
    """Draw a group and rank three of its pictures."""
    page.locator("[data-testid=queue-button]").first.click()
    page.wait_for_function("document.querySelectorAll('.g2rpo-choice img').length === 12", timeout=180_000)
    page.evaluate("[4, 2, 9].forEach((place) => document.querySelectorAll('.g2rpo-choice')[place].click())")
    page.wait_for_timeout(3000)


def keep(picture: Image.Image, place: Path) -> None:
    """Write a JPEG of at most MAX_BYTES; what is much taller than wide is cut."""
    picture = picture.convert("RGB").crop((0, 0, picture.width, min(picture.height, picture.width)))
    picture.thumbnail((WIDTH * 2, WIDTH * 2), Image.Resampling.LANCZOS)
    for quality in range(88, 30, -6):
        picture.save(place, "JPEG", quality=quality, optimize=True)
        if place.stat().st_size <= MAX_BYTES:
            return
    raise ValueError(f"{place.name} does not fit into {MAX_BYTES} bytes")
