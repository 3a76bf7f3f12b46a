"""Runs inside a ComfyUI: Train LoRA that drops branches and chooses prompts, in one press and in several.

What came out goes back to test_nodes_choosing.py.
"""

import comfy_side
import torch
from comfy_graphs import block, drawing, reward

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
lora = comfy_side.pack_module("comfy_g2rpo.lora")
given = comfy_side.given()
PROMPTS = "a red circle\ntwo blue squares\na green triangle"
# In images this small no rule sees a shape: agreement would find them all alike.
GRAPH = {**drawing("a red circle", steps=2, model=["load", 0]), "reward": reward("colourfulness")}


def press(**changes):
    """Press Run; return the run's name, or the error."""
    settings = {
        "reward": ["reward", 0],
        "model": ["load", 0],
        **given["train"],
        "prompts": PROMPTS,
        **changes,
    }
    graph = {**GRAPH, "3": block("TrainLoRA", **settings)}
    # The model stays loaded, as in the server.
    ran = comfy_side.run_prompt(graph, want={"run": ("3", 4)}, fresh=False)
    return ran.error or str(ran.problems or "") or ran.values["run"]


def left(run):
    """Return a run's newest state: its tensors, what it remembers, and whether it has learned."""
    place = runs.RunFolder(hosting.run_place(run)).latest()
    tensors, meta = runs.read_state(place)
    pairs = lora.read(place / "lora.safetensors").pairs.values()
    return tensors, meta.get("history"), any(up.abs().max() > 0 for _, up in pairs)


answer = {}
for name, changes in given["ways"].items():
    wholly = press(run=f"{name}-whole", steps=3, changes=changes)
    pressed = [press(run=f"{name}-parts", steps=steps, changes=changes) for steps in (1, 3)]
    one, other = left(f"{name}-whole"), left(f"{name}-parts")
    equal = one[0].keys() == other[0].keys() and all(torch.equal(one[0][k], other[0][k]) for k in one[0])
    answer[name] = [[wholly, *pressed], equal and one[1] == other[1], bool(one[1]), bool(one[2])]
answer["refused"] = {
    name: press(run="refused", changes=changes) for name, changes in given["refused"].items()
}
comfy_side.answer(answer)
