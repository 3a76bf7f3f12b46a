"""Run inside ComfyUI by test_nodes_saving.py: folders of images, installed reward models, mixes,
references, saved scores.
"""

import csv
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy_side
import folder_paths
import torch
from comfy.cli_args import args
from comfy_graphs import block, drawing, lists, outputs, refusals, reward, run, thing
from PIL import Image

given, tensors = comfy_side.given(), comfy_side.given_tensors()
types, saving, library = (
    comfy_side.pack_module(f"nodes.{name}") for name in ("types", "saving", "host.reward_models")
)
rewards = comfy_side.pack_module("comfy_g2rpo.rewards")
installed = comfy_side.pack_module("comfy_g2rpo.rewards.models.installed")
INPUT, OUTPUT = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory())
CHANGES = "num_steps = 4\ngroup_size = 4\ngranularities = 1"

answers: dict[str, Any] = {}
pictures: dict[str, torch.Tensor] = {}

# A folder is loaded, scored by two rewards, saved twice.
pair = {"reward_1": ["first", 0], "reward_2": ["second", 0]}
files = {"images": ["folder", 0], "names": ["folder", 1]}
folder_graph = {
    "folder": block("LoadImageFolder", folder="cats", deep=False, skip=0, most=64, max_side=2048),
    "first": reward("colourfulness"),
    "second": reward("jpeg"),
    "mix": block("MixRewards", **pair, weight_2=0.5, mix="zscore", gates=""),
    "score": block("ScoreImages", **files, reward=["mix", 0], prompt=["folder", 2]),
    "save": block(
        "SaveScoredImages", **files, scores=["score", 0], prefix="cats/best", most=3, details=["score", 4]
    ),
}
found = lists(
    folder_graph,
    **outputs(folder="images names prompts report", score="scores - - ranking", save="files table"),
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
answers["ui"] = run(folder_graph).ui["save"]["images"]
shrunk, deep = (
    {"folder": block("LoadImageFolder", **{**folder_graph["folder"]["inputs"], **changes})}
    for changes in ({"max_side": 64, "skip": 1, "most": 2}, {"deep": True})
)
answers["shrunk"] = [list(image.shape) for image in lists(shrunk, images=("folder", 0))["images"]]
answers["deep"] = lists(deep, names=("folder", 1))["names"]
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
    "load": reward("clipscore"),
    "score": block("ScoreImages", images=["images", 0], reward=["load", 0], prompt="a red cube"),
}
direct = installed.load_installed(library.root(), "clipscore", device="cpu", dtype=torch.float32, batch=4)
expected = direct.score((images * 255).round() / 255, ["a red cube"] * len(images))
ran = run(clip_graph, **outputs(load="reward about"))
managed = ran.values["reward"].rewards[0]
holders = [
    loaded.model.model for loaded in comfy.model_management.current_loaded_models if loaded.model is not None
]
answers["model"] = {
    "expected": expected.tolist(),
    "scores": lists(clip_graph, scores=("score", 0))["scores"],
    "about": ran.values["about"],
    "managed": any(holder is managed.patcher.model for holder in holders),
    "trainable": any(weight.is_inference() for weight in managed.reward.module.parameters()),
    "threads": managed.runs_elsewhere,
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
    next(library.find("clipscore", "bf16", 2).reward.module.vision_model.parameters()).dtype
)

# Mixes with gates, and likeness to a picture.
answers["mixes"] = {}
for mix in ("zscore", "sum", "minimum", "rank_product"):
    for gates in ("", "colourfulness = 50"):
        graph = {
            "images": thing("images", images),
            "first": reward("colourfulness"),
            "second": reward("jpeg"),
            "mix": block("MixRewards", **pair, weight_2=2.0, mix=mix, gates=gates),
            "score": block("ScoreImages", images=["images", 0], reward=["mix", 0]),
        }
        answers["mixes"][f"{mix} {gates}".strip()] = lists(graph, scores=("score", 0))["scores"]
like = {
    "images": thing("images", images),
    "one": thing("one", images[2:3]),
    "like": block("ReferenceReward", kind="phash", reference=["one", 0]),
    "score": block("ScoreImages", images=["images", 0], reward=["like", 0]),
    "other": block("ReferenceReward", kind="palette", colours="#ff8800, #002244"),
    "palette": block("ScoreImages", images=["images", 0], reward=["other", 0]),
}
answers["like"] = lists(like, scores=("score", 0), palette=("palette", 0), about=("like", 1))

