"""`g2rpo run`: a ComfyUI workflow as a recipe. Whatever the page or its users have done to a graph, it is the
recipe of its plain twin, or one line says what to change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from comfy_host import ROOT
from graph_forms import NONE, Page, api_of, end_links, folded, plain, recipe_in, refusal, rewire, write
from program import leave

from comfy_g2rpo.blocks.train_presets import PRESETS
from g2rpo_trainer.config.reading import from_dict, make_pace, make_recipe
from g2rpo_trainer.workflows.model_files import ModelFolders
from g2rpo_trainer.workflows.training_recipe import read_workflow

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

# The recipe


def test_a_plain_graph_is_the_recipe_of_its_widgets() -> None:
    config = from_dict(recipe_in(plain().tree()))
    recipe, pace = make_recipe(config), make_pace(config)
    assert config.model.path == str(ROOT / "models/tiny") and config.model.schedule == "comfyui"
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 8.0, "attention")
    assert (recipe.num_steps, recipe.group_size, recipe.learning_rate) == (4, 4, 1e-3)
    assert (pace.steps, pace.seed, pace.slots, pace.decode_batch, pace.micro_batch) == (3, 7, 16, 8, 4)
    assert [each.name for each in config.rewards] == ["agreement"]
    assert [each.name for each in config.heldout_rewards] == ["strict"]
    assert config.prompts.train.splitlines()[1] == "two blue squares"


def test_the_api_format_says_the_same() -> None:
    assert recipe_in(api_of(plain())) == recipe_in(plain().tree())
    assert recipe_in({"prompt": api_of(plain()), "client_id": "x"}) == recipe_in(plain().tree())


def test_no_number_where_none_is_read_is_no_matter(tmp_path: Path) -> None:
    # What ComfyUI writes of nodes that are always anew.
    graph = api_of(plain())
    graph["9"] = {"class_type": "LoadImage", "inputs": {}, "is_changed": [float("nan")]}
    found = read_workflow(write(tmp_path / "history.json", graph), NONE)
    assert found.tree == recipe_in(plain().tree())


def test_blank_heldout_prompts_set_a_fifth_aside_where_there_are_five() -> None:
    assert recipe_in(plain(heldout_prompts=" \n").tree())["prompts"]["heldout_share"] == 0.2
    few = recipe_in(plain(heldout_prompts="", prompts="a red circle\na blue square").tree())
    assert set(few["prompts"]) == {"train"}


@pytest.mark.parametrize("preset", [each for each in PRESETS if each != "as typed"])
def test_a_preset_replaces_typed_numbers_and_changes_win(preset: str) -> None:
    made = recipe_in(plain(preset=preset, changes="group_size = 5\neval_prompts = 3").tree())
    assert made["train"]["slots"] != 16 and made["method"]["group_size"] == 5
    assert made["train"]["eval_prompts"] == 3
    assert made["lora"]["alpha"] == made["lora"]["rank"]


def test_mixes_multiply_weights_and_gates_come_along() -> None:
    page = plain()
    page.add("G2RPO_LoadReward", reward="jpeg")
    wires = {"reward_1": (2, 0), "reward_2": (5, 0)}
    page.add("G2RPO_MixRewards", **wires, weight_2=-0.5, mix="minimum", gates="jpeg = 20")
    wires = {"reward_1": (6, 0), "reward_2": (3, 0)}
    page.add("G2RPO_MixRewards", **wires, weight_1=2.0, weight_2=0.0, mix="minimum")
    end = next(each for each in page.nodes[3]["inputs"] if each["name"] == "reward")
    end["link"] = page.wire((7, 0), 4, 3, "G2RPO_REWARD")
    made = recipe_in(page.tree())
    assert made["rewards"] == [
        {"name": "agreement", "weight": 2.0},
        {"name": "jpeg", "weight": -1.0, "gate": 20.0},
    ]
    assert made["method"]["mix"] == "minimum"
    assert made["heldout_rewards"] == [{"name": "strict", "weight": 1.0}]


def test_a_palette_and_a_picture_to_be_like(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/sea.png").write_bytes(b"")
    page = plain()
    page.add("G2RPO_ReferenceReward", kind="palette", colours="#ff8800, #002244")
    page.add("LoadImage", image="deep/sea.png [input]")
    page.add("G2RPO_ReferenceReward", kind="phash", reference=(6, 0))
    page.add("G2RPO_MixRewards", reward_1=(5, 0), reward_2=(7, 0), gates="palette-0a1b2c3d = 0.5")
    end = next(each for each in page.nodes[3]["inputs"] if each["name"] == "reward")
    end["link"] = page.wire((8, 0), 4, 3, "G2RPO_REWARD")
    assert "--input" in refusal(page.tree())
    made = recipe_in(page.tree(), ModelFolders((), tmp_path))
    assert made["rewards"] == [
        {"name": "palette", "palette": ["#ff8800", "#002244"], "weight": 1.0, "gate": 0.5},
        {"name": "phash", "reference": str(tmp_path / "deep/sea.png"), "weight": 1.0},
    ]


# Graphs that only look different


def rerouted() -> dict[str, Any]:
    """Lead wires through core's Reroute, three times."""
    page = plain()
    for _ in range(3):
        last = len(page.nodes)
        page.add("Reroute", input=(last if last > 4 else 1, 0))
    rewire(page, "model", (7, 0))
    return page.tree()


