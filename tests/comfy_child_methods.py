"""Runs inside a ComfyUI: Train LoRA with every recipe, objective and way of exploring, also typed in changes.

What came out goes back to test_nodes_methods.py.
"""

import comfy_side
from comfy_graphs import block, drawing, reward

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
lora = comfy_side.pack_module("comfy_g2rpo.lora")
given = comfy_side.given()
# In images this small no rule sees a shape: agreement would find them all alike.
GRAPH = {**drawing("a red circle", steps=2), "reward": reward("colourfulness")}


def train(**changes):
    """Train; return the run's name, or what it was refused with."""
    settings = {"reward": ["reward", 0], **given["train"], **changes}
    graph = {**GRAPH, "3": block("TrainLoRA", **settings)}
    # The model stays loaded, as in the server.
    ran = comfy_side.run_prompt(graph, want={"run": ("3", 4)}, fresh=False)
    return ran.error or str(ran.problems or "") or ran.values["run"]


def folder(run):
    """Return a run's folder."""
    return runs.RunFolder(hosting.run_place(run))


def result(run):
    """Return a run's newest LoRA as text that differs by a bit, and whether it does anything."""
    tensors = lora.read(folder(run).latest() / "lora.safetensors").pairs
    parts = [part for name in sorted(tensors) for part in tensors[name]]
    return [part.numpy().tobytes().hex() for part in parts], any(
        up.abs().max() > 0 for _, up in tensors.values()
    )


def ways(name, changes):
    """Train two steps at once, and one and then another; return what both made."""
    once, first = (
        train(run=f"{name}-once", steps=2, **changes),
        train(run=f"{name}-twice", steps=1, **changes),
    )
    again = train(run=f"{name}-twice", steps=2, **changes)
    if (once, first, again) != (f"{name}-once", f"{name}-twice", f"{name}-twice"):
        return {"said": [once, first, again]}
    (one, learned), (other, _) = result(once), result(again)
    rows = [row for row in folder(once).metrics() if "nfe" in row]
    return {"equal": one == other, "learned": learned, "metrics": sorted(rows[-1])}


answer = {"ways": {name: ways(name, changes) for name, changes in given["ways"].items()}}
answer["refused"] = {
    name: train(run="refused", steps=1, **changes) for name, changes in given["refused"].items()
}
answer["begun"] = hosting.run_place("refused").exists()

# A run that goes on with one field after another changed, each kept for the steps after it.
answer["base"] = train(run="going", steps=1)
lines, told = given["train"]["changes"], {}
for step, (name, line) in enumerate(given["goes on"].items(), start=2):
    typed = f"{given['train']['changes']}\n{line}"
    said = train(run="going", steps=step, changes=typed, if_settings_changed="continue")
    told[name] = [said, max(row["step"] for row in folder("going").metrics())]
answer["goes on"] = told
answer["stays"] = {
    name: train(
        run="going", steps=99, changes=f"{given['train']['changes']}\n{line}", if_settings_changed="continue"
    )
    for name, line in given["stays"].items()
}
comfy_side.answer(answer)
