"""What diffusers' own loaders make of a LoRA file: they are asked, as they are installed, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor

from comfy_g2rpo.lora.convert import renamed
from comfy_g2rpo.lora.forms import Reading
from comfy_g2rpo.lora.key_names import Family

from ..config.family_names import FAMILIES

Pair = tuple[Tensor, Tensor]
EQUAL = 0.02
"""Relative difference of two changes of weights that rounding to 16 bit may make."""


@dataclass(frozen=True)
class Taken:
    """Modules of a file, by the file's names, that diffusers loads at the strength that was trained."""

    pipeline: frozenset[str]
    """By `pipeline.load_lora_weights`."""
    adapter: frozenset[str]
    """By `transformer.load_lora_adapter`."""


def in_diffusers(tensors: Mapping[str, Tensor], reading: Reading, family: Family) -> Taken:
    """Ask diffusers' loaders of a family about a file's `tensors`, and about what they mean."""
    return Taken(
        _right(by_pipeline(tensors, reading, family), reading, family),
        _right(by_adapter(tensors, reading), reading, family),
    )


def pipeline_name(family: Family) -> str:
    """Return the name of a family's usual pipeline."""
    return next(iter(FAMILIES[family.name].pipelines))


def by_pipeline(tensors: Mapping[str, Tensor], reading: Reading, family: Family) -> dict[str, Pair]:
    """Return the pairs by diffusers' names that `load_lora_weights` would put on the transformer."""
    kind = getattr(diffusers, pipeline_name(family), None)
    if kind is None:
        return {}
    alphas: Mapping[str, Tensor] = {}
    with quiet():
        try:
            if family.pipeline_takes_alpha:
                converted, alphas = kind.lora_state_dict(dict(tensors), return_alphas=True)
            else:
                converted = kind.lora_state_dict(dict(tensors))
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return {}  # a converter of other people's forms gives up in any of these ways
    found = pairs_of(converted, alphas or {}, reading)
    # Then it refuses the whole file; FLUX.1's does where its converter makes a module that the model lacks,
    # too.
    refuses = not all("lora" in key for key in converted)
    strange = family.pipeline_takes_alpha and any(family.find(module) is None for module in found)
    return {} if refuses or strange else found


def by_adapter(tensors: Mapping[str, Tensor], reading: Reading) -> dict[str, Pair]:
    """Return the pairs that `load_lora_adapter` takes; it heeds no alpha in the file."""
    return pairs_of(tensors, {}, reading)


def pairs_of(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, Tensor], reading: Reading
) -> dict[str, Pair]:
    """Collect `transformer.<module>` pairs, scaled as the loader does: by alphas, peft's settings, or not."""
    found = {}
    for key, down in tensors.items():
        module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        up = tensors.get(f"transformer.{module}.lora_B.weight")
        if key != f"transformer.{module}.lora_A.weight" or up is None:
            continue
        scale = float(alphas.get(f"transformer.{module}.alpha", len(down))) / len(down)
        if reading.alpha_from == "metadata" and module in reading.missing_alpha:
            scale = reading.alphas[module] / len(down)
        found[module] = (down, up * scale)
    return found


def _right(loaded: Mapping[str, Pair], reading: Reading, family: Family) -> frozenset[str]:
    """Choose the modules of a file whose every part is loaded with the change of weight that was trained."""
    scaled, right = reading.scaled(), []
    for module, pair in scaled.items():
        parts = renamed(family, {module: pair}, "diffusers")
        if all(name in loaded and same(loaded[name], part) for name, part in parts.items()):
            right.append(module)
    return frozenset(right)


def same(one: Pair, other: Pair) -> bool:
    """Return whether two pairs change a weight alike, by what they make of a random vector."""
    columns = one[0].flatten(1).shape[1]
    if other[0].flatten(1).shape[1] != columns or len(one[1]) != len(other[1]):
        return False
    vector = torch.randn(columns, generator=torch.Generator().manual_seed(0))
    ours, theirs = (up.float().flatten(1) @ (down.float().flatten(1) @ vector) for down, up in (one, other))
    return bool((ours - theirs).norm() <= EQUAL * theirs.norm())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers' log to errors."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