def natively_rerouted() -> dict[str, Any]:
    """Draw wires with the page's own bends."""
    tree = plain().tree()
    bends = [
        {"id": 1, "pos": [5, 5], "linkIds": [501]},
        {"id": 2, "parentId": 1, "pos": [9, 9], "linkIds": []},
    ]
    ends = [{"id": tree["links"][0][0], "parentId": 2}]
    return {**tree, "extra": {"reroutes": bends, "linkExtensions": ends}}


def wires_as_tables() -> dict[str, Any]:
    """Save wires, and their bends, as newer versions of the format do."""
    tree = plain().tree()
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [{**dict(zip(names, link, strict=True)), "parentId": 1} for link in tree["links"]]
    return {**tree, "links": links, "version": 1, "reroutes": [{"id": 1, "pos": [1, 1], "linkIds": []}]}


def bypassed() -> dict[str, Any]:
    """Switch off what stands before the block: each hands on the first input of the same type."""
    page = plain()
    page.add("LoraLoader", mode=4, model=(1, 0), clip=(1, 1), lora_name="gone.safetensors")
    page.add("OddPatch", mode=4, model=(5, 0))
    rewire(page, "model", (6, 0))
    rewire(page, "clip", (5, 1))
    return page.tree()


def set_and_got() -> dict[str, Any]:
    """Send the model by name, as KJNodes do, and through a Set node itself."""
    page = plain()
    page.add("SetNode", value=(1, 0), name="the model")
    page.add("GetNode", name="the model")
    page.add("SetNode", value=(1, 2), name="vae")
    rewire(page, "model", (6, 0))
    rewire(page, "vae", (7, 0))
    return page.tree()


def primitive() -> dict[str, Any]:
    """Type numbers into the page's own primitives, and leave other ones in the widgets."""
    page = plain(steps=99, rank=99)
    page.add("PrimitiveNode", value=3)
    page.add("PrimitiveNode", value=4, control="randomize")
    rewire(page, "steps", (5, 0))
    rewire(page, "rank", (6, 0))
    return page.tree()


def core_primitives() -> dict[str, Any]:
    """Type values into core's primitives, one of them by way of another."""
    page = plain(steps=99, learning_rate=9.0, prompts="other")
    page.add("PrimitiveInt", value=3)
    page.add("PrimitiveInt", value=(5, 0))
    page.add("PrimitiveFloat", value=1e-3)
    page.add("PrimitiveStringMultiline", value=plain().nodes[3]["widgets_values"][2])
    for name, node in (("steps", 6), ("learning_rate", 7), ("prompts", 8)):
        rewire(page, name, (node, 0))
    return page.tree()


