"""The pack as ComfyUI sees it: it starts under any folder name, changes nothing that is not its own, explains
and bounds every input, and keeps its schema.
"""

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from comfy_host import COMFYUIS, ROOT, Answer, make_base, run_script

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_pack.py")
SNAPSHOT = Path(__file__).with_name("snapshots") / "nodes.json"
RENEW = "G2RPO_RENEW_SNAPSHOT"
FOLDER = "an odd.name-of 2026"
DUMMY = """
class Dummy:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"number": ("INT", {"default": 1})}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "dummy"
    def run(self, number):
        return (number,)
NODE_CLASS_MAPPINGS = {"DummyOfAnotherPack": Dummy}
"""
WIDGETS_NOT_OFFERED = re.compile(
    r"(^|_)(url|uri|path|file|filename|dir|directory|folder|host|port|address|command|cmd|shell|script|code|python|interpreter|repo|repository|"
    r"module|package|token|key|password|env)(_|$)"
)

FROM_A_FOLDER = {"folder", "prior", "model", "text_encoder_1", "text_encoder_2", "text_encoder_3", "vae"}


@dataclass(frozen=True)
class Pair:
    """A ComfyUI after its start with the pack, and the same without it; another pack is beside it in both."""

    name: str
    pack: Answer
    bare: Answer

    @property
    def ours(self) -> dict[str, Any]:
        """Return what the page is told about our nodes."""
        return {key: info for key, info in self.pack.data["object_info"].items() if key.startswith("G2RPO_")}


