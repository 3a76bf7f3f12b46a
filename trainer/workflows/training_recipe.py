"""A workflow's training block, with the nodes before it, as a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_g2rpo.blocks.block_settings import HELDOUT_SHARE, TINY_PARAMETERS, block_fields, sets_aside
from comfy_g2rpo.blocks.run_names import checked_name
from comfy_g2rpo.blocks.train_presets import AS_TYPED, PRESETS, WIDGETS, preset_numbers
from comfy_g2rpo.options import check_value
from comfy_g2rpo.prompts import prompts_of

from .api_graph import ApiGraph
from .graph_file import Raw, WorkflowError, read_file, shown
from .graph_models import ModelParts, model_parts, named_parts
from .graph_rewards import RewardReader, heldout_sections, trained_sections
from .graph_values import number_in, output_into, text_of, whole_in
from .model_files import FAMILY_FACTS, ModelFolders, tokens_for
from .page_graph import Node, Nothing, Output, PageGraph

BLOCK, HANDED_OVER = "G2RPO_TrainLoRA", "G2RPO_SubmitTraining"
STEPWISE = {
    "G2RPO_UpdateLoRA": "is one step of a loop that ComfyUI runs; put Train LoRA on a Reward in its place",
    "G2RPO_UpdateFromVotes": "learns from votes that a run keeps; do so with: g2rpo pairs RUN",
}
"""What other blocks that learn do, and what to do instead."""
WHOLE = ("steps", "width", "height", "rank", "prompts_per_step", "slots", "eval_every", "seed")


@dataclass
class FoundRecipe:
    """A recipe that a workflow says, as nested tables."""

    tree: dict[str, Any]
    run: str
    """What the run is called in the graph; blank where the block leaves it open."""
    notes: list[str] = field(default_factory=list)
    """What is another in the recipe than in the graph."""


def read_workflow(path: Path, folders: ModelFolders, wanted: str | None = None) -> FoundRecipe:
    """Read a workflow's file; `wanted` is the id of the training block, where there are several."""
    try:
        graph = graph_of(read_file(path))
        return recipe_of(graph, training_block(graph, wanted), folders)
    except WorkflowError as error:
        raise WorkflowError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def graph_of(tree: Raw) -> PageGraph | ApiGraph:
    """Tell the two formats apart."""
    if "nodes" in tree:
        return PageGraph(tree)
    prompt, workflow = tree.get("prompt"), tree.get("workflow")
    if isinstance(prompt, dict) and "class_type" not in tree["prompt"]:
        return ApiGraph(prompt)
    if isinstance(workflow, dict) and "nodes" in workflow:
        return PageGraph(workflow)
    if not tree or not any(isinstance(each, dict) and "class_type" in each for each in tree.values()):
        raise WorkflowError("it holds no workflow; save one in ComfyUI, as it is or in the API format")
    return ApiGraph(tree)


def training_block(graph: PageGraph | ApiGraph, wanted: str | None = None) -> Node:
    """Return the block that trains, or hands a training over."""
    both = [graph.nodes(kind) for kind in (BLOCK, HANDED_OVER)]
    found, off = ([node for nodes in both for node in nodes[at]] for at in (0, 1))
    if wanted is not None:
        found = [node for node in found if node.id == wanted]
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(node.label for node in found[:4])
        raise WorkflowError(f"{len(found)} blocks train: {listed}; name one by its id with --node")
    if off:
        raise WorkflowError(f"{off[0].label} is muted or bypassed, and nothing else trains; switch it on")
    if wanted is not None:
        raise WorkflowError(f"--node {shown(wanted)} is no block that trains; give the id of one")
    if where := graph.hidden(BLOCK) or graph.hidden(HANDED_OVER):
        raise WorkflowError(where)
    for kind, instead in STEPWISE.items():
        for node in graph.nodes(kind)[0]:
            raise WorkflowError(f"{node.label} {instead}")
    first = next((node for node in graph.every_kind() if node.kind.startswith("G2RPO_")), None)
    other = f"{first.label} is no training" if first else f"there is no block {BLOCK}"
    raise WorkflowError(f"{other}; add Train LoRA on a Reward, or run this workflow in ComfyUI")


def recipe_of(graph: PageGraph | ApiGraph, block: Node, folders: ModelFolders) -> FoundRecipe:
    """Say a block as a recipe."""
    if isinstance(given := graph.given(block, "sigmas"), Output):
        raise WorkflowError(
            f"{given.node.label} gives the sigmas of {block.label}, and a recipe has a number of steps "
            "and a shift; disconnect it, and write num_steps = … and shift = … into changes"
        )
    notes: list[str] = []
    parts = (named_parts if block.kind == HANDED_OVER else model_parts)(graph, block, folders)
    typed = _typed(graph, block)
    numbers = _preset(graph, block, typed, parts)
    try:
        method, train = block_fields(typed, numbers, text_of(graph, block, "changes"))
    except WorkflowError:
        raise
    except ValueError as error:
        raise WorkflowError(f"{block.label}: {error}") from error
    _guidance(graph, block, parts, notes)
    parts.section |= {name: typed[name] for name in ("width", "height")}
    if "shift" not in method:
        if parts.shift is None:
            parts.section["schedule"] = "comfyui"
        else:
            method["shift"] = parts.shift
    rewards, measured, mix = _rewards(graph, block, folders, notes)
    tree = {
        "model": parts.section,
        "memory": parts.memory,
        "lora": {"rank": typed["rank"], "alpha": typed["alpha"], "targets": text_of(graph, block, "targets")},
        "method": {"name": text_of(graph, block, "recipe"), **mix, **method},
        "rewards": rewards,
        "heldout_rewards": measured,
        "prompts": _prompts(graph, block, parts, notes),
        "train": train,
    }
    plain = {name: as_lists(section) for name, section in tree.items() if section}
    return FoundRecipe(plain, _run_name(graph, block), notes)


