"""LoRA files from one form into another: the change of every weight stays what it was."""

from __future__ import annotations

import math

import pytest
import torch
from lora_models import ALPHA, RANK, TINY, deltas, layers, random_pairs
from torch import Tensor

from comfy_g2rpo.lora import MAX_NAME, LoraError
from comfy_g2rpo.lora.convert import extracted, family_of, renamed, resized, scaled, shapes, split
from comfy_g2rpo.lora.forms import check_sound, faults, understand
from comfy_g2rpo.lora.key_names import FAMILIES, FLUX, SD3, template

pytestmark = pytest.mark.xdist_group("lora_convert")  # one process makes what they share

Pairs = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def trained() -> dict[str, Pairs]:
    """Draw, for every family, a LoRA on every layer of diffusers' tiny model, its scale in the up
    matrices.
    """
    drawn = {name: random_pairs(layers(tiny.make())) for name, tiny in TINY.items()}
    return {name: scaled(pairs, dict.fromkeys(pairs, ALPHA)) for name, pairs in drawn.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Say whether changes of weights are equal to 1e-6."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=0, atol=1e-6) for key in one
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_diffusers_own_class_has_a_native_name(name: str, trained: dict[str, Pairs]) -> None:
    assert [module for module in trained[name] if FAMILIES[name].find(module) is None] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_again_gives_the_same_pairs(name: str, trained: dict[str, Pairs]) -> None:
    native = renamed(FAMILIES[name], trained[name], "native")
    back = renamed(FAMILIES[name], native, "diffusers")
    assert back.keys() == trained[name].keys()
    assert all(
        torch.equal(one, other)
        for key in back
        for one, other in zip(back[key], trained[name][key], strict=True)
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_native_lora_keeps_its_rank_there_and_back_again(name: str, trained: dict[str, Pairs]) -> None:
    shapes = {
        key: (len(up), *down.shape[1:])
        for key, (down, up) in renamed(FAMILIES[name], trained[name], "native").items()
    }
    native = random_pairs(shapes, seed=1)
    there = renamed(FAMILIES[name], native, "diffusers")
    back = renamed(FAMILIES[name], there, "native")
    assert all(len(down) == RANK for down, _ in there.values())
    assert back.keys() == native.keys()
    assert all(
        torch.equal(one, other) for key in back for one, other in zip(back[key], native[key], strict=True)
    )


def test_fusing_triples_the_rank_and_stacks_the_parts() -> None:
    names = [f"transformer_blocks.7.attn.{part}" for part in ("to_q", "to_k", "to_v")]
    pairs = random_pairs(dict.fromkeys(names, (6, 4)))
    (name, fused), *rest = renamed(SD3, pairs, "native").items()
    assert name == "joint_blocks.7.x_block.attn.qkv" and not rest and len(fused[0]) == 3 * RANK
    assert same({"": fused[1] @ fused[0]}, {"": torch.cat([up @ down for down, up in pairs.values()])})


def test_a_part_that_was_not_trained_changes_nothing() -> None:
    pairs = random_pairs(
        {"single_transformer_blocks.3.attn.to_k": (4, 4), "single_transformer_blocks.3.proj_mlp": (16, 4)}
    )
    native = renamed(FLUX, pairs, "native")
    down, up = native["single_blocks.3.linear1"]
    whole = up @ down
    assert whole.shape == (28, 4) and not whole[:4].any() and not whole[8:12].any() and whole[4:8].any()
    assert renamed(FLUX, native, "diffusers").keys() == pairs.keys()


def test_shift_and_scale_change_places_in_a_layer_that_has_but_these() -> None:
    last, inner = "transformer_blocks.1.norm1_context.linear", "transformer_blocks.0.norm1_context.linear"
    pairs = random_pairs({last: (8, 4), inner: (24, 4)})
    native = renamed(SD3, pairs, "native")
    one, other = native["joint_blocks.1.context_block.adaLN_modulation.1"][1], pairs[last][1]
    assert torch.equal(one[:4], other[4:]) and torch.equal(one[4:], other[:4])
    assert torch.equal(native["joint_blocks.0.context_block.adaLN_modulation.1"][1], pairs[inner][1])


def test_a_fresh_lora_keeps_its_rank_though_its_up_is_zero() -> None:
    link = SD3.find("joint_blocks.0.x_block.attn.qkv")
    parts = split(link, (torch.ones(2, 4), torch.zeros(12, 2)))
    assert len(parts) == 3 and all(len(down) == 2 for down, _ in parts.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_tell_the_family(name: str, trained: dict[str, Pairs]) -> None:
    assert family_of(shapes(trained[name]), "file").name == name
    assert family_of(shapes(renamed(FAMILIES[name], trained[name], "native")), "file").name == name


@pytest.mark.parametrize(
    ("width", "blocks", "name"),
    [(1536, 24, "sd3"), (3072, 19, "flux"), (3072, 60, "qwen_image"), (6144, 8, "flux2")],
)
def test_attention_alone_is_told_apart_by_published_sizes(width: int, blocks: int, name: str) -> None:
    one = (torch.zeros(1, width), torch.zeros(width, 1))
    pairs = {f"transformer_blocks.{i}.attn.to_q": one for i in range(blocks)}
    assert family_of(shapes(pairs), "file").name == name


def test_what_could_be_several_families_asks_which() -> None:
    pairs = shapes(random_pairs({"transformer_blocks.0.attn.to_q": (4, 4)}))
    with pytest.raises(
        LoraError, match="fits sd3 and flux and flux2 and qwen_image; say which with --family"
    ):
        family_of(pairs, "file")
    assert family_of(pairs, "file", "flux") is FLUX
    with pytest.raises(LoraError, match="is no module of Wan"):
        family_of(pairs, "file", "wan")


def test_a_module_that_nobody_knows_is_named() -> None:
    with pytest.raises(LoraError, match=r"down_blocks\.0\.attn is no module of a family"):
        family_of({"transformer_blocks.0.attn.to_q": (4, 4), "down_blocks.0.attn": None}, "file")


def test_cutting_the_rank_is_the_best_approximation_and_says_what_it_lost() -> None:
    pairs = random_pairs({"a": (20, 12), "b": (9, 30)}, rank=8)
    cut, error = resized(pairs, 5)
    changes, kept = deltas(pairs, 1.0), deltas(cut, 1.0)
    best = [torch.linalg.svdvals(change)[5:].square().sum() for change in changes.values()]
    whole = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    missed = math.sqrt(sum(float((changes[key] - kept[key]).square().sum()) for key in changes))
    assert all(len(down) == 5 for down, _ in cut.values())
    assert missed / whole == pytest.approx(error, rel=1e-4)
    assert missed == pytest.approx(math.sqrt(sum(map(float, best))), rel=1e-4)


def test_a_rank_that_is_small_already_is_left_alone() -> None:
    pairs = random_pairs({"a": (20, 12)})
    cut, error = resized(pairs, 8)
    assert error == 0 and torch.equal(cut["a"][0], pairs["a"][0])


@pytest.mark.parametrize(
    "shape", [(40, 30), (1500, 1200), (12, 4, 3, 3)], ids=["full SVD", "randomised SVD", "convolution"]
)
def test_extraction_finds_a_planted_update_of_rank_8(shape: tuple[int, ...]) -> None:
    change = deltas(random_pairs({"": shape}, rank=8), 0.01)[""]
    pair, missed, whole = extracted(change, 8)
    assert math.sqrt(missed / whole) <= 1e-4
    assert (deltas({"": pair}, 1.0)[""] - change).norm() <= 1e-4 * change.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scale_that_16_bits_would_round_is_multiplied_in_32(dtype: torch.dtype) -> None:
    pairs = {"a": (torch.ones(3, 2, dtype=dtype), torch.full((2, 3), 0.7, dtype=dtype))}
    assert scaled(pairs, {"a": 6.0})["a"][1].dtype == dtype
    wide = scaled(pairs, {"a": 5.0})["a"][1]
    assert wide.dtype == torch.float32 and torch.equal(wide, pairs["a"][1].float() * (5 / 3))


def test_the_number_of_a_block_is_the_first_one() -> None:
    assert template("blocks.12.ffn.net.0.proj") == ("blocks.{}.ffn.net.0.proj", "12")
    assert template("all_final_layer.2-1.linear") == ("all_final_layer.2-1.linear", "")


ONE = torch.ones(1, 1)
NAME = "transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    ("stem", "parts"),
    [
        (f"transformer.{NAME}", ("lora_A.weight", "lora_B.weight")),
        (f"transformer.{NAME}", ("lora.down.weight", "lora.up.weight")),
        (f"base_model.model.{NAME}", ("lora_A.weight", "lora_B.weight")),
        (f"transformer.base_model.model.{NAME}", ("lora_A.default.weight", "lora_B.default.weight")),
        (f"diffusion_model.{NAME}", ("lora_down.weight", "lora_up.weight")),
        (NAME, ("lora_A", "lora_B")),
        ("lora_transformer_transformer_blocks_0_attn_to_q", ("lora_down.weight", "lora_up.weight")),
        ("lycoris_transformer_blocks_0_attn_to_q", ("lora_down.weight", "lora_up.weight")),
    ],
)
def test_every_form_is_understood(stem: str, parts: tuple[str, str]) -> None:
    reading = understand(
        {f"{stem}.{part}": ONE for part in parts} | {f"{stem}.alpha": torch.tensor(2.0)}, {}, "file"
    )
    assert list(reading.pairs) == [NAME] and reading.alphas == {NAME: 2.0} and not faults(reading)


@pytest.mark.parametrize("name", FAMILIES)
def test_kohyas_names_are_undone_for_every_module(name: str, trained: dict[str, Pairs]) -> None:
    native = renamed(FAMILIES[name], trained[name], "native")
    tensors = {
        f"lora_unet_{key.replace('.', '_')}.lora_{part}.weight": ONE
        for key in native
        for part in ("down", "up")
    }
    reading = understand(tensors, {}, "file")
    assert reading.pairs.keys() == native.keys() and not reading.unknown


def test_peft_keeps_the_alpha_that_its_file_lacks() -> None:
    tensors = {f"base_model.model.{NAME}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    assert understand(tensors, {}, "file").alphas == {NAME: 4.0}
    plain = understand(tensors, {}, "file", {"lora_alpha": 8})
    assert (
        plain.alphas == {NAME: 8.0}
        and plain.missing_alpha == (NAME,)
        and plain.alpha_from == "adapter_config.json"
    )
    stable = understand(tensors, {}, "file", {"lora_alpha": 8, "use_rslora": True})
    assert stable.alphas[NAME] / 4 == 8 / math.sqrt(4)  # rsLoRA: alpha over the root of the rank
    packed = understand(
        tensors, {"lora_adapter_metadata": '{"transformer.lora_alpha": 6, "transformer.r": 4}'}, "file"
    )
    assert packed.alphas == {NAME: 6.0} and packed.alpha_from == "metadata"
    own = understand(tensors, {}, "file", {"lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2}})
    assert own.alphas == {NAME: 2.0}


@pytest.mark.parametrize("words", ["{", "[" * 10**5, "[1]", "null", "7", '{"r": 4}'])
def test_metadata_that_are_no_configuration_of_peft_say_nothing(words: str) -> None:
    tensors = {f"transformer.{NAME}.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    reading = understand(tensors, {"lora_adapter_metadata": words}, "file")
    assert reading.alphas == {NAME: 4.0} and reading.alpha_from == ""


@pytest.mark.parametrize("alpha", [True, "8", None, [8], 10**400, -(10**400), math.inf])
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_of_peft_is_a_number(field: str, alpha: object) -> None:
    tensors = {f"transformer.{NAME}.lora_{part}.weight": ONE for part in "AB"}
    adapter = {"lora_alpha": 8} | {field: {NAME: alpha} if field == "alpha_pattern" else alpha}
    with pytest.raises(LoraError, match=r"file: lora_alpha of its peft configuration is .* must be a number"):
        understand(tensors, {}, "file", adapter)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.ones(0), torch.ones(1, 3)])
def test_an_alpha_of_the_file_is_one_number(alpha: Tensor) -> None:
    tensors = {f"transformer.{NAME}.lora_{part}.weight": ONE for part in "AB"}
    with pytest.raises(LoraError, match=r"to_q\.alpha has \d values; it must be one number"):
        understand(tensors | {f"transformer.{NAME}.alpha": alpha}, {}, "file")


@pytest.mark.parametrize("keys", [(), ("lora_te1_text_model.lora_down.weight",), ("emb_params",)])
def test_a_file_without_pairs_is_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(LoraError, match="file holds no LoRA pair for the model; choose another file"):
        check_sound(understand(dict.fromkeys(keys, ONE), {}, "file"), "file")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({f"transformer.{NAME}.dora_scale": ONE}, "DoRA"),
        ({f"transformer.{NAME}.lora_magnitude_vector": ONE}, "DoRA"),
        ({f"transformer.{NAME}.hada_w1_a": ONE}, "another kind of adapter"),
        ({f"transformer.{NAME}.lokr_w1": ONE}, "another kind of adapter"),
        (
            {"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": ONE},
            "one of the two matrices is missing",
        ),
        ({"strange": ONE}, "no known name"),
        ({"transformer.a b.lora_A.weight": ONE}, "no known name"),
        ({"lora_unet_down_blocks_0_attn.lora_down.weight": ONE}, "no known name"),
        ({f"transformer.{'a' * (MAX_NAME + 1)}.lora_A.weight": ONE}, "no known name"),
    ],
)
def test_what_no_conversion_could_keep_is_named(extra: dict[str, Tensor], words: str) -> None:
    reading = understand({f"transformer.{NAME}.lora_{part}.weight": ONE for part in "AB"} | extra, {}, "file")
    assert len(faults(reading)) == 1 and words in faults(reading)[0]


def test_text_encoders_are_left_alone() -> None:
    tensors = {f"transformer.{NAME}.lora_{part}.weight": ONE for part in "AB"} | {
        "lora_te1_text_model_encoder.lora_down.weight": ONE
    }
    reading = understand(tensors, {}, "file")
    assert len(reading.text) == 1 and not faults(reading)


def test_a_module_in_two_forms_is_refused() -> None:
    tensors = {f"{prefix}{NAME}.lora_A.weight": ONE for prefix in ("transformer.", "base_model.model.")}
    with pytest.raises(LoraError, match="twice"):
        understand(tensors, {}, "file")
    native = "joint_blocks.0.x_block.attn.qkv"
    with pytest.raises(LoraError, match="comes twice"):
        renamed(SD3, random_pairs({NAME: (4, 4), native: (12, 4)}), "native")
