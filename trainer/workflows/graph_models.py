"""Loaders, LoRAs and shifts of a graph as the model section of a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from comfy_g2rpo.blocks.block_settings import ENCODERS, NO_FILE, OF_CHECKPOINT, TINY_MODEL

from .graph_file import WorkflowError, shown
from .graph_values import Graph, number_in, output_into, text_of
from .model_files import Facts, ModelFolders
from .page_graph import Node, Output

TINY_PARTS = {"path": "models/tiny", "max_sequence_length": 0}
NONE = ("", NO_FILE)
TINY, CHECKPOINT = "G2RPO_TinyDemoLoader", "CheckpointLoaderSimple"
CLIP_WIDGETS = {
    "CLIPLoader": ("clip_name",),
    "DualCLIPLoader": ("clip_name1", "clip_name2"),
    "TripleCLIPLoader": ("clip_name1", "clip_name2", "clip_name3"),
}
SHIFTS = ("ModelSamplingSD3", "ModelSamplingAuraFlow", "ModelSamplingFlux")
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
MAKERS = {
    "model": (TINY, CHECKPOINT, "UNETLoader", *LORAS, *SHIFTS),
    "clip": (TINY, CHECKPOINT, *CLIP_WIDGETS, "LoraLoader"),
    "vae": (TINY, CHECKPOINT, "VAELoader"),
}
"""Kinds of nodes that may stand before a socket."""
MAX_LORAS = 64
PRECISIONS = {"default": "", "fp8_e4m3fn": "fp8", "fp8_e4m3fn_fast": "fp8"}
"""What UNETLoader's weight_dtype is called in a recipe."""


@dataclass
class ModelParts:
    """What is found on the way from the training block back to the loaders."""

    section: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    shift: float | None = None
    facts: Facts | None = None
    """Of a model in a file; the tiny one has none."""


def model_parts(graph: Graph, block: Node, folders: ModelFolders) -> ModelParts:
    """Make the model section of the nodes before the training block."""
    parts = ModelParts()
    loader, loras = _walk_model(graph, block, parts, folders)
    text = _walk_text(graph, block, folders)
    vae = _known(output_into(graph, block, "vae", "a VAELoader"), "vae", block)
    if TINY in (kinds := {loader.kind, text.kind, vae.kind}):
        if len(kinds) > 1:
            raise WorkflowError(
                f"{block.label} takes one part of the tiny model and another of a real one; take model, clip "
                "and vae from the same loaders"
            )
        parts.section |= TINY_PARTS
    else:
        _files(graph, (loader, text, vae), parts, folders)
    if loras:
        parts.section["lora"] = loras
    return parts


def named_parts(graph: Graph, block: Node, folders: ModelFolders) -> ModelParts:
    """Make the model section of a block that names the files itself."""
    parts = ModelParts()
    choice = text_of(graph, block, "model")
    if choice == TINY_MODEL:
        parts.section |= TINY_PARTS
        return parts
    whole = choice.endswith(OF_CHECKPOINT)
    kind, field = ("checkpoints", "path") if whole else ("diffusion_models", "transformer")
    parts.section[field] = folders.find(kind, choice.removesuffix(OF_CHECKPOINT), block.label)
    named = [text_of(graph, block, widget) for widget in ENCODERS]
    texts = [folders.find("text_encoders", name, block.label) for name in named if name not in NONE]
    if texts:
        parts.section["text_encoders"] = texts
    if (vae := text_of(graph, block, "vae")) not in NONE:
        parts.section["vae"] = folders.find("vae", vae, block.label)
    _tell(parts, folders, block.label)
    return parts


def _known(found: Output, socket: str, block: Node) -> Node:
    """Return the node of an output, if it is one that may stand there."""
    if found.node.kind not in MAKERS[socket]:
        raise WorkflowError(
            f"{found.node.label} gives the {socket} of {block.label}, and a recipe cannot say what it does; "
            f"bypass it, or put one of these in its place: {', '.join(MAKERS[socket])}"
        )
    return found.node


