"""Loaders of a workflow as a recipe's model, the workflows that come along, and what is known of nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_host import ROOT, Server
from graph_forms import BLOCKS, TRAIN, Page, api_of, model_file, plain, recipe_in, refusal, rewire
from make_node_table import table, written
from workflow_api import to_api

from comfy_g2rpo.blocks.block_settings import TINY_MODEL
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.model_files import ModelFolders
from g2rpo_trainer.workflows.node_table import KINDS, TABLE
from g2rpo_trainer.workflows.training_recipe import read_workflow

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Lay out a models folder with the least files that are told apart."""
    root = tmp_path / "models"
    model_file(
        root / "checkpoints/whole.safetensors", "sd3", "model.diffusion_model.", {".SelfAttention.": 0}
    )
    model_file(root / "checkpoints/other.safetensors", "sd3", "model.diffusion_model.")
    model_file(root / "unet/flux.safetensors", "flux", more={"guidance_in.in_layer.weight": 0})
    model_file(root / "diffusion_models/sub/z.safetensors", "z_image")
    for place in ("text_encoders/one", "clip/two", "vae/ae", "loras/style"):
        model_file(root / f"{place}.safetensors", "sd3", more={"some.weight": 0})
    model_file(root / "loras/words.safetensors", "sd3", more={"text_encoders.clip_l.x.weight": 0})
    return root


def real(**train: Any) -> Page:
    """Return a graph that takes its parts from separate files: loaders are nodes 1 to 3, the block is 5."""
    page = Page()
    page.add("UNETLoader", unet_name="sub\\z.safetensors")
    page.add("CLIPLoader", clip_name="one.safetensors", device="cpu")
    page.add("VAELoader", vae_name="ae.safetensors")
    page.add("G2RPO_LoadReward", reward="agreement")
    wires = {"model": (1, 0), "clip": (2, 0), "vae": (3, 0), "reward": (4, 0)}
    page.add(
        "G2RPO_TrainLoRA", **{**wires, "prompts": "a\nb", "guidance": 4.0, "negative": "blurry", **train}
    )
    return page


def test_loaders_become_files_below_the_models_folder(models: Path) -> None:
    made = recipe_in(real().tree(), ModelFolders((models,)))
    assert made["model"] == {
        "transformer": str(models / "diffusion_models/sub/z.safetensors"),
        "text_encoders": [str(models / "text_encoders/one.safetensors")],
        "vae": str(models / "vae/ae.safetensors"),
        "family": "z_image",
        "dtype": "fp32",
        "max_sequence_length": 512,
        "guidance": 4.0,
        "negative_prompt": "blurry",
        "width": 512,
        "height": 512,
        "schedule": "comfyui",
    }
    assert made["memory"] == {"text_encoders": "cpu"}
    from_dict(made)


def test_a_checkpoint_brings_all_three_parts(models: Path) -> None:
    page = plain()
    page.nodes[0] |= {"type": "CheckpointLoaderSimple", "widgets_values": ["whole.safetensors"]}
    made = recipe_in(page.tree(), ModelFolders((models,)))["model"]
    assert made["path"] == str(models / "checkpoints/whole.safetensors")
    assert (made["family"], made["max_sequence_length"]) == ("sd3", 77)
    page.nodes[0]["widgets_values"] = ["other.safetensors"]
    assert recipe_in(page.tree(), ModelFolders((models,)))["model"]["max_sequence_length"] == 0


def handed_over(**given: Any) -> Page:
    """Return a graph that hands the plain training over, with the names of files in the place of loaders."""
    page = Page()
    page.add("G2RPO_LoadReward", reward="agreement")
    page.add("G2RPO_LoadReward", reward="strict")
    wires = {"reward": (1, 0), "heldout_reward": (2, 0)}
    page.add("G2RPO_SubmitTraining", **{"model": TINY_MODEL, **TRAIN, **wires, **given})
    return page


def test_what_is_handed_over_is_trained_here_alike() -> None:
    assert recipe_in(handed_over().tree()) == recipe_in(plain().tree())
    assert recipe_in(api_of(handed_over())) == recipe_in(plain().tree())
    page = plain()
    page.nodes[3]["mode"] = 2
    assert "is muted or bypassed" in refusal(page.tree())
    page.nodes += [{**node, "id": node["id"] + 10} for node in handed_over().nodes]
    assert "reward" in refusal(page.tree())  # that block's own wires are not there


def test_names_on_a_block_are_files_below_the_models_folder(models: Path) -> None:
    names = {"model": "sub/z.safetensors", "text_encoder_2": "one.safetensors", "vae": "ae.safetensors"}
    page = handed_over(**names, guidance=4.0, negative="blurry")
    made, loaded = (recipe_in(each.tree(), ModelFolders((models,))) for each in (page, real()))
    assert made["model"] == {**loaded["model"], "width": 64, "height": 64}
    whole = handed_over(model="whole.safetensors (checkpoint)")
    made = recipe_in(whole.tree(), ModelFolders((models,)))["model"]
    assert made["path"] == str(models / "checkpoints/whole.safetensors") and "vae" not in made
    for name in ("../outside.safetensors", "/etc/passwd", "gone.safetensors", "whole.safetensors"):
        for widget in ("model", "text_encoder_1", "vae"):
            said = refusal(handed_over(**{**names, widget: name}).tree(), ModelFolders((models,)))
            assert "G2RPO_SubmitTraining, id 3" in said, (widget, name)