# The best of every prompt, of any size.
select = {
    "images": thing("many", [images[i : i + 1, : 8 + 4 * i] for i in range(4)]),
    "scores": thing("scores", [0.1, 0.9, 0.5, 0.7]),
    "prompts": thing("prompts", ["a", "a", "b", "b"]),
    "best": block("SelectBest", images=["images", 0], scores=["scores", 0], prompts=["prompts", 0]),
}
chosen = lists(select, **outputs(best="- kept images scores"))
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
train_graph = {
    **drawing("a red circle", steps=4),
    "first": block("LoadReward", reward="clipscore", batch=8),
    "second": reward("jpeg"),
    "mix": block("MixRewards", **pair, weight_2=0.5, gates="jpeg = -2.6", mix="rank_product"),
    "rollout": block("Rollout", branch_steps="0,1", group_size=6, slots=12),
    "scores": block("ScoreRollout", reward=["mix", 0], prompt="a red circle"),
    "advantages": block("Advantages", scores=["scores", 0], per_branch=True),
    "train": block("TrainLoRA", reward=["mix", 0], run="mixed", changes=CHANGES),
}
ran = run(train_graph, **outputs(scores="scores", advantages="advantages", train="- lora"))
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
two = {"reward_1": one, "reward_2": types.RewardSet((rewards.load("jpeg"),), (1.0,))}
usual = {
    "SaveScoredImages": {"images": good, "scores": [0.5, 0.25], "prefix": "x", "most": 0},
    "LoadImageFolder": {"folder": "cats", "deep": False, "skip": 0, "most": 4, "max_side": 64},
    "MixRewards": {**two, "weight_1": 1.0, "weight_2": 1.0},
    "ScoreImages": {"images": good, "reward": one, "prompt": ""},
    "SelectBest": {"images": good, "scores": [0.5, 0.25], "k": 1, "use_threshold": False, "threshold": 0.0},
}
hostile: dict[str, dict[str, dict[str, Any]]] = {
    "SaveScoredImages": {
        **{f"prefix {text[:20]!a}": {"prefix": text} for text in given["prefixes"]},
        "scores of nan only": {"scores": [float("inf"), 0.0]},
        "scores of another length": {"scores": [0.5]},
        "names of another length": {"names": ["a"]},
        "names of numbers": {"names": [1, 2]},
        "details of others": {"details": dataclasses.replace(details, values=torch.zeros(1, 3))},
        "details without axes": {"details": dataclasses.replace(details, values=torch.tensor(1.0))},
        "images to 255": {"images": good * 255},
        "images without end": {"images": torch.zeros(1, 1, 1, 3).expand(1025, 1, 1, 3)},
        "most below none": {"most": -1},
    },
    "ScoreImages": {"names for others": {"names": ["a"]}},
    "LoadImageFolder": {
        "folder of a path": {"folder": "../../secret"},
        "folder that is a link": {"folder": "leads_out"},
        "folder without images": {"folder": "empty"},
        "folder of broken files": {"folder": "broken"},
        "skip of all": {"skip": 1000},
        "most of none": {"most": 0},
        "max_side of none": {"max_side": 1},
    },
    "LoadReward": {
        "reward of a path": {"reward": "../../secret"},
        "reward that is not installed": {"reward": "pickscore"},
        "reward that is damaged": {"reward": "damaged"},
        "precision of a word": {"reward": "jpeg", "precision": "fp8"},
        "batch of none": {"reward": "jpeg", "batch": 0},
    },
    "MixRewards": {
        "mix of a word": {"mix": "mean"},
        "mix of another mix": {"reward_1": minimum},
        "gates of words": {"gates": "colourfulness > 5"},
        "gates of strangers": {"gates": "pickscore = 20"},
        "gates of infinity": {"gates": "jpeg = 1e999"},
        "gates twice": {"gates": "jpeg = 1\njpeg = 2"},
        "gates without end": {"gates": "x" * 2001},
    },
    "ReferenceReward": {
        "kind of a word": {"kind": "lpips", "reference": good[:1]},
        "reference missing": {"kind": "phash"},
        "reference of two": {"kind": "phash", "reference": good},
        "reference of nan": {"kind": "phash", "reference": good[:1] * torch.nan},
        "colours missing": {"kind": "palette"},
        "colours of words": {"kind": "palette", "colours": "red"},
    },
    "SelectBest": {"prompts of another length": {"prompts": ["a"]}},
}
answers["hostile"] = refusals(usual, hostile)
answers["outside"] = sorted(str(path.relative_to(OUTPUT.parent)) for path in OUTPUT.parent.glob("*.png"))
spoilt = torch.cat([good[:1], good[:1] * torch.nan])
broken = {"images": spoilt, "scores": [float("nan"), 1.0], "details": details}
graph = {name: thing(name, value) for name, value in broken.items()}
graph["save"] = block("SaveScoredImages", **{name: [name, 0] for name in broken}, prefix="odd", most=0)
kept = lists(graph, **outputs(save="files table"))
answers["odd"] = {"files": kept["files"], "csv": (OUTPUT / kept["table"][0]).read_text("utf-8")}
comfy_side.answer(answers, pictures)
