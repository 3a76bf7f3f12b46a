"""Run inside ComfyUI by test_hostile.py: every input of every block gets what nobody should send, by hand
and through core's validation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy_side
import folder_paths
import torch
from comfy_api.latest import io
from comfy_graphs import SETTINGS, block, core, drawing, run
from comfy_hostile_files import attack_files
from comfy_hostile_tools import Court, Watch, live_bytes
from comfy_hostile_wires import attack_wires
from PIL import Image
from server import PromptServer

import nodes

given = comfy_side.given()
BASE = Path(folder_paths.get_output_directory()).parent
OUTPUT, OUTSIDE = BASE / "output", BASE / "outside"
PACK = [os.path.dirname(comfy_side.pack_module("nodes.demo").__file__)[: -len("nodes")]]
BLOCKS = {
    name.removeprefix("G2RPO_"): block
    for name, block in nodes.NODE_CLASS_MAPPINGS.items()
    if name.startswith("G2RPO_") and name != comfy_side.CATCH
}

OUTSIDE.mkdir()
for i in range(4):
    # As many as the rollout's pictures, whose names and prompts they lend.
    Image.new("RGB", (8, 8), (60 * i, 9, 9)).save(BASE / f"input/{i}.png")
(OUTSIDE / "secret.txt").write_text("not yours")
watch = Watch([OUTPUT, BASE / "models/loras/g2rpo", BASE / "temp"], OUTSIDE)
court = Court(watch, PACK)

SMALL = {"negative": "", "guidance": 1.0, "width": 16, "height": 16, "seed": 0}
CIRCLE = "a red circle"
SAMPLER = {"sampler": ["SingularSDESampler", 0], "sigmas": ["sigmas", 0], "latent_image": ["empty", 0]}
GRAPH: dict[str, Any] = {
    **drawing(CIRCLE, steps=3, model=["LoRAPolicy", 1]),
    "draw": core("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], **SAMPLER),
    "picture": core("VAEDecode", samples=["draw", 0], vae=["load", 2]),
}
MODEL, CLIP, VAE = (["load", i] for i in range(3))
TREE, REWARD = {"rollout": ["Rollout", 0]}, {"reward": ["LoadReward", 0]}
JUDGED = {**REWARD, "prompt": CIRCLE}
PICTURES = {"images": ["ScoreRollout", 1], "scores": ["ScoreImages", 0]}
SHORT = {"prompts": f"{CIRCLE}\na blue square", "heldout_prompts": "a green circle", "sigmas": ["sigmas", 0]}
SHORT |= {"changes": "group_size = 2\ngranularities = 1\neval_noises = 1"}
SHORT |= {"heldout_reward": ["LoadReward", 0]}
COMPARED = {"base": MODEL, "tuned": ["LoRAPolicy", 1], "clip": CLIP, "vae": VAE, "prompts": CIRCLE}
GIVEN: dict[str, dict[str, Any]] = {
    "TinyDemoLoader": {},
    "SingularSDESampler": {"branch_step": 1, "branch": 0, "kernel": "flow_sde", "eta": 0.7},
    "LoRAPolicy": {"model": MODEL, "rank": 2, "alpha": 2.0, "run": ""},
    "Rollout": {"branch_steps": "0,1", "group_size": 2, "eta": 0.7, "slots": 4},
    "LoadReward": {"reward": "colourfulness", "precision": "fp32", "batch": 4},
    "ReferenceReward": {"kind": "phash", "reference": ["picture", 0], "colours": ""},
    "MixRewards": {f"reward_{i}": ["LoadReward", 0] for i in range(1, 7)}
    | {f"weight_{i}": 1.0 for i in range(1, 7)}
    | {"mix": "zscore", "gates": ""},
    "LoadImageFolder": {"folder": "(input)", "deep": False, "skip": 0, "most": 4, "max_side": 64},
    "ScoreRollout": {**TREE, **JUDGED},
    "ScoreImages": {**JUDGED, "images": ["ScoreRollout", 1], "names": ["LoadImageFolder", 1]},
    "SearchSampler": {**REWARD, "budget": 12, "keep": 2, "steps": "0,1", "judge_at": "1"},
    "EarlyFilter": {"keep": 2, "after": 0.3, "measure": "velocity"},
    "SelectBest": {**PICTURES, "k": 2, "use_threshold": True, "prompts": ["LoadImageFolder", 2]}
    | {"how": "draw"},
    "OptimizeNoise": {**REWARD, "steps": 1, "probes": 1},
    "LoadNoisePrior": {"prior": "good.safetensors", "model": MODEL},
    "ApplyNoisePrior": {"prior": ["LoadNoisePrior", 0]},
    "SaveScoredImages": {**PICTURES, "prefix": "scored/image", "most": 0}
    | {"details": ["ScoreImages", 4], "names": ["LoadImageFolder", 1]},
    "VoteRollout": {**TREE, "pictures": ["ScoreRollout", 1], "prompt": CIRCLE, "votes": "", "run": ""},
    "ScoresFromValues": {**TREE, "votes": "", "values": ["ScoreImages", 0], "pictures": ["ScoreRollout", 1]},
    "Advantages": {**TREE, "scores": ["ScoresFromValues", 0], "diversity": 0.1},
    "UpdateLoRA": {"policy": ["LoRAPolicy", 0], "advantages": ["Advantages", 0], "kl": 0.01}
    | {"micro_batch": 2},
    "UpdateFromVotes": {
        "policy": ["LoRAPolicy", 0],
        "clip": CLIP,
        "run": "kept",
        "negative": "",
        "guidance": 1.0,
    }
    | {"epochs": 1, "pair_loss": "dpo", "pair_beta": 1.0, "forks_per_step": 1, "kl": 0.0, "micro_batch": 1},
    "TrainLoRA": {**REWARD, **SMALL, **SHORT, "preset": "as typed", "if_settings_changed": "new"},
    "CompareLoRA": {**COMPARED, **REWARD, **SMALL, "num_steps": 1, "noises": 1, "slots": 2}
    | {"sigmas": ["sigmas", 0]},
    "SubmitTraining": {**REWARD, **SMALL, **SHORT, "preset": "as typed", "if_settings_changed": "new"}
    | {"try_again": False, "run": "handed"},
    "TrainingResult": {"run": ["SubmitTraining", 0], "model": MODEL},
    "RunMonitor": {"run": "newest", "run_name": ["TrainLoRA", 4]},
    "SaveLoRA": {"lora": ["UpdateLoRA", 1], "name": "saved", "key_names": "native", "model": MODEL}
    | {"run": ["TrainLoRA", 4]},
}
del GIVEN["SubmitTraining"]["sigmas"]
INPUTS = {name: {**SETTINGS.get(name, {}), **inputs} for name, inputs in GIVEN.items()}
assert INPUTS.keys() == BLOCKS.keys(), (
    f"blocks that nobody attacks, or that are gone: {INPUTS.keys() ^ BLOCKS.keys()}"
)
for name, inputs in INPUTS.items():
    declared = {one.id for one in BLOCKS[name].define_schema().inputs}
    assert inputs.keys() == declared, (
        f"{name}: inputs that nobody attacks, or that are gone: {inputs.keys() ^ declared}"
    )
    GRAPH[name] = block(name, **inputs)
NAMED = {"ValueError", "FileError", "RunError", "LoraError", "PromptError", "RewardError", "VoteError"}
HEAVY = {"TrainLoRA", "CompareLoRA", "UpdateFromVotes", "SearchSampler", "OptimizeNoise"}
LIST_BLOCKS = {name for name, block in BLOCKS.items() if block.define_schema().is_input_list}


def make_prior() -> None:
    """Put a noise prior for the bundled model where it is looked for."""
    priors = comfy_side.pack_module("comfy_g2rpo.priors.noise_prior")
    blocks = comfy_side.pack_module("nodes.search.prior_blocks")
    model = run({"load": block("TinyDemoLoader")}, model=("load", 0)).values["model"]
    prior, vectors = priors.NoisePrior(128, (16, 8, 8), rank=2), blocks.vectors_of(model)
    priors.save_prior(BASE / "models/noise_priors/good.safetensors", prior, vectors, {})


def needed(node: str) -> dict[str, Any]:
    """Return the part of the graph that a node needs."""
    found: dict[str, Any] = {node: {**GRAPH[node], "inputs": dict(GRAPH[node]["inputs"])}}
    for value in GRAPH[node]["inputs"].values():
        if isinstance(value, list):
            found |= needed(value[0])
    return found


def vote() -> None:
    """Vote on the rollout's pictures in the run whose votes are learned from."""
    graph = needed("VoteRollout")
    inputs = graph["VoteRollout"]["inputs"]
    inputs["run"] = graph["LoRAPolicy"]["inputs"]["run"] = "kept"
    ran = comfy_side.run_prompt(graph)
    assert ran.ok, ran
    shown = ran.ui["VoteRollout"]["g2rpo_ballot"][0]["pictures"]
    keys = [picture["key"] for picture in shown]
    inputs["votes"] = json.dumps({"pictures": keys, "ranking": keys})
    assert comfy_side.run_prompt(graph).ok


