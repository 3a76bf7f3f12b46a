"""For scripts inside ComfyUI: short words for a graph's nodes, and nodes that give and keep anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import comfy_side

import nodes

Node = dict[str, Any]
PARTS = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2]}
WIRES = {
    "guider": ["guider", 0],
    "noise": ["noise", 0],
    "sigmas": ["sigmas", 0],
    "latent_image": ["empty", 0],
}
TREE = {"kernel": "flow_sde", "eta": 0.9, "terminal": "exact", "antithetic": False}
TREE |= {"granularities": "1", "slots": 8, **WIRES}
TRAIN = {"recipe": "g2rpo", "steps": 1, "prompts": "a red circle", "heldout_prompts": "a blue square"}
TRAIN |= {"width": 64, "height": 64, "rank": 2, "alpha": 2.0, "targets": "attention", "learning_rate": 1e-3}
TRAIN |= {"negative": "", "guidance": 1.0, "prompts_per_step": 1, "slots": 8, "eval_every": 0}
TRAIN |= {"seed": 0, "run": "", **PARTS}
NAMED = {"model": "tiny demo model", **dict.fromkeys(("text_encoder_1", "text_encoder_2"), "none")}
NAMED |= {"text_encoder_3": "none", "vae": "none", "changes": ""}
SETTINGS: dict[str, dict[str, Any]] = {
    "Advantages": {"rollout": ["rollout", 0], "clamp": 5.0, "std_floor": 1e-8, "per_branch": False},
    "LoRAPolicy": {"rank": 4, "alpha": 4.0, "targets": "attention", "learning_rate": 1e-3, "seed": 0},
    "EarlyFilter": {"keep": 4, "after": 0.3, "measure": "velocity"},
    "MixRewards": {"weight_1": 1.0, "weight_2": 1.0},
    "OptimizeNoise": {
        **{"steps": 4, "learning_rate": 0.05, "gradient": "auto", "probes": 2, "regularise": 0.1},
        **{"vae": ["load", 2], "reward": ["reward", 0], "prompt": "a red circle", **WIRES},
    },
    "Rollout": TREE,
    "ScoreImages": {"prompt": ""},
    "ScoreRollout": {"rollout": ["rollout", 0], "vae": ["load", 2]},
    "SearchSampler": {
        **{"method": "coarse first", "budget": 64, "keep": 1, "prompt": "a red circle", **WIRES},
        **{"vae": ["load", 2], "reward": ["reward", 0], "steps": "0-3", "eta": 0.7, "kernel": "ddim"},
        **{"group": 0, "stride": 2, "strength": 20.0, "judge_at": "3-5", "iterations": 2},
        **{"mutation": 0.5, "pull": 0.3, "score": "reward", "slots": 8},
    },
    "SelectBest": {"k": 1, "use_threshold": False, "threshold": 0.0}
    | {"how": "best", "temperature": 0.1, "seed": 0},
    "ApplyNoisePrior": {"strength": 1.0, "noise": ["noise", 0], "conditioning": ["text", 0]},
    "SubmitTraining": {name: TRAIN[name] for name in TRAIN if name not in PARTS} | NAMED,
    "TrainLoRA": TRAIN,
    "TrainingResult": {"newest_checkpoint": False, "stop": False},
    "UpdateFromVotes": {
        **{"pair_loss": "ropo", "pair_beta": 1.0, "negative": "", "guidance": 1.0, "forks_per_step": 4},
        **{"kl": 0.0, "max_grad_norm": 1.0, "weight_decay": 0.0},
    },
    "UpdateLoRA": {"kl": 0.0, "step_weight": "uniform", "max_grad_norm": 1.0, "weight_decay": 0.0},
}
"""What blocks are given where a script does not say otherwise."""


class Give:
    """Put any object on a wire."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING", {})}})
    RETURN_TYPES = (comfy_side.Anything("*"),)
    FUNCTION = "give"
    CATEGORY = "tests"
    things: ClassVar[dict[str, Any]] = {}

    def give(self, name: str) -> tuple[Any]:
        return (self.things[name],)


class GiveList(Give):
    """Put a list of objects on a wire."""

    OUTPUT_IS_LIST = (True,)


class Collect:
    """Keep a whole list."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"value": (comfy_side.Anything("*"), {}), "name": ("STRING", {})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "keep", "tests", True, True
    seen: ClassVar[dict[str, list[Any]]] = {}

    def keep(self, value: list[Any], name: list[str]) -> dict[str, Any]:
        self.seen[name[0]] = value
        return {}


nodes.NODE_CLASS_MAPPINGS |= {"TestGive": Give, "TestGiveList": GiveList, "TestCollect": Collect}


def core(name: str, /, **inputs: Any) -> Node:
    """Return a node of core."""
    return {"class_type": name, "inputs": inputs}


def block(name: str, /, **inputs: Any) -> Node:
    """Return a node of the pack, with its usual settings where none are given."""
    return core(f"G2RPO_{name}", **{**SETTINGS.get(name, {}), **inputs})


def reward(name: str) -> Node:
    """Return a reward loader."""
    return block("LoadReward", reward=name)


def thing(name: str, value: Any) -> Node:
    """Return a node that gives an object, or the objects of a list."""
    Give.things[name] = value
    return core("TestGiveList" if isinstance(value, list) else "TestGive", name=name)


def drawing(text: str, steps: int, seed: Any = 3, model: Any = ("load", 0)) -> dict[str, Node]:
    """Return the nodes that a picture, or a rollout, of the bundled model begins with."""
    return {
        "load": block("TinyDemoLoader"),
        "text": core("CLIPTextEncode", clip=["load", 1], text=text),
        "guider": core("BasicGuider", model=list(model), conditioning=["text", 0]),
        "noise": core("RandomNoise", noise_seed=seed),
        "sigmas": core("BasicScheduler", model=["load", 0], scheduler="simple", steps=steps, denoise=1.0),
        "empty": core("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    }


def outputs(**given: str) -> dict[str, tuple[str, int]]:
    """Name nodes' outputs in their order, to ask for them: outputs(load="model - vae") leaves one out."""
    named = ((name, (node, slot)) for node, names in given.items() for slot, name in enumerate(names.split()))
    return {name: place for name, place in named if name != "-"}


def run(graph: Mapping[str, Node], **want: tuple[str, int]) -> comfy_side.Ran:
    """Run a graph that must come to its end."""
    ran = comfy_side.run_prompt(graph, want)
    assert ran.ok, ran
    return ran


def lists(graph: Mapping[str, Node], **want: tuple[str, int]) -> dict[str, list[Any]]:
    """Run a graph and return whole outputs, every one as a list."""
    Collect.seen.clear()
    run(
        {
            **graph,
            **{
                f"collect {name}": core("TestCollect", value=list(at), name=name) for name, at in want.items()
            },
        }
    )
    return dict(Collect.seen)


def spoken(graph: Mapping[str, Node], at: str = "block") -> str:
    """Return what a graph says that must fail."""
    ran = comfy_side.run_prompt(graph, {"out": (at, 0)})
    return ran.error or str(ran.problems or "")


def refusals(
    usual: Mapping[str, Mapping[str, Any]], hostile: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, str]:
    """Put hostile objects on the wires of blocks beside their usual ones; say what each case is told."""
    said = {}
    for name, cases in hostile.items():
        for case, changes in cases.items():
            sent = {key: thing(key, value) for key, value in {**usual.get(name, {}), **changes}.items()}
            said[case] = spoken({**sent, "block": core(f"G2RPO_{name}", **{key: [key, 0] for key in sent})})
    return said
