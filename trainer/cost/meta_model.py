"""A model without its weights: built from configurations and file headers alone, on tensors that have shapes
and no memory.

What runs on it takes the allocations of the real model and computes nothing, so that a run's memory is known
before anything is loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..config.reading import ConfigError, model_folder
from ..families import __name__ as FAMILIES
from ..families.files import diffusers_folder
from ..families.files.parts import CONFIGS, Parts, read_config
from ..families.files.sizes import TRANSFORMERS
from ..lora.weight_files import look_at
from ..model.stored_linear import Float8, StoredLinear, store

if TYPE_CHECKING:
    from ..config.reading import Config
    from ..config.sections import ModelSection
    from ..families.shared.peft_policy import Adapted

KINDS = {
    "sd3": ("StableDiffusion3Pipeline", "SD3"),
    "flux": ("FluxPipeline", "Flux"),
    "flux2": ("Flux2Pipeline", "Flux2"),
    "qwen_image": ("QwenImagePipeline", "QwenImage"),
    "wan": ("WanPipeline", "Wan"),
    "z_image": ("ZImagePipeline", "ZImage"),
    "lumina2": ("Lumina2Pipeline", "Lumina2"),
}
"""Pipeline and policy of every family."""
EDITING = {"flux": ("kontext", "Kontext"), "qwen_image": ("qwen_edit", "QwenEdit")}
"""Module and policy of a family's models that edit pictures; their transformers are the family's own."""
LATER = ("text_encoder", "image_encoder")


@dataclass(frozen=True)
class Sketch:
    """What is known of a model before it is loaded: the configurations of transformer and VAE, and its
    text encoders' weights.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_parameters: Mapping[str, int]
    """Weights of the text encoders, by component."""
    clip_tokens: int = 77
    edits: bool = False
    """Whether prompts bring a picture."""


def published() -> dict[str, Any]:
    """Read the sizes of the published models, by the name under which the hub has them."""
    return json.loads((CONFIGS / "published.json").read_text("utf-8"))


def look(section: ModelSection) -> Sketch:
    """Look at a model by its configurations and headers.

    One that this machine lacks is known if it is published, else refused.
    """
    known = published().get(section.path or "")
    try:
        place = model_folder(section.path) if section.path else None
    except ConfigError:
        if known is None:
            raise
        return of_published(known)
    parts = Parts(getattr(diffusers, KINDS[section.family][0]), section.family, section, place, "cpu")
    transformer = read_config(parts.folder, "transformer")
    if transformer is None and parts.transformer is None:
        diffusers_folder.components(parts.folder, KINDS[section.family][0])
        raise ValueError(
            f"model.path {parts.folder}: it lacks transformer/config.json; "
            f"{diffusers_folder.remedy(parts.folder, 'transformer')}"
        )
    if transformer is None:
        transformer = {**parts.facts["transformer"], **TRANSFORMERS[section.family](parts.transformer)}
    vae = read_config(parts.folder, "vae") or parts.facts["vae"]["config"]
    text = {name: sum(map(size_of, held.tensors.values())) for name, held in parts.text.held.items()}
    if parts.folder:
        for part in sorted(parts.folder.iterdir()):
            if part.name.startswith(LATER) and part.name not in text:
                files = list(diffusers_folder.weight_files(part))
                text[part.name] = sum(
                    size_of(stored) for file in files for stored in look_at(file).tensors.values()
                )
    name = diffusers_folder.pipeline_name(parts.folder) if parts.folder else ""
    return Sketch(
        transformer,
        vae,
        text,
        clip_tokens(parts.folder),
        bool(section.edits) or "Edit" in name or "Kontext" in name,
    )


def of_published(known: Mapping[str, Any]) -> Sketch:
    """Sketch a published model that is not here."""
    facts = (
        json.loads((CONFIGS / f"{known['facts']}.json").read_text("utf-8"))
        if "facts" in known
        else {"transformer": {}}
    )
    vae = known.get("vae") or facts["vae"]["config"]
    return Sketch({**facts["transformer"], **known["transformer"]}, vae, known["text_parameters"])


def size_of(stored: Any) -> int:
    """Count the numbers of a stored tensor."""
    count = 1
    for side in stored.shape:
        count *= side
    return count


