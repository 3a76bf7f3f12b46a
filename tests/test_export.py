"""`g2rpo export` and `g2rpo check-lora`: what they write, say and refuse, on tiny models of diffusers' own
classes.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from lora_models import ALPHA, TINY, change, deltas, layers, pipeline_of, random_pairs
from program import call
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.lora.convert import renamed, scaled
from comfy_g2rpo.lora.key_names import FAMILIES, SD3
from g2rpo_trainer.config.reading import apply_overrides, find_recipe, from_dict, read_yaml
from g2rpo_trainer.families.sd3 import SD3 as SD3Policy
from g2rpo_trainer.families.sd3 import load_pipeline
from g2rpo_trainer.lora.ask_diffusers import in_diffusers
from g2rpo_trainer.lora.lora_files import add_frozen, read_any, start_from
from g2rpo_trainer.run import continue_from, load_policy

BUNDLED = Path(__file__).parent.parent / "models/tiny"
TO_Q = "transformer_blocks.0.attn.to_q"
Attention = tuple[Path, dict[str, Tensor]]


def export(source: Path, out: Path, *words: object, code: int = 0) -> None:
    """Run `g2rpo export`."""
    assert call("export", source, *words, "--out", out) == code


def merge(file: Path, weights: Mapping[str, Tensor], folder: Path, *words: object) -> dict[str, Tensor]:
    """Merge a LoRA into a file of these weights; return those that came out."""
    save_file(dict(weights), folder / "base.safetensors")
    export(file, folder / "merged.safetensors", "--merge", folder / "base.safetensors", *words)
    return load_file(folder / "merged.safetensors")


def by_parts(pairs: Mapping[str, tuple[Tensor, Tensor]], key: str) -> dict[str, Tensor]:
    """Name the halves of a LoRA, such as by x.{}.lora_{}: in diffusers' letters, or in kohya's words."""
    words = ("down", "up") if "unet" in key else ("A", "B")
    return {
        key.format(name, word): half
        for name, pair in pairs.items()
        for word, half in zip(words, pair, strict=True)
    }


def inner(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Take the layers of attention and feed-forward."""
    return {name: shape for name, shape in shapes.items() if ".attn" in name or ".ff" in name}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], atol: float = 1e-6) -> bool:
    """Say whether changes of weights are equal."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[key], other[key], rtol=0, atol=atol) for key in one
    )


@pytest.fixture
def attention(tmp_path: Path) -> Attention:
    """Write a LoRA on the tiny SD3's blocks as peft does: base_model.model., no alpha, its configuration
    beside it.
    """
    pairs = random_pairs({name: s for name, s in layers(TINY["sd3"].make()).items() if "blocks" in name})
    named = by_parts(pairs, "base_model.model.{}.lora_{}.weight")
    (tmp_path / "peft").mkdir()
    save_file(named, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": 3}))
    return tmp_path / "peft/adapter_model.safetensors", deltas(pairs)


def test_a_file_is_converted_there_and_back_and_its_metadata_kept(
    tmp_path: Path, attention: Attention, capsys
) -> None:
    file, wanted = attention
    tuned, native, back = (tmp_path / f"{name}.safetensors" for name in ("tuned", "native", "back"))
    export(file, tuned, "--family", "sd3")
    assert "note: 29 pairs have no alpha; taken from adapter_config.json" in capsys.readouterr().err
    export(tuned, native, "--form", "native")
    export(native, back, "--form", "diffusers")
    first, last = lora.read(tuned), lora.read(back)
    assert same({name: first.delta(name) for name in first.pairs}, wanted)
    assert same({name: last.delta(name) for name in last.pairs}, wanted)
    assert lora.read(native).style == "native" and last.metadata["g2rpo.family"] == "sd3"
    assert all(key.startswith("diffusion_model.joint_blocks.") for key in load_file(native))


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_the_exported_file_by_both_of_its_loaders(name: str, tmp_path: Path) -> None:
    base = TINY[name].make("cpu")
    pairs = random_pairs(layers(base))
    native = renamed(FAMILIES[name], scaled(pairs, dict.fromkeys(pairs, ALPHA)), "native")
    tensors: dict[str, Tensor] = {}
    for module, pair in native.items():
        tensors |= lora.named({module: pair}, len(pair[0]), "", "native")
    file, plain, bare = (tmp_path / f"{form}.safetensors" for form in ("native", "plain", "bare"))
    save_file(tensors, file)
    export(file, plain, "--form", "diffusers")
    export(file, bare, "--form", "diffusers", "--no-alpha")
    by_model, by_pipeline = copy.deepcopy(base), copy.deepcopy(base)
    by_model.load_lora_adapter(plain)
    pipeline_of(name, by_pipeline).load_lora_weights(plain if FAMILIES[name].pipeline_takes_alpha else bare)
    assert same(change(by_model), deltas(pairs)) and same(change(by_pipeline), deltas(pairs))
    assert not any(key.endswith(".alpha") for key in load_file(bare))
    for file in (plain, bare):
        taken = in_diffusers(load_file(file), read_any(file), FAMILIES[name])
        assert taken.adapter == pairs.keys()
        assert taken.pipeline == (
            pairs.keys() if file == bare or FAMILIES[name].pipeline_takes_alpha else set()
        )


def test_the_exported_file_gives_diffusers_the_output_of_training(tmp_path: Path) -> None:
    base = TINY["sd3"].make("cpu")
    pairs = random_pairs(inner(layers(base)))
    native = {name.replace(".", "_"): pair for name, pair in renamed(SD3, pairs, "native").items()}
    save_file(by_parts(native, "lora_unet_{}.lora_{}.weight"), tmp_path / "kohya.safetensors")
    export(tmp_path / "kohya.safetensors", tmp_path / "a.safetensors")
    merged, loaded = copy.deepcopy(base), copy.deepcopy(base)
    with torch.no_grad():
        for name, delta in deltas(pairs, 1.0).items():
            merged.get_submodule(name).weight += delta
    loaded.load_lora_adapter(tmp_path / "a.safetensors")
    noise = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=noise) for shape in ((2, 16, 8, 8), (2, 5, 32), (2, 32))]
    with torch.no_grad():
        times = torch.tensor([900.0, 200.0])
        plain, one, other = (model(*given, times).sample for model in (base, merged, loaded))
    assert (one - plain).abs().max() > 1e-2 and torch.allclose(one, other, atol=1e-5)


def test_the_rank_is_cut_with_the_error_stated(tmp_path: Path, attention: Attention, capsys) -> None:
    export(attention[0], tmp_path / "a.safetensors", "--family", "sd3", "--rank", 2)
    made = lora.read(tmp_path / "a.safetensors")
    missed = sum(float((made.delta(name) - attention[1][name]).square().sum()) for name in made.pairs)
    error = (missed / sum(float(delta.square().sum()) for delta in attention[1].values())) ** 0.5
    assert f"cut to rank 2: relative error {error:.2e}" in capsys.readouterr().out
    assert {len(down) for down, _ in made.pairs.values()} == {2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Save the tiny SD3 in two shards."""
    model = TINY["sd3"].make("cpu")
    model.save_pretrained(tmp_path / "base/transformer", max_shard_size="2MB")
    assert len(list((tmp_path / "base/transformer").glob("*.safetensors"))) > 1
    return tmp_path / "base"


