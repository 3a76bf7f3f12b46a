"""LoRA files: one strength in every loader, and nothing strange is read."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfy_g2rpo import lora
from comfy_g2rpo.lora import LoraError

PAIRS = {
    "transformer_blocks.0.attn.to_q": (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        torch.ones(5, 4),
    ),
    "transformer_blocks.0.attn.to_out.0": (torch.ones(4, 3), torch.full((2, 4), 0.5)),
}


@pytest.mark.parametrize("style", lora.STYLES)
def test_a_file_has_the_change_of_weight_that_was_trained(tmp_path: Path, style: str) -> None:
    lora.write(tmp_path / "a.safetensors", PAIRS, 8.0, style=style, metadata={"step": 3})
    read = lora.read(tmp_path / "a.safetensors")
    assert read.style == style
    assert read.metadata["step"] == "3"
    for module, (down, up) in PAIRS.items():
        assert torch.equal(read.delta(module), 8 / 4 * up @ down)


@pytest.mark.parametrize(
    ("style", "names"),
    [("diffusers", {"lora_A.weight", "lora_B.weight"}), ("native", {"lora_down.weight", "lora_up.weight"})],
)
def test_every_pair_has_its_alpha_and_needs_no_scale(tmp_path: Path, style: str, names: set[str]) -> None:
    lora.write(tmp_path / "a.safetensors", PAIRS, 8.0, style=style)
    prefix = lora.STYLES[style][0]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == {
            f"{prefix}{module}.{name}" for module in PAIRS for name in (*names, "alpha")
        }
        assert all(file.get_tensor(f"{prefix}{module}.alpha") == 4 for module in PAIRS)


def test_a_foreign_alpha_is_kept_and_a_missing_one_means_rank(tmp_path: Path) -> None:
    weights = {
        "transformer.a.lora_A.weight": torch.ones(4, 2),
        "transformer.a.lora_B.weight": torch.ones(2, 4),
    }
    save_file(weights, tmp_path / "without.safetensors")
    save_file(weights | {"transformer.a.alpha": torch.tensor(2.0)}, tmp_path / "with.safetensors")
    assert lora.read(tmp_path / "without.safetensors").alphas == {"a": 4.0}
    assert lora.read(tmp_path / "with.safetensors").delta("a")[0, 0] == 2


def test_convolutions_are_pairs_too(tmp_path: Path) -> None:
    lora.write(tmp_path / "a.safetensors", {"conv": (torch.ones(2, 3, 3, 3), torch.ones(5, 2, 1, 1))}, 2.0)
    assert lora.read(tmp_path / "a.safetensors").delta("conv").shape == (5, 3, 3, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_diverged_adapter_is_not_written(tmp_path: Path, bad: float) -> None:
    with pytest.raises(LoraError, match="NaN"):
        lora.write(tmp_path / "a.safetensors", {"a": (torch.full((1, 1), bad), torch.ones(1, 1))}, 1.0)
    assert not any(tmp_path.iterdir())


ONE = torch.ones(1, 1)
LONG = "a" * lora.MAX_NAME
PAIR = {"transformer.a.lora_A.weight": ONE, "transformer.a.lora_B.weight": ONE}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.lora_A.weight": ONE}, "no LoRA key that starts with"),
        (PAIR | {"transformer.a.dora_scale": ONE}, "dora_scale"),
        (PAIR | {"transformer.a b.alpha": ONE}, "not of the form"),
        (PAIR | {"diffusion_model.a.lora_up.weight": ONE}, "not of the form"),
        ({"transformer.a.lora_A.weight": ONE}, "lacks its lora_B.weight"),
        ({"transformer.a.lora_B.weight": ONE}, "lacks its lora_A.weight"),
        ({"transformer.a.alpha": torch.tensor(1.0)}, "lacks its lora_A.weight"),
        (PAIR | {"transformer.a..alpha": ONE}, "not of the form"),
        ({f"transformer.{LONG}x.{part}": ONE for part in ("lora_A.weight", "lora_B.weight")}, "module name"),
        (PAIR | {"transformer.a.lora_B.weight": torch.ones(1, 2)}, "must be"),
        (PAIR | {"transformer.a.lora_A.weight": torch.ones(1)}, "must be"),
        (PAIR | {"transformer.a.lora_A.weight": torch.tensor(1.0)}, "must be"),
        (PAIR | {"transformer.a.lora_B.weight": torch.ones(1)}, "must be"),
        (
            {
                "transformer.a.lora_A.weight": torch.ones(0, 1),
                "transformer.a.lora_B.weight": torch.ones(1, 0),
            },
            "must be",
        ),
        (PAIR | {"transformer.a.lora_A.weight": torch.ones(1, 1, dtype=torch.int8)}, "non-float"),
        (PAIR | {"transformer.a.lora_B.weight": torch.ones(1, 1, dtype=torch.int8)}, "non-float"),
        (PAIR | {"transformer.a.lora_A.weight": torch.full((1, 1), torch.nan)}, "NaN"),
        (PAIR | {"transformer.a.lora_B.weight": torch.full((1, 1), -torch.inf)}, "NaN"),
        (PAIR | {"transformer.a.alpha": torch.tensor(torch.nan)}, "NaN"),
        (PAIR | {"transformer.a.alpha": torch.tensor(torch.inf)}, "infinite"),
        (PAIR | {"transformer.a.alpha": torch.ones(2)}, "one number"),
    ],
)
def test_what_no_loader_could_apply_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], words: str
) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=rf"a\.safetensors.*{words}"):
        lora.read(tmp_path / "a.safetensors")


def test_a_module_name_may_be_as_long_as_is_said(tmp_path: Path) -> None:
    lora.write(tmp_path / "a.safetensors", {LONG: (ONE, ONE)}, 1.0)
    assert lora.read(tmp_path / "a.safetensors").alphas == {LONG: 1.0}


def test_nothing_to_write_and_unknown_styles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no LoRA pair"):
        lora.write(tmp_path / "a.safetensors", {}, 1.0)
    with pytest.raises(LoraError, match="choose one of: diffusers, native"):
        lora.write(tmp_path / "a.safetensors", PAIRS, 1.0, style="kohya")
    with pytest.raises(LoraError, match="module name"):
        lora.write(tmp_path / "a.safetensors", {"../a": (ONE, ONE)}, 1.0)


def test_the_pairs_that_fit_are_counted_and_zero_is_an_error(tmp_path: Path) -> None:
    lora.write(tmp_path / "a.safetensors", PAIRS, 4.0)
    assert lora.check(tmp_path / "a.safetensors") == 2
    assert lora.check(tmp_path / "a.safetensors", ["transformer_blocks.0.attn.to_q.weight", "other"]) == 1
    with pytest.raises(LoraError, match="fits no module"):
        lora.check(tmp_path / "a.safetensors", ["blocks.0.qkv"])


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=noise),
        "timestep": torch.tensor([900.0, 200.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=noise),
        "pooled_projections": torch.randn(2, 32, generator=noise),
    }


def test_diffusers_loads_the_strength_that_was_trained(
    tmp_path: Path, inputs: dict[str, torch.Tensor]
) -> None:
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "caption_projection_dim": 128,
        "sample_size": 8,
    }
    sizes |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "pos_embed_max_size": 8}
    base = diffusers.SD3Transformer2DModel(in_channels=16, num_layers=2, **sizes)
    trained = copy.deepcopy(base)
    trained.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False
        )
    )
    weights = peft.get_peft_model_state_dict(trained)
    modules = {key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")}
    pairs = {name: (weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]) for name in modules}
    lora.write(tmp_path / "a.safetensors", pairs, 8.0)

    by_file, by_pipeline = copy.deepcopy(base), copy.deepcopy(base)
    by_file.load_lora_adapter(tmp_path / "a.safetensors")
    parts = dict.fromkeys(
        ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        by_pipeline, diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )
    pipeline.load_lora_weights(lora.read(tmp_path / "a.safetensors").state_dict())
    with torch.no_grad():
        wanted, plain = trained(**inputs).sample, base(**inputs).sample
        assert (wanted - plain).abs().max() > 1e-3
        assert (by_file(**inputs).sample - wanted).abs().max() <= 1e-6
        assert (by_pipeline(**inputs).sample - wanted).abs().max() <= 1e-6


def test_metadata_is_readable_without_loading_tensors(tmp_path: Path) -> None:
    lora.write(
        tmp_path / "a.safetensors",
        PAIRS,
        8.0,
        metadata={"recipe": "g2rpo", "rewards": json.dumps(["agreement"])},
    )
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "recipe": "g2rpo",
            "rewards": '["agreement"]',
            "modelspec.implementation": "diffusers",
            "ss_network_dim": "4",
            "ss_network_alpha": "4",
        }
