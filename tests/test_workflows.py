"""The workflows that ComfyUI's template browser lists: whole, tidy, runnable, and what the generator
makes.
"""

from __future__ import annotations

import json
import re
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from comfy_host import EVERY, ROOT, Server, make_base, run_script
from PIL import Image
from workflow_api import BYPASSED, NOTES, declared, is_widget, to_api, widget_values
from workflow_inputs import put_pictures

FOLDER = ROOT / "workflows"
SUBJECTS = [
    "score_images",
    "rank_folder",
    "look_at_rollout",
    "train_lora",
    "graph_loop",
    "vote_and_train",
    "resume_compare",
]
MODELS = ["tiny", "sd35", "flux"]
NAMES = [f"g2rpo_{subject}_{model}" for subject in SUBJECTS for model in MODELS]
TINY = [name for name in NAMES if name.endswith("_tiny")]
REAL = [name for name in NAMES if name not in TINY]
MODEL_FILES = {"ckpt_name", "unet_name", "vae_name", "clip_name1", "clip_name2", "clip_name3", "reward"}
MAX_PICTURE = 150_000
TITLE = 30  # a node's title stands above its position

comfyui = [pytest.mark.comfyui, pytest.mark.xdist_group("served")]


def read(name: str) -> dict[str, Any]:
    """Read a workflow."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def marked(*marks: pytest.MarkDecorator) -> Any:
    """Mark a test with several marks."""

    def wrap(test: Any) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return wrap


def shortened(name: str, schemas: Any, switched_on: bool = False) -> dict[str, Any]:
    """Convert a tiny workflow and let it train for few steps; `switched_on` also runs what is bypassed."""
    workflow = read(name)
    for node in workflow["nodes"]:
        if switched_on and node["mode"] == BYPASSED:
            node["mode"] = 0
    graph = to_api(workflow, schemas)
    for node in graph.values():
        if node["class_type"] == "G2RPO_TrainLoRA":
            node["inputs"]["steps"] = 2 if "train_lora" in name else 3
    return graph


# What needs no ComfyUI


def test_every_subject_exists_for_every_model_and_nothing_else_lies_there() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        f"{name}.{kind}" for name in NAMES for kind in ("json", "jpg")
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_small_and_a_picture(name: str) -> None:
    content = (FOLDER / f"{name}.jpg").read_bytes()
    picture = Image.open(BytesIO(content)).convert("L")
    assert len(content) <= MAX_PICTURE
    assert min(picture.size) >= 200
    low, high = picture.getextrema()
    assert high - low > 100


def test_every_block_is_used() -> None:
    blocks = {
        match
        for path in (ROOT / "nodes").glob("*.py")
        for match in re.findall(r'node_id="(G2RPO_\w+)"', path.read_text("utf-8"))
    }
    used = {node["type"] for name in NAMES for node in read(name)["nodes"]}
    assert len(blocks) >= 16
    assert {kind for kind in used if kind.startswith("G2RPO_")} == blocks
    assert {"LossGraphNode", "LoraModelLoader", "LoraLoaderModelOnly"} <= used


@pytest.mark.parametrize("name", NAMES)
def test_nodes_stand_apart_and_wires_run_to_the_right_or_down(name: str) -> None:
    workflow = read(name)
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    for number, (x, y, width, height) in boxes.items():
        for other, (x2, y2, width2, height2) in boxes.items():
            apart = x + width < x2 or x2 + width2 < x or y + height < y2 - TITLE or y2 + height2 < y - TITLE
            assert number == other or apart, (number, other)
    for _, origin, _, target, _, _ in workflow["links"]:
        assert boxes[origin][:2] < boxes[target][:2]


@pytest.mark.parametrize("name", NAMES)
def test_links_agree_at_both_ends(name: str) -> None:
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[origin]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][entry]["link"] == number
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(ends) == [link[0] for link in workflow["links"]]


@pytest.mark.parametrize("name", NAMES)
def test_a_note_says_what_to_press_and_where_to_look(name: str) -> None:
    notes = [node["widgets_values"][0] for node in read(name)["nodes"] if node["type"] in NOTES]
    assert len(notes) == 1
    assert "**Run**" in notes[0]
    assert "**Look at**" in notes[0]


# In real ComfyUIs


class Host(NamedTuple):
    """A running ComfyUI and what its nodes look like."""

    server: Server
    schemas: Any


@pytest.fixture(scope="module")
def host(served: Server) -> Host:
    """Put into a ComfyUI what the workflows start from."""
    put_pictures(served.base)
    return Host(served, served.get("/object_info"))


@marked(*comfyui)
@pytest.mark.parametrize("name", NAMES)
def test_workflow_fits_the_nodes(host: Host, name: str) -> None:
    for node in read(name)["nodes"]:
        if node["type"] in NOTES:
            continue
        schema = host.schemas[node["type"]]
        inputs = {entry["name"]: entry for entry in node["inputs"]}
        values = widget_values(node, schema)
        for field, kind, options in declared(schema):
            if is_widget(kind, options):
                check_value(field, kind, options, values[field])
            elif field in schema["input"]["required"]:
                assert inputs[field]["link"] is not None, (node["type"], field)
            if field in inputs:
                assert inputs[field]["type"] == kind, (node["type"], field)
        assert set(inputs) <= {field for field, _, _ in declared(schema)}
        kinds = [output["type"] for output in node["outputs"]]
        assert kinds == [str(kind) for kind in schema["output"]][: len(kinds)]


def check_value(field: str, kind: str, options: Any, value: Any) -> None:
    """See that a widget's value is of its kind and within its bounds; model files may be missing."""
    if kind == "COMBO":
        assert field in MODEL_FILES | {"lora_name"} or value in options["options"], field
        return
    assert isinstance(value, {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]), field
    if kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), field