def test_a_lora_is_merged_into_a_sharded_model(
    tmp_path: Path, base: Path, attention: Attention, capsys
) -> None:
    out = tmp_path / "merged.safetensors"
    export(attention[0], out, "--merge", base, "--strength", 0.5)
    assert "lost" in capsys.readouterr().out
    before, after = TINY["sd3"].make("cpu").state_dict(), load_file(out)
    assert before.keys() == after.keys()
    for key, weight in before.items():
        delta = attention[1].get(key.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(after[key], weight)
        else:
            assert torch.allclose(after[key], weight + 0.5 * delta, atol=1e-6)


def test_a_native_checkpoint_keeps_its_names_and_everything_else(
    tmp_path: Path, attention: Attention
) -> None:
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in native_shapes().items()}
    weights["first_stage_model.conv.weight"] = torch.ones(3, dtype=torch.float8_e4m3fn)
    after = merge(attention[0], weights, tmp_path)
    qkv = torch.cat([attention[1][f"transformer_blocks.0.attn.to_{part}"] for part in "qkv"])
    key = "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"
    assert after.keys() == weights.keys() and after[key].dtype == torch.bfloat16
    assert torch.allclose(after[key].float(), qkv, atol=1e-2 * float(qkv.abs().max()))
    assert torch.equal(after["first_stage_model.conv.weight"].float(), torch.ones(3))


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", None])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_merge_into_fp8_rounds_to_the_nearest_and_states_what_it_lost(
    tmp_path: Path, attention: Attention, dtype: torch.dtype, name: str | None, capsys
) -> None:
    noise, scale = torch.Generator().manual_seed(2), 0.25 if name else 1.0
    weights = {
        key: (torch.randn(shape, generator=noise) / scale).to(dtype) for key, shape in native_shapes().items()
    }
    scales = {key.replace("weight", name): torch.tensor(scale) for key in weights} if name else {}
    after, said = merge(attention[0], weights | scales, tmp_path), capsys.readouterr()
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()].unique()
    full = {key: (torch.eye(delta.shape[1]), delta) for key, delta in attention[1].items() if delta.ndim == 2}
    native = renamed(SD3, full, "native")
    lost = whole = 0.0
    for module, (down, up) in native.items():
        key, change = f"model.diffusion_model.{module}.weight", up @ down
        wanted = (weights[key].float() * scale + change) / scale
        off = (after[key].float() - wanted).abs()
        nearest = (numbers - wanted.flatten()[:64, None]).abs().amin(1)
        assert after[key].dtype == dtype and torch.allclose(off.flatten()[:64], nearest, rtol=0, atol=1e-6)
        lost, whole = lost + float((off * scale).square().sum()), whole + float(change.square().sum())
    assert f"lost {(lost / whole) ** 0.5:.1e} of the change" in said.out
    assert all(torch.equal(after[key], value) for key, value in scales.items())


