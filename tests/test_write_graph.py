"""`g2rpo workflow`: a recipe as a ComfyUI workflow, which says the same when it is read back; what it cannot
say is named.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from comfy_host import Server
from drawn_pictures import colourful
from graph_forms import large_file, model_file
from program import leave
from workflow_api import every_node, to_api

from comfy_g2rpo.lora.key_names import FAMILIES
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.config.bundled import bundled_recipes
from g2rpo_trainer.config.comfyui_models import FOLDERS
from g2rpo_trainer.config.file_checks import read_prompts
from g2rpo_trainer.config.reading import Config, from_dict, load, make_pace, make_recipe
from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.graph_writer import written_workflow
from g2rpo_trainer.workflows.model_files import FAMILY_FACTS, ModelFolders
from g2rpo_trainer.workflows.training_recipe import read_workflow

TINY = ("demo", "demo_multi", "demo_gated")
PARTS = {"checkpoint": "checkpoints", "transformer": "diffusion_models"}
PARTS |= {"text_encoders": "text_encoders", "vae": "vae"}
MODEL_FIELDS = {"path", "transformer", "text_encoders", "vae", "schedule", "max_sequence_length", "frames"}
SMALL = ["train.steps=1", "train.eval_prompts=2", "train.eval_noises=1", "method.num_steps=4"]
SMALL += ["rewards=[exposure]", "heldout_rewards=[exposure, colourfulness]"]
"""Rewards without thresholds: what differs by rounding scores alike."""


def same_training(one: Config, other: Config) -> None:
    """See that two recipes train alike."""
    assert make_recipe(one) == make_recipe(other)
    assert make_pace(one) == make_pace(other)
    assert one.lora == other.lora
    for part in ("rewards", "heldout_rewards"):
        both = (
            [(e.name, e.weight, getattr(e, "gate", None)) for e in getattr(c, part)] for c in (one, other)
        )
        assert next(both) == next(both)
    mine, theirs = read_prompts(one), read_prompts(other)
    assert (mine.train, mine.heldout) == (theirs.train, theirs.heldout)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_comes_back_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "made.json"
    code, shown, errors = leave(capsys, "workflow", name, "--out", file)
    assert (code, shown, errors) == (0, f"{file}\n", "")
    code, shown, errors = leave(capsys, "run", file, "--print")
    assert (code, errors) == (0, "")
    recipe, back = load(name), from_dict(yaml.safe_load(shown))
    same_training(recipe, back)
    assert (back.model, back.memory, back.rewards) == (recipe.model, recipe.memory, recipe.rewards)
    assert back.heldout_rewards == recipe.heldout_rewards


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out the usual files of every family."""
    place = tmp_path_factory.mktemp("models")
    for family, known in FAMILY_FACTS.items():
        for part, folder in PARTS.items():
            names = known.get(part, [])
            for name in [names] if isinstance(names, str) else names:
                prefix = "model.diffusion_model." if part == "checkpoint" else ""
                more = [f"{prefix}guidance_in.in_layer.weight"] if known.get("guided") else []
                more += [".SelfAttention."] if known.get("t5_may_lack") else []
                large_file(place / folder / name, family, prefix, more)
    return place


def test_every_family_has_its_facts() -> None:
    assert set(FAMILY_FACTS) == set(FAMILIES)
    assert set(PARTS.values()) < set(FOLDERS)


@pytest.mark.parametrize("name", [each for each in bundled_recipes() if each not in TINY])
def test_a_real_recipe_comes_back_but_for_what_is_named(name: str, usual: Path, tmp_path: Path) -> None:
    recipe, file = load(name), tmp_path / "made.json"
    try:
        made = written_workflow(recipe, name)
    except WorkflowError as error:
        assert "start from pictures" in str(error) and name in ("flux_kontext", "qwen_edit")
        return
    file.write_text(made.text, "utf-8")
    back = from_dict(read_workflow(file, ModelFolders((usual,))).tree)
    same_training(recipe, back)
    named = {line.split(" is ")[0] for line in made.unsaid}
    for section in ("model", "memory", "speed", "report"):
        mine, theirs = dict(getattr(recipe, section)), dict(getattr(back, section))
        other = {f"{section}.{key}" for key in mine if mine[key] != theirs[key]}
        assert other <= named, section
    assert {each for each in named if each.startswith("model.")} <= {f"model.{each}" for each in MODEL_FIELDS}
    (note,) = (node for node in every_node(json.loads(made.text)) if node["type"] == "MarkdownNote")
    assert all(line in note["widgets_values"][0] for line in made.unsaid)


