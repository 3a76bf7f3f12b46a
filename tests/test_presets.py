"""Presets for cards, and what is said of memory before a run starts."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from flux_folder import transformer
from make_presets import RECIPES
from program import call
from test_memory import config

from g2rpo_trainer.config.reading import ConfigError, load
from g2rpo_trainer.cost import presets
from g2rpo_trainer.cost.card_memory import GIB
from g2rpo_trainer.cost.count_model import footprint, transformer_bytes
from g2rpo_trainer.cost.estimate import count
from g2rpo_trainer.cost.meta_model import build, look, of_published, published
from g2rpo_trainer.cost.meta_model import made as made_of
from g2rpo_trainer.cost.presets import SIZES, Card, preflight, preset_settings
from g2rpo_trainer.cost.price import Price, add_memory
from g2rpo_trainer.families.files.parts import FACTS as CONFIGS
from g2rpo_trainer.families.flux import Flux
from g2rpo_trainer.families.qwen_edit import QwenEdit
from g2rpo_trainer.families.qwen_image import QwenImage
from g2rpo_trainer.model.placing import check_card

pytestmark = pytest.mark.xdist_group("presets")  # one process makes what they share


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the configurations, and nothing else, of a FLUX.1 that is as wide as the published one and
    four blocks long.
    """
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24, "joint_attention_dim": 4096}
    parts = {
        "transformer": {**transformer().config, **sizes},
        "vae": json.loads((CONFIGS / "flux_dev.json").read_text("utf-8"))["vae"]["config"],
    }
    for name, content in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(
            json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8"
        )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), "utf-8")
    return folder


@pytest.mark.parametrize("family", RECIPES)
def test_every_preset_is_a_configuration_of_its_familys_recipe(family):
    own = presets.presets()[family]
    assert set(own) <= set(SIZES) and "24gb" in own
    for name in own:
        made = load(RECIPES[family], preset_settings(RECIPES[family], name))
        assert made.model.family == family and made.train.slots == own[name]["train.slots"]


@pytest.mark.parametrize("family", RECIPES)
def test_a_smaller_card_is_asked_for_no_more(family):
    own = [presets.presets()[family][name] for name in SIZES if name in presets.presets()[family]]
    bits = {"none": 16, "fp8": 8, "nf4": 4}
    for field in ("train.slots", "train.decode_batch"):
        assert [each[field] for each in own] == sorted(each[field] for each in own)
    for recomputes in (True, False):  # which leaves room for more latents at once
        alike = [each for each in own if each["memory.gradient_checkpointing"] is recomputes]
        found = [each["train.micro_batch"] for each in alike]
        assert found == sorted(found)
    assert [bits[each["memory.quantization"]] for each in own] == sorted(
        bits[each["memory.quantization"]] for each in own
    )


def test_what_is_set_goes_before_a_preset():
    assert load("flux_dev", preset_settings("flux_dev", "16gb", ["train.slots=3"])).train.slots == 3


@pytest.mark.parametrize(
    ("recipe", "name", "words"),
    [
        ("flux_dev", "18g", "--preset '18g' is unknown; a card of 18 GB takes 16gb; there are: 8gb"),
        ("demo", "lagre", "is unknown; choose one of"),
    ],
)
def test_a_preset_that_is_none_is_refused(recipe, name, words):
    with pytest.raises(ConfigError) as error:
        preset_settings(recipe, name)
    assert words in str(error.value)