def test_a_change_that_is_finer_than_fp8_is_noted_and_one_beyond_its_range_stays_finite(
    tmp_path: Path, base: Path, capsys
) -> None:
    weights = {k: torch.full(s, 440.0).to(torch.float8_e4m3fn) for k, s in native_shapes().items()}
    key = "joint_blocks.0.x_block.attn.proj"
    for size, merged, note in ((0.1, 448.0, True), (100.0, 448.0, True), (-100.0, 352.0, False)):
        pair = torch.full((1, 128), 1.0), torch.full((128, 1), size)
        file = tmp_path / f"{size}/lora.safetensors"
        file.parent.mkdir()
        lora.write(file, {key: pair}, 1, style="native")
        made = merge(file, weights, file.parent, "--family", "sd3")
        after = made[f"model.diffusion_model.{key}.weight"].float()
        assert (after == merged).all() and ("too coarse" in capsys.readouterr().err) == note


@pytest.mark.parametrize(
    ("dtype", "shape", "scales", "words"),
    [
        (torch.uint8, None, None, "U8, to which nothing can be added; give a model in 16 bit, 32 bit or fp8"),
        (torch.float8_e4m3fn, None, (4, 2), "has a scale per block"),
        (torch.float32, (3, 3), None, "another size"),
    ],
)
def test_what_cannot_take_a_lora_is_refused(
    tmp_path: Path, attention, dtype, shape, scales, words: str, capsys
) -> None:
    weights = {name: torch.zeros(shape or own).to(dtype) for name, own in native_shapes().items()}
    if scales:
        weights |= {name.replace("weight", "weight_scale"): torch.ones(scales) for name in weights}
    save_file(weights, tmp_path / "base.safetensors")
    export(attention[0], tmp_path / "a.safetensors", "--merge", tmp_path / "base.safetensors", code=2)
    assert words in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


