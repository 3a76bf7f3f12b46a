"""Make workflows/*.json: `python tools/make_workflows.py` asks the first ComfyUI that it finds for its nodes
and writes the graphs.

With `--measure` it first loads them into the pages of all ComfyUIs that it finds, and writes down the least
height of every node (needs Chromium and playwright); do that after a node's inputs have changed. With
`--pictures` it also makes the .jpg files: the tiny graphs are run, and their results are drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workflow_graph import Graph
from workflow_layout import HEIGHTS, known_heights, lay_out
from workflow_parts import FAMILIES, ROOT
from workflow_topics import GRAPHS

WORKFLOWS = ROOT / "workflows"


def make_graphs(schemas: Mapping[str, Any], heights: Mapping[str, int]) -> Iterator[Graph]:
    """Yield every workflow, laid out."""
    for title, describe in GRAPHS.items():
        for family in FAMILIES:
            graph = Graph(f"{title} - {family.label}", schemas, heights)
            describe(graph, family)
            lay_out(graph, heights)
            yield graph


def make_all(schemas: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield every workflow's name and its JSON."""
    for graph in make_graphs(schemas, known_heights()):
        yield graph.name, graph.write()


def measure(roots: list[Path], schemas: Mapping[str, Any]) -> dict[str, int]:
    """Return the least height of every node, by the page that needs most for it."""
    import comfy_host
    import workflow_page

    graphs, most = list(make_graphs(schemas, {})), dict[str, int]()
    files = {graph.name: json.loads(graph.write()) for graph in graphs}
    for root, newer_renderer in workflow_page.renderers(roots):
        with (
            tempfile.TemporaryDirectory() as folder,
            # By a name without a space: ComfyUI serves no web files of other packs.
            comfy_host.server(root, comfy_host.make_base(Path(folder), "comfy_g2rpo")) as server,
            workflow_page.opened(server, newer_renderer) as page,
        ):
            for graph in graphs:
                workflow_page.open_template(page, graph.name, files[graph.name])
                boxes = workflow_page.boxes(page)
                for node in (each for each in graph.nodes if each.key):
                    height = round(boxes[node.data["id"]].size[1])
                    most[node.key] = max(most.get(node.key, 0), height)
    return dict(sorted(most.items()))


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure the nodes in the page first")
    parser.add_argument("--pictures", action="store_true", help="make the .jpg files too")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import comfy_host

    found = comfy_host.comfyui_roots()
    if not found:
        parser.error(comfy_host.MISSING)
    with (
        tempfile.TemporaryDirectory() as folder,
        comfy_host.server(found[0], comfy_host.make_base(Path(folder))) as server,
    ):
        schemas = server.get("/object_info")
    if args.measure:
        HEIGHTS.write_text(json.dumps(measure(found, schemas), indent=1) + "\n", "utf-8")
    for name, text in make_all(schemas):
        (WORKFLOWS / f"{name}.json").write_text(text, "utf-8")
    if args.pictures:
        import workflow_pictures

        workflow_pictures.make(found[-1], WORKFLOWS)


if __name__ == "__main__":
    main()
