"""Adapters that are no pair of matrices: what their parts are called, and what size of weight they change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor

DORA = "DoRA"
KINDS = {
    "LoHa": r"hada_w[12]_[ab]|hada_t[12]",
    "LoKr": r"lokr_w[12](_[ab])?|lokr_t[12]",
    "GLoRA": r"[ab][12]\.weight",
    "OFT": r"oft_\w+(\.weight)?|boft_\w+(\.weight)?|rescale",
    DORA: r"dora_scale|lora_magnitude_vector(\..+)?",
    "LoCon of three matrices (lora_mid)": r"lora_mid\.weight",
    "whole weights (diff)": r"diff",
    "biases (diff_b)": r"diff_b",
    "biases of the matrices (lora_B.bias)": r"lora_[AB](\.[^.]+)?\.bias",
    "replaced weights (set_weight)": r"set_weight",
    "norms (w_norm, b_norm)": r"[wb]_norm",
    "larger weights (reshape_weight)": r"reshape_weight",
}
"""What each is called, and its parts after the layer's name."""
PART = re.compile("|".join(rf"(?P<k{i}>\.({parts})$)" for i, parts in enumerate(KINDS.values())))
SCALE = re.compile(r"(?<=_norm)(?P<part>\.scale)$")  # of the control LoRAs of FLUX.1's makers


def other_kind(key: str) -> tuple[str, str, str] | None:
    """Split a key into layer, part and kind of adapter; None where it is of a pair, or unknown."""
    if SCALE.search(key):
        return key, "", "replaced weights (set_weight)"
    if (found := PART.search(key)) is None:
        return None
    kind = list(KINDS)[int(found.lastgroup[1:])]
    return key[: found.start()], key[found.start() + 1 :], kind


def size(parts: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the (rows, columns) of the weight that a layer's parts change; None where they do not tell."""
    if {"hada_w1_a", "hada_w1_b"} <= parts.keys() and "hada_t1" not in parts:
        return len(parts["hada_w1_a"]), math.prod(parts["hada_w1_b"].shape[1:])
    for name in ("diff", "set_weight"):
        if name in parts and parts[name].ndim > 1:
            return len(parts[name]), math.prod(parts[name].shape[1:])
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts and parts[name].ndim > 1:
            factors.append((len(parts[name]), math.prod(parts[name].shape[1:])))
        elif {f"{name}_a", f"{name}_b"} <= parts.keys() and "lokr_t2" not in parts:
            factors.append((len(parts[f"{name}_a"]), math.prod(parts[f"{name}_b"].shape[1:])))
    if len(factors) < 2:
        return None
    return factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]
