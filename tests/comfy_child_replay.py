"""Runs inside a ComfyUI: Train LoRA with old forks, in one press and in several, and in a run that goes on.

What came out goes back to test_nodes_replay.py.
"""

import comfy_side
import torch
from comfy_graphs import block, drawing, reward

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
safe = comfy_side.pack_module("comfy_g2rpo.files.safe")
given = comfy_side.given()
GRAPH = {**drawing("a red circle", steps=2, model=["load", 0]), "reward": reward("agreement")}


def press(**changes):
    """Press Run; return the run's name, or the error."""
    settings = {"reward": ["reward", 0], "model": ["load", 0], **given["train"], **changes}
    graph = {**GRAPH, "3": block("TrainLoRA", **settings)}
    ran = comfy_side.run_prompt(graph, want={"run": ("3", 4)}, fresh=True)
    return ran.error or str(ran.problems or "") or ran.values["run"]


def left(run):
    """Return a run's newest LoRA, state and old forks."""
    place = runs.RunFolder(hosting.run_place(run)).latest()
    files = {path.name: safe.read_tensors(path)[0] for path in place.glob("*.safetensors")}
    return {f"{name}/{key}": value for name, found in files.items() for key, value in found.items()}


def rows(run):
    """Return a run's rows of steps, with what they say of old forks."""
    found = [row for row in runs.RunFolder(hosting.run_place(run)).metrics() if "nfe" in row]
    return [[row["step"], row.get("replay/rows"), row.get("replay/size")] for row in found]


answer = {"same": {}, "rows": {}, "files": {}}
for name, changes in given["ways"].items():
    answer["whole"] = press(run=f"{name}-whole", steps=3, changes=changes)
    pressed = [press(run=f"{name}-parts", steps=steps, changes=changes) for steps in (1, 2, 3)]
    one, other = left(f"{name}-whole"), left(f"{name}-parts")
    equal = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    answer["same"][name] = [pressed, equal]
    answer["rows"][name] = rows(f"{name}-parts")
    answer["files"][name] = sorted(key for key in one if key.startswith("replay"))

with_replay, without = given["ways"]["clip"], given["without"]
answer["turned on"] = [
    press(run="later", steps=1, changes=without),
    press(run="later", steps=3, changes=with_replay, if_settings_changed="continue"),
    press(run="later", steps=4, changes=without, if_settings_changed="continue"),
    rows("later"),
]
large = {"run": "refused", "width": 256, "height": 256}
answer["refused"] = {name: press(changes=changes, **large) for name, changes in given["refused"].items()}
answer["left"] = hosting.run_place("refused").exists()
comfy_side.answer(answer)
