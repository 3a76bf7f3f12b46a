"""A LoRA added to a model's weights on disk: 16 or 32 bit, fp8, or fp8 with scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from comfy_g2rpo.files.safe import FileError

from .lora_files import Fit
from .weight_files import NUMBERS, SCALES, Model, rewrite


def merge(made: Fit, model: Model, out: Path, strength: float, metadata: Mapping[str, str]) -> float:
    """Write the model with a LoRA added to its weights; return the error of rounding to the model's type,
    relative to the change.

    Sums are computed in float32 and rounded to the nearest number of the type; what is too large for it
    becomes its largest. Fp8 may lose more than the change itself: then the error is near 1 or above. Scales
    of fp8 weights stay what they are.
    """
    keys = model.modules()
    pairs = {keys[module]: pair for module, pair in made.fitting.items()}
    scales = {key: scale_of(model, key) for key in pairs}
    lost, whole = 0.0, 0.0

    def add(key: str, weight: Tensor) -> Tensor:
        nonlocal lost, whole
        (down, up), scale = pairs[key], scales[key]
        change = strength * (up.flatten(1).float() @ down.flatten(1).float()).reshape(weight.shape)
        before = weight.float() * scale
        summed = rounded((before + change) / scale, weight.dtype)
        lost += float((summed.float() * scale - before - change).double().square().sum())
        whole += float(change.double().square().sum())
        return summed

    rewrite(model, out, add, set(pairs), metadata)
    return math.sqrt(lost / whole) if whole else 0.0


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of a type; torch makes NaN or infinity of what is too large."""
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


def scale_of(model: Model, key: str) -> float:
    """Return what a stored weight is to be multiplied by; types to which nothing can be added are refused."""
    stored = model.tensors[key]
    if stored.dtype not in NUMBERS:
        raise FileError(
            f"{model.path}: {key!a} is {stored.dtype}, to which nothing can be added; give a model in "
            "16 bit, 32 bit or fp8"
        )
    found = next(
        (other for word in SCALES if (other := f"{key.removesuffix('weight')}{word}") in model.tensors), None
    )
    if found is None:
        return 1.0
    if math.prod(model.tensors[found].shape) != 1:
        raise FileError(
            f"{model.path}: {key!a} has a scale per block, to which nothing can be added; give a model "
            "in 16 bit or plain fp8"
        )
    scale = float(model.tensors[found].read())
    if not (math.isfinite(scale) and scale > 0):
        raise FileError(
            f"{model.path}: {found!a} is {scale:g}; a scale must be above 0; download the model again"
        )
    return scale
