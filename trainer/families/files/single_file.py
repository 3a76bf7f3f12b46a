"""Weights from one file of ComfyUI's: native or diffusers' names, bare or in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from comfy_g2rpo.lora.key_names import Family, Link

from ...lora.weight_files import DTYPES, FP8, PREFIXES, Stored, look_at
from .weight_names import UNUSED, Layout, by_rules

READ = {**DTYPES, **FP8}
SAME = by_rules(())
EMBEDDINGS = ("shared.weight", "embed_tokens.weight")
SCALES = ("scale_weight", "weight_scale")


@dataclass(frozen=True)
class Origin:
    """Where a wanted tensor comes from: a key's rows, whose halves may have to change places."""

    key: str
    rows: tuple[int, int]
    swaps: bool = False


@dataclass(frozen=True)
class Held:
    """A model's weights in a file, by the names that they have once a prefix is taken off."""

    field: str
    """The configuration's field that named the file."""
    title: str
    path: Path
    tensors: Mapping[str, Stored]
    layout: Layout = SAME
    links: Family | None = None

    def find(self, name: str) -> Origin | None:
        """Find what diffusers or transformers calls `name`."""
        for other in self.layout(name):
            if other in self.tensors:
                return Origin(other, (0, (*self.tensors[other].shape, 1)[0]))
        module, _, leaf = name.rpartition(".")
        link = self.links.find(module) if self.links else None
        key = f"{link.native}.{leaf}" if link else None
        if key not in self.tensors or module not in link.diffusers:
            return None
        count = self.tensors[key].shape[0]
        weight = self.tensors.get(f"{link.native}.weight")
        # A modulation is swapped where it has but a shift and a scale, as in SD3's last block.
        halves = weight is not None and len(weight.shape) > 1 and weight.shape[0] == 2 * weight.shape[1]
        return Origin(key, rows(link, module, count), link.swaps and halves)

    def size(self, name: str) -> tuple[int, ...]:
        """Return the shape of what diffusers calls `name`, which the file must have."""
        origin = self.find(name)
        if origin is None:
            raise ValueError(
                f"{self.field} {self.path}: it lacks {name} of {self.title}; give a whole model's file"
            )
        begin, end = origin.rows
        return (end - begin, *self.tensors[origin.key].shape[1:])

    def has(self, name: str) -> bool:
        """Return whether the file has a weight."""
        return self.find(name) is not None

    def count(self, pattern: str) -> int:
        """Count the blocks 0, 1, … of which the file has the weight named by a pattern with `{}`."""
        number = 0
        while self.has(pattern.format(number)):
            number += 1
        return number


def hold(field: str, title: str, path: Path, prefixes: tuple[str, ...] = ()) -> Held:
    """Look at a file; of the `prefixes` before a model's names, the first that occurs is taken."""
    if not path.is_file():
        raise ValueError(f"{field} {path} is no file; give one .safetensors file")
    tensors = look_at(path).tensors
    prefix = next((prefix for prefix in prefixes if any(key.startswith(prefix) for key in tensors)), "")
    return Held(
        field,
        title,
        path,
        {key.removeprefix(prefix): stored for key, stored in tensors.items() if key.startswith(prefix)},
    )


def hold_transformer(field: str, path: Path, family: Family, layout: Layout) -> Held:
    """Look at a transformer's file, or at the transformer of a checkpoint."""
    return replace(hold(field, f"a {family.title}", path, PREFIXES), layout=layout, links=family)


def build(
    held: Held,
    make: Callable[[], nn.Module],
    described: str,
    dtype: torch.dtype,
    given: Mapping[str, Tensor] | None = None,
) -> Any:
    """Make a module and fill it from a file.

    `described` says which it is, as in "the model that …", `given` weights are not looked for.
    """
    with init_empty_weights(include_buffers=False):
        module = make()
    # A count of training batches is no weight.
    found = {
        name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")
    } | dict(given or {})
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items() if name not in found}
    origins = {name: origin(held, name, shape, described) for name, shape in wanted.items()}
    used = {each.key for each in origins.values()}
    if strange := sorted(key for key in held.tensors if key not in used and not UNUSED.fullmatch(key)):
        raise ValueError(
            f"{held.field} {held.path}: {len(strange)} of its weights, {strange[0]} first, are not in the "
            f"model that {described}; give the file of such a model, or another model.path"
        )
    known: dict[Origin, Tensor] = {}
    # What diffusers keeps in fp32 when it loads a folder in another precision.
    exact = set(module._keep_in_fp32_modules or ()) if isinstance(module, ModelMixin) else set()
    for name, shape in wanted.items():
        # Embeddings that stand under two names are read, and kept, once.
        again, kind = known.get(origins[name]), torch.float32 if exact & set(name.split(".")) else dtype
        found[name] = (
            read(held, origins[name], kind).reshape(shape).contiguous()
            if again is None
            else again.reshape(shape)
        )
        if name.endswith(EMBEDDINGS):
            known[origins[name]] = found[name]
    module.load_state_dict(found, assign=True)
    return module.eval()


def origin(held: Held, name: str, shape: tuple[int, ...], described: str) -> Origin:
    """Find a wanted weight; refuse a missing one, another size, or a type that is not read."""
    found = held.find(name)
    got = held.size(name)
    # Latent diffusion keeps linear layers as convolutions of one cell.
    if math.prod(got) != math.prod(shape) or got[:1] != shape[:1]:
        stored = list(held.tensors[found.key].shape)
        raise ValueError(
            f"{held.field} {held.path}: {found.key} is {stored}, which does not give {name} {list(shape)} of "
            f"the model that {described}; give the file of such a model, or another model.path"
        )
    kind, scale = held.tensors[found.key].dtype, scale_of(held, found.key)
    if (
        kind not in READ
        or (scale and math.prod(held.tensors[scale].shape) != 1)
        or any(key in held.tensors for key in packed(found.key))
    ):
        what = f"{found.key} is of type {kind}" if kind not in READ else f"{found.key} is packed in blocks"
        raise ValueError(
            f"{held.field} {held.path}: {what}, which is not read; give the model in 16 bit or fp8"
        )
    return found


def packed(key: str) -> tuple[str, ...]:
    """List the names beside a weight that say it is packed: bitsandbytes' and nvfp4's."""
    return (f"{key}.absmax", f"{key}_scale_2")


def scale_of(held: Held, key: str) -> str | None:
    """Return the key of the number that a weight in fp8 is multiplied by."""
    module, _, leaf = key.rpartition(".")
    return next(
        (name for word in SCALES if leaf == "weight" and (name := f"{module}.{word}") in held.tensors), None
    )


def read(held: Held, origin: Origin, dtype: torch.dtype) -> Tensor:
    """Read a weight, its rows alone where the file has fused several; fp8 is multiplied by its scale."""
    part = held.tensors[origin.key].rows(*origin.rows)
    if scale := scale_of(held, origin.key):
        part = part.float() * held.tensors[scale].rows(0, 1).float().reshape(())
    part = part.to(dtype)
    return torch.cat(part.chunk(2)[::-1]) if origin.swaps else part


def rows(link: Link, module: str, count: int) -> tuple[int, int]:
    """Return which rows of a native weight are a diffusers module's."""
    place, unit = link.diffusers.index(module), count / sum(link.shares)
    begin = math.floor(unit * sum(link.shares[:place]))
    return begin, begin + math.floor(unit * link.shares[place])
