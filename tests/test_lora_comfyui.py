"""Every LoRA form that we write and every claim of check-lora, against the key maps of real ComfyUIs, for
every family.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flux2_folder
import pytest
import torch
from comfy_host import COMFYUIS, Answer, make_base, run_script
from diffusers.loaders import single_file_utils as published
from lora_models import ALPHA, PREFIXES, RANK, TINY, deltas, layers, random_pairs
from lora_outputs import CASES, Case
from safetensors.torch import save_file
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.lora.convert import renamed, scaled
from comfy_g2rpo.lora.core_loader import OLD, applied
from comfy_g2rpo.lora.forms import in_core, understand
from comfy_g2rpo.lora.key_names import FAMILIES, template
from comfy_g2rpo.lora.norm_names import NORMS, PARAMETERS
from g2rpo_trainer.families.flux2 import Flux2

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_lora.py")
CONVERTERS = {
    "sd3": published.convert_sd3_transformer_checkpoint_to_diffusers,
    "flux2": published.convert_flux2_transformer_checkpoint_to_diffusers,
    "wan": published.convert_wan_transformer_to_diffusers,
    "z_image": published.convert_z_image_transformer_checkpoint_to_diffusers,
}


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Draw, for every family, a LoRA on every layer of diffusers' tiny model; its alpha is not its rank."""
    shapes = {name: layers(tiny.make()) for name, tiny in TINY.items()}
    shapes["z_image"] |= {
        "t_embedder.mlp.0": (256, 256),
        "t_embedder.mlp.2": (256, 256),
    }  # in core no wider than the model
    return {name: random_pairs(shape) for name, shape in shapes.items()}


def write_form(path: Path, pairs: dict[str, tuple[Tensor, Tensor]], prefix: str) -> None:
    """Write a file as other programs do, alpha beside the pair."""
    tensors = {}
    for module, (down, up) in pairs.items():
        name = module.replace(".", "_") if prefix.endswith("_") else module
        names = (f"{prefix}{name}.lora_A.weight", f"{prefix}{name}.lora_B.weight", f"{prefix}{name}.alpha")
        tensors |= dict(
            zip(names, (down.contiguous(), up.contiguous(), torch.tensor(float(len(down)))), strict=True)
        )
    save_file(tensors, path)


@pytest.fixture(scope="module")
def files(
    trained: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str, bool]]:
    """Write our two forms for every family, and every form that check-lora speaks of."""
    folder, made = tmp_path_factory.mktemp("loras"), {}
    for name, pairs in trained.items():
        folded = scaled(pairs, dict.fromkeys(pairs, ALPHA))
        for style in lora.STYLES:
            path = folder / f"{name}-{style}.safetensors"
            ours = renamed(FAMILIES[name], folded, style)
            save_file(
                {
                    k: v
                    for m, p in ours.items()
                    for k, v in lora.named({m: p}, len(p[0]), path, style).items()
                },
                path,
            )
            made[f"{name}/{style}"] = (name, str(path), True)
            for prefix in PREFIXES:
                path = folder / f"{name}-{style}-{prefix}.safetensors"
                write_form(path, ours, prefix)
                made[f"{name}/{style}/{prefix}"] = (name, str(path), False)
    return made


