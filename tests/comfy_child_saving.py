"""Run inside ComfyUI by test_nodes_saving.py: folders of images, installed reward models, mixes,
references, saved scores.
"""

import csv
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import comfy.model_management
import comfy_side
import folder_paths
import torch
from comfy.cli_args import args
from PIL import Image

import nodes

given, tensors = comfy_side.given(), comfy_side.given_tensors()
types, saving, library = (
    comfy_side.pack_module(f"nodes.{name}") for name in ("types", "saving", "host.reward_models")
)
rewards = comfy_side.pack_module("comfy_g2rpo.rewards")
installed = comfy_side.pack_module("comfy_g2rpo.rewards.models.installed")
INPUT, OUTPUT = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory())


class Anything(str):
    """A type that goes with every other."""

    def __ne__(self, other: object) -> bool:
        return False


class Give:
    """Put any object on a wire."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": ("STRING", {})}})
    RETURN_TYPES = (Anything("*"),)
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
        lambda cls: {"required": {"value": (Anything("*"), {}), "name": ("STRING", {})}}
    )
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "keep", "tests", True, True
    seen: ClassVar[dict[str, list[Any]]] = {}

    def keep(self, value: list[Any], name: list[str]) -> dict[str, Any]:
        self.seen[name[0]] = value
        return {}


nodes.NODE_CLASS_MAPPINGS |= {"TestGive": Give, "TestGiveList": GiveList, "TestCollect": Collect}


def thing(name: str, value: Any) -> dict[str, Any]:
    """Return a node that gives an object, or the objects of a list."""
    Give.things[name] = value
    return {"class_type": "TestGiveList" if isinstance(value, list) else "TestGive", "inputs": {"name": name}}


def block(name: str, /, **inputs: Any) -> dict[str, Any]:
    """Return a node of the pack."""
    return {"class_type": f"G2RPO_{name}", "inputs": inputs}


def lists(graph: dict[str, Any], **want: tuple[str, int]) -> dict[str, list[Any]]:
    """Run a graph and return whole outputs."""
    Collect.seen.clear()
    collectors = {
        f"collect {name}": {"class_type": "TestCollect", "inputs": {"value": list(at), "name": name}}
        for name, at in want.items()
    }
    ran = comfy_side.run_prompt({**graph, **collectors})
    assert ran.ok, ran
    return dict(Collect.seen)


def spoken(graph: dict[str, Any], at: str, slot: int = 0) -> str:
    """Return what a graph says that must fail."""
    ran = comfy_side.run_prompt(graph, {"out": (at, slot)})
    return ran.error or str(ran.problems or "")


answers: dict[str, Any] = {}
pictures: dict[str, torch.Tensor] = {}

# A folder is loaded, scored by two rewards, saved twice.
folder_graph = {
    "folder": block("LoadImageFolder", folder="cats", deep=False, skip=0, most=64, max_side=2048),
    "first": block("LoadReward", reward="colourfulness"),
    "second": block("LoadReward", reward="jpeg"),
    "mix": block(
        "MixRewards",
        reward_1=["first", 0],
        reward_2=["second", 0],
        weight_1=1.0,
        weight_2=0.5,
        mix="zscore",
        gates="",
    ),
    "score": block(
        "ScoreImages", images=["folder", 0], reward=["mix", 0], prompt=["folder", 2], names=["folder", 1]
    ),
    "save": block(
        "SaveScoredImages",
        images=["folder", 0],
        scores=["score", 0],
        prefix="cats/best",
        most=3,
        details=["score", 4],
        names=["folder", 1],
    ),
}
found = lists(
    folder_graph,
    names=("folder", 1),
    prompts=("folder", 2),
    report=("folder", 3),
    scores=("score", 0),
    files=("save", 0),
    table=("save", 1),
    images=("folder", 0),
    ranking=("score", 3),
)
answers["folder"] = {key: value for key, value in found.items() if key != "images"}
answers["folder"]["sizes"] = [list(image.shape) for image in found["images"]]
pictures |= {f"image {i}": image for i, image in enumerate(found["images"])}
(table_name,) = found["table"]
with open(OUTPUT / table_name, encoding="utf-8", newline="") as file:
    answers["csv"] = list(csv.DictReader(file))
answers["chunks"] = []
for name in found["files"]:
    with Image.open(OUTPUT / name) as image:
        answers["chunks"].append(dict(image.text))
before = {path.name: path.read_bytes() for path in (OUTPUT / "cats").iterdir()}
again = lists(folder_graph, files=("save", 0))["files"]
answers["again"] = {
    "files": again,
    "untouched": all((OUTPUT / "cats" / name).read_bytes() == content for name, content in before.items()),
}
ran = comfy_side.run_prompt(folder_graph)
answers["ui"] = ran.ui["save"]["images"]
shrunk = {**folder_graph["folder"]["inputs"], "max_side": 64, "skip": 1, "most": 2}
answers["shrunk"] = [
    list(image.shape)
    for image in lists({"folder": block("LoadImageFolder", **shrunk)}, images=("folder", 0))["images"]
]
deep = lists(
    {"folder": block("LoadImageFolder", **{**folder_graph["folder"]["inputs"], "deep": True})},
    names=("folder", 1),
)
answers["deep"] = deep["names"]
answers["choices"] = comfy_side.node_class("G2RPO_LoadImageFolder").define_schema().inputs[0].options

# Without metadata.
args.disable_metadata = True
files = lists(folder_graph, files=("save", 0))["files"]
args.disable_metadata = False
with Image.open(OUTPUT / files[0]) as image:
    answers["bare"] = dict(image.text)
hidden = SimpleNamespace(prompt={"1": "é"}, extra_pnginfo={"workflow": {"nodes": []}})
answers["core notes"] = saving.core_notes(SimpleNamespace(hidden=hidden))

# A reward model that is installed: ComfyUI moves it.
images = tensors["images"]
clip_graph = {
    "images": thing("images", images),
    "load": block("LoadReward", reward="clipscore"),
    "score": block("ScoreImages", images=["images", 0], reward=["load", 0], prompt="a red cube"),
}
direct = installed.load_installed(library.root(), "clipscore", device="cpu", dtype=torch.float32, batch=4)
expected = direct.score((images * 255).round() / 255, ["a red cube"] * len(images))
ran = comfy_side.run_prompt(clip_graph, {"about": ("load", 1), "reward": ("load", 0)})
assert ran.ok, ran
managed = ran.values["reward"].rewards[0]
holders = [
    loaded.model.model for loaded in comfy.model_management.current_loaded_models if loaded.model is not None
]
answers["model"] = {
    "expected": expected.tolist(),
    "scores": lists(clip_graph, scores=("score", 0))["scores"],
    "about": ran.values["about"],
    "managed": any(holder is managed.patcher.model for holder in holders),
    "trainable": any(weight.is_inference() for weight in managed.inner.module.parameters()),
    "threads": rewards.protocol.runs_elsewhere(managed),
}
comfy.model_management.unload_all_models()
answers["model"]["after unloading"] = managed.score(
    (images * 255).round() / 255, ["a red cube"] * len(images)
).tolist()
answers["model"]["shared"] = library.find("clipscore", "fp32", 16) is managed
answers["model"]["embeds"] = list(managed.embed(images).shape)
block_class = comfy_side.node_class("G2RPO_LoadReward")
stamp = block_class.fingerprint_inputs(reward="clipscore")
weights = library.root() / "clipscore/model.safetensors"
os.utime(weights, (1, 1))
answers["model"]["seen again"] = block_class.fingerprint_inputs(reward="clipscore") != stamp
answers["model"]["loaded again"] = library.find("clipscore", "fp32", 16) is not managed
answers["model"]["listed"] = block_class.define_schema().inputs[0].options
answers["model"]["bf16"] = str(
    next(library.find("clipscore", "bf16", 2).inner.module.vision_model.parameters()).dtype
)

# Mixes with gates, and likeness to a picture.
colour = {
    "images": thing("images", images),
    "c": block("LoadReward", reward="colourfulness"),
    "j": block("LoadReward", reward="jpeg"),
}
answers["mixes"] = {}
for mix in ("zscore", "sum", "minimum", "rank_product"):
    for gates in ("", "colourfulness = 50"):
        made = block(
            "MixRewards",
            reward_1=["c", 0],
            reward_2=["j", 0],
            weight_1=1.0,
            weight_2=2.0,
            mix=mix,
            gates=gates,
        )
        graph = {
            **colour,
            "mix": made,
            "score": block("ScoreImages", images=["images", 0], reward=["mix", 0], prompt=""),
        }
        answers["mixes"][f"{mix} {gates}".strip()] = lists(graph, scores=("score", 0))["scores"]
like = {
    "images": thing("images", images),
    "one": thing("one", images[2:3]),
    "like": block("ReferenceReward", kind="phash", reference=["one", 0]),
    "score": block("ScoreImages", images=["images", 0], reward=["like", 0], prompt=""),
    "other": block("ReferenceReward", kind="palette", colours="#ff8800, #002244"),
    "palette": block("ScoreImages", images=["images", 0], reward=["other", 0], prompt=""),
}
answers["like"] = lists(like, scores=("score", 0), palette=("palette", 0), about=("like", 1))

# The best of every prompt, of any size.
select = {
    "images": thing("many", [images[i : i + 1, : 8 + 4 * i] for i in range(4)]),
    "scores": thing("scores", [0.1, 0.9, 0.5, 0.7]),
    "prompts": thing("prompts", ["a", "a", "b", "b"]),
    "best": block(
        "SelectBest",
        images=["images", 0],
        scores=["scores", 0],
        k=1,
        use_threshold=False,
        threshold=0.0,
        prompts=["prompts", 0],
    ),
}
chosen = lists(select, kept=("best", 1), scores=("best", 3), images=("best", 2))
answers["best"] = {
    "kept": chosen["kept"],
    "scores": chosen["scores"],
    "sizes": [list(image.shape) for image in chosen["images"]],
}
# The page is told why the batch is missing; whoever does not use it never hears of it.
sent: list[Any] = []
server = comfy_side.server()
send, server.send_sync = server.send_sync, lambda event, data, sid=None: sent.append((event, data))
ran = comfy_side.run_prompt(select, {"out": ("best", 0)})
server.send_sync = send
answers["best"]["batch"] = "out" in ran.values
answers["best"]["said"] = [data["exception_message"] for event, data in sent if event == "execution_error"]

# A rollout, and a training, judged by a mix of a model and a rule with a gate.
GATED = {
    "reward_1": ["clip", 0],
    "reward_2": ["rule", 0],
    "weight_1": 1.0,
    "weight_2": 0.5,
    "gates": "jpeg = -2.6",
}
train_graph = {
    "load": block("TinyDemoLoader"),
    "clip": block("LoadReward", reward="clipscore", batch=8),
    "rule": block("LoadReward", reward="jpeg"),
    "mix": block("MixRewards", **GATED, mix="rank_product"),
    "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["load", 1], "text": "a red circle"}},
    "guider": {"class_type": "BasicGuider", "inputs": {"model": ["load", 0], "conditioning": ["text", 0]}},
    "noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}},
    "sigmas": {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["load", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
    },
    "empty": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "rollout": block(
        "Rollout",
        **{name: [name, 0] for name in ("guider", "noise", "sigmas")},
        latent_image=["empty", 0],
        branch_steps="0,1",
        group_size=6,
        granularities="1",
        kernel="flow_sde",
        eta=0.9,
        terminal="exact",
        antithetic=False,
        slots=12,
    ),
    "scores": block(
        "ScoreRollout", rollout=["rollout", 0], vae=["load", 2], reward=["mix", 0], prompt="a red circle"
    ),
    "advantages": block(
        "Advantages", rollout=["rollout", 0], scores=["scores", 0], clamp=5.0, std_floor=1e-8, per_branch=True
    ),
    "train": block(
        "TrainLoRA",
        model=["load", 0],
        clip=["load", 1],
        vae=["load", 2],
        reward=["mix", 0],
        recipe="g2rpo",
        steps=1,
        prompts="a red circle",
        heldout_prompts="a blue square",
        negative="",
        guidance=1.0,
        width=64,
        height=64,
        learning_rate=1e-3,
        rank=2,
        alpha=2.0,
        targets="attention",
        prompts_per_step=1,
        slots=8,
        eval_every=0,
        seed=0,
        run="mixed",
        changes="num_steps = 4\ngroup_size = 4\ngranularities = 1",
    ),
}
ran = comfy_side.run_prompt(
    train_graph, {"scores": ("scores", 0), "advantages": ("advantages", 0), "lora": ("train", 1)}
)
assert ran.ok, ran
pictures |= {
    "rollout scores": ran.values["scores"].values,
    "rollout advantages": ran.values["advantages"].table,
}
answers["trained"] = json.loads((OUTPUT / "g2rpo/mixed/config.json").read_text("utf-8"))["config"]
answers["moved"] = max(
    float(tensor.abs().max()) for name, tensor in ran.values["lora"].items() if "up" in name
)

# What nobody should send.
good = images[:2]
one = types.RewardSet((rewards.load("colourfulness"),), (1.0,))
minimum = types.RewardSet((rewards.load("colourfulness"), rewards.load("jpeg")), (1.0, 1.0), "minimum")
details = types.ScoresData(("x",), (1.0,), torch.zeros(1, 2), prompts=("<b>", "=1"))
save = {"images": good, "scores": [0.5, 0.25], "prefix": "x", "most": 0}
folder = {"folder": "cats", "deep": False, "skip": 0, "most": 4, "max_side": 64}
mixing = {"reward_1": one, "reward_2": one, "weight_1": 1.0, "weight_2": 1.0}
two = {**mixing, "reward_2": types.RewardSet((rewards.load("jpeg"),), (1.0,))}
hostile: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"prefix {text[:20]!a}": ("SaveScoredImages", save, {"prefix": text}) for text in given["prefixes"]},
    "scores of nan only": ("SaveScoredImages", save, {"scores": [float("inf"), 0.0]}),
    "scores of another length": ("SaveScoredImages", save, {"scores": [0.5]}),
    "names of another length": ("SaveScoredImages", save, {"names": ["a"]}),
    "names of numbers": ("SaveScoredImages", save, {"names": [1, 2]}),
    "details of others": (
        "SaveScoredImages",
        save,
        {"details": dataclasses.replace(details, values=torch.zeros(1, 3))},
    ),
    "details without axes": (
        "SaveScoredImages",
        save,
        {"details": dataclasses.replace(details, values=torch.tensor(1.0))},
    ),
    "images to 255": ("SaveScoredImages", save, {"images": good * 255}),
    "images without end": (
        "SaveScoredImages",
        save,
        {"images": torch.zeros(1, 1, 1, 3).expand(1025, 1, 1, 3)},
    ),
    "most below none": ("SaveScoredImages", save, {"most": -1}),
    "names for others": ("ScoreImages", {"images": good, "reward": one, "prompt": "", "names": ["a"]}, {}),
    "folder of a path": ("LoadImageFolder", folder, {"folder": "../../secret"}),
    "folder that is a link": ("LoadImageFolder", folder, {"folder": "leads_out"}),
    "folder without images": ("LoadImageFolder", folder, {"folder": "empty"}),
    "folder of broken files": ("LoadImageFolder", folder, {"folder": "broken"}),
    "skip of all": ("LoadImageFolder", folder, {"skip": 1000}),
    "most of none": ("LoadImageFolder", folder, {"most": 0}),
    "max_side of none": ("LoadImageFolder", folder, {"max_side": 1}),
    "reward of a path": ("LoadReward", {"reward": "../../secret"}, {}),
    "reward that is not installed": ("LoadReward", {"reward": "pickscore"}, {}),
    "reward that is damaged": ("LoadReward", {"reward": "damaged"}, {}),
    "precision of a word": ("LoadReward", {"reward": "jpeg"}, {"precision": "fp8"}),
    "batch of none": ("LoadReward", {"reward": "jpeg"}, {"batch": 0}),
    "mix of a word": ("MixRewards", two, {"mix": "mean"}),
    "mix of another mix": ("MixRewards", two, {"reward_1": minimum}),
    "gates of words": ("MixRewards", two, {"gates": "colourfulness > 5"}),
    "gates of strangers": ("MixRewards", two, {"gates": "pickscore = 20"}),
    "gates of infinity": ("MixRewards", two, {"gates": "jpeg = 1e999"}),
    "gates twice": ("MixRewards", two, {"gates": "jpeg = 1\njpeg = 2"}),
    "gates without end": ("MixRewards", two, {"gates": "x" * 2001}),
    "kind of a word": ("ReferenceReward", {"kind": "lpips", "reference": good[:1]}, {}),
    "reference missing": ("ReferenceReward", {"kind": "phash"}, {}),
    "reference of two": ("ReferenceReward", {"kind": "phash", "reference": good}, {}),
    "reference of nan": ("ReferenceReward", {"kind": "phash", "reference": good[:1] * torch.nan}, {}),
    "colours missing": ("ReferenceReward", {"kind": "palette"}, {}),
    "colours of words": ("ReferenceReward", {"kind": "palette", "colours": "red"}, {}),
    "prompts of another length": (
        "SelectBest",
        {"images": good, "scores": [0.5, 0.25], "k": 1, "use_threshold": False, "threshold": 0.0},
        {"prompts": ["a"]},
    ),
}
answers["hostile"] = {}
for name, (node, inputs, changes) in hostile.items():
    graph: dict[str, Any] = {key: thing(key, value) for key, value in {**inputs, **changes}.items()}
    graph["block"] = block(node, **{key: [key, 0] for key in graph})
    answers["hostile"][name] = spoken(graph, "block")
answers["outside"] = sorted(str(path.relative_to(OUTPUT.parent)) for path in OUTPUT.parent.glob("*.png"))
kept = lists({"save": block((((((("SaveScoredImages")))))), images=["i", 0], scores=["s", 0], prefix="odd", most=0, details=["d", 0]),  # noqa: E501
              "i": thing("i", torch.cat([good[:1], good[:1] * torch.nan])), "s": thing("s", [float("nan"), 1.0]), "d": thing("d", details)},  # noqa: E501
             files=("save", 0), table=("save", 1))  # fmt: skip
answers["odd"] = {"files": kept["files"], "csv": (OUTPUT / kept["table"][0]).read_text("utf-8")}
comfy_side.answer(answers, pictures)
