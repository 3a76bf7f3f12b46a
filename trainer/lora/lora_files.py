"""LoRA files from and to disk, and their meeting with a model on disk: fit, merge, extract."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comfy_g2rpo.files.safe import FileError, read_tensors
from comfy_g2rpo.lora import LoraError, file_bytes, named
from comfy_g2rpo.lora.convert import extracted, family_of, renamed, shapes
from comfy_g2rpo.lora.forms import Reading, check_sound, understand
from comfy_g2rpo.lora.key_names import BOTH, FAMILIES, Family, family_of_model
from comfy_g2rpo.lora.modelspec import handed_out

from .weight_files import SCALES, Model, check_free, new_file

Pairs = Mapping[str, tuple[Tensor, Tensor]]
FAMILY_KEY = "g2rpo.family"


def read_any(path: Path) -> Reading:
    """Read a LoRA file of any known form, with peft's configuration beside it, or a folder's only one."""
    path = lora_file(path)
    tensors, metadata = read_tensors(path)
    return understand(tensors, metadata, path, _adapter(path))


def lora_file(path: Path) -> Path:
    """Return the file itself where a folder with one safetensors file is given."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise LoraError(f"{path} holds {len(found)} safetensors files; give the LoRA file itself")
    return found[0]


def _adapter(path: Path) -> dict[str, Any] | None:
    """Read the configuration that peft writes beside its weights."""
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        return None
    try:
        content = json.loads(beside.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraError(
            f"{beside} is damaged: it is no JSON file; restore it, or take it away if it is not this LoRA's"
        ) from error
    return content if isinstance(content, dict) else None


def which(reading: Reading, path: Path, family: str | None, model: Model | None = None) -> Family:
    """Find the family of a LoRA: as the user says, as the model shows, as the file says, by its names."""
    known = {
        layer: size
        for layer, size in reading.other_layers.items()
        if any(each.find(layer) for each in FAMILIES.values())
    }
    sizes = known | shapes(reading.pairs)
    if family is None and model is not None and (found := family_of_model(model.modules())):
        return family_of(sizes, path, found[0].name)
    kept = reading.metadata.get(FAMILY_KEY)
    named = family or (kept if kept in FAMILIES else None)
    if not sizes and named is None:
        raise LoraError(
            f"{path} names no layer of a family that is known ({', '.join(FAMILIES)}); give --family if it "
            "is one of them"
        )
    return family_of(sizes, path, named)


def write_new(path: Path, pairs: Pairs, style: str, metadata: Mapping[str, str], alpha: bool = True) -> None:
    """Write a LoRA file, its scales in the up matrices; an existing file is never overwritten."""
    check_free(path)
    tensors = {}
    for module, pair in pairs.items():
        tensors |= named({module: pair}, len(pair[0]), path, style)
    kept = {key: tensor for key, tensor in tensors.items() if alpha or not key.endswith(".alpha")}
    content = handed_out(file_bytes(kept, style, metadata), path.stem)
    with new_file(path) as file:
        file.write(content)


def form_for(family: Family, pairs: Pairs) -> str:
    """Choose the form that both ComfyUI and diffusers read; where there is none, the native one."""
    return (
        "diffusers"
        if all(family.in_core(module) == BOTH for module in renamed(family, pairs, "diffusers"))
        else "native"
    )


@dataclass(frozen=True)
class Fit:
    """How a LoRA and a model go together, by the model's module names."""

    family: Family
    naming: str
    fitting: dict[str, tuple[Tensor, Tensor]]
    absent: list[str]
    misshapen: list[str]


def fit(reading: Reading, path: Path, model: Model, family: str | None) -> Fit:
    """Put a LoRA under a model's names and compare shapes, by the model's header alone."""
    modules = model.modules()
    found = family_of_model(modules)
    if found is None:
        raise FileError(
            f"{model.path} is of no family that is known ({', '.join(FAMILIES)}); give a transformer's file"
        )
    naming = found[1]
    known = which(reading, path, family or found[0].name)
    pairs = renamed(known, reading.scaled(), naming)
    fitting, absent, misshapen = {}, [], []
    for module, (down, up) in pairs.items():
        if module not in modules:
            absent.append(module)
        elif not _sized(model.tensors[modules[module]].shape, down, up):
            misshapen.append(module)
        else:
            fitting[module] = (down, up)
    return Fit(known, naming, fitting, absent, misshapen)


def _sized(shape: tuple[int, ...], down: Tensor, up: Tensor) -> bool:
    """Return whether a weight has the shape that a pair changes."""
    return len(shape) > 1 and shape[0] == len(up) and math.prod(shape[1:]) == down[0].numel()


@dataclass(frozen=True)
class Extracted:
    """A LoRA out of two models, and what it leaves out."""

    family: Family
    naming: str
    pairs: dict[str, tuple[Tensor, Tensor]]
    error: float
    """Relative error of all changed matrices, in the Frobenius norm."""
    left_out: list[str]
    """Keys that changed and are no matrix of a known module: biases, norms, embeddings."""


def extract(tuned: Model, base: Model, rank: int) -> Extracted:
    """Approximate what leads from one model to another by a LoRA of a rank, one weight at a time."""
    found, other = family_of_model(tuned.modules()), family_of_model(base.modules())
    if found is None or found != other:
        names = [f"{each[0].name} ({each[1]})" if each else "unknown" for each in (found, other)]
        raise FileError(
            f"{tuned.path} is {names[0]} and {base.path} is {names[1]}; give two models of one family "
            "and form"
        )
    family, naming = found
    ours, theirs = tuned.modules(), base.modules()
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys())
        raise FileError(
            f"{odd!a} is in one of {tuned.path} and {base.path} alone; give two models of the same "
            "architecture"
        )
    pairs, left_out, missed, whole = {}, [], 0.0, 0.0
    prefixes = [next(iter(keys.values()))[: -len(next(iter(keys)) + ".weight")] for keys in (ours, theirs)]
    for key, stored in tuned.tensors.items():
        if (
            not key.startswith(prefixes[0])
            or (twin := base.tensors.get(prefixes[1] + key[len(prefixes[0]) :])) is None
        ):
            continue
        if stored.shape != twin.shape:
            raise FileError(
                f"{key!a} is {list(stored.shape)} in {tuned.path} and {list(twin.shape)} in "
                f"{base.path}; give one architecture"
            )
        if any(
            f"{key.removesuffix('weight')}{word}" in model.tensors
            for model in (tuned, base)
            for word in SCALES
        ):
            raise FileError(
                f"{key!a} of {tuned.path} or {base.path} has a scale; give both models in 16 bit, 32 "
                "bit or plain fp8"
            )
        change = stored.read().float() - twin.read().float()
        if not change.isfinite().all():
            raise FileError(
                f"{key!a}: {tuned.path} or {base.path} holds NaN or infinite values; give a sound model"
            )
        if not change.any():
            continue
        module = key[len(prefixes[0]) :].removesuffix(".weight")
        if module not in ours or change.ndim < 2 or family.find(module) is None:
            left_out.append(key)
            continue
        pairs[module], gone, all_of_it = extracted(change, rank)
        missed, whole = missed + gone, whole + all_of_it
    if not pairs:
        raise FileError(
            f"{tuned.path} and {base.path} differ in no matrix of a known module; give the model "
            "before and after fine-tuning"
        )
    return Extracted(family, naming, pairs, math.sqrt(missed / whole), left_out)


