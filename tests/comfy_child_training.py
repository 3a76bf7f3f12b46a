"""Runs inside a ComfyUI: Train LoRA and the graph as the loop on the tiny model.

What came out goes back to test_nodes_training.py.
"""

import hashlib
import subprocess
import sys

import comfy.model_management
import comfy_side
import folder_paths
import torch
from comfy_graphs import block, core, drawing, outputs, reward
from safetensors.torch import load_file

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
given = comfy_side.given()

TEXT = "a red circle and a blue square"
GRAPH = {**drawing(TEXT, steps=4, seed=5, model=["policy", 1]), "reward": reward("agreement")}
EULER = {"seed": 3, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def train(**changes):
    """Build the graph of a short run."""
    return {**GRAPH, "3": block("TrainLoRA", **{"reward": ["reward", 0], **given["train"], **changes})}


def picture(model, file=None):
    """Draw with a MODEL output of the graph, or with a LoRA file."""
    lora = core("LoraLoaderModelOnly", model=["load", 0], lora_name=file, strength_model=1.0)
    wires = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        **GRAPH,
        **({"lora": lora} if file else {}),
        "drawn": core("KSampler", model=["lora", 0] if file else model, **wires, **EULER),
        "picture": core("VAEDecode", samples=["drawn", 0], vae=["load", 2]),
    }


def image(model, file=None):
    """Run the graph of a picture alone; return it."""
    return comfy_side.run_prompt(picture(model, file), want={"image": ("picture", 0)}).values["image"]


def monitor(run):
    """Look at a run; return whether that went well, the error and the text."""
    graph = {"1": block("RunMonitor", run=run)}
    ran = comfy_side.run_prompt(graph, want={"curve": ("1", 0), "text": ("1", 1)})
    return [ran.ok, ran.error, ran.values.get("text", "")]


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
before = image(["load", 0])
ok, _, text = monitor("newest")
answer["unborn"] = [ok, text]

