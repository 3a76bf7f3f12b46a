"""A transformer from one file, as ComfyUI's models/diffusion_models holds it: native or diffusers' names, bare or in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from comfy_g2rpo.lora_keys import FAMILIES, Family, Link, template
from comfy_g2rpo.runs import FileError

from ..weights import PREFIXES, Model, look_at

# What the names of LoRA files leave out: native → diffusers.
NORMS = {
    "flux": {
        "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
        "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
        "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
        "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
        "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
        "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
    }
}
SCALED = ("scale_weight", "weight_scale", "scaled_fp8", "absmax")


def load_transformer(kind: Any, config: Path, path: Path, family: str, dtype: torch.dtype) -> nn.Module:
    """Load a file into diffusers' class; `config` is a diffusers folder of the same model, whose transformer/config.json says its size."""
    if not path.is_file():
        raise ValueError(f"model.transformer {path} is no file; give one .safetensors file")
    held = look_at(path)
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in held.tensors)), "")
    keys = {key.removeprefix(prefix): key for key in held.tensors if key.startswith(prefix)}
    if scaled := next((key for key in keys if key.endswith(SCALED)), None):
        raise ValueError(
            f"model.transformer {path}: {scaled} belongs to scaled weights, which are not read; give it in 16 bit or plain fp8"
        )
    if not (config / "transformer/config.json").is_file():
        raise ValueError(f"model.path {config}: it lacks transformer/config.json, which says the size of {path.name}; {hint(config)}")
    with torch.device("meta"):
        module = kind.from_config(kind.load_config(config / "transformer", local_files_only=True))
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = dict(read(held, keys, wanted, FAMILIES[family], NORMS[family], dtype))
    used = {source for name in wanted if (source := source_of(name, keys, FAMILIES[family], NORMS[family])[0])}
    if strange := sorted(set(keys) - used):
        raise ValueError(
            f"model.transformer {path}: {len(strange)} of its weights, {strange[0]} first, are not in the model that {config} describes; "
            f"give model.path the folder of the same model"
        )
    module.load_state_dict(found, assign=True)
    return module.eval()


def read(
    held: Model,
    keys: Mapping[str, str],
    wanted: Mapping[str, tuple[int, ...]],
    family: Family,
    norms: Mapping[str, str],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Read every wanted tensor, its rows alone where the file has fused several."""
    with safe_open(held.path, "pt") as file:
        for name, shape in wanted.items():
            source, link = source_of(name, keys, family, norms)
            if source is None:
                raise ValueError(
                    f"model.transformer {held.path}: it lacks {name} of a {family.title}; give a whole transformer's file"
                )
            stored = held.tensors[keys[source]].shape
            begin, end = rows(link, name.rpartition(".")[0], stored[0])
            if (end - begin, *stored[1:]) != shape:
                raise ValueError(
                    f"model.transformer {held.path}: {source} is {list(stored)}, which does not give {name} {list(shape)}; "
                    f"give model.path the folder of the same model"
                )
            try:
                part = file.get_slice(keys[source])[begin:end].to(dtype)
            except (RuntimeError, ValueError) as error:
                raise FileError(f"{held.path}: {source} cannot be read ({error}); download it again") from error
            if link and link.swaps:
                part = torch.cat(part.chunk(2)[::-1])
            yield name, part.contiguous()


def source_of(name: str, keys: Mapping[str, str], family: Family, norms: Mapping[str, str]) -> tuple[str | None, Link | None]:
    """Find the file's key for a diffusers weight, and the link where names differ."""
    if name in keys:
        return name, None
    module, _, leaf = name.rpartition(".")
    pattern, number = template(module)
    native = next((native for native, theirs in norms.items() if theirs == pattern), None)
    if native:
        options = [f"{native.format(number)}.{word}" for word in ("scale", "weight")]
        return next((key for key in options if key in keys), None), None
    link = family.find(module)
    key = f"{link.native}.{leaf}" if link else None
    return (key, link) if key in keys else (None, None)


def rows(link: Link | None, module: str, count: int) -> tuple[int, int]:
    """Return which rows of a native weight are a diffusers module's."""
    if link is None:
        return 0, count
    place, unit = link.diffusers.index(module), count / sum(link.shares)
    begin = math.floor(unit * sum(link.shares[:place]))
    return begin, begin + math.floor(unit * link.shares[place])


def hint(folder: Path) -> str:
    """Name the command that fetches the configuration alone."""
    return f"fetch it with: hf download OWNER/NAME --include '*.json' --local-dir {folder}"
