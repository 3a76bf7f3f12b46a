"""One block Submit Training is one training, whether `g2rpo run` reads its graph or a worker its job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from graph_forms import TRAIN, Page, large_file, model_file, recipe_in, write
from program import leave
from safetensors.torch import save
from test_graph_job import TINY, write_job

from comfy_g2rpo.blocks.block_settings import TINY_MODEL
from comfy_g2rpo.lora.key_names import FAMILIES
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.config.file_checks import read_prompts
from g2rpo_trainer.config.reading import Config, from_dict, make_pace, make_recipe
from g2rpo_trainer.cost.presets import presets
from g2rpo_trainer.jobs.graph_job import Owner, prepared
from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.model_files import FAMILY_FACTS, ModelFolders

LONG = " ".join(["a very long prompt"] * 20)
LENGTHS = {"sd3": 0, "flux": 256, "flux2": 512, "qwen_image": 512, "wan": 512, "z_image": 512, "lumina2": 256}
"""What texts are filled up to, without a T5 for sd3: it must be the model's own."""
NAMES = {"text_encoder_1": "one.safetensors", "text_encoder_2": "none", "text_encoder_3": "none"}
NAMES |= {"vae": "ae.safetensors"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out models of 1.3 B parameters, in 16 and in 32 bit, and text encoders with and without T5."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        for dtype in ("BF16", "F32"):
            large_file(root / f"diffusion_models/{family}_{dtype}.safetensors", family, "", (), dtype)
    large_file(root / "diffusion_models/flux_guided.safetensors", "flux", "", ["guidance_in.in_layer.weight"])
    model_file(root / "diffusion_models/small.safetensors", "wan")
    for name, more in (("one", {}), ("t5", {".SelfAttention.": 0})):
        model_file(root / f"text_encoders/{name}.safetensors", "sd3", "", more)
    model_file(root / "vae/ae.safetensors", "sd3")
    return root


def run_way(models: Path, **given: Any) -> Config:
    """Return what `g2rpo run` makes of a graph."""
    page = Page()
    page.add("G2RPO_LoadReward", reward="agreement")
    page.add("G2RPO_SubmitTraining", **{**TRAIN, **NAMES, "reward": (1, 0), **given})
    return from_dict(recipe_in(page.tree(), ModelFolders.of([models])))


def job(family: str, parameters: int, **given: Any) -> dict[str, Any]:
    """Return the job that the block writes for the same widgets."""
    widgets = {"negative": "", **TRAIN, **NAMES, **given}
    name = widgets["model"]
    model = write_job.Model("diffusion_models", name, family, parameters)
    own = {key: value for key, value in widgets.items() if key in write_job.Order.__dataclass_fields__}
    own |= {"model": TINY if name == TINY_MODEL else model, "text_encoders": (widgets["text_encoder_1"],)}
    own |= {"reward": (write_job.Judge("agreement"),), "heldout_reward": (), "mix": "zscore"}
    return write_job.job_of(write_job.Order(**own))[0]


def same(one: Config, other: Config) -> None:
    """See that two recipes train alike."""
    assert (one.model, one.memory, one.lora) == (other.model, other.memory, other.lora)
    assert (make_recipe(one), make_pace(one)) == (make_recipe(other), make_pace(other))
    assert (one.rewards, one.heldout_rewards) == (other.rewards, other.heldout_rewards)
    mine, theirs = read_prompts(one), read_prompts(other)
    assert (mine.train, mine.heldout) == (theirs.train, theirs.heldout)


CASES = {
    **{f"{family} in {dtype}": (family, dtype, {}) for family in FAMILIES for dtype in ("BF16", "F32")},
    "sd3 with T5": ("sd3", "BF16", {"text_encoder_1": "t5.safetensors"}),
    "sd3 with T5, long": ("sd3", "BF16", {"text_encoder_1": "t5.safetensors", "prompts": LONG}),
    "sd3, long": ("sd3", "BF16", {"prompts": LONG}),
    "flux, long": ("flux", "BF16", {"prompts": LONG}),
    "flux guided": ("flux", "guided", {"guidance": 3.5}),
    "flux guided, long held-out": ("flux", "guided", {"heldout_prompts": LONG}),
    "wan, shifted": ("wan", "BF16", {"changes": "shift = 5.0", "guidance": 4.0, "negative": "blurry"}),
}
ENDS = {"sd3 with T5": 77, "sd3 with T5, long": 256, "flux guided, long held-out": 512}


@pytest.mark.parametrize("case", CASES)
def test_a_block_is_one_training_both_ways(case: str, models: Path, tmp_path: Path) -> None:
    family, dtype, given = CASES[case]
    given = {"model": f"{family}_{dtype}.safetensors", **given}
    here = run_way(models, **given)
    there = prepared(job(family, 1_300_000_000, **given), ModelFolders.of([models]), tmp_path / "job")
    same(here, from_dict(there["recipe"]))
    assert here.model.max_sequence_length == ENDS.get(case, LENGTHS[family])
    assert here.model.dtype == "bf16" and here.memory.gradient_checkpointing


def test_small_models_keep_their_activations_and_compute_in_fp32(models: Path, tmp_path: Path) -> None:
    for given in ({"model": "small.safetensors"}, {"model": TINY_MODEL}):
        here = run_way(models, **given)
        there = prepared(job("wan", 16, **given), ModelFolders.of([models]), tmp_path / "job")
        same(here, from_dict(there["recipe"]))
        assert here.model.dtype == "fp32" and not here.memory.gradient_checkpointing


def test_every_family_is_compared() -> None:
    assert set(LENGTHS) == set(FAMILIES) == set(FAMILY_FACTS)


def test_what_a_job_says_itself_and_its_owner_comes_first(models: Path, tmp_path: Path) -> None:
    asked = job("wan", 1_300_000_000, model="wan_BF16.safetensors")
    asked["recipe"]["model"] |= {"max_sequence_length": 64, "dtype": "fp32"}
    asked["recipe"]["memory"] = {"gradient_checkpointing": False}
    folders = ModelFolders.of([models])
    made = from_dict(prepared(asked, folders, tmp_path / "job")["recipe"])
    assert (made.model.max_sequence_length, made.model.dtype) == (64, "fp32")
    assert not made.memory.gradient_checkpointing
    own = Owner(folders, ["model.max_sequence_length=32"]).prepare(asked, tmp_path / "job")
    assert own["settings"] == ["model.max_sequence_length=32"]
    # A job of before said nothing of memory.
    del asked["recipe"]["memory"]
    assert prepared(asked, folders, tmp_path / "job")["recipe"]["memory"] == {"gradient_checkpointing": True}


def test_a_file_that_holds_no_model_is_named_without_its_place(models: Path, tmp_path: Path) -> None:
    bad = models / "diffusion_models/bad.safetensors"
    for content, says in (
        (b"x", "bad.safetensors is not a safetensors file"),
        (save({"x": torch.zeros(1)}), "models.model loads 'bad.safetensors', which holds no model"),
    ):
        bad.write_bytes(content)
        asked = job("wan", 1_300_000_000, model=bad.name)
        with pytest.raises(WorkflowError, match=says) as refused:
            prepared(asked, ModelFolders.of([models]), tmp_path / "job")
        assert str(models) not in str(refused.value)


def submitted(place: Path, **given: Any) -> Path:
    """Write a graph that hands the tiny training over."""
    page = Page()
    page.add("G2RPO_LoadReward", reward="agreement")
    page.add("G2RPO_SubmitTraining", **{**TRAIN, **NAMES, "reward": (1, 0), "model": TINY_MODEL, **given})
    return write(place / "graph.json", page.tree())


def test_run_takes_a_preset_and_an_extra_model_paths_file(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = tmp_path / "extra.yaml"
    kinds = {"diffusion_models": "diffusion_models", "clip": "text_encoders", "vae": "vae"}
    paths.write_text(yaml.safe_dump({"mine": {"base_path": str(models), **kinds}}))
    graph = submitted(tmp_path, model="wan_BF16.safetensors")
    words = ("run", graph, "--print", "--models", paths)
    code, plain, _ = leave(capsys, *words)
    assert code == 0
    code, shown, _ = leave(capsys, *words, "--preset", "16GB", "--set", "train.slots=3")
    assert code == 0
    before, made = yaml.safe_load(plain), yaml.safe_load(shown)
    assert made["model"]["transformer"] == str(models / "diffusion_models/wan_BF16.safetensors")
    changes = presets()["wan"]["16gb"]
    spelt = {f"{part}.{name}": made[part][name] for part in ("memory", "train") for name in made[part]}
    assert {**changes, "train.slots": 3}.items() <= spelt.items()
    assert before["train"]["slots"] == 16 and "vae_tiling" not in before["memory"]
    code, _, error = leave(capsys, *words, "--preset", "3gb")
    assert code == 2 and "--preset '3gb' is unknown" in error
    code, _, error = leave(capsys, "run", graph, "--print", "--models", tmp_path / "gone")
    assert code == 2 and "gone is neither a folder nor a file" in error


def test_a_run_that_has_begun_keeps_what_was_told_of_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, run = submitted(tmp_path), tmp_path / "run"
    words = ("run", graph, "--out", run, "--quiet", "--set=method.num_steps=2", "--set=train.eval_prompts=1")
    first = (*words, "--set=train.steps=1", "--set=model.dtype=bf16")
    assert leave(capsys, *first)[0] == 0
    # This version would tell fp32 of the same file.
    code, _, error = leave(capsys, *words, "--resume", "--set=train.steps=2")
    assert code == 0, error
    content = RunFolder(run).config()["config"]
    assert (content["model"]["dtype"], content["train"]["steps"]) == ("bf16", 2)