def tree(**changes: Any) -> dict[str, Any]:
    """Return a recipe of the tiny model as nested tables."""
    made = {
        "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
        "rewards": [{"name": "agreement"}],
        "prompts": {"train": "a red circle\ntwo blue squares\n", "heldout": "a green circle\n"},
    }
    return {**made, **changes}


RULES = ("jpeg", "webp", "sharpness", "colourfulness", "exposure", "symmetry", "strict")


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards": [{"name": "agreement", "weight": -2.5}]},
        {"rewards": [{"name": "agreement", "gate": 0.25}]},
        {"rewards": [{"name": "agreement"}, {"name": "jpeg", "weight": 0, "gate": -3.5}]},
        {"rewards": [{"name": name, "weight": i + 1} for i, name in enumerate(RULES)]},
        {"heldout_rewards": [{"name": name, "weight": i % 2} for i, name in enumerate(RULES)]},
        {"rewards": [{"name": "palette", "palette": ["#ff8800", "002244"], "gate": 0.5}]},
        {"method": {"name": "flow_grpo", "steps": "all_but_last", "shift": 2.25}},
        {"method": {"name": "mix_grpo", "mix": "sum"}},
        {"train": {"steps": 7, "seed": 2**31 - 1, "slots": 3, "minutes": 1.5, "watch": "off"}},
        {"train": {"steps": 200_000, "prompts_per_step": 2000}},
        {"lora": {"rank": 7, "alpha": 3.5, "targets": "attention+feed_forward"}},
        {"model": {**tree()["model"], "guidance": 4.5, "negative_prompt": "blurry, \u00fcgly \u2603"}},
        {"model": {**tree()["model"], "schedule": "comfyui"}},
    ],
    ids=str,
)
def test_settings_of_all_kinds_come_back(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe, file = from_dict(tree(**changes)), tmp_path / "made.json"
    made = written_workflow(recipe, "mine")
    assert made.unsaid == []
    file.write_text(made.text, "utf-8")
    back = from_dict(read_workflow(file, ModelFolders()).tree)
    assert {each.name: each for each in back.rewards} == {each.name: each for each in recipe.rewards}
    assert {e.name: e for e in back.heldout_rewards} == {e.name: e for e in recipe.heldout_rewards}
    assert make_recipe(back) == make_recipe(recipe) and make_pace(back) == make_pace(recipe)
    assert (back.lora, back.model) == (recipe.lora, recipe.model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"memory": {"block_swap": 3}}, "memory.block_swap is 3"),
        ({"speed": {"tail_stride": 2}}, "speed.tail_stride is 2"),
        ({"lora": {"init": "FILE"}}, "lora.init is "),
        ({"model": {**tree()["model"], "sizes": ["64x64", "64x48"]}}, "model.sizes is [64x64, 64x48]"),
        ({"model": {**tree()["model"], "schedule": "pipeline"}}, "model.schedule is pipeline"),
        ({"report": {"trackers": ["wandb"]}}, "report.trackers is [wandb]"),
        ({"heldout_rewards": [{"name": "jpeg", "weight": 0}]}, "heldout_rewards.jpeg.weight is 0"),
        ({"heldout_rewards": [{"name": "j", "url": "http://localhost:1"}]}, "reward j: it asks a judge"),
        ({"prompts": {"train": "\n".join(map(str, range(9)))}}, "prompts: 9 and 0 held-out ones, 7 and 2"),
        (
            {"prompts": {"train": "ROWS", "heldout": "a b\n"}},
            "prompts: only their texts are here, without shape",
        ),
    ],
    ids=str,
)
def test_what_a_block_cannot_say_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "shape": "x"}\n')
    lora = model_file(tmp_path / "lora.safetensors", "sd3")
    given = json.dumps(changes).replace("FILE", str(lora)).replace("ROWS", str(tmp_path / "rows.jsonl"))
    made = written_workflow(from_dict(tree(**json.loads(given))), "mine")
    assert any(line.startswith(named) for line in made.unsaid), made.unsaid
    assert named in made.text.replace('\\"', '"')