def real_inputs() -> dict[str, dict[str, Any]]:
    """Run the whole graph once and give every block what its links carry."""
    make_prior()
    # Run Monitor refuses to look before there is a run.
    assert comfy_side.run_prompt(needed("TrainLoRA")).ok
    vote()
    links = {tuple(v) for inputs in INPUTS.values() for v in inputs.values() if isinstance(v, list)}
    ran = run(GRAPH, **{f"{node} {slot}": (node, slot) for node, slot in links}, picture=("picture", 0))
    made: dict[str, dict[str, Any]] = {}
    for name, inputs in INPUTS.items():
        values = {
            key: ran.values[f"{v[0]} {v[1]}"] if isinstance(v, list) else v for key, v in inputs.items()
        }
        if name in LIST_BLOCKS:
            values = {key: [value] for key, value in values.items()}
            values |= {key: [0.1, 0.4, 0.2, 0.3] for key in values.keys() & {"scores", "values"}}
            values |= {key: list("abca") for key in values.keys() & {"names", "prompts"}}
        made[name] = values
    return made


def execute(name: str, inputs: Mapping[str, Any]) -> Any:
    """Call a block as core does, but past core's validation."""
    return BLOCKS[name].execute(**inputs)


def allowed_number(one: Any, value: Any) -> bool:
    """Say whether a widget's schema allows a number."""
    whole = isinstance(one, io.Int.Input)
    return (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and one.min <= value <= one.max
    )