PAIR = {"lora_down.weight": 2, "lora_up.weight": 2, "alpha": 0}
LAYOUTS = {
    "pair": PAIR,
    "peft": {"lora_A.weight": 2, "lora_B.weight": 2},
    "peft, adapter default": {"lora_A.default.weight": 2, "lora_B.default.weight": 2},
    "peft, another adapter": {"lora_A.style.weight": 2, "lora_B.style.weight": 2},
    "diffusers": {"lora.down.weight": 2, "lora.up.weight": 2},
    "old diffusers": {"lora_linear_layer.down.weight": 2, "lora_linear_layer.up.weight": 2},
    "bare": {"lora_A": 2, "lora_B": 2},
    "down alone": {"lora_down.weight": 2},
    "up alone": {"lora_up.weight": 2},
    "LoCon": PAIR | {"lora_mid.weight": 4},
    "LoCon in peft's names": {"lora_A.weight": 2, "lora_B.weight": 2, "lora_mid.weight": 4},
    "reshape": PAIR | {"reshape_weight": 1},
    "biases of matrices": {"lora_A.weight": 2, "lora_B.weight": 2, "lora_B.bias": 1},
    "DoRA": PAIR | {"dora_scale": 2},
    "DoRA of peft": {"lora_A.weight": 2, "lora_B.weight": 2, "lora_magnitude_vector": 1},
    "LoKr": {"lokr_w1": 2, "lokr_w2": 2, "alpha": 0},
    "LoKr of pairs": {"lokr_w1_a": 2, "lokr_w1_b": 2, "lokr_w2_a": 2, "lokr_w2_b": 2, "lokr_t2": 4},
    "LoHa": {"hada_w1_a": 2, "hada_w1_b": 2, "hada_w2_a": 2, "hada_w2_b": 2, "alpha": 0},
    "LoHa of Tucker's": dict.fromkeys(
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"), 4
    ),
    "half a LoHa": {"hada_w1_a": 2, "hada_w1_b": 2},
    "GLoRA": dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), 2),
    "OFT": {"oft_blocks": 3, "rescale": 1, "alpha": 0},
    "BOFT": {"oft_blocks": 4, "rescale": 1},
    "OFT of peft": {"oft_R.weight": 2},
    "diff": {"diff": 2},
    "diff and biases": {"diff": 2, "diff_b": 1},
    "biases": {"diff_b": 1},
    "norms": {"w_norm": 1, "b_norm": 1},
    "set": {"set_weight": 2},
    "diff over a pair": PAIR | {"diff": 2},
    "set over diff over LoKr": {"lokr_w1": 2, "lokr_w2": 2, "diff": 2, "set_weight": 2},
    "magnitude alone": {"dora_scale": 2},
}
ALL_PREFIXES = (
    *PREFIXES,
    *("lora_unet__", "lora_transformer__", "lycoris__"),
    *("model.diffusion_model.", "unet.", "transformer.base_model.model."),
)


def stems_of(family: str, modules: Iterable[str], naming: str, ends: tuple[str, ...]) -> list[str]:
    """Name the layers of a family's first blocks, natively or as diffusers does, and parameters of them."""
    first = [module for module in modules if template(module)[1] in ("", "0")]
    links = [FAMILIES[family].find(module) for module in first] + [link.at("0") for link in NORMS[family]]
    names = {name for link in links for name in NAMES[naming](link)}
    more = [name.replace("{}", "0") for name in PARAMETERS.get(family, ())]
    return [*more, *(name + end for name in sorted(names) for end in ends)]


NAMES = {"native": lambda link: {link.native}, "diffusers": lambda link: {*link.diffusers}}
EVERYWHERE = ("pair", "LoKr", "magnitude alone", "biases")


@pytest.fixture(scope="module")
def layouts(trained: dict[str, Any]) -> dict[str, tuple[str, dict[str, int]]]:
    """Name the keys of files of every layout, of every family, with their dimensions.

    A native and a diffusers name can lead to one weight, where the later one counts: each has its own file.
    """
    made = {}
    for family, naming in itertools.product(trained, NAMES):
        for prefix, (name, parts) in itertools.product(ALL_PREFIXES, LAYOUTS.items()):
            if prefix in ("diffusion_model.", "transformer.", "") or name in EVERYWHERE:
                ends = ("", ".bias", ".scale") if name in EVERYWHERE[:3] else ("",)
                stems = stems_of(family, trained[family], naming, ends)
                written = [stem.replace(".", "_") if prefix.endswith("_") else stem for stem in stems]
                keys = {f"{prefix}{stem}.{part}": n for stem in written for part, n in parts.items()}
                made[f"{family}/{name}/{prefix}/{naming}"] = (family, keys)
    return made | whole_files()