def test_loras_keep_their_order_and_the_last_shift_counts(models: Path) -> None:
    page = real()
    for kind, more in (
        ("ModelSamplingSD3", {"shift": 9.0}),
        ("LoraLoader", {"clip": (2, 0), "lora_name": "style.safetensors", "strength_model": 0.5}),
        ("LoraLoaderModelOnly", {"lora_name": "words.safetensors", "strength_model": -1.0}),
        ("ModelSamplingSD3", {"shift": 5.5}),
    ):
        last = len(page.nodes)
        page.add(kind, model=(last if last > 5 else 1, 0), **more)
    rewire(page, "model", (9, 0), 5)
    rewire(page, "clip", (7, 1), 5)
    made = recipe_in(page.tree(), ModelFolders((models,)))
    assert made["model"]["lora"] == [
        {"path": str(models / "loras/style.safetensors"), "strength": 0.5},
        {"path": str(models / "loras/words.safetensors"), "strength": -1.0},
    ]
    assert made["method"]["shift"] == 5.5 and "schedule" not in made["model"]


def test_a_lora_for_text_encoders_is_refused(models: Path) -> None:
    page = real()
    page.add("LoraLoader", model=(1, 0), clip=(2, 0), lora_name="words.safetensors")
    rewire(page, "clip", (6, 1), 5)
    assert "strength_clip to 0" in refusal(page.tree(), ModelFolders((models,)))


def test_guidance_that_is_an_input_is_what_comfyui_gives(models: Path) -> None:
    page = real(guidance=1.0)
    page.nodes[0]["widgets_values"][0] = "flux.safetensors"
    page.add("ModelSamplingFlux", model=(1, 0), width=512, height=512)
    rewire(page, "model", (6, 0), 5)
    made = recipe_in(page.tree(), ModelFolders((models,)))
    assert made["model"]["guidance"] == 3.5 and "negative_prompt" not in made["model"]
    # As ComfyUI's node computes it: 1024 tokens lie a fifth of the way from 0.5 to 1.15.
    assert made["method"]["shift"] == pytest.approx(2.718281828**0.63, rel=1e-6)
    given = handed_over(model="flux.safetensors", guidance=2.5, negative="blurry")
    made = recipe_in(given.tree(), ModelFolders((models,)))["model"]
    assert made["guidance"] == 2.5 and "negative_prompt" not in made
    page.nodes[4]["widgets_values"][5] = 4.0
    assert "set it to 1" in refusal(page.tree(), ModelFolders((models,)))


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/../../b", "C:\\x", "", ".", "x\0y", "link.safetensors"],
)
def test_names_lead_nowhere_but_below_the_models(models: Path, name: str) -> None:
    model_file(models.parent / "outside.safetensors", "z_image")
    (models / "diffusion_models/link.safetensors").symlink_to(models.parent / "outside.safetensors")
    page = real()
    page.nodes[0]["widgets_values"][0] = name
    said = refusal(page.tree(), ModelFolders((models,)))
    assert "UNETLoader, id 1" in said
    if name.startswith("link"):
        assert "lies outside" in said
        assert recipe_in(page.tree(), ModelFolders((models, models.parent)))


# The workflows that come along


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_shipped_workflow_is_a_recipe_or_names_its_node(path: Path, tmp_path: Path) -> None:
    folders = ModelFolders((shipped_models(tmp_path),))
    if path.stem.startswith(("Train a LoRA", "Train beside", "Before and after")):
        assert from_dict(read_workflow(path, folders).tree).rewards
    else:
        with pytest.raises(WorkflowError, match=r"node '.*' \(G2RPO_\w+, id \d+(:\d+)*\)"):
            read_workflow(path, folders)


def shipped_models(place: Path) -> Path:
    """Lay out what the shipped workflows load."""
    whole = "model.diffusion_model."
    model_file(place / "checkpoints/sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors", "sd3", whole)
    guided = {f"{whole}guidance_in.in_layer.weight": 0}
    model_file(place / "checkpoints/flux1-dev-fp8.safetensors", "flux", whole, guided)
    model_file(place / "diffusion_models/z_image_bf16.safetensors", "z_image")
    model_file(place / "text_encoders/qwen_3_4b.safetensors", "sd3")
    model_file(place / "vae/ae.safetensors", "sd3")
    return place


@pytest.mark.comfyui
@pytest.mark.xdist_group("served")
def test_both_formats_of_shipped_workflows_say_the_same(served: Server, tmp_path: Path) -> None:
    schemas, folders = served.get("/object_info"), ModelFolders((shipped_models(tmp_path),))

    def outcome(tree: Any) -> Any:
        try:
            return recipe_in(tree, folders)
        except WorkflowError as error:
            return str(error).partition(" (")[2]  # the converter drops titles

    for path in WORKFLOWS:
        tree = json.loads(path.read_text("utf-8"))
        both = outcome(tree), outcome(to_api(tree, schemas))
        if isinstance(both[0], dict):
            assert both[0] == both[1], path.stem
        else:
            assert "G2RPO_" in both[0] and "G2RPO_" in both[1], path.stem


# What is known of nodes


def test_the_table_has_our_blocks_as_they_are() -> None:
    for kind, known in KINDS.items():
        if kind in BLOCKS:
            inputs = {each["id"]: each for each in BLOCKS[kind]["inputs"]}
            assert set(inputs) == {*known.sockets, *known.widgets}, kind
            assert list(known.widgets) == [name for name in inputs if name in known.widgets], kind
            assert [type_ for _, type_ in known.outputs] == BLOCKS[kind]["outputs"], kind
            for name, widget in known.widgets.items():
                assert widget.default in (inputs[name].get("default"), inputs[name].get("options", [None])[0])


@pytest.mark.comfyui
@pytest.mark.xdist_group("served")
def test_the_table_is_what_comfyui_says(served: Server) -> None:
    """After a change of a node, renew it: python tools/make_node_table.py."""
    assert written(table(served.get("/object_info"))) == TABLE.read_text("utf-8")
