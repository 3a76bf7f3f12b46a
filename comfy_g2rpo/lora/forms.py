"""The forms that LoRA files come in: which tensor is what, and what a loader would half read."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import MAX_NAME, MODULE, LoraError, check_pair, wide
from .convert import scaled
from .key_names import BOTH, FAMILIES, NEW, NONE, Family
from .kinds import DORA, other_kind, size
from .norm_names import NORMS, norm

PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "alpha": "alpha",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
}
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.base_model.model.",
    "transformer.",
    "base_model.model.",
    "unet.",
    "",
)
KOHYA = ("lora_unet_", "lora_transformer_", "lycoris_")
ADAPTER = re.compile(r"\.(lora_[AB])\.(?!weight$).+\.weight$")
"""How peft writes the weights of an adapter, whatever the name that it was given."""
EMBEDDINGS = ("bundle_emb.", "emb_params")
TEXT = ("text_encoder", "text_encoders.", "lora_te", "clip_", "t5xxl.", "te1", "te2")


@dataclass(frozen=True)
class Form:
    """How a module was written."""

    prefix: str
    peft: bool = True
    """Whether the matrices are called lora_A and lora_B."""
    up: str = ""
    """The key of the up matrix."""


@dataclass(frozen=True)
class Reading:
    """What a file of any known form holds."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    alphas: dict[str, float]
    forms: dict[str, Form]
    """By module."""
    missing_alpha: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    """Keys of text encoders, which are left alone."""
    embeddings: tuple[str, ...] = ()
    """Keys of textual-inversion embeddings that trainers bundle with a LoRA; left alone too."""
    other: tuple[str, ...] = ()
    """Keys of other kinds of adapter."""
    other_layers: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    """The (rows, columns) of the layers that they change, where their parts tell."""
    unknown: tuple[str, ...] = ()
    """Keys or modules that mean nothing here."""
    incomplete: tuple[str, ...] = ()
    rslora: bool = False
    alpha_from: str = ""
    """Where the missing alphas were found: "" means nowhere, and alpha is taken as rank."""
    metadata: dict[str, str] = field(default_factory=dict)

    def scaled(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the pairs with their scales in the up matrices."""
        return scaled(self.pairs, self.alphas)


def _underscored() -> dict[str, str]:
    """Map every known module, with `{}` and joined by underscores, to its name."""
    links = [link for family in FAMILIES.values() for link in (*family.links, *NORMS[family.name])]
    return {name.replace(".", "_"): name for link in links for name in (link.native, *link.diffusers)}


UNDERSCORED = _underscored()
NUMBER = re.compile(r"_(\d+)_")


def dotted(name: str) -> str | None:
    """Return the module that kohya's way of writing joins by underscores."""
    if name in UNDERSCORED:
        return UNDERSCORED[name]
    if found := NUMBER.search(name):
        pattern = UNDERSCORED.get(f"{name[: found.start()]}_{{}}_{name[found.end() :]}")
        return pattern and pattern.format(found[1])
    return None


def place(key: str) -> tuple[str, str, str] | None:
    """Split a key into prefix, module and the part's name; None where it is not of a LoRA's weights."""
    key = ADAPTER.sub(r".\1.default.weight", key)
    part = next((part for part in sorted(PARTS, key=len, reverse=True) if key.endswith("." + part)), None)
    if part is None:
        return None
    found = locate(key[: -len(part) - 1])
    return (*found, part) if found else None


def locate(stem: str) -> tuple[str, str] | None:
    """Split a layer's name in a file into prefix and module; None where it can be no layer."""
    for prefix in KOHYA:
        if stem.startswith(prefix):
            rest = stem[len(prefix) :]
            module = dotted(rest.lstrip("_"))
            # A second underscore belongs to the form: ComfyUI does not read over it.
            return (prefix + "_" * (len(rest) - len(rest.lstrip("_"))), module) if module else None
    prefix = next(prefix for prefix in PREFIXES if stem.startswith(prefix))
    module = stem[len(prefix) :]
    return (prefix, module) if MODULE.fullmatch(module) and len(module) <= MAX_NAME else None


def understand(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    path: object,
    adapter: Mapping[str, Any] | None = None,
) -> Reading:
    """Sort the tensors of a LoRA file of any known form; `adapter` is a peft configuration beside it."""
    parts: dict[str, dict[str, Tensor]] = {}
    forms: dict[str, Form] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    text, embeddings, other, unknown = [], [], [], []
    for key, tensor in wide(tensors).items():
        if key.startswith(TEXT):
            text.append(key)
        elif key.startswith(EMBEDDINGS):
            embeddings.append(key)
        elif kind := other_kind(key):
            other.append(key)
            if layer := locate(kind[0]):
                layers.setdefault(layer[1], {})[kind[1]] = tensor
        elif (found := place(key)) is None:
            unknown.append(key)
        else:
            prefix, module, name = found
            part = PARTS[name]
            if part in parts.setdefault(module, {}):
                raise LoraError(
                    f"{path}: {module} has its {part} matrix twice, in two forms or of two adapters; "
                    "keep one of them"
                )
            parts[module][part] = tensor
            if part == "up":
                forms[module] = Form(prefix, name == "lora_B.weight", key)
    whole = {module: found for module, found in parts.items() if {"down", "up"} <= found.keys()}
    settings, source = _settings(metadata, adapter)
    alphas = {module: _alpha(path, module, found, settings) for module, found in whole.items()}
    for module, found in whole.items():
        check_pair(path, module, found["down"], found["up"], alphas[module])
    missing = tuple(module for module, found in whole.items() if "alpha" not in found)
    return Reading(
        pairs={module: (found["down"], found["up"]) for module, found in whole.items()},
        alphas=alphas,
        forms={module: forms[module] for module in whole},
        missing_alpha=missing,
        text=tuple(text),
        embeddings=tuple(embeddings),
        other=tuple(other),
        other_layers={layer: size(found) for layer, found in layers.items()},
        unknown=tuple(unknown),
        incomplete=tuple(
            module
            for module, found in parts.items()
            if module not in whole and (len(found) > 1 or module not in layers or "alpha" not in found)
        ),
        rslora=bool(settings.get("use_rslora")),
        alpha_from=source if missing else "",
        metadata={key: value for key, value in metadata.items() if key not in ("format", PEFT)},
    )


PEFT = "lora_adapter_metadata"  # where diffusers keeps peft's configuration


def _settings(metadata: Mapping[str, str], adapter: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Return peft's configuration of the transformer's adapter, and where it was found."""
    if isinstance(adapter, Mapping) and "lora_alpha" in adapter:
        return dict(adapter), "adapter_config.json"
    try:
        packed = json.loads(metadata.get(PEFT, "{}"))
    except (ValueError, RecursionError):
        return {}, ""
    if not isinstance(packed, dict):
        return {}, ""
    flat = {key.removeprefix("transformer."): value for key, value in packed.items()}
    return (flat, "metadata") if "lora_alpha" in flat else ({}, "")


def _alpha(path: object, module: str, found: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """Return the alpha by which alpha/rank is the trained scale: the file's, else peft's, else the rank."""
    rank = len(found["down"]) if found["down"].ndim else 1
    if "alpha" in found:
        if found["alpha"].numel() != 1:
            raise LoraError(
                f"{path}: {module}.alpha has {found['alpha'].numel()} values; it must be one number"
            )
        return float(found["alpha"])
    alpha = settings.get("lora_alpha", rank)
    patterns = settings.get("alpha_pattern")
    for name, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if module == name or module.endswith(f".{name}"):
            alpha = value
    # JSON has whole numbers that no float holds.
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or abs(alpha) > sys.float_info.max:
        raise LoraError(
            f"{path}: lora_alpha of its peft configuration is {str(alpha)[:40]!r}; it must be a number that "
            "a float holds"
        )
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)


def in_core(family: Family, module: str, form: Form) -> str:
    """Return which ComfyUI (both, 0.33 alone, none) takes a module in the form in which it is written."""
    return known_by(family, form.prefix, module)


def known_by(family: Family, prefix: str, module: str) -> str:
    """Return which ComfyUI (both, 0.33 alone, none) knows a layer by a prefix and a name."""
    link, mapped = family.find(module), family.in_core(module)
    native = BOTH
    if link is None and (link := norm(family, module)):
        known = FAMILIES[family.core_names or family.name]
        mapped = known.core if module in link.diffusers else NONE
        native = NEW if family.name == "flux" else BOTH  # a layer with a weight since 0.33
    native = native if link is not None and module == link.native else NONE
    mmdit, flux, qwen, next_dit = (
        family.name in names
        for names in (("sd3",), ("flux", "flux2"), ("qwen_image",), ("z_image", "lumina2"))
    )
    takes = {
        "diffusion_model.": native or (mapped if next_dit else NONE),
        "transformer.": mapped,
        "base_model.model.": mapped if mmdit else NONE,
        "lora_unet_": native,
        "lora_transformer_": mapped if mmdit or flux else NONE,
        "lycoris_": mapped,
        "": mapped if qwen or next_dit else NEW if flux and mapped else NONE,
    }
    return takes.get(prefix, NONE)


def naming_in(family: Family, module: str) -> str:
    """Return whether a family's module is named natively, as in diffusers, or the same in both."""
    link = family.find(module)
    return "diffusers" if module != link.native else "both" if module in link.diffusers else "native"


def faults(reading: Reading) -> list[str]:
    """Return what keeps a file from being trained further, merged or exported as it is."""
    made = []
    for kind, keys in by_kind(reading.other).items():
        why = (
            "magnitudes beside the pair, which loaders apply in different ways; train without DoRA"
            if kind == DORA
            else "another kind of adapter, no pair of matrices; ComfyUI may load it (g2rpo check-lora)"
        )
        made.append(f"{_some(keys)}: {kind}, {why}")
    return made + gaps(reading)


def by_kind(keys: Iterable[str]) -> dict[str, list[str]]:
    """Sort keys of other adapters by their kind."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(other_kind(key)[2], []).append(key)
    return found


def gaps(reading: Reading) -> list[str]:
    """Return what nobody could use."""
    made = []
    if reading.incomplete:
        made.append(f"{_some(reading.incomplete)}: one of the two matrices is missing; save the file again")
    if reading.unknown:
        made.append(f"{_some(reading.unknown)}: no known name of a LoRA's weights")
    return made


def _some(names: Iterable[str]) -> str:
    """Name the first of several."""
    listed = list(names)
    first = listed[0] if len(listed[0]) <= 120 else listed[0][:117] + "…"
    return f"{len(listed)} × such as {first!a}" if len(listed) > 1 else f"{first!a}"


def check_sound(reading: Reading, path: object) -> None:
    """Refuse a file that cannot be taken over whole."""
    if problems := faults(reading):
        raise LoraError(f"{path} is refused: {'; '.join(problems)}")
    if not reading.pairs:
        raise LoraError(f"{path} holds no LoRA pair for the model; choose another file")