def hostile_values(one: Any) -> list[tuple[Any, bool | None]]:
    """List what a widget gets, and whether it must be refused."""
    junk: list[Any] = [None, True, [1], {}, b"1", 1j, object()]
    if one.optional:
        del junk[0]
    if isinstance(one, (io.Int.Input, io.Float.Input)):
        near = [
            math.nextafter(one.min, -math.inf),
            math.nextafter(one.max, math.inf),
            one.min - 1,
            one.max + 1,
        ]
        values = [*given["numbers"], *near, "7", *junk]
        return [(value, True) for value in values if not allowed_number(one, value)]
    if isinstance(one, io.Boolean.Input):
        return [(value, True) for value in ("true", 2, 0.0, math.nan, *junk) if value is not True]
    if isinstance(one, io.Combo.Input):
        return [(value, True) for value in (*given["strings"], *junk) if value != "newest"]
    if isinstance(one, io.String.Input):
        broken = [any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text) for text in given["strings"]]
        texts = [(text, bad or None) for text, bad in zip(given["strings"], broken, strict=True)]
        return [*texts, *((value, True) for value in (*junk, 7, math.nan))]
    return []


def attack_widgets(real: Mapping[str, Mapping[str, Any]]) -> None:
    """Send every hostile value to every widget of every block, past core's validation."""
    for name, inputs in real.items():
        for one in BLOCKS[name].define_schema().inputs:
            values = hostile_values(one)
            if name in HEAVY:
                # Texts that are taken run a whole training, comparison or search.
                values = [
                    (value, refuse) for i, (value, refuse) in enumerate(values) if refuse or i % 12 == 0
                ]
            if (name in LIST_BLOCKS and isinstance(one, io.Boolean.Input)) or name == "RunMonitor":
                # Lists' switches may be anything that is true or false; the run may be one that an attack has
                # made.
                values = [(value, None) for value, _ in values]
            for value, refuse in values:
                changed = {**inputs, one.id: [value] if name in LIST_BLOCKS else value}
                if one.id == "votes" and "values" in inputs:
                    changed["values"] = None
                act = partial(execute, name, changed)
                court.attack(name, f"{one.id} = {value!a:.60}", [one.id], act, refuse)