def twice_folded() -> dict[str, Any]:
    """Fold the loader away, and that graph again; fold the block, with a number from outside."""
    loader = Page(20)
    loader.add("G2RPO_TinyDemoLoader")
    for slot, kind in enumerate(("MODEL", "CLIP", "VAE")):
        end_links(loader, (20, slot), slot, kind)
    around = Page(30)
    around.nodes.append({"id": 30, "type": "loader", "mode": 0, "inputs": [], "widgets_values": []})
    around.add("Reroute", input=(30, 0))
    for slot, origin in enumerate(((31, 0), (30, 1), (30, 2))):
        end_links(around, origin, slot, "*")
    inner = plain(steps=99)
    inner.nodes[0] = {"id": 1, "type": "around", "mode": 0, "inputs": [], "widgets_values": []}
    rewire(inner, "steps", (-10, 1))
    rewire(inner, "reward", (-10, 0))
    page = Page(100)
    page.add("PrimitiveInt", value=3)
    page.add("G2RPO_LoadReward", reward="agreement")
    entries = [
        {"name": "judge", "type": "G2RPO_REWARD", "link": page.wire((101, 0), 102, 0, "G2RPO_REWARD")},
        {"name": "how long", "type": "INT", "link": page.wire((100, 0), 102, 1, "INT")},
    ]
    page.nodes.append({"id": 102, "type": "train", "mode": 0, "inputs": entries, "widgets_values": []})
    inner_definition = folded(inner, "train", ("judge", "how long"))
    graphs = [folded(loader, "loader"), folded(around, "around"), inner_definition]
    return page.tree(definitions={"subgraphs": graphs})


def typed_outside(listing: bool, entries: Sequence[str] = ("how long", "size")) -> dict[str, Any]:
    """Type numbers into the widgets that a folded node shows; exports leave out entries but renamed ones."""
    inner = plain(steps=99, rank=99)
    rewire(inner, "steps", (-10, 0))
    host: dict[str, Any] = {"id": 102, "type": "train", "mode": 0}
    host["inputs"] = [
        {"name": name, "label": "renamed", "type": "INT", "link": None, "widget": {"name": name}}
        for name in entries
    ]
    if listing:
        host["properties"] = {"proxyWidgets": [["4", "rank"], ["-1", "how long"]]}
        host["widgets_values"] = [4, 3]
    else:
        rewire(inner, "rank", (-10, 1))
        host["widgets_values"] = [3, 4]
    page = Page(100)
    page.nodes.append(host)
    graphs = [folded(inner, "train", ("how long", "size"))]
    return page.tree(definitions={"subgraphs": graphs})


def wired_outside() -> dict[str, Any]:
    """Connect what leads into no widget, and one that does; the values are of those that do."""
    tree = typed_outside(False, ("size",))
    graph = tree["definitions"]["subgraphs"][0]
    graph["inputs"].insert(0, {"name": "judge", "type": "G2RPO_REWARD"})
    for link in graph["links"]:
        link["origin_slot"] += link["origin_id"] == -10
    judge = Page(100)
    judge.add("G2RPO_LoadReward", reward="agreement")
    judge.add("PrimitiveInt", value=4)
    entries = tree["nodes"][0]["inputs"]
    entries[0]["link"] = judge.wire((101, 0), 102, 0, "INT")
    entries.append({"name": "judge", "type": "G2RPO_REWARD"})
    entries[1]["link"] = judge.wire((100, 0), 102, 1, "G2RPO_REWARD")
    inner_reward = next(link for link in graph["links"] if link["target_slot"] == 3)
    inner_reward |= {"origin_id": -10, "origin_slot": 0}
    tree["nodes"][0]["widgets_values"] = [3, 98]
    return {**tree, "nodes": tree["nodes"] + judge.nodes, "links": judge.links}


def of_another_version() -> dict[str, Any]:
    """Add what old pages put behind a seed, and leave out the widgets that came later."""
    page = plain()
    values = page.nodes[3]["widgets_values"]
    values.insert(values.index(7) + 1, "randomize")
    return page.tree()


def shorter() -> dict[str, Any]:
    """Leave out the widgets that came later."""
    page = plain()
    del page.nodes[3]["widgets_values"][-2:]
    return page.tree()