def whole_files() -> dict[str, tuple[str, dict[str, int]]]:
    """Name the keys of files that core renames first, and of some that it does not."""
    made = {}
    block = "double_blocks.0.img_attn"
    control = {
        f"{name}.lora_{part}": 2 for name in ("img_in", f"{block}.qkv") for part in ("A.weight", "B.weight")
    }
    control |= {f"{name}.lora_B.bias": 1 for name in ("img_in", f"{block}.qkv", "nowhere")}
    control |= {f"{block}.norm.key_norm.scale": 1, "single_blocks.0.norm.key_norm.scale": 1}
    made["flux/control//"] = ("flux", control)
    made["flux/no control//"] = ("flux", {key: control[key] for key in list(control)[:-1]})
    for family in ("wan", "flux"):
        fun = {
            f"lora_unet__blocks_0_{name}.{part}": count
            for name in ("cross_attn_k", "self_attn_q", "ffn_0", "norm3")
            for part, count in (PAIR | {"diff_b": 1}).items()
        }
        made[f"{family}/Wan Fun//"] = (family, fun)
        made[f"{family}/no Wan Fun//"] = (family, {key: fun[key] for key in fun if "cross_attn_k" not in key})
    return made


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Make the models whose output is compared."""
    folder = tmp_path_factory.mktemp("models")
    return {name: make(folder) for name, make in CASES.items()}


@pytest.fixture(scope="module", params=COMFYUIS)
def core(
    request: pytest.FixtureRequest,
    files: dict[str, Any],
    cases: dict[str, Case],
    layouts: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Answer:
    """Load all files in a ComfyUI."""
    base, outputs = make_base(tmp_path_factory.mktemp("base"), None), {}
    for name, case in cases.items():
        for file in case.loras.values():
            (base / "models/loras" / file.name).write_bytes(file.read_bytes())
        outputs[name] = (
            name.split()[0],
            str(case.transformer),
            {form: file.name for form, file in case.loras.items()},
        )
    inputs = {f"{name}|{key}": value for name, case in cases.items() for key, value in case.inputs.items()}
    return run_script(
        request.param, CHILD, base, {"files": files, "outputs": outputs, "layouts": layouts}, inputs
    )


def old(core: Answer) -> bool:
    """Say whether this ComfyUI is 0.3.64, which knows neither FLUX.2 nor Z-Image."""
    return not core.data["new"]


def of_core(core: Answer, name: str) -> dict[str, Tensor]:
    """Return the changes of weights that core computed for a file, by native key.

    Of what it leaves alone, zeros.
    """
    changed = {
        key.partition("|")[2]: value for key, value in core.tensors.items() if key.startswith(f"{name}|")
    }
    shapes = core.data[name]["shapes"]
    return {
        key.removeprefix("diffusion_model."): changed.get(key, torch.zeros(shape))
        for key, shape in shapes.items()
    }


def taken(core: Answer, name: str) -> bool:
    """Say whether core loaded a file whole."""
    return not any(core.data[name][what] for what in ("ignored", "strange", "errors"))


def in_diffusers_names(family: str, native: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename native weights by diffusers' own converter of published checkpoints."""
    if family in CONVERTERS:
        extra = {"pos_embed": torch.zeros(1, 1)} if family == "sd3" else {}
        return CONVERTERS[family]({**extra, **native})
    made = {}  # two converters know one size alone, and Qwen-Image's names are the same
    for key, value in native.items():
        if (link := FAMILIES[family].find(key.removesuffix(".weight"))) is not None:
            rows = [len(value) * share // sum(link.shares) for share in link.shares]
            whole = torch.cat(value.chunk(2)[::-1]) if link.swaps else value
            made |= {
                f"{name}.weight": part for name, part in zip(link.diffusers, whole.split(rows), strict=True)
            }
    return made


def skip_unknown(core: Answer, family: str) -> None:
    """Skip a family that this ComfyUI does not have."""
    if core.data[f"{family}/native"].get("missing"):
        assert old(core) and family in ("flux2", "z_image"), core.data[f"{family}/native"]["missing"]
        pytest.skip(f"this ComfyUI has no {family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_core_takes_every_key_of_the_native_form(core: Answer, family: str) -> None:
    skip_unknown(core, family)
    assert taken(core, f"{family}/native")


@pytest.mark.parametrize("family", FAMILIES)
def test_core_changes_the_weights_by_what_was_trained(
    core: Answer, family: str, trained: dict[str, Any]
) -> None:
    skip_unknown(core, family)
    computed = in_diffusers_names(family, of_core(core, f"{family}/native"))
    wanted = {f"{module}.weight": change for module, change in deltas(trained[family]).items()}
    assert RANK != ALPHA and wanted.keys() <= computed.keys()
    assert max((computed[key] - wanted[key]).abs().max() for key in wanted) <= 1e-6
    assert not any(value.any() for key, value in computed.items() if key not in wanted)


@pytest.mark.parametrize(
    ("name", "form"),
    [("sd3", "run"), ("flux2", "run"), ("flux2", "diffusers"), ("wan 2.1", "run"), ("wan 2.2 5B", "run")],
)
def test_core_answers_the_same_with_the_lora_that_a_run_leaves(
    core: Answer, cases: dict[str, Case], name: str, form: str
) -> None:
    skip_unknown(core, name.split()[0])
    case, said = cases[name], core.data[f"output {name}"][form]
    unpacked = case.base.reshape(case.inputs["x"].shape) if case.inputs["x"].ndim == 5 else case.base
    assert said == {"warnings": [], "mapped": case.modules[form]}
    assert (case.tuned - case.base).abs().max() > 1e-2
    assert (core.tensors[f"output|{name}"] - unpacked).abs().max() <= 1e-5
    assert (core.tensors[f"output|{name}|{form}"] - case.tuned.reshape(unpacked.shape)).abs().max() <= 1e-5


def test_flux2s_block_for_noise_levels_has_those_of_the_pipeline(core: Answer) -> None:
    skip_unknown(core, "flux2")
    sigmas = Flux2(flux2_folder.pipeline("klein"), guidance=1.0).pipeline_sigmas(20, (128, 32, 48))
    assert torch.allclose(core.tensors["flux2 sigmas"], sigmas, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.core])
def test_unfused_names_mean_the_same_where_core_maps_them(
    core: Answer, family: str, trained: dict[str, Any]
) -> None:
    skip_unknown(core, family)
    mapped = {module for module in trained[family] if FAMILIES[family].in_core(module)}
    assert mapped >= {
        module for module in trained[family] if re.search(r"to_q|to_out|ff|mlp|feed_forward", module)
    }
    computed = in_diffusers_names(family, of_core(core, f"{family}/diffusers"))
    wanted = deltas(trained[family])
    assert max((computed[f"{module}.weight"] - wanted[module]).abs().max() for module in mapped) <= 1e-6
    assert {key for key, value in computed.items() if value.any()} == {
        f"{module}.weight" for module in mapped
    }


@pytest.mark.parametrize("prefix", PREFIXES, ids=lambda prefix: prefix or "no prefix")
@pytest.mark.parametrize("style", lora.STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_check_lora_says_what_core_ignores(
    core: Answer, files: dict[str, Any], family: str, style: str, prefix: str
) -> None:
    skip_unknown(core, family)
    from safetensors.torch import load_file

    name = f"{family}/{style}/{prefix}"
    reading = understand(load_file(files[name][1]), {}, name)
    takes = {"both"} if old(core) else {"both", "0.33"}
    said = {
        module
        for module, form in reading.forms.items()
        if in_core(FAMILIES[family], module, form) not in takes
    }
    ignored = {understood for key in core.data[name]["ignored"] if (understood := module_of(key, reading))}
    assert not reading.unknown and said == ignored


WHOLE = [("flux", "control"), ("flux", "no control"), ("flux", "Wan Fun"), ("flux", "no Wan Fun")]
WHOLE += [("wan", "Wan Fun"), ("wan", "no Wan Fun")]
NOTHING = (
    "down alone",
    "OFT of peft",
    "peft, another adapter",
    "magnitude alone",
    "no control",
    "no Wan Fun",
)
"""What is not known under any name."""


@pytest.mark.parametrize(("family", "layout"), [*itertools.product(FAMILIES, LAYOUTS), *WHOLE])
def test_check_lora_knows_what_core_applies_of_every_layout(
    core: Answer, layouts: dict[str, Any], family: str, layout: str
) -> None:
    skip_unknown(core, family)
    version, seen = OLD if old(core) else "0.33", 0
    for name, (_, keys) in layouts.items():
        if not name.startswith(f"{family}/{layout}/"):
            continue
        answer = core.data[f"layout {name}"]
        said = applied({key: torch.ones([1] * count) for key, count in keys.items()}, FAMILIES[family])
        assert (version in said.stops) == isinstance(answer, str), (name, answer, said.stops)
        if isinstance(answer, list):
            assert {key for key in keys if said.keys[key] in ("both", version)} == set(answer), name
        seen += bool(answer)
    without = layout in NOTHING or (family, layout) in (("flux", "Wan Fun"), ("flux2", "biases"))
    assert bool(seen) != without


def module_of(key: str, reading: Any) -> str | None:
    """Return the module that an ignored key of a file belongs to."""
    from comfy_g2rpo.lora.forms import place

    found = place(key)
    return found and found[1]