def attack_through_core() -> None:
    """Send numbers out of range, and a few texts, through core's own validation and executor."""
    for name in BLOCKS:
        graph = needed(name)
        for one in BLOCKS[name].define_schema().inputs:
            values: list[Any] = []
            if isinstance(one, (io.Int.Input, io.Float.Input)):
                values = [one.min - 1, one.max + 1, math.nan, -math.inf]
            elif isinstance(one, (io.String.Input, io.Combo.Input)):
                values = ["../../x", "\ud800", "a\0b"]
            usual = INPUTS[name][one.id]
            for value in values if not isinstance(usual, list) else ():
                graph[name]["inputs"][one.id] = value
                act = partial(refused, name, graph, one.id)
                court.attack(name, f"{one.id} = {value!a} in a graph", [one.id], act)
            graph[name]["inputs"][one.id] = usual


def refused(name: str, graph: Mapping[str, Any], widget: str) -> None:
    """See that core, or the block itself, refuses a prompt by the widget's name, or that it runs."""
    ran = comfy_side.run_prompt(graph, {"out": (name, 0)}, fresh=False)
    if ran.ok:
        return
    words = repr(ran.problems) if ran.problems else ran.error
    if not ran.problems:
        kind = words.partition(": ")[0].rpartition(".")[2]
        assert kind in NAMED and ran.error_node == name and "\n" not in words.strip(), (
            f"{ran.error_node}: {words}"
        )
    assert widget in words, f"{widget} is not named: {words[:300]}"


@torch.inference_mode()
def portrait(real: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Use the very objects that are attacked as a user would: draw with core's sampler, roll out, update.

    And look at their weights.
    """
    found = {}
    rollout = real["Rollout"]
    plain = comfy.samplers.CFGGuider(real["TrainLoRA"]["model"])
    plain.original_conds = rollout["guider"].original_conds
    for name, guider in (("plain", plain), ("tuned", rollout["guider"])):
        noise = (
            rollout["noise"]
            .generate_noise(rollout["latent_image"])
            .repeat(1, 16 // rollout["latent_image"]["samples"].shape[1], 1, 1)
        )
        sampler, empty = comfy.samplers.sampler_object("euler"), torch.zeros_like(noise)
        latent = guider.sample(
            noise, empty, sampler, rollout["sigmas"], disable_pbar=True, seed=rollout["noise"].seed
        )
        found[f"{name} picture"] = real["TrainLoRA"]["vae"].decode(latent)
    rolled = execute("Rollout", rollout).args
    found["completions"] = rolled[1]["samples"]
    found |= {
        f"update {key}": tensor for key, tensor in execute("UpdateLoRA", real["UpdateLoRA"]).args[1].items()
    }
    clip = real["TrainLoRA"]["clip"]
    found["text"] = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))[0][0]
    comfy.model_management.unload_all_models()
    model = real["TrainLoRA"]["model"].model
    layers = [
        layer
        for layer in model.modules()
        if getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None)
    ]
    assert not layers, f"functions left on {len(layers)} layers"
    return found | {f"weight {key}": tensor.clone() for key, tensor in model.state_dict().items()}


server = PromptServer.instance
# Core's progress bars ask for them, and outside a prompt there are none.
server.last_prompt_id, server.last_node_id = "hostile", "hostile"
real = real_inputs()
before = portrait(real)
memory = live_bytes()
for act in (
    lambda: attack_widgets(real),
    lambda: attack_wires(court, real, execute, BLOCKS, LIST_BLOCKS),
    lambda: attack_files(court, real, execute, OUTPUT / "g2rpo"),
    attack_through_core,
):
    act()
    print({name: round(spent, 1) for name, spent in court.seconds.items()}, flush=True)
# A fresh prompt makes the executor forget the results that it keeps.
assert comfy_side.run_prompt(needed("LoadReward"), {"out": ("LoadReward", 0)}).ok
comfy.model_management.unload_all_models()
grown = live_bytes() - memory
after = portrait(real)
comfy_side.answer(
    {
        "blocks": sorted(BLOCKS),
        "counts": court.counts,
        "faults": court.faults,
        "seen": watch.seen,
        "events": watch.events,
        "seconds": court.seconds,
        "grown": grown,
        "different": [name for name, value in before.items() if not torch.equal(value, after[name])],
        "outside": sorted(path.name for path in OUTSIDE.iterdir()),
    }
)