def _run_name(graph: PageGraph | ApiGraph, block: Node) -> str:
    """Return what the run is called; blank where that is left open."""
    name = text_of(graph, block, "run").strip()
    try:
        return checked_name(name, "run") if name else ""
    except ValueError as error:
        raise WorkflowError(f"{block.label}: {error}") from error


def as_lists(section: Any) -> Any:
    """Write what is no list but acts like one as YAML has it."""
    if not isinstance(section, Mapping):
        return section
    return {name: list(value) if isinstance(value, tuple) else value for name, value in section.items()}


def _typed(graph: PageGraph | ApiGraph, block: Node) -> dict[str, Any]:
    """Return the numbers of the block's widgets."""
    numbers = {name: whole_in(graph, block, name) for name in WHOLE}
    return numbers | {name: number_in(graph, block, name) for name in ("learning_rate", "alpha")}


def _preset(
    graph: PageGraph | ApiGraph, block: Node, typed: dict[str, Any], parts: ModelParts
) -> dict[str, Any]:
    """Return the numbers of the block's preset, and put them into the place of typed ones."""
    preset = text_of(graph, block, "preset") or AS_TYPED
    try:
        check_value("preset", preset, choices=tuple(PRESETS))
    except ValueError as error:
        raise WorkflowError(f"{block.label}: {error}") from error
    parameters = parts.facts.parameters if parts.facts else TINY_PARAMETERS
    numbers = preset_numbers(preset, parameters, text_of(graph, block, "recipe"))
    typed |= {name: numbers[name] for name in numbers if name in WIDGETS}
    return numbers


def _guidance(graph: PageGraph | ApiGraph, block: Node, parts: ModelParts, notes: list[str]) -> None:
    """Say the guidance, and what it moves away from."""
    guidance, negative = number_in(graph, block, "guidance"), text_of(graph, block, "negative")
    family = FAMILY_FACTS[parts.facts.family] if parts.facts else {}
    guided = parts.facts is not None and parts.facts.guided
    # In ComfyUI the conditioning holds that input; a job hands the widget's number over as it.
    if guided and block.kind == BLOCK and guidance > 1:
        raise WorkflowError(
            f"{block.label}: guidance is {guidance:g}, but this model takes its guidance as an input, and a "
            "recipe has no other for it; set it to 1"
        )
    if guided and block.kind == BLOCK:
        # What ComfyUI gives a model that nobody gives another number.
        guidance = family["guidance"]
    parts.section["guidance"] = guidance
    if guidance > 1 and family.get("norms"):
        notes.append("guidance keeps the norms of the model's answers, as diffusers has it; ComfyUI does not")
    if negative.strip() and guidance > 1 and not guided:
        parts.section["negative_prompt"] = negative


def _rewards(
    graph: PageGraph | ApiGraph, block: Node, folders: ModelFolders, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Return the rewards, those that only measure, and how several become one."""
    reader = RewardReader(graph, folders)
    mix = reader.read(output_into(graph, block, "reward", "Load Reward"))
    found = graph.given(block, "heldout_reward")
    held = reader.read(found) if isinstance(found, Output) else None
    if isinstance(found, Nothing) and found.off:
        notes.append(f"{found.off}, so there is no held-out reward")
    trained = trained_sections(mix, reader.sections)
    measured = heldout_sections(mix, held, reader.sections, notes)
    return trained, measured, {"mix": mix.how} if len(mix.parts) > 1 else {}


def _prompts(graph: PageGraph | ApiGraph, block: Node, parts: ModelParts, notes: list[str]) -> dict[str, Any]:
    """Return the prompts, which a recipe holds as text."""
    texts = {name: text_of(graph, block, name) for name in ("prompts", "heldout_prompts")}
    try:
        found = prompts_of(texts["prompts"].splitlines(), "prompts")[0]
        held = texts["heldout_prompts"].strip()
        measured = prompts_of(texts["heldout_prompts"].splitlines(), "heldout_prompts")[0] if held else []
    except ValueError as error:
        raise WorkflowError(f"{block.label}: {error}") from error
    made: dict[str, Any] = {"train": "\n".join(found) + "\n"}
    if measured:
        made["heldout"] = "\n".join(measured) + "\n"
    elif sets_aside(len(found)):
        made["heldout_share"] = HELDOUT_SHARE
    if parts.facts:
        usual, longest = parts.section["max_sequence_length"], max(map(len, (*found, *measured)))
        parts.section["max_sequence_length"] = tokens = tokens_for(parts.facts, usual, longest)
        if tokens > usual:
            notes.append(f"a prompt has {longest} characters: texts are filled up to {tokens} tokens")
    return made
