"""A LoRA on a MODEL: the modules that it sits on, what core loads, and its names in diffusers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn

from ...comfy_g2rpo.lora import STYLES, fold
from ...comfy_g2rpo.rollout import seeded_noise

PREFIX = "diffusion_model."
TARGETS = ("attention", "attention+feed_forward")
LARGE = 2 * 2**30  # bytes of weights from which on activations are computed again rather than kept


class Kind(NamedTuple):
    """Where one kind of diffusion model keeps its projections: patterns over whole module names."""

    name: str
    attention: str
    feed_forward: str


KINDS = (
    Kind(
        "SD3",
        r"joint_blocks\.\d+\.(x|context)_block\.attn2?\.(qkv|proj)",
        r"joint_blocks\.\d+\.(x|context)_block\.mlp\.\w+",
    ),
    # linear1 and linear2 of a single block are attention and feed-forward in one matrix.
    Kind(
        "FLUX, Chroma, HunyuanVideo",
        r"double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]",
        r"double_blocks\.\d+\.(img|txt)_mlp\.\w+",
    ),
    Kind("Wan", r"blocks\.\d+\.(self|cross)_attn\.(q|k|v|o|k_img|v_img)", r"blocks\.\d+\.ffn\.\w+"),
    Kind(
        "LTXV, Qwen-Image",
        r"transformer_blocks\.\d+\.attn[12]?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)",
        r"transformer_blocks\.\d+\.(ff|img_mlp|txt_mlp)\.net\.(0\.proj|2)",
    ),
    Kind("Lumina 2, Z-Image", r"layers\.\d+\.attention\.(qkv|out)", r"layers\.\d+\.feed_forward\.w[123]"),
    Kind(
        "any other",
        r"(.+\.)?\d+\.(.+\.)?\w*attn?\w*\.(.+\.)?\w+",
        r"(.+\.)?\d+\.(.+\.)?(mlp|ff|ffn|feed_forward)\w*\.(.+\.)?\w+",
    ),
)


@dataclass(frozen=True)
class Adapter:
    """LoRA matrices down [rank, in] and up [out, rank] by native module name, float32 on the CPU."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float
    targets: str


def target_modules(model: Any, targets: str) -> dict[str, nn.Module]:
    """Find the linear layers that an adapter sits on, in the model's order."""
    if targets not in TARGETS:
        raise ValueError(f"targets is {targets!r}; choose one of: {', '.join(TARGETS)}")
    modules = model.model.diffusion_model.named_modules()
    layers = {name: module for name, module in modules if _is_linear(module)}
    for kind in KINDS:
        pattern = kind.attention if targets == "attention" else f"{kind.attention}|{kind.feed_forward}"
        if any(re.fullmatch(kind.attention, name) for name in layers):
            return {name: module for name, module in layers.items() if re.fullmatch(pattern, name)}
    raise ValueError(
        f"targets: no attention layer was found in {type(model.model).__name__}, so it cannot carry a "
        "LoRA yet; connect another model"
    )


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is one of core's linear layers, also a quantised one."""
    known = hasattr(module, "weight_function") and hasattr(module, "in_features")
    return known and getattr(module.weight, "ndim", 0) == 2


def is_large(model: Any) -> bool:
    """Return whether training should save memory at the cost of a second forward."""
    return model.model_size() > LARGE


def fresh_adapter(model: Any, rank: int, alpha: float, seed: int, targets: str = "attention") -> Adapter:
    """Make an adapter that changes nothing yet: down seeded as N(0, 1/3n), up zero."""
    pairs = {}
    for name, module in target_modules(model, targets).items():
        out, width = module.weight.shape
        down = seeded_noise((rank, width), "lora", seed, name) / math.sqrt(3 * width)
        pairs[name] = (down, torch.zeros(out, rank))
    return Adapter(pairs, rank, alpha, targets)


def lora_model(adapter: Adapter) -> dict[str, Tensor]:
    """Return a LORA_MODEL: native keys, the scale multiplied into up and `.alpha` = rank, as in our files."""
    _, down_name, up_name = STYLES["native"]
    weights = {}
    for name, (down, up) in fold(adapter.pairs, dict.fromkeys(adapter.pairs, adapter.alpha)).items():
        weights[f"{PREFIX}{name}.{down_name}"] = down
        weights[f"{PREFIX}{name}.{up_name}"] = up
        weights[f"{PREFIX}{name}.alpha"] = torch.tensor(float(len(down)))
    return weights


def with_adapter(model: Any, adapter: Adapter) -> Any:
    """Return a clone of the model with the LoRA on it, as LoraLoaderModelOnly makes it at strength 1."""
    return comfy.sd.load_lora_for_models(model, None, lora_model(adapter), 1.0, 0.0)[0]


def diffusers_pairs(adapter: Adapter, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Rename an adapter to diffusers' modules, and split fused matrices exactly: rows of up, down shared."""
    found = _diffusers_parts(model)
    pairs = {}
    for name, (down, up) in adapter.pairs.items():
        parts = found.get(name)
        if not parts:
            raise ValueError(
                f"key names: {name} has no name in diffusers; choose the native names, which ComfyUI "
                "loads as well"
            )
        rows = sorted((start, len(up) if length is None else length) for _, start, length in parts)
        ends = [0, *accumulate(length for _, length in rows)]
        if [*(start for start, _ in rows), len(up)] != ends:
            raise ValueError(
                f"key names: {name} does not split into diffusers' modules exactly; choose the native names"
            )
        for module, start, length in parts:
            pairs[module] = (down, up[start:][:length].contiguous())
    return pairs


def _diffusers_parts(model: Any) -> dict[str, list[tuple[str, int, int | None]]]:
    """Map native modules to (diffusers module, first row, rows), by core's own tables."""
    config, kind = model.model.model_config.unet_config, type(model.model).__name__
    tables = {"SD3": comfy.utils.mmdit_to_diffusers, "Flux": comfy.utils.flux_to_diffusers}
    if kind == "QwenImage":
        return {name: [(name, 0, None)] for name, _ in model.model.diffusion_model.named_modules()}
    if kind not in tables:
        raise ValueError(
            f"key names: {kind} has no exact diffusers names; choose the native ones, which ComfyUI "
            "loads for every model"
        )
    parts: dict[str, list[tuple[str, int, int | None]]] = {}
    for key, native, start, length in _rows(tables[kind](config)):
        parts.setdefault(native, []).append((key, start, length))
    return parts


def _rows(table: dict[str, Any]) -> Iterator[tuple[str, str, int, int | None]]:
    """Read one of core's tables: diffusers key → native key, or (native key, (dim, first row, rows))."""
    for key, target in table.items():
        native, slices, *function = target if isinstance(target, tuple) else (target, None)
        if key.endswith(".weight") and not function and (slices is None or slices[0] == 0):
            _, start, length = slices or (0, 0, None)
            yield key.removesuffix(".weight"), native.removesuffix(".weight"), start, length
