"""What loads a LoRA file: diffusers, as check-lora says it does, and our own drawing of pictures, whatever
the file's form.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from lora_models import ALPHA, PREFIXES, TINY, change, deltas, layers, pipeline_of, random_pairs
from safetensors.torch import save_file
from some_cases import some
from torch import Tensor, nn

from comfy_g2rpo import lora
from comfy_g2rpo.lora.convert import renamed, scaled
from comfy_g2rpo.lora.forms import understand
from comfy_g2rpo.lora.key_names import FAMILIES, SD3, Family
from g2rpo_trainer.families.sd3 import SD3 as SD3Policy
from g2rpo_trainer.families.sd3 import load_pipeline
from g2rpo_trainer.lora.ask_diffusers import in_diffusers

pytestmark = pytest.mark.xdist_group("lora_loaders")  # one process makes what they share

BUNDLED = Path(__file__).parent.parent / "models/tiny"
TO_Q = "transformer_blocks.0.attn.to_q"
FORMS = [
    (prefix, names, alpha)
    for prefix in PREFIXES
    for names, alpha in (("AB", True), ("AB", False), (("down", "up"), True))
    if not (prefix.endswith("_") and names == "AB") and prefix != "lycoris_"
]


@pytest.mark.parametrize("style", lora.STYLES)
@pytest.mark.parametrize("name", some(FAMILIES, 3))
def test_check_lora_says_what_diffusers_loads(name: str, style: str) -> None:
    base = TINY[name].make("cpu")
    shapes = {
        key: shape
        for key, shape in layers(base).items()
        if re.match(r"(transformer_blocks|blocks|layers)\.0\.", key)
    }
    ours = renamed(FAMILIES[name], random_pairs(shapes), style)
    loaded = 0
    for prefix, (down, up), alpha in FORMS:
        tensors = {}
        for module, pair in ours.items():
            key = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
            tensors |= {f"{key}.lora_{down}.weight": pair[0], f"{key}.lora_{up}.weight": pair[1]}
            tensors |= {f"{key}.alpha": torch.tensor(ALPHA)} if alpha else {}
        reading = understand(tensors, {}, "file")
        said = in_diffusers(tensors, reading, FAMILIES[name]).pipeline
        changed = by_pipeline(name, base, tensors)
        scales = {module: ALPHA / len(pair[0]) if alpha else 1.0 for module, pair in ours.items()}
        true = {
            module
            for module, pair in ours.items()
            if is_there(FAMILIES[name], module, pair, scales[module], changed)
        }
        assert said == true, (prefix, down, alpha)
        loaded += len(said) == len(ours)
    assert loaded or (name, style) in (("sd3", "native"), ("flux", "native"), ("lumina2", "native"))


def by_pipeline(name: str, base: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `load_lora_weights` changes; nothing where it raises, whatever it raises."""
    model = copy.deepcopy(base)
    try:
        pipeline_of(name, model).load_lora_weights(dict(tensors))
    except Exception:
        return {}
    return change(model)


def is_there(
    family: Family, module: str, pair: tuple[Tensor, Tensor], scale: float, changed: Mapping[str, Tensor]
) -> bool:
    """Say whether a module of a file is in a model as it was trained."""
    wanted = deltas(renamed(family, {module: pair}, "diffusers"), scale)
    return all(
        key in changed and torch.allclose(changed[key], delta, atol=1e-5) for key, delta in wanted.items()
    )


@pytest.fixture(scope="module")
def worn(tmp_path_factory: pytest.TempPathFactory) -> tuple[SD3Policy, Path]:
    """The bundled model with a LoRA of alpha ≠ rank, and a folder of that LoRA in every form."""
    policy, folder = SD3Policy(load_pipeline(BUNDLED, torch.float32)), tmp_path_factory.mktemp("forms")
    policy.add_lora(4, 8, seed=0, feed_forward=True)
    for up in (up for _, up in policy.pairs().values()):
        torch.nn.init.normal_(up, std=0.02)
    pairs = {name: (down.detach(), up.detach()) for name, (down, up) in policy.pairs().items()}
    native = renamed(SD3, scaled(pairs, dict.fromkeys(pairs, 8)), "native")
    for form, named, parts, alpha in (
        ("transformer.", pairs, "AB", 8),
        ("base_model.model.", pairs, "AB", None),
        ("lora_unet_", native, ("down", "up"), -1),
        ("diffusion_model.", native, ("down", "up"), -1),
        ("lora_transformer_", pairs, ("down", "up"), 8),
    ):
        tensors = {}
        for name, pair in named.items():
            key = form + (name.replace(".", "_") if form.endswith("_") else name)
            tensors |= {f"{key}.lora_{part}.weight": tensor for part, tensor in zip(parts, pair, strict=True)}
            tensors |= (
                {}
                if alpha is None
                else {f"{key}.alpha": torch.tensor(float(len(pair[0]) if alpha < 0 else alpha))}
            )
        (folder / form.strip("._")).mkdir()
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in tensors.items()},
            folder / form.strip("._") / "lora.safetensors",
        )
    (folder / "base_model.model/adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 4}))
    return policy, folder


@pytest.mark.parametrize(
    "form", ["transformer", "base_model.model", "lora_unet", "diffusion_model", "lora_transformer"]
)
def test_pictures_are_drawn_with_a_lora_of_any_form(worn: tuple[SD3Policy, Path], form: str) -> None:
    policy, drawing = worn[0], SD3Policy(load_pipeline(BUNDLED, torch.float32))
    drawing.load_lora(worn[1] / form / "lora.safetensors")
    x, sigma, cond = (
        torch.randn(2, 16, 8, 8),
        torch.tensor([0.9, 0.3]),
        policy.encode(["a red circle", "a blue square"]),
    )
    with torch.no_grad():
        assert torch.allclose(drawing.velocity(x, sigma, cond), policy.velocity(x, sigma, cond), atol=1e-5)


def test_a_lora_that_does_not_fit_draws_no_picture(worn: tuple[SD3Policy, Path], tmp_path: Path) -> None:
    one = (torch.ones(1, 3), torch.ones(5, 1))
    for name, words in (
        ("single_blocks.0.linear1", "fits no module"),
        (TO_Q, f"1 of its modules, such as {TO_Q}, are absent or of anot"),
    ):
        lora.write(tmp_path / f"{name}.safetensors", {name: one}, 1)
        with pytest.raises(lora.LoraError, match=words):
            worn[0].load_lora(tmp_path / f"{name}.safetensors")