def native_shapes() -> dict[str, tuple[int, ...]]:
    """Return the weights of the tiny SD3 as a published single file has them."""
    pairs = renamed(SD3, random_pairs(layers(TINY["sd3"].make())), "native")
    return {
        f"model.diffusion_model.{name}.weight": (len(up), *down.shape[1:])
        for name, (down, up) in pairs.items()
    }


def test_a_planted_update_is_extracted_with_the_error_stated(tmp_path: Path, base: Path, capsys) -> None:
    tuned = TINY["sd3"].make("cpu")
    planted = deltas(random_pairs(inner(layers(tuned)), rank=8), 1.0)
    with torch.no_grad():
        for name, delta in planted.items():
            tuned.get_submodule(name).weight += delta
        tuned.proj_out.bias += 1
    tuned.save_pretrained(tmp_path / "tuned")
    export(tmp_path / "tuned", tmp_path / "a.safetensors", "--extract", base, "--rank", 8)
    said = capsys.readouterr().out
    assert "rank 8: relative error" in said and float(said.split("relative error ")[1].split()[0]) <= 1e-4
    assert "left out: 1 changed tensors" in said and "proj_out.bias" in said
    made = lora.read(tmp_path / "a.safetensors")
    assert made.pairs.keys() == planted.keys()
    assert all((made.delta(name) - delta).norm() <= 1e-4 * delta.norm() for name, delta in planted.items())


def test_nothing_is_overwritten(tmp_path: Path, base: Path, attention: Attention, capsys) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.write_bytes(b"mine")
    for more in ((), ("--merge", base), ("--extract", base)):
        assert call("export", attention[0], *more, "--out", taken) == 2
        assert "never overwritten" in capsys.readouterr().err
    assert taken.read_bytes() == b"mine" and call("export", attention[0], "--out", attention[0]) == 2


def test_check_lora_names_what_is_wrong_and_what_mends_it(
    tmp_path: Path, base: Path, attention: Attention, capsys
) -> None:
    assert call("check-lora", attention[0], "--against", base) == 1
    said = capsys.readouterr().out
    assert "family: Stable Diffusion 3 and 3.5" in said and "base_model.model." in said
    assert "modules fit" in said and "lack their alpha" in said
    assert "adapter_config.json says 1.66667" in said and "g2rpo export" in said
    export(attention[0], tmp_path / "good.safetensors", "--family", "sd3")
    assert call("check-lora", tmp_path / "good.safetensors", "--against", base) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]


@pytest.mark.parametrize(
    ("family", "prefix", "words"),
    [
        ("flux", "base_model.model.", "ComfyUI ignores 50 modules"),
        ("flux", "transformer.", "50 load; diffusers: 50 load"),
        ("wan", "transformer.", "ComfyUI ignores 33 modules"),
        ("flux", "diffusion_model.", "ignores"),
        ("flux2", "transformer.", "load from ComfyUI 0.33 on only"),
    ],
)
def test_check_lora_says_what_loads_where(
    tmp_path: Path, family: str, prefix: str, words: str, capsys
) -> None:
    pairs = random_pairs(layers(TINY[family].make()))
    save_file(by_parts(pairs, prefix + "{}.lora_{}.weight"), tmp_path / "a.safetensors")
    call("check-lora", tmp_path / "a.safetensors")
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("family", "naming", "said"),
    [("wan", "native", 20), ("qwen_image", "native", 16), ("z_image", "diffusers", 24)],
)
def test_check_lora_knows_that_diffusers_loads_the_form_of_a_run(
    tmp_path: Path, family: str, naming: str, said: int, capsys
) -> None:
    shapes = {
        name: s for name, s in layers(TINY[family].make()).items() if re.search(r"attn|attention\.", name)
    }
    pairs = renamed(FAMILIES[family], random_pairs(shapes), naming)
    lora.write(tmp_path / "a.safetensors", pairs, ALPHA, style="native")
    call("check-lora", tmp_path / "a.safetensors", "--family", family)
    assert f"diffusers: {said} load as they are\n" in capsys.readouterr().out


