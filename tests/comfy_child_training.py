"""Runs inside a ComfyUI: Train LoRA and the graph as the loop on the tiny model.

What came out goes back to test_nodes_training.py.
"""

import hashlib

import comfy.model_management
import comfy_side
import folder_paths
import torch
from safetensors.torch import load_file

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
given = comfy_side.given()

LOADER = {
    "1": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}},
    "2": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": "agreement"}},
}
PICTURE = {
    "p1": {
        "class_type": "CLIPTextEncode",
        "inputs": {"clip": ["1", 1], "text": "a red circle and a blue square"},
    },
    "p2": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "p3": {
        "class_type": "KSampler",
        "inputs": {
            "model": ["1", 0],
            "positive": ["p1", 0],
            "negative": ["p1", 0],
            "latent_image": ["p2", 0],
            "seed": 3,
            "steps": 4,
        }
        | {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
    },
    "p4": {"class_type": "VAEDecode", "inputs": {"samples": ["p3", 0], "vae": ["1", 2]}},
}


def train(**changes):
    """Build the graph of a short run."""
    inputs = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "reward": ["2", 0],
        **given["train"],
        **changes,
    }
    return {**LOADER, "3": {"class_type": "G2RPO_TrainLoRA", "inputs": inputs}}


def picture(model, file=None):
    """Draw with a MODEL output of the graph, or with a LoRA file."""
    graph = {key: {**node, "inputs": dict(node["inputs"])} for key, node in PICTURE.items()}
    if file:
        graph["p5"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["1", 0], "lora_name": file, "strength_model": 1.0},
        }
        model = ["p5", 0]
    graph["p3"]["inputs"]["model"] = model
    return graph


def state(run):
    """Return the newest checkpoint's tensors and the rows that are not clocks."""
    folder = runs.RunFolder(hosting.run_place(run))
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in folder.metrics()
    ]
    tensors = load_file(folder.latest() / "state.safetensors") | load_file(
        folder.latest() / "lora.safetensors"
    )
    return tensors, rows


def same(one, other):
    """Compare two states bit for bit."""
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][k], other[0][k]) for k in one[0])
        and one[1] == other[1]
    )


def interrupt_at(call):
    """Press the stop button at the given look at it."""
    real, count = comfy.model_management.throw_exception_if_processing_interrupted, iter(range(1, 10**6))

    def check():
        if next(count) == call:
            comfy.model_management.interrupt_current_processing(True)
        real()

    hosting.check_interrupted = check


phases = []
look = hosting.Live.check


def noted(self, phase):
    """Note the phase, then look at the stop button."""
    phases.append(phase)
    look(self, phase)


hosting.Live.check = noted
answer, tensors = {}, {}
before = comfy_side.run_prompt({**LOADER, **picture(["1", 0])}, want={"image": ("p4", 0)}).values["image"]

unborn = comfy_side.run_prompt(
    {"1": {"class_type": "G2RPO_RunMonitor", "inputs": {"run": "newest"}}}, want={"text": ("1", 1)}
)
answer["unborn"] = [unborn.ok, unborn.values.get("text", "")]

# A whole run, its outputs, and the file that it leaves for core's loader.
events = []
hosting.PromptServer.instance.send_sync = lambda event, data, sid=None: (
    events.append((event, data)) if event == hosting.EVENT else None
)
whole = comfy_side.run_prompt(
    {
        **train(run="whole"),
        **picture(["3", 0]),
        "4": {"class_type": "LossGraphNode", "inputs": {"loss": ["3", 2], "filename_prefix": "loss"}},
        "5": {
            "class_type": "LoraModelLoader",
            "inputs": {"model": ["1", 0], "lora": ["3", 1], "strength_model": 1.0} | given["bypass"],
        },
        "6": {
            "class_type": "G2RPO_SaveLoRA",
            "inputs": {"lora": ["3", 1], "name": "saved", "key_names": "native", "run": ["3", 4]},
        },
        "7": {
            "class_type": "G2RPO_SaveLoRA",
            "inputs": {"lora": ["3", 1], "name": "split", "key_names": "diffusers", "model": ["1", 0]},
        },
    },
    want={
        "image": ("p4", 0),
        "tuned": ("3", 0),
        "loaded": ("5", 0),
        "loss": ("3", 2),
        "curve": ("3", 3),
        "file": ("6", 0),
        "run": ("3", 4),
    },
)
answer["whole"] = [whole.ok, whole.error, whole.problems]
answer["events"] = [data for _, data in events]
answer["run"] = whole.values["run"]
answer["losses"] = whole.values["loss"]["loss"]
answer["patched"] = [len(whole.values[name].patches) for name in ("tuned", "loaded")]
answer["rows"] = state("whole")[1]
answer["loras"] = folder_paths.get_filename_list("loras")
tensors["curve"] = whole.values["curve"]
tensors["tuned"] = whole.values["image"]
for name in answer["loras"]:
    ran = comfy_side.run_prompt({**LOADER, **picture(None, name)}, want={"image": ("p4", 0)})
    tensors[f"image {name}"] = ran.values["image"]
reference = state("whole")

