"""The sizes of published models, told from the shapes of the weights in their files."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from g2rpo_trainer.families.files import sizes
from g2rpo_trainer.families.files.single_file import Held
from g2rpo_trainer.families.files.text_files import FACTS, facts_of_text, kind_of, named
from g2rpo_trainer.lora.weight_files import Stored


def in_file(weights: Mapping[str, Tensor], field: str) -> Held:
    """Describe a file of these weights."""
    held = {key: Stored(Path(), "BF16", tuple(value.shape), 0, 0) for key, value in weights.items()}
    return Held(field, "a model", Path(), held)


@pytest.mark.parametrize("kind", [file.stem.removeprefix("text_") for file in FACTS.glob("text_*.json")])
def test_shapes_tell_a_published_text_encoder(kind: str) -> None:
    config = facts_of_text(kind)["config"]
    model = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        shapes = model(model.config_class.from_dict(config)).state_dict()
    held = named(in_file(shapes, "model.text_encoders"))
    found = sizes.TEXT[kind](held)
    tower = found.pop("vision_config", {})
    assert kind_of(held) in (kind, "clip") and found == {key: config[key] for key in found}
    assert tower == {key: config["vision_config"][key] for key in tower}


def depth(layers: int, heads: int, **more: object) -> dict[str, object]:
    """Write down the sizes of a transformer."""
    return {"num_layers": layers, "num_attention_heads": heads, **more}


SD3 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
FLUX = depth(19, 24, num_single_layers=38, in_channels=64, joint_attention_dim=4096)
KLEIN = depth(5, 24, num_single_layers=20, joint_attention_dim=7680, guidance_embeds=False)
QWEN = depth(60, 24, in_channels=64, out_channels=16, joint_attention_dim=3584)
WAN = {"text_dim": 4096, "freq_dim": 256}
LUMINA2 = depth(26, 24, hidden_size=2304, num_refiner_layers=2, num_kv_heads=8, cap_feat_dim=2304)
Z_IMAGE = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30}
DUAL = {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}


def sd3(layers: int, width: int, positions: int, **more: object) -> tuple[str, dict[str, object]]:
    """Write down a Stable Diffusion 3."""
    more |= {"caption_projection_dim": width, "pos_embed_max_size": positions}
    return "sd3", depth(layers, layers, **SD3, **more)


def wan(layers: int, heads: int, channels: int, inner: int) -> tuple[str, dict[str, object]]:
    """Write down a Wan."""
    return "wan", depth(layers, heads, in_channels=channels, out_channels=channels, ffn_dim=inner, **WAN)


# What the configurations say that were published with the models.
PUBLISHED: dict[str, tuple[str, dict[str, object]]] = {
    "3 medium": sd3(24, 1536, 192, qk_norm=None),
    "3.5 medium": sd3(24, 1536, 384, **DUAL),
    "3.5 large": sd3(38, 2432, 192, qk_norm="rms_norm"),
    "dev": ("flux", {**FLUX, "pooled_projection_dim": 768, "guidance_embeds": True}),
    "schnell": ("flux", {**FLUX, "pooled_projection_dim": 768, "guidance_embeds": False}),
    "klein 4B": ("flux2", KLEIN),
    "Qwen-Image": ("qwen_image", QWEN),
    "Wan 1.3B": wan(30, 12, 16, 8960),
    "Wan 14B": wan(40, 40, 16, 13824),
    "Wan 5B": wan(30, 24, 48, 14336),
    "Lumina-Image 2.0": ("lumina2", LUMINA2),
    "Z-Image": ("z_image", {**Z_IMAGE, "cap_feat_dim": 2560}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_tell_every_published_variant(name: str) -> None:
    family, config = PUBLISHED[name]
    shipped = json.loads(next(FACTS.glob(f"{family}*.json")).read_text("utf-8"))["transformer"]
    with torch.device("meta"):
        model = getattr(diffusers, shipped["_class_name"]).from_config({**shipped, **config})
    held = in_file(model.state_dict(), "model.transformer")
    found = import_module(f"g2rpo_trainer.families.{family}").POLICY.sizes(held)
    dual = "dual_attention_layers"
    assert found == {**found, **config} and found.get(dual, []) == config.get(dual, [])
