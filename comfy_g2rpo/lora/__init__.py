"""LoRA files: the key grammar, safe reading, and one strength in every loader.

    diffusers style   transformer.<module>.{lora_A.weight, lora_B.weight, alpha}               ComfyUI maps
    these for SD3, FLUX, Qwen-Image native style      diffusion_model.<module>.{lora_down.weight,
    lora_up.weight, alpha}       any model that ComfyUI samples

Loaders disagree on a file whose alpha differs from its rank: ComfyUI reads `.alpha`, diffusers' SD3 loader
ignores it and takes 1 as scale, silently. So the scale alpha/rank is multiplied into the up matrix, `.alpha`
says rank, and every loader arrives at the trained strength.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.safe import FileError, read_tensors, tensor_bytes, write_bytes

STYLES = {
    "diffusers": ("transformer.", "lora_A.weight", "lora_B.weight"),
    "native": ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
}
IMPLEMENTATIONS = {"diffusers": "diffusers", "native": "ComfyUI"}
"""Whose names a style has, as ModelSpec asks."""
MAX_NAME = 300
MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

Pairs = Mapping[str, tuple[Tensor, Tensor]]
Rename = Callable[[Pairs], Pairs]


class LoraError(FileError):
    """A LoRA file, or weights for one, that are refused."""


@dataclass(frozen=True)
class Lora:
    """A file's (down [rank, in …], up [out, rank …]) and alpha by module; the change is α/rank·up·down."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]
    style: str
    metadata: dict[str, str]

    def delta(self, module: str) -> Tensor:
        """Compute a module's change of weight."""
        down, up = self.pairs[module]
        return (
            self.alphas[module]
            / len(down)
            * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return what diffusers' `load_lora_weights` takes: no `.alpha`, the scale in the up matrix."""
        weights = {}
        for module, (down, up) in fold(self.pairs, self.alphas).items():
            weights[f"transformer.{module}.lora_A.weight"] = down
            weights[f"transformer.{module}.lora_B.weight"] = up
        return weights


def fold(pairs: Pairs, alphas: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Multiply every pair's scale alpha/rank into its up matrix."""
    return {module: (down, up * (alphas[module] / len(down))) for module, (down, up) in pairs.items()}


def write(
    path: Path,
    pairs: Pairs,
    alpha: float,
    *,
    style: str = "diffusers",
    rename: Rename | None = None,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a LoRA file whose every loader applies alpha/rank · up · down; `metadata` is kept as text."""
    write_bytes(path, file_bytes(named(pairs, alpha, path, style, rename), style, metadata))


def file_bytes(
    tensors: Mapping[str, Tensor], style: str, metadata: Mapping[str, object] | None = None
) -> bytes:
    """Return a LoRA's named tensors as its file has them, with what its form and ranks tell readers."""
    down = STYLES[style][1]
    ranks = {len(tensor) for key, tensor in tensors.items() if key.endswith(down)}
    # Every alpha is its rank: the scale is folded. Where ranks differ, kohya's tools say Dynamic.
    rank = ranks.pop() if len(ranks) == 1 else "Dynamic"
    notes = {**(metadata or {}), "ss_network_dim": rank, "ss_network_alpha": rank}
    notes["modelspec.implementation"] = IMPLEMENTATIONS[style]
    return tensor_bytes(tensors, {key: str(value) for key, value in notes.items()})


def named(
    pairs: Pairs, alpha: float, path: Path | str, style: str = "diffusers", rename: Rename | None = None
) -> dict[str, Tensor]:
    """Name a LoRA's tensors as its file does; `path` names it in errors."""
    if style not in STYLES:
        raise LoraError(f"LoRA style is {style!r}; choose one of: {', '.join(STYLES)}")
    if not pairs:
        raise LoraError(f"{path} would hold no LoRA pair; choose targets that the model has")
    prefix, down_name, up_name = STYLES[style]
    tensors, folded = {}, fold(pairs, dict.fromkeys(pairs, alpha))
    for module, (down, up) in (rename(folded) if rename else folded).items():
        check_pair(path, module, down, up, alpha)
        tensors[f"{prefix}{module}.{down_name}"] = down
        tensors[f"{prefix}{module}.{up_name}"] = up
        tensors[f"{prefix}{module}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def read(path: Path) -> Lora:
    """Read a LoRA file that keeps to the grammar; a missing alpha means rank, as in every loader."""
    return parse(*read_tensors(path), path)


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path | str) -> Lora:
    """Sort a LoRA's tensors by module; `path` names it in errors."""
    style = next(
        (name for name, (prefix, *_) in STYLES.items() if any(key.startswith(prefix) for key in tensors)),
        None,
    )
    if style is None:
        raise LoraError(
            f"{path} holds no LoRA key that starts with transformer. or diffusion_model.; convert it "
            "to one of these forms"
        )
    prefix, down_name, up_name = STYLES[style]
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in wide(tensors).items():
        module, part = _split(path, key, prefix, (down_name, up_name, "alpha"))
        found.setdefault(module, {})[part] = tensor
    pairs, alphas = {}, {}
    for module, parts in found.items():
        if down_name not in parts or up_name not in parts:
            raise LoraError(
                f"{path}: {prefix}{module} lacks its {up_name if down_name in parts else down_name}; "
                "save the file again"
            )
        down, up = pairs[module] = parts[down_name], parts[up_name]
        alpha = parts.get("alpha", torch.tensor(float(len(down)) if down.ndim else 0.0))
        if alpha.numel() != 1:
            raise LoraError(
                f"{path}: {prefix}{module}.alpha has {alpha.numel()} values; it must be one number"
            )
        alphas[module] = float(alpha)
        check_pair(path, module, down, up, alphas[module])
    return Lora(pairs, alphas, style, dict(metadata))


def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors, those in 8-bit floats as bfloat16, which has all their values and computes."""
    return {
        key: tensor.bfloat16() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
        for key, tensor in tensors.items()
    }


def check(path: Path, model_keys: Iterable[str] | None = None) -> int:
    """Count the pairs that fit a model (its module names or weight keys; None: any); zero is an error."""
    modules = set(read(path).pairs)
    if model_keys is not None:
        bare = re.compile(r"^(transformer\.|diffusion_model\.)|\.weight$")
        modules &= {bare.sub("", key) for key in model_keys}
    if not modules:
        raise LoraError(f"{path} fits no module of this model; choose a LoRA that was made for it")
    return len(modules)


def _split(path: Path | str, key: str, prefix: str, parts: tuple[str, ...]) -> tuple[str, str]:
    """Split a key into module and part, refusing what the grammar does not know."""
    for part in parts:
        module = key.removeprefix(prefix).removesuffix(f".{part}")
        if key == f"{prefix}{module}.{part}" and MODULE.fullmatch(module):
            return module, part
    form = f"{prefix}<module>.{{{', '.join(parts)}}}"
    raise LoraError(
        f"{path}: key {key[:200]!a} is not of the form {form}; other kinds of adapter are not supported"
    )


def check_pair(path: Path | str, module: str, down: Tensor, up: Tensor, alpha: float) -> None:
    """Refuse a pair that no loader could apply."""
    if not MODULE.fullmatch(module) or len(module) > MAX_NAME:
        raise LoraError(
            f"{path}: module name {module[:200]!r} is refused; use {MAX_NAME} letters, digits, '_', "
            "'-' and dots at most"
        )
    if down.ndim < 2 or up.ndim < 2 or not len(down) or up.shape[1] != len(down):
        raise LoraError(
            f"{path}: {module} has matrices {list(down.shape)} and {list(up.shape)}; they must be "
            "[rank, in] and [out, rank]"
        )
    if not (
        down.is_floating_point()
        and up.is_floating_point()
        and down.isfinite().all()
        and up.isfinite().all()
        and math.isfinite(alpha)
    ):
        raise LoraError(
            f"{path}: {module} holds NaN, infinite or non-float values; the training has diverged, "
            "take an earlier checkpoint"
        )