@marked(*comfyui)
@pytest.mark.parametrize("name", REAL)
def test_a_real_models_workflow_lacks_nothing_but_its_files(host: Host, name: str) -> None:
    graph = to_api(read(name), host.schemas)
    status, body = host.server.request("POST", "/prompt", {"prompt": graph})
    reply = json.loads(body)
    found = {
        (error["type"], error["extra_info"]["input_name"])
        for node in reply["node_errors"].values()
        for error in node["errors"]
    }
    # No run exists yet either, and Run Monitor says so.
    found.discard(("custom_validation_failed", "run"))
    assert {kind for kind, _ in found} <= {"value_not_in_list"}
    assert {field for _, field in found} <= MODEL_FILES
    ended = host.server.wait(reply["prompt_id"]) if status == 200 else {}
    # A reward model is named when it runs, with the command that gets it.
    assert found or "fetch_rewards.py" in json.dumps(ended["status"])


@marked(*comfyui)
def test_tiny_workflows_run_over_http(host: Host) -> None:
    for name in [*TINY, "g2rpo_graph_loop_tiny"]:
        ended = host.server.wait(host.server.post_prompt(shortened(name, host.schemas)))
        assert ended["status"]["status_str"] == "success", (name, ended["status"])
    # What Save LoRA has written, any loader finds.
    graph = shortened("g2rpo_resume_compare_tiny", host.schemas, switched_on=True)
    assert any(node["class_type"] == "LoraLoaderModelOnly" for node in graph.values())
    ended = host.server.wait(host.server.post_prompt(graph))
    assert ended["status"]["status_str"] == "success", ended["status"]
    runs = {run["id"]: run["step"] for run in host.server.get("/g2rpo/runs")["runs"]}
    # Nobody has voted.
    assert runs.items() >= {"tiny-train": 3, "tiny-loop": 2, "tiny-vote": None}.items()


@pytest.mark.skipif(not EVERY, reason="over HTTP alone, unless G2RPO_EVERY_COMFYUI=1")
@marked(*comfyui)
def test_tiny_workflows_run_in_process(host: Host, tmp_path: Path) -> None:
    jobs = [{"name": name, "graph": shortened(name, host.schemas), "want": {}} for name in TINY]
    base = make_base(tmp_path)
    put_pictures(base)
    answer = run_script(host.server.root, Path(__file__).with_name("comfy_child_workflows.py"), base, jobs)
    assert answer.data == [{"name": name, "error": "", "node": "", "problems": ""} for name in TINY]


@marked(*comfyui)
def test_the_page_is_offered_every_workflow_and_its_picture(host: Host) -> None:
    (offered,) = host.server.get("/api/workflow_templates").items()
    assert sorted(offered[1]) == sorted(NAMES)
    for kind in ("json", "jpg"):
        status, content = host.server.request(
            "GET", f"/api/workflow_templates/{offered[0]}/{NAMES[0]}.{kind}"
        )
        assert (status, content) == (200, (FOLDER / f"{NAMES[0]}.{kind}").read_bytes())


@marked(*comfyui)
def test_the_files_are_what_the_generator_makes(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.delitem(sys.modules, "make_workflows", raising=False)
    import make_workflows

    made = dict(make_workflows.make_all(host.schemas))
    assert sorted(made) == sorted(NAMES)
    for name, text in made.items():
        assert text == (FOLDER / f"{name}.json").read_text("utf-8"), (
            f"{name} is stale: run tools/make_workflows.py"
        )


@marked(*comfyui)
@pytest.mark.browser
@pytest.mark.parametrize("newer_renderer", [False, True], ids=["classic", "nodes2"])
def test_the_page_accepts_every_workflow_and_queues_what_we_read(
    host: Host, newer_renderer: bool, tmp_path: Path
) -> None:
    pytest.importorskip("playwright")
    import workflow_page

    with workflow_page.opened(host.server, newer_renderer) as page:
        for name in NAMES:
            workflow = workflow_page.load(page, FOLDER / f"{name}.json")
            assert workflow_page.queued(page) == to_api(workflow, host.schemas), name
            assert not workflow_page.refused(page), name
        # The page does say so where a file breaks its schema.
        workflow = read(NAMES[0])
        workflow["nodes"][0]["mode"] = "odd"
        (tmp_path / "broken.json").write_text(json.dumps(workflow), "utf-8")
        workflow_page.load(page, tmp_path / "broken.json")
        assert workflow_page.refused(page)