def in_diffusers_names(
    path: Path, modules: Iterable[str], family: str | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a LoRA of any form by diffusers' names, its scales in the up matrices."""
    reading = read_any(path)
    check_sound(reading, path)
    pairs = reading.scaled()
    if not set(pairs) <= set(modules):
        pairs = renamed(which(reading, path, family if family in FAMILIES else None), pairs, "diffusers")
    return pairs


def for_transformer(path: Path, transformer: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a LoRA of any form for a diffusers model, scales in the up matrices; a misfit is refused."""
    shapes = shapes_of(transformer)
    found, reading = family_of_model(shapes), read_any(path)
    known = [module for module in reading.pairs if module in shapes or (found and found[0].find(module))]
    if reading.pairs and not known:
        raise LoraError(f"{path} fits no module of this model; choose a LoRA that was made for it")
    pairs = in_diffusers_names(path, shapes, found[0].name if found else None)
    if bad := [
        module
        for module, (down, up) in pairs.items()
        if module not in shapes or not _sized(shapes[module], down, up)
    ]:
        raise LoraError(
            f"{path}: {len(bad)} of its modules, such as {bad[0]}, are absent or of another size in this "
            "model; take a LoRA that was made for it"
        )
    return pairs


def shapes_of(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a diffusers model's weights by module."""
    return {name: shape for name, layer in transformer.named_modules() if (shape := _shape(layer))}


def _shape(layer: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, also where it is kept in few bits; nothing where it has none."""
    if isinstance(rows := getattr(layer, "out_features", None), int):
        return rows, layer.in_features
    weight = getattr(layer, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def start_from(
    path: Path, adapter: Mapping[str, tuple[int, ...]], family: str | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Read what a run starts from, for modules of (rows, rank, columns) by diffusers' names."""
    pairs = in_diffusers_names(path, adapter, family)
    if strange := sorted(set(pairs) - set(adapter)):
        raise LoraError(
            f"lora.init {path}: this run does not train {len(strange)} of its modules, such as "
            f"{strange[0]}; change lora.targets"
        )
    for module, (down, up) in pairs.items():
        rows, rank, *columns = adapter[module]
        if len(up) != rows or list(down.shape[1:]) != columns:
            raise LoraError(
                f"lora.init {path}: {module} has another size in this model; take a LoRA that was made for it"
            )
        if len(down) > rank:
            raise LoraError(
                f"lora.init {path}: its rank is {len(down)}, lora.rank is {rank}; raise lora.rank, or cut "
                f"the file: g2rpo export {path} --rank {rank} --out NEW.safetensors"
            )
    return pairs


@torch.no_grad()
def add_frozen(transformer: nn.Module, path: Path, strength: float, family: str | None) -> None:
    """Add a LoRA to a model's weights for good: a run starts, and measures KL, from there."""
    weights = {
        name: layer.weight
        for name, layer in transformer.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
    }
    pairs = in_diffusers_names(path, weights, family)
    for module, (down, up) in pairs.items():
        if module not in weights or not _sized(tuple(weights[module].shape), down, up):
            raise LoraError(
                f"model.lora {path}: {module} is absent or of another size in this model; take a LoRA "
                "that was made for it"
            )
    for module, (down, up) in pairs.items():
        weight = weights[module]
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise LoraError(
                f"model.lora {path}: {module} is {weight.dtype}, to which nothing can be added; load "
                "the model in 16 or 32 bit"
            )
        down, up = (tensor.to(weight.device, torch.float32).flatten(1) for tensor in (down, up))
        weight.copy_(weight.float() + strength * (up @ down).reshape(weight.shape))