def test_check_lora_recognises_other_adapters_and_other_models(tmp_path: Path, base: Path, capsys) -> None:
    pair = by_parts({TO_Q: (torch.ones(2, 64), torch.ones(64, 2))}, "transformer.{}.lora_{}.weight")
    save_file(pair | {f"transformer.{TO_Q}.dora_scale": torch.ones(64, 1)}, tmp_path / "a.safetensors")
    assert call("check-lora", tmp_path / "a.safetensors", "--against", base) == 1
    said = capsys.readouterr().out
    assert "DoRA" in said and "have another size in the model" in said
    export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--family", "sd3", code=2)
    assert "DoRA" in capsys.readouterr().err and not (tmp_path / "b.safetensors").exists()


def test_two_models_of_different_kinds_are_not_compared(tmp_path: Path, base: Path, capsys) -> None:
    native, out = tmp_path / "native.safetensors", tmp_path / "a.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in native_shapes().items()}, native)
    export(native, out, "--extract", base, code=2)
    assert "is sd3 (native) and" in capsys.readouterr().err
    export(base, out, "--extract", base, code=2)
    assert "differ in no matrix" in capsys.readouterr().err


def damaged(path: Path) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[:-100])


def configured(text: str) -> Callable[[Path], object]:
    """Write another configuration beside a file."""
    return lambda path: path.with_name("adapter_config.json").write_text(text)


def indexed(text: str) -> Callable[[Path], object]:
    """Write another index of shards."""
    return lambda folder: next(folder.glob("*.index.json")).write_text(text)


NAN = by_parts({"a": (torch.full((1, 1), torch.nan), torch.ones(1, 1))}, "{}.lora_{}.weight")
SPOILT = [
    (lambda path: path.write_bytes(b"\xff" * 100), "not a safetensors file"),
    (damaged, "damaged"),
    (lambda path: path.unlink(), "cannot read"),
    (configured("{"), "no JSON"),
    (configured('{"lora_alpha": "x"}'), "must be a number"),
    (lambda path: save_file(NAN, path), "NaN"),
    (lambda path: save_file({"unet.lora": torch.ones(1)}, path), "no known name"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT)
def test_hostile_files_are_one_clear_line(
    tmp_path: Path, attention: Attention, spoil, words: str, capsys
) -> None:
    spoil(attention[0])
    export(attention[0], tmp_path / "a.safetensors", "--family", "sd3", code=2)
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "a.safetensors").exists()


SPOILT_MODELS = [
    (lambda folder: next(folder.glob("*-00002-*")).unlink(), "finish the download"),
    (lambda folder: damaged(next(folder.glob("*-00002-*"))), "damaged"),
    (indexed("[]"), "no index of shards"),
    (indexed('{"weight_map": {"a": "../../x.safetensors"}}'), "which is no file beside it"),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILT_MODELS)
def test_a_damaged_model_is_one_clear_line(
    tmp_path: Path, base: Path, attention: Attention, spoil, words: str, capsys
) -> None:
    spoil(base / "transformer")
    export(attention[0], tmp_path / "a.safetensors", "--merge", base, code=2)
    assert words in capsys.readouterr().err and not (tmp_path / "a.safetensors").exists()


