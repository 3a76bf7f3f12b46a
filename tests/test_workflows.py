"""The workflows that ComfyUI's template browser lists: whole, tidy, runnable, and what the generator makes;
and that those of earlier versions still load and run.
"""

from __future__ import annotations

import json
import re
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import workflow_geometry as geometry
from comfy_host import EVERY, ROOT, Server, make_base, run_script
from PIL import Image
from workflow_api import NOTES, declared, every_node, is_widget, to_api, widget_values
from workflow_inputs import put_pictures

FOLDER, OLD = ROOT / "workflows", Path(__file__).with_name("old_workflows")
SUBJECTS = [
    "Pick the best of my images",
    "Why is one better",
    "Train a LoRA on a reward",
    "Train on my votes",
    "Train again on kept votes",
    "The loop as a graph",
    "Before and after",
    "Better images without training",
    "Train beside ComfyUI",
]
MODELS = ["tiny demo", "SD3.5", "FLUX.1", "Z-Image"]
NAMES = [f"{subject} - {model}" for subject in SUBJECTS for model in MODELS]
TINY = [name for name in NAMES if name.endswith("tiny demo")]
REAL = [name for name in NAMES if name not in TINY]
OLD_NAMES = sorted(path.stem for path in OLD.glob("*.json"))
FILE_WIDGETS = {"ckpt_name", "unet_name", "clip_name", "vae_name", "reward"}
FILE_WIDGETS |= {"model", "text_encoder_1", "vae"}
SPARE = {"G2RPO_SingularSDESampler", "G2RPO_ScoresFromValues", "G2RPO_ReferenceReward"}
SPARE |= {"G2RPO_EarlyFilter", "G2RPO_OptimizeNoise", "G2RPO_LoadNoisePrior", "G2RPO_ApplyNoisePrior"}
"""Blocks for those who build graphs of their own; their help pages say how."""
MOST_NODES, MAX_PICTURE, CARD = 12, 60_000, 300
WIDTH, HEIGHT = 1460 * 0.75 / 0.8 - 20, 960 * 0.75 / 0.8 - 20
"""What the page shows at 80 % in a window of 1500 × 1000: it fits a graph and ten pixels around it into three
quarters of its canvas, which has 1460 × 960 pixels in the oldest supported version and more in others.
"""
MAP = (1100, 705)
"""Right of and below this the page's small map lies over a graph."""

comfyui = [pytest.mark.comfyui, pytest.mark.xdist_group("served")]


def read(name: str) -> dict[str, Any]:
    """Read a workflow."""
    folder = FOLDER if name in NAMES else OLD
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def marked(*marks: pytest.MarkDecorator) -> Any:
    """Mark a test with several marks."""

    def wrap(test: Any) -> Any:
        for mark in marks:
            test = mark(test)
        return test

    return wrap


def shortened(name: str, schemas: Any, steps: int = 2) -> dict[str, Any]:
    """Convert a tiny workflow and let it train for few steps, in a run of its own."""
    graph = to_api(read(name), schemas)
    for node in graph.values():
        if node["class_type"] == "G2RPO_TrainLoRA":
            node["inputs"] |= {"steps": steps, "run": re.sub(r"\W+", "-", name)}
    return graph


def files_in(folder: Path) -> list[Path]:
    """List the files of a folder."""
    return [file for file in folder.iterdir() if file.is_file()]


# What needs no ComfyUI


