"""What exploring a step leaves, how the parts of a step become one, and a part as bytes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..curriculum.prompt_choice import Chosen
from ..plan import Plan
from ..rollout import Rollout
from ..trees.staged_rollout import PrunedRollout


@dataclass(frozen=True)
class Explored:
    """The step's pictures as the rewards saw them, and the states that the learner differentiates at."""

    conds: Sequence[Any]
    plan: Plan
    rollout: Rollout
    scores: Tensor  # [R, P, images]
    features: Mapping[str, Sequence[Tensor]]  # by measure and prompt: [K, G, L, D]
    cheap: bool  # whether completions may go on being cheap
    guard: Mapping[str, float]  # metrics of the guard on cheap completions
    seconds: Mapping[str, float]  # rollout, decode, reward
    latents: Tensor | None = None  # [P, images, …], where the objective learns from finished images
    chosen: Chosen = field(default_factory=Chosen)
    drawn_by: Sequence[Tensor] = ()  # the adapter that drew, where it is not the one that learns
    told: Mapping[str, float] = field(default_factory=dict)  # metrics of workers that explored

    @property
    def forwards(self) -> int:
        """Count the forwards, those of the guard and of the choice of prompts among them."""
        return self.rollout.nfe + int(self.guard.get("guard/nfe", 0)) + self.chosen.nfe

    @property
    def final_scores(self) -> Tensor:
        """Return the scores of the pictures that teach: [R, P, F], of all but in a rollout that prunes."""
        if not isinstance(self.rollout, PrunedRollout):
            return self.scores
        return self.scores.gather(2, torch.tensor(self.rollout.images).expand(len(self.scores), -1, -1))


def parted(slots: Sequence[int], at_once: int) -> list[Sequence[int]]:
    """Cut a step's slots into runs of so many, in their order; 0 leaves them together."""
    size = at_once or max(len(slots), 1)
    return [slots[start : start + size] for start in range(0, len(slots), size)]


def merged(parts: Sequence[Explored], chosen: Chosen) -> Explored:
    """Put the parts of a step together, in the order of their slots, as one rollout over all prompts."""
    first = parts[0]
    rollouts = [part.rollout for part in parts]
    joined: dict[str, Any] = {
        "seeds": tuple(seed for rollout in rollouts for seed in rollout.seeds),
        "nfe": sum(rollout.nfe for rollout in rollouts),
        "x": torch.cat([rollout.x for rollout in rollouts]),
        "velocity": torch.cat([rollout.velocity for rollout in rollouts]),
    }
    if isinstance(first.rollout, PrunedRollout):
        for name in ("finished", "images"):
            joined[name] = tuple(each for rollout in rollouts for each in getattr(rollout, name))
    return dataclasses.replace(
        first,
        conds=[cond for part in parts for cond in part.conds],
        rollout=dataclasses.replace(first.rollout, **joined),
        scores=torch.cat([part.scores for part in parts], 1),
        features={name: [t for part in parts for t in part.features[name]] for name in first.features},
        cheap=all(part.cheap for part in parts),
        seconds=summed([*(part.seconds for part in parts), chosen.seconds]),
        latents=None if first.latents is None else torch.cat([part.latents for part in parts]),
        chosen=chosen,
    )


def summed(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up seconds by name."""
    names = dict.fromkeys(name for each in seconds for name in each)
    return {name: sum(each.get(name, 0.0) for each in seconds) for name in names}


def packed(part: Explored) -> bytes:
    """Write what the learner needs of a part as safetensors.

    Plan, noise and conditions are left out: the learner makes them again. So is the velocity, which it takes
    anew in the batches of its own passes.
    """
    rollout = part.rollout
    tensors = {"x": rollout.x, "scores": part.scores}
    tensors |= {f"features/{name}": torch.stack([*tables]) for name, tables in part.features.items()}
    if part.latents is not None:
        tensors["latents"] = part.latents
    notes = {"seeds": rollout.seeds, "nfe": rollout.nfe, "seconds": dict(part.seconds)}
    if isinstance(rollout, PrunedRollout):
        tensors["finished"] = torch.stack([*rollout.finished])
        notes["images"] = rollout.images
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(content, {"part": json.dumps(notes)})


def unpacked(
    content: bytes, plan: Plan, sigmas: Tensor, conds: Sequence[Any], device: torch.device | str
) -> Explored:
    """Read a part again, with the plan, noise levels [T+1] and conditions that the learner has made."""
    tensors = load(content)
    size = int.from_bytes(content[:8], "little")
    notes = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["part"])
    x = tensors["x"].to(device)
    nothing = x.new_empty(0)
    made: Any = plan, plan.coefficients(sigmas), tuple(notes["seeds"]), x, nothing, None, notes["nfe"]
    if "finished" in tensors:
        images = tuple(tuple(row) for row in notes["images"])
        rollout: Rollout = PrunedRollout(*made, finished=tuple(tensors["finished"]), images=images)
    else:
        rollout = Rollout(*made)
    latents = tensors["latents"].to(device) if "latents" in tensors else None
    prefix = "features/"
    features = {name[len(prefix) :]: [*each] for name, each in tensors.items() if name.startswith(prefix)}
    return Explored(conds, plan, rollout, tensors["scores"], features, True, {}, notes["seconds"], latents)