def around_muted_ones() -> dict[str, Any]:
    """Put muted and unknown nodes beside what is needed, notes, and wires that lead nowhere."""
    page = plain()
    page.add("OddPatch", mode=2, model=(1, 0))
    page.nodes.append({"id": "77", "type": "MarkdownNote", "mode": 0, "widgets_values": ["hello"]})
    muted = page.add("G2RPO_TrainLoRA", mode=2, model=(5, 0))
    page.links += [None, [1], [9, 8, 0, 7, 0, "X"]]
    assert muted == 7
    return page.tree()


ODD: dict[str, Callable[[], dict[str, Any]]] = {
    "reroutes": rerouted,
    "native reroutes": natively_rerouted,
    "wires as tables": wires_as_tables,
    "bypassed": bypassed,
    "set and get": set_and_got,
    "primitive nodes": primitive,
    "core primitives": core_primitives,
    "folded twice": twice_folded,
    "typed outside": lambda: typed_outside(False),
    "typed outside, listed": lambda: typed_outside(True),
    "typed outside, exported": lambda: typed_outside(False, ()),
    "typed outside, one renamed": lambda: typed_outside(False, ("size",)),
    "typed outside, in another order": lambda: typed_outside(False, ("size", "how long")),
    "typed outside, listed and exported": lambda: typed_outside(True, ()),
    "wired outside": wired_outside,
    "seed control": of_another_version,
    "fewer widgets": shorter,
    "muted beside": around_muted_ones,
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_graph_is_the_recipe_of_its_plain_twin(name: str) -> None:
    assert recipe_in(ODD[name]()) == recipe_in(plain().tree())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("odd", ["node 'My patch' (OddPatch, id 5)", "bypass it", "UNETLoader"]),
        ("muted", ["G2RPO_TinyDemoLoader, id 1", "is muted; switch it on"]),
        ("sigmas", ["BasicScheduler, id 5", "num_steps"]),
        ("two", ["2 blocks train", "id 4", "id 5", "--node"]),
        ("off", ["is muted or bypassed", "switch it on"]),
        ("gone", ["node 99", "not there"]),
        ("free", ["vae is not connected"]),
        ("computed", ["OddPatch, id 5", "gives steps", "PrimitiveInt"]),
        ("mixed", ["one part of the tiny model"]),
        ("no setter", ["GetNode, id 5", "'nobody'", "no Set node"]),
        ("two setters", ["two Set nodes are called 'x'"]),
        ("name", ["run is '../../etc'"]),
        ("reward", ["reward 'x' is unknown"]),
        ("votes", ["G2RPO_LoadReward, id 2", "does not give votes"]),
        ("changes", ["G2RPO_TrainLoRA, id 4", "changes, line 1"]),
        ("no prompts", ["prompts holds no prompt"]),
        ("bool", ["steps is True", "number"]),
        ("half", ["steps is 2.5", "whole number"]),
        ("many values", ["4 values more than it has widgets"]),
        ("mix", ["mix is 'odd'"]),
    ],
)
def test_what_cannot_be_said_is_one_line_with_the_node(change: str, says: list[Any]) -> None:
    page = plain()
    block = page.nodes[3]
    if change == "odd":
        page.add("OddPatch", title="My patch", model=(1, 0))
        rewire(page, "model", (5, 0))
    elif change == "muted":
        page.nodes[0]["mode"] = 2
    elif change == "sigmas":
        page.add("BasicScheduler", model=(1, 0))
        rewire(page, "sigmas", (5, 0))
    elif change == "two":
        page.nodes.append({**block, "id": 5})
    elif change == "off":
        block["mode"] = 4
    elif change == "gone":
        rewire(page, "model", (99, 0))
    elif change == "free":
        next(each for each in block["inputs"] if each["name"] == "vae")["link"] = None
    elif change == "computed":
        page.add("OddPatch", model=(1, 0))
        rewire(page, "steps", (5, 0))
    elif change == "mixed":
        page.add("VAELoader", vae_name="ae.safetensors")
        rewire(page, "vae", (5, 0))
    elif change == "no setter":
        page.add("GetNode", name="nobody")
        rewire(page, "model", (5, 0))
    elif change == "two setters":
        page.add("GetNode", name="x")
        page.add("SetNode", value=(1, 0), name="x")
        page.add("SetNode", value=(1, 0), name="x")
        rewire(page, "model", (5, 0))
    elif change == "mix":
        page.add("G2RPO_MixRewards", reward_1=(2, 0), reward_2=(3, 0), mix="odd")
        rewire(page, "reward", (5, 0))
    elif change == "votes":
        page.nodes[1]["widgets_values"][0] = "votes"
    elif change == "many values":
        block["widgets_values"] += [1, 2, 3, 4]
    else:
        field, value = {
            "name": ("run", "../../etc"),
            "reward": ("", ""),
            "changes": ("changes", "nothing"),
            "no prompts": ("prompts", " \n"),
            "bool": ("steps", True),
            "half": ("steps", 2.5),
        }[change]
        page = plain(**({field: value} if field else {}))
        if change == "reward":
            page.nodes[1]["widgets_values"][0] = "x"
            with pytest.raises(ValueError, match=says[0]):
                from_dict(recipe_in(page.tree()))
            return
    said = refusal(page.tree())
    assert all(word in said for word in says if isinstance(word, str)), said


