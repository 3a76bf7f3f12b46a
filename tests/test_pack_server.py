"""The pack in a ComfyUI that runs as users run it: over HTTP, its page's files served, a graph queued and
drawn.
"""

import json
import re
import shlex
import subprocess

import numpy as np
import pytest
from comfy_host import ROOT, SERVED, Server, environment
from PIL import Image

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("served")]

GRAPH = {
    "1": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
    "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "4": {
        "class_type": "KSampler",
        "inputs": {
            **{
                "seed": 1,
                "steps": 8,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "simple",
                "denoise": 1.0,
            },
            **{"model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0]},
        },
    },
    "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "demo"}},
}


def test_a_queued_graph_draws_a_red_circle(served: Server) -> None:
    ended = served.wait(served.post_prompt(GRAPH))
    assert ended["status"]["status_str"] == "success"
    saved = ended["outputs"]["6"]["images"][0]["filename"]
    with Image.open(served.base / "output" / saved) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    red = (pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 110)
    assert pixels.shape == (64, 64, 3)
    assert 0.02 < red.mean() < 0.5


def test_the_page_gets_our_script_and_every_help_page(served: Server) -> None:
    # The page finds a node's help under the name of its Python module.
    block = served.get("/object_info/G2RPO_TinyDemoLoader")["G2RPO_TinyDemoLoader"]
    folder = "/extensions/" + block["python_module"].split(".")[1]
    pages = sorted((ROOT / "web/docs").glob("*.md"))
    assert f"{folder}/g2rpo.js" in served.get("/extensions")
    assert len(pages) >= 10
    for page in pages:
        assert served.request("GET", f"{folder}/docs/{page.name}") == (200, page.read_bytes())


def test_the_template_browser_lists_every_workflow(served: Server) -> None:
    workflows = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(served.get("/workflow_templates").get(SERVED, [])) == workflows


def test_the_page_gets_our_texts_in_every_language(served: Server) -> None:
    files = {path.parent.name: path for path in (ROOT / "locales").glob("*/nodeDefs.json")}
    merged = served.get("/i18n")
    assert {"en", "de", "es", "fr", "ja", "zh"} <= set(files)
    for language, path in files.items():
        ours = json.loads(path.read_text("utf-8"))
        there = merged[language]["nodeDefs"]
        assert {node: there.get(node) for node in ours} == ours


def test_the_server_has_nothing_to_complain_about(served: Server) -> None:
    served.get("/object_info/G2RPO_TinyDemoLoader")
    # Core's own database may complain on a busy machine; nothing may come by way of the pack.
    raised = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*", served.log)
    assert not [one for one in raised if SERVED in one or str(ROOT) in one]
    assert "IMPORT FAILED" not in served.log


# What fails on purpose comes last, as the server logs it.


def judged_by(reward: str) -> dict:
    """Return a graph that scores the image of GRAPH."""
    inputs = {"images": ["5", 0], "reward": ["7", 0], "prompt": "a red circle"}
    return {
        **{key: node for key, node in GRAPH.items() if key != "6"},
        "7": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": reward}},
        "8": {"class_type": "G2RPO_ScoreImages", "inputs": inputs},
        "9": {"class_type": "PreviewAny", "inputs": {"source": ["8", 0]}},
    }


def error_of(served: Server, reward: str) -> dict:
    """Return how a graph fails for its reward."""
    ended = served.wait(served.post_prompt(judged_by(reward)))
    return next(said for kind, said in ended["status"]["messages"] if kind == "execution_error")


@pytest.mark.parametrize("more", ["", " (not installed: 3.9 GB, MIT)", " (not installed: 9 GB, other words)"])
def test_a_reward_that_is_not_here_is_named_with_the_command_that_gets_it(served: Server, more: str) -> None:
    error = error_of(served, f"pickscore{more}")
    said, _, command = error["exception_message"].strip().partition(" by: ")
    assert (error["node_type"], error["exception_type"]) == ("G2RPO_LoadReward", "ValueError")
    assert said == "reward pickscore is not installed; get it on a command line" and "\n" not in command
    script = served.base / "custom_nodes" / SERVED / "fetch_rewards.py"
    assert shlex.split(command)[1:] == [str(script), "pickscore"]


def test_that_command_runs(served: Server) -> None:
    command = error_of(served, "pickscore")["exception_message"].strip().partition(" by: ")[2]
    words = shlex.split(command)[:-1]  # without a name it lists
    listed = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120)
    assert listed.returncode == 0 and f"in {served.base / 'models/g2rpo_rewards'}:" in listed.stdout


def test_an_unknown_reward_is_refused_before_anything_runs_with_the_nearest(served: Server) -> None:
    status, body = served.request("POST", "/prompt", {"prompt": judged_by("sharpnes")})
    assert status == 400 and "(did you mean 'sharpness'?)" in body.decode()