def clip_tokens(place: Path | None) -> int:
    """Return the length to which CLIP's tokenizer fills a text up."""
    try:
        return (
            int(
                json.loads((place / "tokenizer/tokenizer_config.json").read_text("utf-8"))["model_max_length"]
            )
            if place
            else 77
        )
    except (OSError, ValueError, KeyError, TypeError):
        return 77


def build(config: Config, sketch: Sketch) -> Adapted:
    """Build a policy on the meta device, its transformer packed as the configuration says."""
    section, memory = config.model, config.memory
    (pipeline_name, policy_name), module_name = KINDS[section.family], str(section.family)
    if sketch.edits:
        module_name, policy_name = EDITING[module_name]
    dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        transformer, vae = made(sketch.transformer), made(sketch.vae)
    for module in (transformer, vae):
        convert(module, dtype)
    kind = getattr(diffusers, pipeline_name)
    given = {"transformer": transformer, "vae": vae}
    names = [
        name
        for name in kind.__init__.__annotations__
        if name.startswith((*LATER, "tokenizer", "scheduler", "feature"))
    ]
    pipeline = kind(**given, **dict.fromkeys(names))
    settings: dict[str, Any] = {"frames": section.frames} if section.family == "wan" else {}
    policy: Any = getattr(import_module(f"..families.{module_name}", __package__), policy_name)(
        pipeline,
        guidance=section.guidance,
        max_sequence_length=section.max_sequence_length,
        autocast=torch.bfloat16 if section.dtype == "bf16" else None,
        **settings,
    )
    policy.packed = (
        True  # what is merged from weights for a rollout looks at numbers, of which there are none here
    )
    # nf4 makes the same weights as fp8, of half the bytes, which are counted by `memory.py`.
    quantization = "none" if memory.quantization == "none" else "fp8"
    meta = torch.device("meta")
    store(transformer, quantization, memory.block_swap, meta, meta)
    if memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if memory.vae_tiling:
        vae.enable_tiling()
    policy.attach_lora(config.lora.rank, config.lora.alpha, config.lora.targets != "attention")
    for parameter in policy.parameters():
        parameter.data = parameter.data.float()
    return policy


def made(config: Mapping[str, Any]) -> nn.Module:
    """Make a model of its configuration."""
    return getattr(diffusers, config["_class_name"]).from_config(dict(config)).requires_grad_(False).eval()


def convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model to a precision as its loader does: some parts stay in fp32."""
    exact = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and exact.isdisjoint(name.split(".")):
            tensor.data = tensor.data.to(dtype)


def cond(policy: Adapted, sketch: Sketch, length: int, reference_size: int) -> Any:
    """Make a prompt's features, of a text of a length and a square picture, inside `pretended`."""
    config = sketch.transformer
    width = config.get("joint_attention_dim") or config.get("text_dim") or config.get("cap_feat_dim")
    if type(policy).__name__ == "SD3":
        length += sketch.clip_tokens
    channels, *side = policy.latent_shape(*[reference_size // 16 * 16] * 2) if sketch.edits else (0, 0, 0)
    shapes = {"tokens": (length, width), "without": (length, width), "picture": (channels, *side)}
    shapes["pooled"] = (config.get("pooled_projection_dim", 0),)
    return policy.cond(*(torch.empty(shapes[name], dtype=policy.dtype) for name in policy.cond._fields))


@contextmanager
def pretended(policy: Adapted) -> Iterator[None]:
    """Let a policy of the meta device pass for one on the CPU inside the context.

    Every tensor that is made has a shape and no memory.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pretend(tensor: Tensor) -> Tensor:
        return FakeTensor(mode, tensor.detach(), torch.device("cpu"))

    for module in (*policy.transformer.modules(), *policy.vae.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    pretend(parameter), requires_grad=parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = pretend(buffer)
        if isinstance(module, StoredLinear):
            module.device, packed = torch.device("cpu"), module.packed
            packed.kept = pretend(packed.kept)
            if isinstance(packed, Float8):
                packed.scale = pretend(packed.scale)
    policy.device = torch.device("cpu")
    try:
        with mode:
            yield
    finally:
        forget()


def forget() -> None:
    """Empty the families' caches, such as those of positions: what they took in from a sketch is of no use
    to a model.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(FAMILIES):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