def test_a_run_starts_from_any_form_and_pads_the_rank(tmp_path: Path, attention: Attention) -> None:
    file, wanted = attention
    native = tmp_path / "native.safetensors"
    export(file, native, "--family", "sd3", "--form", "native")
    adapter = {name: (shape[0], 16, *shape[1:]) for name, shape in layers(TINY["sd3"].make()).items()}
    for source in (file, native):
        pairs = start_from(source, adapter, "sd3")
        assert same(deltas(pairs, 1.0), wanted)
    with pytest.raises(lora.LoraError, match=r"its rank is 3, lora\.rank is 2"):
        start_from(file, {name: (rows, 2, *rest) for name, (rows, _, *rest) in adapter.items()}, "sd3")
    with pytest.raises(lora.LoraError, match=r"change lora\.targets"):
        start_from(file, {TO_Q: adapter[TO_Q]}, "sd3")


def bundled(rank: int, alpha: float, seed: int, feed_forward: bool, trained: bool) -> SD3Policy:
    """Load the bundled model with a LoRA that has been trained, or not."""
    policy = SD3Policy(load_pipeline(BUNDLED, torch.float32))
    policy.add_lora(rank, alpha, seed=seed, feed_forward=feed_forward)
    for _, up in policy.pairs().values() if trained else ():
        torch.nn.init.normal_(up, std=0.02)
    return policy


def asked(policy: SD3Policy) -> tuple[Tensor, Tensor, list[object]]:
    """Draw what a velocity is asked at."""
    return (
        torch.randn(2, 16, 8, 8),
        torch.tensor([0.9, 0.3]),
        policy.encode(["a red circle", "a blue square"]),
    )


def test_an_exported_lora_is_trained_on_and_exported_again(tmp_path: Path) -> None:
    one, other = bundled(4, 8, 0, True, trained=True), bundled(16, 4, 1, True, trained=False)
    places = {name: tmp_path / f"{name}.safetensors" for name in ("one", "native", "bare", "two")}
    lora.write(places["one"], one.pairs(), 8)
    export(places["one"], places["native"], "--family", "sd3", "--form", "native")
    export(places["native"], places["bare"], "--family", "sd3", "--form", "diffusers")
    continue_from(other, places["native"], 4 / 16, "sd3")
    given = asked(one)
    assert torch.allclose(one.velocity(*given), other.velocity(*given), atol=1e-5)
    assert all(down[4:].any() for down, _ in other.pairs().values())  # the ranks that were added can learn
    lora.write(places["two"], other.pairs(), 4)
    files = [lora.read(places[name]) for name in ("one", "bare", "two")]
    changes = [{name: file.delta(name) for name in file.pairs} for file in files]
    assert same(changes[0], changes[1]) and same(changes[0], changes[2])


def test_a_run_stands_on_a_frozen_lora(tmp_path: Path) -> None:
    worn, bare = bundled(4, 4, 0, False, trained=True), SD3Policy(load_pipeline(BUNDLED, torch.float32))
    lora.write(tmp_path / "one.safetensors", worn.pairs(), 4)
    export(
        tmp_path / "one.safetensors", tmp_path / "native.safetensors", "--family", "sd3", "--form", "native"
    )
    overrides = ["model.lora=[{path: native.safetensors, strength: 1}]", "lora.rank=2"]
    config = from_dict(apply_overrides(read_yaml(find_recipe("demo")), overrides), near=tmp_path)
    policy = load_policy(config, "cpu")
    policy.add_lora(2, 2, seed=1)
    given = asked(worn)
    wanted = worn.velocity(*given)
    with policy.reference():
        assert torch.allclose(policy.velocity(*given), wanted, atol=1e-5)
    assert not torch.allclose(bare.velocity(*given), wanted, atol=1e-3)
    with pytest.raises(lora.LoraError, match=r"model\.lora.*is absent or of another size"):
        add_frozen(TINY["sd3"].make("cpu"), tmp_path / "native.safetensors", 1.0, "sd3")


def test_a_folder_means_its_only_file(attention: Attention) -> None:
    assert read_any(attention[0].parent).pairs.keys() == read_any(attention[0]).pairs.keys()
    save_file({"a": torch.ones(1)}, attention[0].with_name("b.safetensors"))
    with pytest.raises(lora.LoraError, match="holds 2 safetensors files"):
        read_any(attention[0].parent)