def test_every_subject_exists_for_every_model_and_nothing_else_lies_there() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(
        f"{name}.{kind}" for name in NAMES for kind in ("json", "jpg")
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_title_and_safe_as_a_file_and_in_an_address(name: str) -> None:
    # The template browser shows the file's name as the card's title, and puts it into an address as it is.
    assert re.fullmatch(r"[A-Z][A-Za-z0-9 .-]{10,41}", name)


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_small_and_a_picture(name: str) -> None:
    content = (FOLDER / f"{name}.jpg").read_bytes()
    picture = Image.open(BytesIO(content)).convert("L")
    assert len(content) <= MAX_PICTURE
    assert picture.width == picture.height >= 2 * CARD
    low, high = picture.resize((CARD, CARD)).getextrema()
    assert high - low > 100


def test_every_block_is_used_but_the_builders() -> None:
    blocks = {
        match
        for path in (ROOT / "nodes").rglob("*.py")
        for match in re.findall(r'node_id="(G2RPO_\w+)"', path.read_text("utf-8"))
    }
    used = {node["type"] for name in NAMES for node in every_node(read(name))}
    assert len(blocks) >= 16
    assert {kind for kind in used if kind.startswith("G2RPO_")} == blocks - SPARE


@pytest.mark.parametrize("name", NAMES)
def test_blocks_have_the_colours_of_their_roles(name: str) -> None:
    page = (ROOT / "web/roles.mjs").read_text("utf-8")
    colours = {
        role: rest for role, *rest in re.findall(r'(\w+): { color: "(#\w+)", bgcolor: "(#\w+)" }', page)
    }
    role_of = {
        f"G2RPO_{block}": role
        for role, blocks in re.findall(r"(\w+): \[([^]]+)\]", page)
        for block in re.findall(r'"(\w+)"', blocks)
    }
    assert len(colours) == 4
    for node in every_node(read(name)):
        if node["type"].startswith("G2RPO_"):
            assert [node["color"], node["bgcolor"]] == colours[role_of[node["type"]]], node["type"]


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_read_when_it_opens(name: str) -> None:
    nodes = read(name)["nodes"]
    width, height = geometry.frame(geometry.rectangles(nodes).values())
    assert len(nodes) <= MOST_NODES
    assert width <= WIDTH
    assert height <= HEIGHT


@pytest.mark.parametrize("name", NAMES)
def test_nodes_stand_apart_and_no_wire_runs_behind_one(name: str) -> None:
    workflow = read(name)
    boxes = geometry.rectangles(workflow["nodes"])
    wires = list(geometry.wires(workflow["nodes"], workflow["links"]))
    assert geometry.overlapping(boxes, apart=20) == []
    assert geometry.turning_back(wires) == []
    assert geometry.behind(boxes, wires) == []
    left, top = (min(box[i] for box in boxes.values()) for i in (0, 1))
    assert [box for box in boxes.values() if box.right > left + MAP[0] and box.bottom > top + MAP[1]] == []


@pytest.mark.parametrize("name", NAMES)
def test_what_is_folded_is_tidy_too(name: str) -> None:
    for inner in read(name)["definitions"]["subgraphs"]:
        boxes = geometry.rectangles(inner["nodes"])
        ends = [[node["id"], *node["bounding"]] for node in (inner["inputNode"], inner["outputNode"])]
        boxes |= {number: geometry.Rectangle(x, y, x + w, y + h) for number, x, y, w, h in ends}
        assert geometry.overlapping(boxes, apart=20) == []
        for link in inner["links"]:
            assert boxes[link["origin_id"]].right < boxes[link["target_id"]].left, link


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        ((95, 50), (305, 50), [(1, 2, 3)]),  # straight through
        ((95, 50), (305, 210), [(1, 2, 3)]),  # across a corner
        ((95, 150), (305, 150), []),  # below
        ((305, 50), (95, 50), [(1, 2, 1), (1, 2, 2), (1, 2, 3)]),  # backwards
    ],
)
def test_the_geometry_finds_wires_behind_nodes(
    start: geometry.Point, end: geometry.Point, expected: list[tuple[int, int, int]]
) -> None:
    left = geometry.Rectangle(start[0] - 100, 0, start[0] + 9, 160)
    right = geometry.Rectangle(end[0] - 9, end[1] - 44, end[0] + 100, end[1] + 100)
    boxes = {1: left, 2: right, 3: geometry.Rectangle(150, 0, 250, 130)}
    assert geometry.behind(boxes, [geometry.Wire(start, end, 1, 2)]) == expected


@pytest.mark.parametrize("name", [*NAMES, *OLD_NAMES])
def test_links_agree_at_both_ends(name: str) -> None:
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, slot, target, entry, kind in workflow["links"]:
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[origin]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][entry]["link"] == number
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(ends) == [link[0] for link in sorted(workflow["links"])]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_folded_agrees_with_the_node_that_stands_for_it(name: str) -> None:
    workflow = read(name)
    hosts = {node["type"]: node for node in workflow["nodes"]}
    numbers = [node["id"] for node in workflow["nodes"]]
    for inner in workflow["definitions"]["subgraphs"]:
        numbers += [node["id"] for node in inner["nodes"]]
        host, links = hosts[inner["id"]], {link["id"]: link for link in inner["links"]}
        for end in ("inputs", "outputs"):
            assert [(each["name"], each["type"]) for each in host[end]] == [
                (each["name"], each["type"]) for each in inner[end]
            ]
        for slot, entry in enumerate(inner["inputs"]):
            assert {links[number]["origin_slot"] for number in entry["linkIds"]} == {slot}
        for slot, entry in enumerate(inner["outputs"]):
            assert [links[number]["target_slot"] for number in entry["linkIds"]] == [slot]
        for node in inner["nodes"]:
            for place, entry in enumerate(node["inputs"]):
                link = links.get(entry["link"])
                assert link is None or (link["target_id"], link["target_slot"]) == (node["id"], place)
    assert len(numbers) == len(set(numbers))  # the page numbers them anew where they are not


@pytest.mark.parametrize("name", NAMES)
def test_a_note_of_five_lines_says_what_to_press_and_where_to_look(name: str) -> None:
    (note,) = [node["widgets_values"][0] for node in read(name)["nodes"] if node["type"] in NOTES]
    assert len(note.split("\n\n")) == 5
    assert "**Run**" in note
    assert "**Look at**" in note


# In real ComfyUIs


class Host(NamedTuple):
    """A running ComfyUI and what its nodes look like."""

    server: Server
    schemas: Any


@pytest.fixture(scope="module")
def host(served: Server) -> Host:
    """Ask a ComfyUI for its nodes."""
    return Host(served, served.get("/object_info"))