# Stopped anywhere and run again: the same as never stopped. Pictures in between are what they were.
answer["stops"] = {}
for call in given["stops"]:
    interrupt_at(call)
    ran = comfy_side.run_prompt(train(run=f"stop{call}"))
    phase = phases[-1]
    hosting.check_interrupted = comfy.model_management.throw_exception_if_processing_interrupted
    between = comfy_side.run_prompt({**LOADER, **picture(["1", 0])}, want={"image": ("p4", 0)}).values[
        "image"
    ]
    again = comfy_side.run_prompt(train(run=f"stop{call}"))
    answer["stops"][call] = {
        "stopped": ran.error,
        "phase": phase,
        "picture": torch.equal(before, between),
        "again": [again.ok, again.error],
        "same": same(reference, state(f"stop{call}")),
    }

# A reward that is gamed: the watch stops the run, and what comes out is the best step's LoRA.
gamed = train(
    run="gamed",
    reward=["8", 0],
    heldout_reward=["2", 0],
    steps=8,
    eval_every=4,
    learning_rate=4e-3,
    **given["gamed"],
) | {"8": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": "jpeg"}}}
caught = comfy_side.run_prompt({**gamed, **picture(["3", 0])}, want={"image": ("p4", 0), "curve": ("3", 3)})
folder = runs.RunFolder(hosting.run_place("gamed"))
answer["gamed"] = [caught.ok, caught.error, folder.summary(), torch.equal(before, caught.values["image"])]
answer["gamed loras"] = [name for name in folder_paths.get_filename_list("loras") if "gamed" in name]

# More steps continue a run; other settings are refused, and a blank name tells settings apart.
longer = comfy_side.run_prompt(train(run="whole", steps=given["train"]["steps"] + 1))
answer["longer"] = [longer.ok, longer.error, state("whole")[1][-1]["step"]]
answer["other"] = comfy_side.run_prompt(train(run="whole", rank=2)).error
names = [
    comfy_side.run_prompt(train(steps=1, **changes), want={"run": ("3", 4)}).values["run"]
    for changes in ({}, {}, {"seed": 9})
]
answer["names"] = names

# The graph as the loop.
guided = {
    "4": {
        "class_type": "G2RPO_LoRAPolicy",
        "inputs": {
            "model": ["1", 0],
            "rank": 4,
            "alpha": 4.0,
            "targets": "attention",
            "learning_rate": 1e-3,
            "seed": 0,
            "run": "loop",
        },
    },
    "5": PICTURE["p1"],
    "6": {"class_type": "BasicGuider", "inputs": {"model": ["4", 1], "conditioning": ["5", 0]}},
    "7": {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}},
    "8": {
        "class_type": "BasicScheduler",
        "inputs": {"model": ["1", 0], "scheduler": "simple", "steps": 4, "denoise": 1.0},
    },
    "10": {
        "class_type": "G2RPO_Rollout",
        "inputs": {
            "guider": ["6", 0],
            "noise": ["7", 0],
            "sigmas": ["8", 0],
            "latent_image": ["p2", 0],
            "branch_steps": "0-1",
            "group_size": 4,
        }
        | {
            "granularities": "1",
            "kernel": "flow_sde",
            "eta": 0.7,
            "terminal": "exact",
            "antithetic": False,
            "slots": 16,
        },
    },
    "11": {
        "class_type": "G2RPO_ScoreRollout",
        "inputs": {
            "rollout": ["10", 0],
            "vae": ["1", 2],
            "reward": ["2", 0],
            "prompt": "a red circle and a blue square",
        },
    },
    "12": {
        "class_type": "G2RPO_Advantages",
        "inputs": {
            "rollout": ["10", 0],
            "scores": ["11", 0],
            "clamp": 5.0,
            "std_floor": 1e-8,
            "per_branch": False,
        },
    },
    "13": {
        "class_type": "G2RPO_UpdateLoRA",
        "inputs": {
            "policy": ["4", 0],
            "advantages": ["12", 0],
            "kl": 0.0,
            "step_weight": "uniform",
            "max_grad_norm": 1.0,
        }
        | {"weight_decay": 1e-4, "micro_batch": 2},
    },
}
loop = {**LOADER, "p2": PICTURE["p2"], **guided}


def digest(adapter):
    return hashlib.sha256(
        b"".join(t.numpy().tobytes() for p in adapter.pairs.values() for t in p)
    ).hexdigest()


answer["loop"] = []
for _ in range(3):
    ran = comfy_side.run_prompt(
        loop, want={"old": ("4", 0), "new": ("13", 0), "tuned": ("13", 2)}, fresh=False
    )
    old, new = ran.values["old"], ran.values["new"]
    answer["loop"].append([ran.ok, ran.error, old.step, new.step, digest(old.adapter), digest(new.adapter)])
answer["loop rows"] = [row["step"] for row in state("loop")[1]]
monitor = comfy_side.run_prompt(
    {"1": {"class_type": "G2RPO_RunMonitor", "inputs": {"run": "loop"}}},
    want={"curve": ("1", 0), "text": ("1", 1)},
)
answer["monitor"] = [monitor.ok, monitor.error, monitor.values["text"]]
comfy_side.answer(answer, tensors)