@pytest.mark.parametrize(
    ("name", "run"), [("_été 2026.", "t-2026"), ("demo", "demo"), ("é", ""), ("a" * 99, "a" * 64)]
)
def test_the_run_is_called_like_the_recipe(name: str, run: str, tmp_path: Path) -> None:
    (tmp_path / "made.json").write_text(written_workflow(from_dict(tree()), name).text, "utf-8")
    assert read_workflow(tmp_path / "made.json", ModelFolders()).run == run


def test_loaders_name_the_recipes_files(tmp_path: Path) -> None:
    files = {
        name: str(large_file(tmp_path / f"models/{folder}/sub/{name}.safetensors", "z_image"))
        for name, folder in (("t", "diffusion_models"), ("e", "text_encoders"), ("v", "vae"), ("l", "loras"))
    }
    model = {"family": "z_image", "transformer": files["t"], "text_encoders": [files["e"]], "vae": files["v"]}
    model |= {"dtype": "bf16", "max_sequence_length": 512, "lora": [{"path": files["l"], "strength": 0.5}]}
    memory = {"text_encoders": "cpu", "quantization": "fp8", "gradient_checkpointing": True}
    recipe = from_dict(tree(model=model, memory=memory))
    made, file = written_workflow(recipe, "mine"), tmp_path / "made.json"
    assert made.unsaid == []
    file.write_text(made.text, "utf-8")
    back = from_dict(read_workflow(file, ModelFolders((tmp_path / "models",))).tree)
    assert (back.model, back.memory) == (recipe.model, recipe.memory)


def test_a_picture_to_be_like_is_loaded(tmp_path: Path) -> None:
    picture = tmp_path / "sea.png"
    colourful(64, (64, 64), 0).save(picture)
    recipe = from_dict(tree(rewards=[{"name": "phash", "reference": str(picture)}]))
    made, file = written_workflow(recipe, "mine"), tmp_path / "made.json"
    assert made.unsaid == []
    file.write_text(made.text, "utf-8")
    assert from_dict(read_workflow(file, ModelFolders((), tmp_path)).tree).rewards == recipe.rewards


def test_a_recipe_that_no_block_trains_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkflowError, match="no block gives what this recipe trains on"):
        written_workflow(from_dict(tree(rewards=["votes"], heldout_rewards=["jpeg"])), "mine")
    file = tmp_path / "made.json"
    file.write_text("mine")
    code, _, errors = leave(capsys, "workflow", "demo", "--out", file)
    assert code == 2 and "--replace" in errors and file.read_text() == "mine"
    assert leave(capsys, "workflow", "demo", "--out", file, "--replace")[0] == 0


@pytest.mark.comfyui
@pytest.mark.long
@pytest.mark.xdist_group("served")
def test_comfyui_trains_a_written_workflow_as_the_command_does(
    served: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = tmp_path / "made.json", "written-by-a-test"
    settings = [word for each in (*SMALL, f"out={run}") for word in ("--set", each)]
    assert leave(capsys, "workflow", "demo", "--out", file, *settings)[0] == 0
    graph = to_api(json.loads(file.read_text("utf-8")), served.get("/object_info"))
    entry = served.wait(served.post_prompt(graph))
    assert entry["status"]["status_str"] == "success", entry["status"]
    theirs = RunFolder.open(served.base / "output/g2rpo" / run).metrics()
    assert leave(capsys, "run", file, "--quiet", "--out", tmp_path / "mine")[0] == 0
    mine = RunFolder.open(tmp_path / "mine").metrics()
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [0, 1, 1]
    # Up to the first update: their adapters are shaped otherwise, because ComfyUI's layers are fused.
    for ours, other in zip(mine[:2], theirs[:2], strict=True):
        shared = [name for name in other if name.startswith(("reward/", "heldout/", "advantage/"))]
        assert len(shared) >= 3
        for name in shared:
            assert ours[name] == pytest.approx(other[name], abs=1e-5), name
