"""The pack in a ComfyUI that runs as users run it: over HTTP, its page's files served, a graph queued and drawn."""

import re
from collections.abc import Iterator

import numpy as np
import pytest
from comfy_host import COMFYUIS, ROOT, Server, make_base, server
from PIL import Image

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("pack_server in comfyui")]

# ComfyUI itself does not serve the web files of a pack whose folder name has a space.
FOLDER = "another-odd_name"
GRAPH = {
    "1": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
    "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "KSampler",
        "inputs": {
            **{"seed": 1, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
            **{"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]},
        },
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "demo"}},
}


@pytest.fixture(scope="module", params=COMFYUIS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server(request.param, make_base(tmp_path_factory.mktemp("served"), FOLDER)) as started:
        yield started


def test_a_queued_graph_draws_a_red_circle(running: Server) -> None:
    ended = running.wait(running.post_prompt(GRAPH))
    assert ended["status"]["status_str"] == "success"
    saved = ended["outputs"]["6"]["images"][0]["filename"]
    with Image.open(running.base / "output" / saved) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    red = (pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 110)
    assert pixels.shape == (64, 64, 3)
    assert 0.02 < red.mean() < 0.5


def test_the_page_gets_our_script_and_every_help_page(running: Server) -> None:
    # The page finds a node's help under the name of its Python module.
    block = running.get("/object_info/G2RPO_TinyDemoLoader")["G2RPO_TinyDemoLoader"]
    folder = "/extensions/" + block["python_module"].split(".")[1]
    pages = sorted((ROOT / "web/docs").glob("*.md"))
    assert f"{folder}/g2rpo.js" in running.get("/extensions")
    assert len(pages) >= 10
    for page in pages:
        assert running.request("GET", f"{folder}/docs/{page.name}") == (200, page.read_bytes())


def test_the_template_browser_lists_every_workflow(running: Server) -> None:
    workflows = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(running.get("/workflow_templates").get(FOLDER, [])) == workflows


def test_the_server_has_nothing_to_complain_about(running: Server) -> None:
    running.get("/object_info/G2RPO_TinyDemoLoader")
    # Core's own database may complain on a busy machine; nothing may come by way of the pack.
    raised = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*", running.log)
    assert not [one for one in raised if FOLDER in one or str(ROOT) in one]
    assert "IMPORT FAILED" not in running.log
