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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .. import families
from ..config.file_checks import published
from ..config.reading import ConfigError, model_folder
from ..families.files import diffusers_folder
from ..families.files.parts import Parts, read_config, read_facts
from ..lora.weight_files import look_at
from ..model.stored_linear import Float8, StoredLinear, store

if TYPE_CHECKING:
    from ..config.reading import Config
    from ..config.sections import ModelSection
    from ..families.shared.peft_policy import PeftPolicy

LATER = ("text_encoder", "image_encoder")


@dataclass(frozen=True)
class Sketch:
    """What is known of a model before it is loaded: its policy's class, and configurations of its parts."""

    policy: type[PeftPolicy]
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_parameters: Mapping[str, int]
    """Weights of the text encoders, by component."""
    clip_tokens: int = 77


def look(section: ModelSection) -> Sketch:
    """Look at a model by configurations and headers, or at what is published of one that is not here."""
    known = published().get(section.path or "")
    try:
        place = model_folder(section.path) if section.path else None
    except ConfigError:
        if known is None:
            raise
        edits = known.get("edits", section.edits)
        return of_published(known, families.policy_class(section.model_copy(update={"edits": edits}), None))
    policy = families.policy_class(section, place)
    parts = Parts(policy, section, place, "cpu")
    transformer = read_config(parts.folder, "transformer")
    if transformer is None and parts.transformer is None:
        diffusers_folder.components(parts.folder, parts.kind.__name__)
        raise ValueError(
            f"model.path {parts.folder}: it lacks transformer/config.json; "
            f"{diffusers_folder.remedy(parts.folder, 'transformer')}"
        )
    if transformer is None:
        transformer = {**parts.facts["transformer"], **policy.sizes(parts.transformer)}
    vae = read_config(parts.folder, "vae") or parts.facts["vae"]["config"]
    text = {name: sum(map(size_of, held.tensors.values())) for name, held in parts.text.held.items()}
    if parts.folder:
        for part in sorted(parts.folder.iterdir()):
            if part.name.startswith(LATER) and part.name not in text:
                files = list(diffusers_folder.weight_files(part))
                text[part.name] = sum(
                    size_of(stored) for file in files for stored in look_at(file).tensors.values()
                )
    return Sketch(policy, transformer, vae, text, clip_tokens(parts.folder))


def of_published(known: Mapping[str, Any], policy: type[PeftPolicy]) -> Sketch:
    """Sketch a published model that is not here."""
    facts = read_facts(known.get("facts", ""))
    vae = known.get("vae") or facts["vae"]["config"]
    transformer = {**facts.get("transformer", {}), **known["transformer"]}
    return Sketch(policy, transformer, vae, known["text_parameters"])


def size_of(stored: Any) -> int:
    """Count the numbers of a stored tensor."""
    count = 1
    for side in stored.shape:
        count *= side
    return count


def clip_tokens(place: Path | None) -> int:
    """Return the length to which CLIP's tokenizer fills a text up."""
    if place is None:
        return 77
    try:
        settings = json.loads((place / "tokenizer/tokenizer_config.json").read_text("utf-8"))
        return int(settings["model_max_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return 77


def build(config: Config, sketch: Sketch) -> PeftPolicy:
    """Build a policy on the meta device, its transformer packed as the configuration says."""
    section, memory = config.model, config.memory
    dtype = torch.bfloat16 if section.dtype == "bf16" else torch.float32
    with torch.device("meta"):
        transformer, vae = made(sketch.transformer), made(sketch.vae)
    for module in (transformer, vae):
        convert(module, dtype)
    kind = sketch.policy.pipeline_class
    given = {"transformer": transformer, "vae": vae}
    empty = (*LATER, "tokenizer", "scheduler", "feature")
    names = [name for name in kind.__init__.__annotations__ if name.startswith(empty)]
    policy: Any = sketch.policy.of(section, kind(**given, **dict.fromkeys(names)))
    if section.negative_prompt is not None:
        policy.avoid(section.negative_prompt)
    # What is merged from weights for a rollout looks at numbers, of which there are none here.
    policy.packed = True
    # nf4 makes the same weights as fp8, of half the bytes, which are counted by `count_model.py`.
    quantization = "none" if memory.quantization == "none" else "fp8"
    meta = torch.device("meta")
    store(transformer, quantization, memory.block_swap, meta, moving=False)
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


def cond(policy: PeftPolicy, sketch: Sketch, length: int, reference_size: int) -> Any:
    """Make a prompt's features, of a text of a length and a square picture, inside `pretended`."""
    config = sketch.transformer
    width = config.get("joint_attention_dim") or config.get("text_dim") or config.get("cap_feat_dim")
    if policy.clip_tokens:
        length += sketch.clip_tokens
    channels, *side = policy.latent_shape(*[reference_size // 16 * 16] * 2) if policy.edits else (0, 0, 0)
    shapes = {"tokens": (length, width), "without": (length, width), "picture": (channels, *side)}
    shapes["pooled"] = (config.get("pooled_projection_dim", 0),)
    return policy.cond(*(torch.empty(shapes[name], dtype=policy.dtype) for name in policy.cond._fields))


@contextmanager
def pretended(policy: PeftPolicy) -> Iterator[None]:
    """Let a policy of the meta device pass for one on the CPU, its tensors without memory."""
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
    """Empty the families' caches, such as those of positions, of what a sketch put there."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{families.__name__}."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