# A whole run, its outputs, and the file that it leaves for core's loader.
events = []
hosting.PromptServer.instance.send_sync = lambda event, data, sid=None: (
    events.append((event, data)) if event == hosting.EVENT else None
)
whole = comfy_side.run_prompt(
    {
        **picture(["3", 0]),
        **train(run="whole"),
        "4": core("LossGraphNode", loss=["3", 2], filename_prefix="loss"),
        "5": core("LoraModelLoader", model=["load", 0], lora=["3", 1], strength_model=1.0, **given["bypass"]),
        "6": block("SaveLoRA", lora=["3", 1], name="saved", key_names="native", run=["3", 4]),
        "7": block("SaveLoRA", lora=["3", 1], name="split", key_names="diffusers", model=["load", 0]),
    },
    want={
        "image": ("picture", 0),
        "loaded": ("5", 0),
        "file": ("6", 0),
        **outputs(**{"3": "tuned - loss curve run"}),
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
    tensors[f"image {name}"] = image(None, name)
reference = state("whole")

# Stopped anywhere and run again: the same as never stopped. Pictures in between are what they were.
answer["stops"] = {}
for call in given["stops"]:
    interrupt_at(call)
    ran = comfy_side.run_prompt(train(run=f"stop{call}"))
    phase = phases[-1]
    hosting.check_interrupted = comfy.model_management.throw_exception_if_processing_interrupted
    between = image(["load", 0])
    again = comfy_side.run_prompt(train(run=f"stop{call}"))
    answer["stops"][call] = {
        "stopped": ran.error,
        "phase": phase,
        "picture": torch.equal(before, between),
        "again": [again.ok, again.error],
        "same": same(reference, state(f"stop{call}")),
    }

# A reward that is gamed: the watch stops the run, and what comes out is the best step's LoRA.
long = {"heldout_reward": ["reward", 0], "steps": 8, "eval_every": 4, "learning_rate": 4e-3}
gamed = train(run="gamed", **{"reward": ["easy", 0], **long, **given["gamed"]}) | {"easy": reward("jpeg")}
caught = comfy_side.run_prompt(
    {**picture(["3", 0]), **gamed}, want={"image": ("picture", 0), "curve": ("3", 3)}
)
folder = runs.RunFolder(hosting.run_place("gamed"))
answer["gamed"] = [caught.ok, caught.error, folder.summary(), torch.equal(before, caught.values["image"])]
texts, made = [], len(folder.metrics())
hosting.PromptServer.instance.send_sync = lambda event, data, sid=None: (
    event == "g2rpo.text" and texts.append((data["node"], data["text"]))
)
again = comfy_side.run_prompt(gamed)
del hosting.PromptServer.instance.send_sync
answer["gamed again"] = [again.ok, [text for node, text in texts if node == "3"]]
answer["gamed again"].append(len(folder.metrics()) == made)
answer["gamed loras"] = [name for name in folder_paths.get_filename_list("loras") if "gamed" in name]

# More steps continue a run; other settings are refused, and a blank name tells settings apart.
longer = comfy_side.run_prompt(train(run="whole", steps=given["train"]["steps"] + 1))
answer["longer"] = [longer.ok, longer.error, state("whole")[1][-1]["step"]]
answer["other"] = comfy_side.run_prompt(train(run="whole", rank=2, if_settings_changed="ask")).error
names = [
    comfy_side.run_prompt(train(steps=1, **changes), want={"run": ("3", 4)}).values["run"]
    for changes in ({}, {}, {"seed": 9})
]
answer["names"] = names

# Two writers: another process has the run's folder, old or new; then this one has it and others come.
HOLD = """
import sys, time
from comfy_g2rpo.files.one_writer import one_writer
with one_writer(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(300)
"""
answer["held"] = []
for name in ("whole", "fresh"):
    command = [sys.executable, "-c", HOLD, str(hosting.run_place(name))]
    holder = subprocess.Popen(command, cwd=given["root"], stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    former = state(name) if name == "whole" else None
    ran = comfy_side.run_prompt(train(run=name, steps=given["train"]["steps"] + 2))
    untouched = former is None or same(former, state(name))
    answer["held"].append([f"process {holder.pid} " in ran.error, ran.error, untouched])
    holder.kill()
    holder.wait()
answer["after"] = comfy_side.run_prompt(train(run="fresh")).ok

others = []


def invite(self, phase):
    """Let command lines in, once, while the graph trains."""
    if not others:
        for words in ([], ["--replace"]):
            command = [given["python"], "-m", "g2rpo_trainer.cli", "train", "demo", "--quiet", *words]
            place = ["--out", str(hosting.run_place("shared"))]
            met = subprocess.run([*command, *place], cwd=given["root"], capture_output=True, text=True)
            others.append([met.returncode, met.stderr.splitlines()[-1:]])
    look(self, phase)


hosting.Live.check = invite
shared = comfy_side.run_prompt(train(run="shared"))
hosting.Live.check = noted
answer["met"] = [shared.ok, shared.error, others, same(reference, state("shared"))]

# The graph as the loop.
loop = {
    **GRAPH,
    "policy": block("LoRAPolicy", model=["load", 0], run="loop"),
    "rollout": block("Rollout", branch_steps="0-1", group_size=4, eta=0.7, slots=16),
    "scores": block("ScoreRollout", reward=["reward", 0], prompt=TEXT),
    "advantages": block("Advantages", scores=["scores", 0]),
    "update": block(
        "UpdateLoRA", policy=["policy", 0], advantages=["advantages", 0], weight_decay=1e-4, micro_batch=2
    ),
}


def digest(adapter):
    return hashlib.sha256(
        b"".join(t.numpy().tobytes() for p in adapter.pairs.values() for t in p)
    ).hexdigest()


answer["loop"] = []
for _ in range(3):
    ran = comfy_side.run_prompt(loop, want=outputs(policy="old", update="new - tuned"), fresh=False)
    old, new = ran.values["old"], ran.values["new"]
    answer["loop"].append([ran.ok, ran.error, old.step, new.step, digest(old.adapter), digest(new.adapter)])
answer["loop rows"] = [row["step"] for row in state("loop")[1]]
answer["monitor"] = monitor("loop")
comfy_side.answer(answer, tensors)
