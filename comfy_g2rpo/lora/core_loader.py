"""What ComfyUI's own loader applies of a LoRA file, key by key, in 0.3.64 and in 0.33.

Its rules are stated here: which files it renames first, which layers it knows by which names, and which parts
make an adapter of a layer. tests/test_lora_comfyui.py compares every one of them with the loaders of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from .forms import EMBEDDINGS, TEXT, known_by, locate
from .key_names import BOTH, NEW, NONE, Family, template
from .kinds import SCALE, other_kind
from .norm_names import PARAMETERS, has_bias, norm

OLD = "0.3.64"
PAIRS = (
    ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_B", "lora_A"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
    ("lora_B.default.weight", "lora_A.default.weight"),
)
"""Of a pair; the first whose up matrix is there counts."""
ENDINGS = (*tuple(sorted((name for pair in PAIRS for name in pair), key=len, reverse=True)), "alpha")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR = {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
PLAIN = ("w_norm", "diff", "set_weight")  # without magnitudes
WAN_FUN = "lora_unet__blocks_0_cross_attn_k.lora_down.weight"
CONTROL = {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"}


@dataclass(frozen=True)
class Applied:
    """By key of the file which ComfyUI applies it: both, 0.33, 0.3.64, or none."""

    keys: dict[str, str]
    stops: dict[str, str]
    """Why a version stops with an error at the file instead."""


@dataclass(frozen=True)
class Target:
    """What a layer's name leads to."""

    whole: bool = True
    """Whether it is all rows of a weight, not some of them or those in another order."""
    biased: bool = False


class MissingPartError(ValueError):
    """A part without which ComfyUI's loader stops."""


def applied(tensors: Mapping[str, Tensor], family: Family) -> Applied:
    """Tell which keys of a file ComfyUI applies to a model of a family."""
    taken: dict[str, set[str]] = {OLD: set(), NEW: set()}
    stops = {}
    for version in taken:
        try:
            taken[version] = _applied(tensors, family, version)
        except MissingPartError as error:
            stops[version] = str(error)
    verdicts = {(True, True): BOTH, (True, False): OLD, (False, True): NEW, (False, False): NONE}
    return Applied({key: verdicts[key in taken[OLD], key in taken[NEW]] for key in tensors}, stops)


def is_control(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a file is taken for a control LoRA of FLUX.1's makers."""
    return tensors.keys() >= CONTROL


def _applied(tensors: Mapping[str, Tensor], family: Family, version: str) -> set[str]:
    """Collect the keys that one version applies."""
    layers: dict[str, dict[str, str]] = {}
    for key in tensors:
        if not key.startswith((*TEXT, *EMBEDDINGS)) and (found := _split(_renamed(tensors, key, version))):
            layers.setdefault(found[0], {})[found[1]] = key
    taken: set[str] = set()
    for layer, keys in layers.items():
        if (target := _target(family, layer, version)) is None:
            continue
        parts = {part: tensors[key] for part, key in keys.items()}
        # Each one replaces what came before it for the same weight.
        *_, last = [frozenset[str](), *weight_patches(layer, parts)]
        used = {"alpha"} | last | ({"dora_scale"} if last and not last <= set(PLAIN) else set())
        if target.whole and target.biased:
            used |= {"diff_b"} | ({"b_norm"} if "w_norm" in parts else set())
        taken |= {keys[part] for part in used & parts.keys()}
    return taken


def _renamed(tensors: Mapping[str, Tensor], key: str, version: str) -> str:
    """Return a key's name after ComfyUI's converter of whole files."""
    if is_control(tensors):
        scale = ".scale.set_weight" if version == OLD else ".set_weight"
        return "diffusion_model." + SCALE.sub(scale, key.replace(".lora_B.bias", ".diff_b"))
    if WAN_FUN in tensors and key.startswith("lora_unet__"):
        return "lora_unet_" + key.removeprefix("lora_unet__")
    return key


def _split(key: str) -> tuple[str, str] | None:
    """Split a key into layer and part."""
    for part in ENDINGS:
        if key.endswith(f".{part}"):
            return key.removesuffix(f".{part}"), part
    found = other_kind(key)
    return found[:2] if found else None


def _target(family: Family, layer: str, version: str) -> Target | None:
    """Find what a layer's name leads to in ComfyUI; None where it knows no such name."""
    found = locate(layer)
    if found is None:
        return None
    prefix, module = found
    if known_by(family, prefix, module) in (BOTH, version):
        link = family.find(module) or norm(family, module)
        # Of a block, only the last one's shift and scale change places.
        swaps = link.swaps and template(module)[0] == module
        part = module != link.native and (len(link.diffusers) > 1 or swaps)
        return Target(not part, has_bias(family, module))
    if prefix != "diffusion_model.":
        return None
    layer, _, parameter = module.rpartition(".")
    link = family.find(layer) or norm(family, layer)
    known = {module, template(module)[0]} & {*PARAMETERS.get(family.name, ())}
    if link and layer == link.native:
        old_norm = version == OLD and family.name == "flux" and norm(family, layer)
        known = known or (
            has_bias(family, layer) if parameter == "bias" else parameter == "scale" and old_norm
        )
    return Target(whole=False) if known else None


def weight_patches(layer: str, parts: Mapping[str, Tensor]) -> Iterator[frozenset[str]]:
    """Yield, in ComfyUI's order, the parts of each adapter that a layer's weight gets.

    Raises MissingPartError where its loader looks for a part that is not there.
    """

    def all_of(*names: str) -> frozenset[str]:
        for name in names:
            if name not in parts:
                raise MissingPartError(f"{layer} lacks its {name}")
        return frozenset(names)

    if pair := next((pair for pair in PAIRS if pair[0] in parts), None):
        middle = {"lora_mid.weight"} if pair == PAIRS[0] else set()
        yield all_of(*pair) | ((middle | {"reshape_weight"}) & parts.keys())
    if LOHA[0] in parts:
        yield all_of(*LOHA, *(("hada_t1", "hada_t2") if "hada_t1" in parts else ()))
    if {"lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a"} & parts.keys():
        yield frozenset(LOKR & parts.keys())
    if "a1.weight" in parts:
        yield all_of("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    if "oft_blocks" in parts and parts["oft_blocks"].ndim in (3, 4):
        yield frozenset({"oft_blocks", "rescale"} & parts.keys())
    for name in PLAIN:
        if name in parts:
            yield frozenset({name})
