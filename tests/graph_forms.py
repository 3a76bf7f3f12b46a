"""Workflows made by code, plain ones and odd ones: what ComfyUI's page and its users make of one graph."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from comfy_g2rpo.lora.key_names import FAMILIES
from g2rpo_trainer.workflows.graph_file import WorkflowError
from g2rpo_trainer.workflows.model_files import ModelFolders
from g2rpo_trainer.workflows.training_recipe import graph_of, recipe_of, training_block

BLOCKS = json.loads((Path(__file__).with_name("snapshots") / "nodes.json").read_text("utf-8"))
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
CORE: dict[str, tuple[dict[str, str], dict[str, Any], list[str]]] = {
    "UNETLoader": ({}, {"unet_name": "", "weight_dtype": "default"}, ["MODEL"]),
    "CLIPLoader": ({}, {"clip_name": "", "type": "sd3", "device": "default"}, ["CLIP"]),
    "VAELoader": ({}, {"vae_name": ""}, ["VAE"]),
    "CheckpointLoaderSimple": ({}, {"ckpt_name": ""}, ["MODEL", "CLIP", "VAE"]),
    "LoraLoader": (
        {"model": "MODEL", "clip": "CLIP"},
        {"lora_name": "", "strength_model": 1.0, "strength_clip": 1.0},
        ["MODEL", "CLIP"],
    ),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, {"lora_name": "", "strength_model": 1.0}, ["MODEL"]),
    "ModelSamplingSD3": ({"model": "MODEL"}, {"shift": 3.0}, ["MODEL"]),
    "ModelSamplingFlux": (
        {"model": "MODEL"},
        {"max_shift": 1.15, "base_shift": 0.5, "width": 1024, "height": 1024},
        ["MODEL"],
    ),
    "PrimitiveInt": ({}, {"value": 0, "control": "fixed"}, ["INT"]),
    "PrimitiveFloat": ({}, {"value": 0.0}, ["FLOAT"]),
    "PrimitiveStringMultiline": ({}, {"value": ""}, ["STRING"]),
    "PrimitiveNode": ({}, {"value": 0, "control": "fixed"}, ["INT"]),
    "Reroute": ({"": "*"}, {}, ["*"]),
    "SetNode": ({"value": "*"}, {"name": ""}, ["*"]),
    "GetNode": ({}, {"name": ""}, ["*"]),
    "LoadImage": ({}, {"image": "", "upload": "image"}, ["IMAGE", "MASK"]),
    "BasicScheduler": ({"model": "MODEL"}, {"scheduler": "simple", "steps": 8, "denoise": 1.0}, ["SIGMAS"]),
    "OddPatch": ({"model": "MODEL"}, {"strength": 1.0}, ["MODEL"]),
}
"""Of nodes that are not ours: sockets, widgets in order, outputs."""
TRAIN = {
    "recipe": "g2rpo",
    "steps": 3,
    "prompts": "a red circle\ntwo blue squares\na green triangle\nthree red squares\na blue circle",
    "heldout_prompts": "a yellow circle",
    "guidance": 1.0,
    "width": 64,
    "height": 64,
    "learning_rate": 1e-3,
    "rank": 4,
    "alpha": 8.0,
    "targets": "attention",
    "prompts_per_step": 2,
    "slots": 16,
    "eval_every": 2,
    "seed": 7,
    "run": "mine",
    "changes": "num_steps = 4\ngroup_size = 4",
}
Wire = tuple[int, int]
NONE = ModelFolders()


def parts_of(kind: str) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Return a node's sockets, its widgets with what they start from, and its outputs."""
    if kind in CORE:
        return CORE[kind]
    inputs = BLOCKS[kind]["inputs"]
    sockets = {each["id"]: each["type"] for each in inputs if each["type"] not in WIDGETS}
    widgets = {
        each["id"]: each.get("default", each.get("options", [""])[0])
        for each in inputs
        if each["type"] in WIDGETS
    }
    return sockets, widgets, BLOCKS[kind]["outputs"]