@pytest.mark.long
def test_what_does_not_fit_is_refused_with_the_preset_that_does(wide, tmp_path):
    made = config(
        wide,
        "flux",
        tmp_path,
        model={"dtype": "bf16", "width": 1024, "height": 1024},
        train={"micro_batch": 8, "slots": 4},
    )
    card = Card("RTX 4060", 8 * GIB)
    with pytest.raises(
        ConfigError, match=r"needs ≈ \d+\.\d GiB \(estimate; most in update\), you have 8\.0 GiB \(RTX 4060\)"
    ) as error:
        preflight(made, card)
    assert "start it with --preset 8gb (≈ " in str(error.value) and str(error.value).endswith(
        "or go on with --force"
    )
    assert "no preset fits: lower model.width" in presets.remedy(made, Card("RTX 4060", GIB // 2))


def test_a_train_command_that_does_not_fit_ends_before_anything_is_loaded(
    wide, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(presets, "this_card", lambda device: Card("RTX 4060", GIB // 2))
    made = config(wide, "flux", tmp_path)
    recipe = tmp_path / "wide.yaml"
    recipe.write_text(
        yaml.safe_dump(made.model_dump(mode="json", exclude_none=True, exclude_defaults=True)), "utf-8"
    )
    assert call("train", recipe, "--out", tmp_path / "run") == 2
    assert "you have 512 MiB (RTX 4060)" in capsys.readouterr().err
    call("train", recipe, "--out", tmp_path / "run", "--force")
    said = capsys.readouterr()  # it went on, to a folder without weights
    assert "needs ≈ " in said.out and "this folder cannot be loaded" in said.err
    assert not (tmp_path / "run").exists()


def test_a_model_that_edits_needs_more_for_the_picture_that_it_looks_at(tmp_path):
    plain = of_published(published()["Qwen/Qwen-Image"], QwenImage)
    plain = dataclasses.replace(plain, transformer={**plain.transformer, "num_layers": 1})
    made = config(
        Path("models/tiny"),
        "qwen_image",
        tmp_path,
        model={"dtype": "bf16", "reference_size": 512, "width": 512, "height": 512},
    )
    peaks = [
        footprint(made, sketch).peaks["update"]
        for sketch in (plain, dataclasses.replace(plain, policy=QwenEdit))
    ]
    assert peaks[1] > 1.1 * peaks[0]


def test_a_model_that_a_sketch_does_not_tell_about_is_trained_without_an_estimate(
    wide, tmp_path, monkeypatch
):
    made = config(wide, "flux", tmp_path)
    monkeypatch.setenv("G2RPO_PLANS", str(tmp_path / "plans"))
    monkeypatch.setattr(Flux, "velocity", lambda self, x, sigma, cond: x[x > 0])
    assert preflight(made, Card("RTX 4060", GIB)).startswith("memory cannot be estimated for this model")
    found = Price(count(made), [])
    assert add_memory(found, made, torch.device("cpu"), large=False) == ""
    assert found.memory is None and [name for name, _ in found.rows] == ["memory"]


def test_packing_and_swapping_bring_the_estimate_down(wide, tmp_path):
    found = {}
    for name, memory in {
        "none": {},
        "fp8": {"quantization": "fp8"},
        "nf4": {"quantization": "nf4"},
        "swap": {"block_swap": 4},
    }.items():
        made = config(wide, "flux", tmp_path, model={"dtype": "bf16"}, memory=memory)
        found[name] = transformer_bytes(made, build(made, look(made.model)))
    # Embeddings and norms stay as they are.
    assert (
        found["swap"] < 0.2 * found["nf4"]
        and 0.5 < found["fp8"] / found["none"] < 0.54
        and 0.28 < found["nf4"] / found["none"] < 0.34
    )


@pytest.mark.parametrize("name", published())
def test_published_sizes_are_those_of_the_models(name):
    """Billions of weights as the models' cards say."""
    cards = {
        "FLUX.1": 11.9,
        "3.5-medium": 2.5,
        "3.5-large": 8.1,
        "Qwen-Image": 20.4,
        "1.3B": 1.4,
        "T2V-14B": 14.3,
        "5B": 5.0,
    }
    cards |= {"Lumina": 2.6, "Z-Image": 6.2, "klein-base-4B": 3.9, "klein-base-9B": 9.1, "FLUX.2-dev": 32.2}
    card = next(size for key, size in cards.items() if key in name)
    assert weights_of(name) / 1e9 == pytest.approx(card, rel=0.03)


def weights_of(name: str) -> int:
    """Count a published transformer's weights without making any."""
    with torch.device("meta"):
        return sum(
            tensor.numel()
            for tensor in made_of(of_published(published()[name], Flux).transformer).state_dict().values()
        )


def test_a_precision_that_a_card_does_not_know_is_refused_with_another(tmp_path):
    made = config(Path("models/tiny"), "sd3", tmp_path, memory={"quantization": "fp8"})
    with pytest.raises(
        ValueError, match=r"memory\.quantization is fp8, which Apple's GPUs do not know; set it to none"
    ):
        check_card(made.model, made.memory, torch.device("mps"))
    with pytest.raises(ValueError, match=r"memory\.block_swap .* set it to 0"):
        check_card(
            made.model,
            config(Path("models/tiny"), "sd3", tmp_path, memory={"block_swap": 1}).memory,
            torch.device("mps"),
        )
    assert check_card(made.model, made.memory, torch.device("cpu")) == ""


def test_a_card_that_computes_bf16_by_detours_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "GTX 1080")
    made = config(Path("models/tiny"), "sd3", tmp_path, model={"dtype": "bf16"})
    assert "GTX 1080 computes bf16 by detours, slowly; model.dtype: fp32" in check_card(
        made.model, made.memory, torch.device("cuda")
    )