@pytest.fixture(scope="module", params=COMFYUIS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    dummy = tmp_path_factory.mktemp("other") / "dummy"
    dummy.mkdir()
    (dummy / "__init__.py").write_text(DUMMY, "utf-8")
    base = make_base(tmp_path_factory.mktemp("with"), FOLDER, {"zz_dummy": dummy})
    bare = make_base(tmp_path_factory.mktemp("without"), None, {"zz_dummy": dummy})
    given = {"pack": str(base / "custom_nodes" / FOLDER)}
    return Pair(
        request.param.name,
        run_script(request.param, CHILD, base, given),
        run_script(request.param, CHILD, bare, {"pack": None}),
    )


def inputs_of(info: dict[str, Any]) -> list[tuple[str, str, Any, dict[str, Any]]]:
    """List a node's inputs: group, id, type (a list of choices where it is a combo), options."""
    groups = [(group, info["input"].get(group, {})) for group in ("required", "optional")]
    return [
        (group, key, spec[0], spec[1] if len(spec) > 1 else {})
        for group, specs in groups
        for key, spec in specs.items()
    ]


def schema_of(info: dict[str, Any]) -> dict[str, Any]:
    """Reduce a node to what a saved workflow depends on. Choices that come from a folder are left out."""
    inputs = []
    for group, key, kind, options in inputs_of(info):
        choices = None if key in FROM_A_FOLDER else kind if isinstance(kind, list) else options.get("options")
        kept = {
            name: options[name]
            for name in ("default", "min", "max", "multiline", "forceInput")
            if options.get(name) is not None
        }
        kept |= {"options": choices} if choices else {}
        inputs.append(
            {"id": key, "type": "COMBO" if isinstance(kind, list) else kind, "group": group, **kept}
        )
    outputs = [
        f"{kind} list" if many else kind
        for kind, many in zip(info["output"], info["output_is_list"], strict=True)
    ]
    return {"name": info["display_name"], "inputs": inputs, "outputs": outputs}


def one_line_per_input(blocks: dict[str, Any]) -> str:
    """Write the snapshot so that a change of one input is a change of one line."""
    words = {}
    for node_id, block in blocks.items():
        inputs = ",\n   ".join(json.dumps(entry, ensure_ascii=False) for entry in block["inputs"])
        rest = (
            f'"name": {json.dumps(block["name"], ensure_ascii=False)},\n  "outputs": '
            f"{json.dumps(block['outputs'])}"
        )
        words[node_id] = (
            f' "{node_id}": {{\n  {rest},\n  "inputs": [' + (f"\n   {inputs}\n  " if inputs else "") + "]\n }"
        )
    return "{\n" + ",\n".join(words.values()) + "\n}\n"


def test_every_node_of_the_pack_is_there(pair: Pair) -> None:
    listed = {
        node_id
        for path in (ROOT / "nodes").rglob("*.py")
        for node_id in re.findall(r'node_id="(\w+)"', path.read_text("utf-8"))
    }
    assert len(listed) >= 10
    assert set(pair.ours) == listed


def test_the_start_says_nothing_worrying_about_us(pair: Pair) -> None:
    worrying = re.compile("warn|error|traceback|exception|fail|cannot|unable|deprecat", re.IGNORECASE)
    usual = {line for line in pair.bare.log.splitlines() if worrying.search(line)}
    assert f"custom_nodes/{FOLDER}" in pair.pack.log
    assert [line for line in pair.pack.log.splitlines() if worrying.search(line) and line not in usual] == []


def test_other_nodes_are_as_they_are_without_us(pair: Pair) -> None:
    others = {
        key: info for key, info in pair.pack.data["object_info"].items() if not key.startswith("G2RPO_")
    }
    assert "DummyOfAnotherPack" in others
    assert others == pair.bare.data["object_info"]


def test_starting_loads_no_model_and_no_further_library(pair: Pair) -> None:
    new = set(pair.pack.data["modules"]) - set(pair.bare.data["modules"]) - set(sys.stdlib_module_names)
    assert new == set()
    assert pair.pack.data["networks"] == pair.bare.data["networks"]
    assert pair.pack.data["loaded_models"] == 0


def test_importing_the_pack_takes_little_more_than_its_own_code(pair: Pair) -> None:
    assert 0 < pair.pack.data["price"] < 2.5


def test_our_routes_can_only_be_read(pair: Pair) -> None:
    before = {tuple(route) for route in pair.bare.data["routes"]}
    new = [
        (method, path)
        for method, path in map(tuple, pair.pack.data["routes"])
        if (method, path) not in before
    ]
    # Core itself serves the files of a pack's web folder and workflows there.
    ours = [
        route
        for route in new
        if not re.match(r"(/api)?/(extensions|workflow_templates|api/workflow_templates)/", route[1])
    ]
    assert {path.removeprefix("/api").split("/")[1] for _, path in ours} == {"g2rpo"}
    # aiohttp adds a HEAD to every GET.
    assert {method for method, _ in ours} == {"GET", "HEAD"}


def test_every_node_input_and_output_is_explained(pair: Pair) -> None:
    silent = []
    for node_id, info in pair.ours.items():
        silent += [
            f"{node_id}.{key}"
            for _, key, _, options in inputs_of(info)
            if len(options.get("tooltip") or "") < 10
        ]
        tooltips = info.get("output_tooltips") or [None] * len(info["output"])
        silent += [
            f"{node_id} -> {name}"
            for name, text in zip(info["output_name"], tooltips, strict=True)
            if len(text or "") < 5
        ]
        silent += [node_id] if len(info["description"]) < 20 or info["display_name"] in ("", node_id) else []
    assert silent == []


def test_every_number_is_bounded_and_starts_within_its_bounds(pair: Pair) -> None:
    loose = []
    for node_id, info in pair.ours.items():
        for _, key, kind, options in inputs_of(info):
            if kind in ("INT", "FLOAT") and not options.get("forceInput"):
                low, start, high = (options.get(name) for name in ("min", "default", "max"))
                loose += (
                    []
                    if None not in (low, start, high) and low <= start <= high and low < high
                    else [f"{node_id}.{key}"]
                )
    assert loose == []


def test_every_choice_starts_with_one_of_its_options(pair: Pair) -> None:
    for node_id, info in pair.ours.items():
        for _, key, kind, options in inputs_of(info):
            choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
            if choices:
                assert options.get("default", choices[0]) in choices, f"{node_id}.{key}"


def test_no_widget_takes_an_address_a_path_or_code(pair: Pair) -> None:
    widgets = [
        (node_id, key)
        for node_id, info in pair.ours.items()
        for _, key, kind, _ in inputs_of(info)
        if kind == "STRING"
    ]
    assert [(node_id, key) for node_id, key in widgets if WIDGETS_NOT_OFFERED.search(key)] == []


def test_blocks_lie_where_users_look(pair: Pair) -> None:
    assert {info["category"] for info in pair.ours.values()} <= {
        "model/training/G²RPO",
        "sampling/G²RPO",
        "image/scoring",
    }
    assert len({info["display_name"] for info in pair.ours.values()}) == len(pair.ours)


def test_no_other_block_has_the_name_of_one_of_ours(pair: Pair) -> None:
    others = {info["display_name"] for info in pair.bare.data["object_info"].values()}
    assert "Train LoRA" in others
    assert {info["display_name"] for info in pair.ours.values()} & others == set()


def test_blocks_have_search_words_and_rare_inputs_where_core_knows_them(pair: Pair) -> None:
    core = [info for info in pair.bare.data["object_info"].values() if info.get("search_aliases")]
    words = {node_id: info.get("search_aliases", []) for node_id, info in pair.ours.items()}
    rare = {
        (node_id, key)
        for node_id, info in pair.ours.items()
        for _, key, _, options in inputs_of(info)
        if options.get("advanced")
    }
    if core:
        assert min(map(len, words.values())) >= 3
        assert {len(set(given)) - len(given) for given in words.values()} == {0}
        assert {("G2RPO_TrainLoRA", "slots"), ("G2RPO_Rollout", "eta"), ("G2RPO_LoadReward", "batch")} < rare
    else:
        assert not any(words.values())
        assert rare == set()


def test_saved_workflows_keep_loading(pair: Pair) -> None:
    """Compare ids, input order, types, defaults and bounds with the snapshot.

    A changed or removed line means that graphs saved before may not load: rename or remove nothing that has
    been released. After an addition, renew it with G2RPO_RENEW_SNAPSHOT=1 pytest tests/test_pack.py and look
    at the difference before committing.
    """
    now = {node_id: schema_of(info) for node_id, info in sorted(pair.ours.items())}
    if os.environ.get(RENEW):
        SNAPSHOT.write_text(one_line_per_input(now), "utf-8")
    assert now == json.loads(SNAPSHOT.read_text("utf-8"))