class Page:
    """A graph of the page; `graph.add(kind, widget=…, socket=(node, slot))` returns the node's id."""

    def __init__(self, first: int = 1) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.first = first

    def add(self, kind: str, /, mode: int = 0, title: str = "", **given: Any) -> int:
        """Add a node. Pairs are wires; a wire into a widget makes it an input, as on the page."""
        sockets, widgets, outputs = parts_of(kind)
        number = self.first + len(self.nodes)
        inputs = []
        for name, type_ in {**sockets, **dict.fromkeys(widgets, "INT")}.items():
            entry: dict[str, Any] = {"name": name, "type": type_, "link": None}
            if name in widgets:
                entry["widget"] = {"name": name}
            if isinstance(given.get(name or "input"), tuple):
                entry["link"] = self.wire(given[name or "input"], number, len(inputs), type_)
            inputs.append(entry)
        values = [
            value if isinstance(given.get(n), tuple) else given.get(n, value) for n, value in widgets.items()
        ]
        made = {"id": number, "type": kind, "mode": mode, "inputs": inputs, "widgets_values": values}
        made["outputs"] = [{"name": each, "type": each} for each in outputs]
        self.nodes.append(made | ({"title": title} if title else {}))
        return number

    def wire(self, origin: Wire, node: int, slot: int, kind: str) -> int:
        """Add a wire."""
        number = self.first + 500 + len(self.links)
        self.links.append([number, *origin, node, slot, kind])
        return number

    def tree(self, **more: Any) -> dict[str, Any]:
        """Return what the page saves."""
        return {"nodes": self.nodes, "links": self.links, "version": 0.4, **more}


def end_links(page: Page, origin: Wire, slot: int, kind: str) -> None:
    """Lead a wire out of a folded graph."""
    page.wire(origin, -20, slot, kind)


def folded(page: Page, key: str, inputs: Sequence[str] = ()) -> dict[str, Any]:
    """Return a graph as the definition of a folded one."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(names, link, strict=True)) for link in page.links]
    sockets = [{"name": name, "type": "*"} for name in inputs]
    return {"id": key, "name": key, "nodes": page.nodes, "links": links, "inputs": sockets, "outputs": []}


def plain(**changes: Any) -> Page:
    """Return a graph that trains the tiny model, as simple as can be: nodes 1 to 4."""
    page = Page()
    page.add("G2RPO_TinyDemoLoader")
    page.add("G2RPO_LoadReward", reward="agreement")
    page.add("G2RPO_LoadReward", reward="strict")
    wires = {"model": (1, 0), "clip": (1, 1), "vae": (1, 2), "reward": (2, 0), "heldout_reward": (3, 0)}
    page.add("G2RPO_TrainLoRA", **{**wires, **TRAIN, **changes})
    return page


def api_of(page: Page) -> dict[str, Any]:
    """Return a plain graph in the API format."""
    origins = {link[0]: [str(link[1]), link[2]] for link in page.links}
    made = {}
    for node in page.nodes:
        _, widgets, _ = parts_of(node["type"])
        inputs = dict(zip(widgets, node["widgets_values"], strict=True))
        inputs |= {each["name"]: origins[each["link"]] for each in node["inputs"] if each["link"]}
        made[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return made


def model_file(path: Path, family: str, prefix: str = "", more: Mapping[str, Any] | None = None) -> Path:
    """Write the least file that is told to be a family's transformer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{prefix}{FAMILIES[family].signature[0]}.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    save_file(tensors | {name: torch.zeros(2, 2) for name in more or {}}, path)
    return path


def large_file(
    path: Path, family: str, prefix: str = "", more: Iterable[str] = (), dtype: str = "BF16"
) -> Path:
    """Write a file of 1.3 B numbers that is told to be a family's transformer; with holes in their place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {f"{prefix}{FAMILIES[family].signature[0]}.weight": [1_300_000, 1000]}
    header, end = {}, 0
    for name, size in (sizes | {name: [2, 2] for name in more}).items():
        begin, end = end, end + math.prod(size) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def write(path: Path, tree: Any) -> Path:
    """Write a workflow's file."""
    path.write_text(json.dumps(tree), "utf-8")
    return path


def recipe_in(tree: Any, folders: ModelFolders = NONE) -> dict[str, Any]:
    """Return the recipe of a workflow's content."""
    graph = graph_of(json.loads(json.dumps(tree)))
    return recipe_of(graph, training_block(graph), folders).tree


def refusal(tree: Any, folders: ModelFolders = NONE) -> str:
    """Return why a workflow is refused."""
    with pytest.raises(WorkflowError) as caught:
        recipe_in(tree, folders)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def rewire(page: Page, name: str, origin: tuple[int, int], node: int = 4) -> None:
    """Let another output go into an input."""
    entries = page.nodes[node - page.first]["inputs"]
    slot = [each["name"] for each in entries].index(name)
    entries[slot]["link"] = page.wire(origin, node, slot, entries[slot]["type"])