@marked(*comfyui)
@pytest.mark.parametrize("name", [*NAMES, *OLD_NAMES])
def test_workflow_fits_the_nodes(host: Host, name: str) -> None:
    for node in every_node(read(name)):
        if node["type"] in NOTES:
            continue
        schema = host.schemas[node["type"]]
        inputs = {entry["name"]: entry for entry in node["inputs"]}
        values = widget_values(node, schema)
        for field, kind, options in declared(schema):
            if is_widget(kind, options):
                check_value(field, kind, options, values[field])
            elif field in schema["input"]["required"]:
                assert field in inputs, (node["type"], field)
                assert inputs[field]["link"] is not None or node["mode"], (node["type"], field)
            if field in inputs:
                assert inputs[field]["type"] == kind, (node["type"], field)
        assert set(inputs) <= {field for field, _, _ in declared(schema)}
        kinds = [output["type"] for output in node["outputs"]]
        assert kinds == [str(kind) for kind in schema["output"]][: len(kinds)]


def check_value(field: str, kind: str, options: Any, value: Any) -> None:
    """See that a widget's value is of its kind and within its bounds; model files may be missing."""
    if kind == "COMBO":
        assert field in FILE_WIDGETS | {"lora_name"} or value in options["options"], field
        return
    assert isinstance(value, {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}[kind]), field
    if kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value), field


@marked(*comfyui)
@pytest.mark.parametrize("name", OLD_NAMES)
def test_the_widgets_of_an_old_workflow_keep_their_order(host: Host, name: str) -> None:
    # The page hands saved values to widgets by order: a new widget may only come last.
    for node in every_node(read(name)):
        if node["type"].startswith("G2RPO_"):
            fields = declared(host.schemas[node["type"]])
            now = [field for field, kind, options in fields if is_widget(kind, options)]
            then = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            assert now[: len(then)] == then, node["type"]


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
    assert {kind for kind, _ in found} <= {"value_not_in_list"}
    assert {field for _, field in found} <= FILE_WIDGETS
    ended = host.server.wait(reply["prompt_id"]) if status == 200 else {}
    # A reward model is named when it runs, with the command that gets it; so is a model of Submit Training
    # where ComfyUI does not look at what a list offers.
    said = json.dumps(ended.get("status"))
    assert found or "fetch_rewards.py" in said or "; choose one of: tiny demo model" in said


@marked(*comfyui)
@pytest.mark.parametrize("name", REAL)
def test_the_page_can_say_where_the_files_are(name: str) -> None:
    nodes = [node for node in every_node(read(name)) if "models" in node["properties"]]
    assert nodes
    for node in nodes:
        for file in node["properties"]["models"]:
            # Submit Training says of a checkpoint that it is one.
            assert {file["name"], f"{file['name']} (checkpoint)"} & set(map(str, node["widgets_values"]))
            assert file["url"].startswith("https://huggingface.co/Comfy-Org/")
            assert file["url"].endswith(f"/{file['name']}")


@marked(*comfyui)
def test_tiny_workflows_run_without_any_file_of_the_users(host: Host) -> None:
    assert not files_in(host.server.base / "input")
    for name in [*TINY, "The loop as a graph - tiny demo"]:
        ended = host.server.wait(host.server.post_prompt(shortened(name, host.schemas)))
        assert ended["status"]["status_str"] == "success", (name, ended["status"])
    runs = {run["id"]: run["step"] for run in host.server.get("/g2rpo/runs")["runs"]}
    # Nobody has voted.
    expected = {"Train-a-LoRA-on-a-reward-tiny-demo": 2, "Before-and-after-tiny-demo": 2}
    assert runs.items() >= (expected | {"tiny-loop": 2, "tiny-vote": None}).items()
    assert list((host.server.base / "output/best").glob("*.png"))


@marked(*comfyui)
def test_old_workflows_run(host: Host) -> None:
    put_pictures(host.server.base)
    try:
        for name in OLD_NAMES:
            ended = host.server.wait(host.server.post_prompt(shortened(name, host.schemas)))
            assert ended["status"]["status_str"] == "success", (name, ended["status"])
    finally:
        for file in files_in(host.server.base / "input"):
            file.unlink()


@pytest.mark.skipif(not EVERY, reason="over HTTP alone, unless G2RPO_EVERY_COMFYUI=1")
@marked(*comfyui)
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_workflow_runs_on_a_fresh_base_directory(host: Host, tmp_path: Path, name: str) -> None:
    jobs = [{"name": name, "graph": shortened(name, host.schemas), "want": {}}]
    script = Path(__file__).with_name("comfy_child_workflows.py")
    answer = run_script(host.server.root, script, make_base(tmp_path), jobs)
    assert answer.data == [{"name": name, "error": "", "node": "", "problems": ""}]


@marked(*comfyui)
def test_the_page_is_offered_every_workflow_and_its_picture(host: Host) -> None:
    (offered,) = host.server.get("/api/workflow_templates").items()
    assert sorted(offered[1]) == sorted(NAMES)
    for kind in ("json", "jpg"):
        address = f"/api/workflow_templates/{offered[0]}/{NAMES[0]}.{kind}".replace(" ", "%20")
        status, content = host.server.request("GET", address)
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