def _walk_model(
    graph: Graph, block: Node, parts: ModelParts, folders: ModelFolders
) -> tuple[Node, list[dict[str, Any]]]:
    """Go from the training block to the loader; return it and the LoRAs in the order of their use."""
    loras: list[dict[str, Any]] = []
    node = _known(output_into(graph, block, "model", "a loader"), "model", block)
    while node.kind in (*LORAS, *SHIFTS):
        if node.kind in SHIFTS:
            # The one nearest to the block replaces those before it.
            parts.shift = _shift(graph, node) if parts.shift is None else parts.shift
        elif strength := number_in(graph, node, "strength_model"):
            path = folders.find("loras", text_of(graph, node, "lora_name"), node.label)
            loras.insert(0, {"path": path, "strength": strength})
        if len(loras) > MAX_LORAS:
            raise WorkflowError(f"{block.label} has more than {MAX_LORAS} LoRAs before it; merge some")
        node = _known(output_into(graph, node, "model", "a loader"), "model", block)
    return node, loras


def _shift(graph: Graph, node: Node) -> float:
    """Return the shift s of σ ↦ sσ/(1+(s−1)σ) that a node sets."""
    if node.kind != "ModelSamplingFlux":
        return number_in(graph, node, "shift")
    # As ComfyUI has it: a line through the shifts at 256 and 4096 tokens, which is an exponent.
    most, least = number_in(graph, node, "max_shift"), number_in(graph, node, "base_shift")
    tokens = number_in(graph, node, "width") * number_in(graph, node, "height") / 256
    exponent = least + (tokens - 256) * (most - least) / (4096 - 256)
    if not abs(exponent) < 50:
        raise WorkflowError(f"{node.label} gives a shift of e^{exponent:.4g}; choose smaller ones")
    return math.exp(exponent)


def _walk_text(graph: Graph, block: Node, folders: ModelFolders) -> Node:
    """Go from the training block to what loads the text encoders."""
    node = _known(output_into(graph, block, "clip", "a CLIPLoader"), "clip", block)
    while node.kind == "LoraLoader":
        if number_in(graph, node, "strength_clip"):
            path = folders.find("loras", text_of(graph, node, "lora_name"), node.label)
            if folders.changes_text(path):
                raise WorkflowError(
                    f"{node.label}: its LoRA changes text encoders, which a recipe cannot say; set "
                    "strength_clip to 0, or take LoraLoaderModelOnly"
                )
        node = _known(output_into(graph, node, "clip", "a CLIPLoader"), "clip", block)
    return node


def _files(graph: Graph, nodes: tuple[Node, Node, Node], parts: ModelParts, folders: ModelFolders) -> None:
    """Name the files of the loaders of a model, its text encoders and its VAE."""
    loader, text, vae = nodes
    section = parts.section
    found: dict[str, str] = {}
    for node in nodes:
        if node.kind == CHECKPOINT:
            found[folders.find("checkpoints", text_of(graph, node, "ckpt_name"), node.label)] = node.label
    if len(found) > 1:
        raise WorkflowError(
            f"{' and '.join(found.values())} load two checkpoints, and a recipe has one; take VAE and text "
            "encoders from VAELoader and CLIPLoader"
        )
    if found:
        section["path"] = next(iter(found))
    if loader.kind != CHECKPOINT:
        name = text_of(graph, loader, "unet_name")
        section["transformer"] = folders.find("diffusion_models", name, loader.label)
        _precision(graph, loader, parts)
    if text.kind != CHECKPOINT:
        names = [text_of(graph, text, widget) for widget in CLIP_WIDGETS[text.kind]]
        section["text_encoders"] = [folders.find("text_encoders", name, text.label) for name in names]
        if text.kind != "TripleCLIPLoader" and text_of(graph, text, "device") == "cpu":
            parts.memory["text_encoders"] = "cpu"
    if vae.kind != CHECKPOINT:
        section["vae"] = folders.find("vae", text_of(graph, vae, "vae_name"), vae.label)
    _tell(parts, folders, loader.label)


def _tell(parts: ModelParts, folders: ModelFolders, asked: str) -> None:
    """Say what the files of a model tell of it."""
    parts.facts, model, memory = folders.tell(parts.section, asked)
    parts.section |= model
    parts.memory |= memory


def _precision(graph: Graph, loader: Node, parts: ModelParts) -> None:
    """Read the precision that a loader keeps weights in."""
    kept = text_of(graph, loader, "weight_dtype") or "default"
    if kept not in PRECISIONS:
        choices = ", ".join(PRECISIONS)
        raise WorkflowError(f"{loader.label}: weight_dtype is {shown(kept)}; choose one of: {choices}")
    if PRECISIONS[kept]:
        parts.memory["quantization"] = PRECISIONS[kept]
