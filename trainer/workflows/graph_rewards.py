"""Reward blocks of a graph as the rewards of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comfy_g2rpo.blocks.reward_mix import PALETTE, Mix, Part, colours_of, kind_named, mixed, parse_gates
from comfy_g2rpo.options import MIXES, check_value
from comfy_g2rpo.rewards import REWARDS
from comfy_g2rpo.rewards.likeness import KINDS

from ..config.reward_checks import is_built_in
from .graph_file import WorkflowError, shown
from .graph_values import Graph, number_in, output_into, text_of, whole_in
from .model_files import ModelFolders
from .page_graph import Node, Nothing, Output

LOAD, MIX, REFERENCE = "G2RPO_LoadReward", "G2RPO_MixRewards", "G2RPO_ReferenceReward"
NOT_HERE = " (not installed: "  # what follows a name in the list of the block
MIXED = 6
MAX_NODES = 200
MAX_NAME = 100  # characters of a reward's name, which lists of rewards repeat


@dataclass
class RewardReader:
    """Reads the blocks before a socket; each block once, however many wires leave it."""

    graph: Graph
    folders: ModelFolders
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is known of every reward, by its name."""
    made: dict[str, Mix] = field(default_factory=dict)

    def read(self, first: Output) -> Mix:
        """Return what a socket gets. Mixes of mixes are made from the inside, without recursion."""
        waiting = [first.node]
        while waiting:
            node = waiting[-1]
            if len(waiting) > MAX_NODES or len(self.made) > MAX_NODES:
                raise WorkflowError(
                    f"{node.label}: more than {MAX_NODES} blocks make its rewards, or a circle"
                )
            if node.kind == MIX:
                inputs = self._inputs(node)
                if missing := [each for _, each in inputs if each.id not in self.made]:
                    waiting += missing
                    continue
                self.made[node.id] = self._mix(node, inputs)
            else:
                self.made[node.id] = self._single(node)
            waiting.pop()
        return self.made[first.node.id]

    def _inputs(self, node: Node) -> list[tuple[int, Node]]:
        """Return the blocks before a mix, each with its number."""
        found = []
        for i in range(1, MIXED + 1):
            if i > 2 and isinstance(self.graph.given(node, f"reward_{i}"), Nothing):
                continue
            found.append((i, output_into(self.graph, node, f"reward_{i}", "Load Reward").node))
        return found

    def _mix(self, node: Node, inputs: list[tuple[int, Node]]) -> Mix:
        """Mix what comes into a block."""
        how = text_of(self.graph, node, "mix") or MIXES[0]
        parts = [
            (i, self.made[each.id], number_in(self.graph, node, f"weight_{i}", 1.0)) for i, each in inputs
        ]
        try:
            check_value("mix", how, choices=MIXES)
            gates = parse_gates(text_of(self.graph, node, "gates"))
            return mixed(parts, how, {kind_named(name, tuple(KINDS)): gate for name, gate in gates.items()})
        except WorkflowError:
            raise
        except ValueError as error:
            raise WorkflowError(f"{node.label}: {error}") from error

    def _single(self, node: Node) -> Mix:
        """Read a block that gives one reward."""
        if node.kind not in (LOAD, REFERENCE):
            raise WorkflowError(
                f"{node.label} gives a reward, and a recipe cannot say what it does; put Load Reward, Mix "
                "Rewards or Reference Reward in its place"
            )
        made = self._loaded(node) if node.kind == LOAD else self._likeness(node)
        if self.sections.setdefault(made["name"], made) != made:
            raise WorkflowError(f"{node.label}: {made['name']} is there twice with other settings; keep one")
        return Mix((Part(made["name"]),))

    def _loaded(self, node: Node) -> dict[str, Any]:
        name = text_of(self.graph, node, "reward").partition(NOT_HERE)[0]
        if name in REWARDS:
            return {"name": name}
        if not name.isprintable() or len(name) > MAX_NAME:
            raise WorkflowError(f"{node.label}: reward is {shown(name)}; choose one that is in its list")
        if is_built_in(name):
            raise WorkflowError(f"{node.label} does not give {name}; choose a reward that is in its list")
        made: dict[str, Any] = {"name": name, "batch": whole_in(self.graph, node, "batch")}
        precision = text_of(self.graph, node, "precision")
        return made | ({} if precision in ("", "fp32") else {"dtype": precision})

    def _likeness(self, node: Node) -> dict[str, Any]:
        kind = text_of(self.graph, node, "kind")
        if kind == PALETTE:
            return {"name": kind, PALETTE: colours_of(text_of(self.graph, node, "colours"))}
        origin = output_into(self.graph, node, "reference", "Load Image").node
        if origin.kind != "LoadImage":
            raise WorkflowError(
                f"{origin.label} gives the reference of {node.label}, and only a file can be said in a "
                "recipe; save that picture and put LoadImage in its place"
            )
        name = text_of(self.graph, origin, "image")
        return {"name": kind, "reference": self.folders.picture(name, origin.label)}


def trained_sections(mix: Mix, sections: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the rewards that are trained on as a recipe has them."""
    written = []
    for part in mix.parts:
        if not part.weight and part.gate is None:
            continue
        gate = {} if part.gate is None else {"gate": part.gate}
        written.append({**sections[part.name], "weight": part.weight, **gate})
    return written


def heldout_sections(
    mix: Mix, held: Mix | None, sections: dict[str, dict[str, Any]], notes: list[str]
) -> list[dict[str, Any]]:
    """Write the rewards that only measure; what cannot be said of them is noted."""
    trained = {part.name for part in mix.parts if part.weight or part.gate is not None}
    idle = [Part(part.name, 0.0) for part in mix.parts if part.name not in trained]
    if idle:
        notes.append(f"of weight 0 and so measured alone: {', '.join(part.name for part in idle)}")
    written: dict[str, dict[str, Any]] = {}
    for part in (*(held.parts if held else ()), *idle):
        if part.name in written:
            continue
        if part.name in trained:
            # A recipe measures it anyway, and asks for its bare name.
            written[part.name] = {"name": part.name}
            if part.weight != 1:
                notes.append(
                    f"held-out weight {shown(part.weight)} of {part.name}, which is trained on, is 1"
                )
        else:
            written[part.name] = {**sections[part.name], "weight": part.weight}
    return list(written.values())