# The command


def scores(row: dict[str, Any]) -> dict[str, Any]:
    """Return what does not depend on the machine."""
    return {key: row[key] for key in row if key.startswith(("reward/", "heldout/", "advantage/"))}


def test_print_shows_a_recipe_that_trains_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "mine.json", plain().tree())
    code, shown, errors = leave(capsys, "run", file, "--print", "--set", "train.minutes=2")
    assert (code, errors) == (0, "")
    tree = yaml.safe_load(shown)
    assert tree.pop("train") == {**recipe_in(plain().tree())["train"], "minutes": 2}
    assert tree == {name: part for name, part in recipe_in(plain().tree()).items() if name != "train"}
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    (tmp_path / "printed.yaml").write_text(shown)
    short = ["--quiet", "--set", "train.steps=1", "--set", "train.eval_every=0"]
    assert leave(capsys, "run", file, *short)[0] == 0
    assert leave(capsys, "train", "printed.yaml", *short)[0] == 0
    files = [tmp_path / f"runs/{name}/metrics.jsonl" for name in ("mine", "printed")]
    rows = [file.read_text().splitlines()[1:] for file in files]
    told = [[scores(json.loads(row)) for row in each] for each in rows]
    assert told[0] == told[1] and len(told[0]) > 1
    code, _, errors = leave(capsys, "run", file, *short)
    assert code == 2 and "already holds a run" in errors
    longer = [*short[:1], "--resume", "--set", "train.steps=2", "--set", "train.eval_every=0"]
    assert leave(capsys, "run", file, *longer)[0] == 0


def test_a_node_is_named_where_several_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = plain()
    page.nodes.append({**page.nodes[3], "id": 9, "widgets_values": ["g2rpo", 55]})
    page.nodes[4]["widgets_values"] = [*page.nodes[3]["widgets_values"]]
    page.nodes[4]["widgets_values"][1] = 55
    file = write(tmp_path / "two.json", page.tree())
    assert leave(capsys, "run", file, "--print")[0] == 2
    code, shown, _ = leave(capsys, "run", file, "--print", "--node", "9")
    assert code == 0 and yaml.safe_load(shown)["train"]["steps"] == 55
    assert leave(capsys, "run", file, "--print", "--node", "8")[0] == 2


def test_prompts_may_stand_in_a_recipe_themselves(tmp_path: Path) -> None:
    from g2rpo_trainer.config.file_checks import read_prompts

    tree = recipe_in(plain().tree())
    found = read_prompts(from_dict(tree))
    assert found.train[0] == "a red circle" and found.heldout == ("a yellow circle",)
    tree["prompts"] = {"train": "# none\n\n"}
    with pytest.raises(ValueError, match="the prompts holds no prompt"):
        read_prompts(from_dict(tree))
