"""Runs inside a ComfyUI: what is done with a model between two runs of Train LoRA, and what is run again.

What came out goes back to test_nodes_continuing.py.
"""

import comfy.model_management
import comfy_side
import torch
from comfy_graphs import block, core, drawing, reward

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
training = comfy_side.pack_module("nodes.host.train_run")
fingerprints = comfy_side.pack_module("nodes.model.fingerprint")
given = comfy_side.given()

GRAPH = {**drawing("a red circle", steps=2, model=["load", 0]), "reward": reward("agreement")}
EULER = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def train(model="load", **changes):
    """Build the graph of a short run."""
    settings = {"reward": ["reward", 0], "model": [model, 0], **given["train"], **changes}
    return {**GRAPH, "3": block("TrainLoRA", **settings)}


def tuned(strength=1.0):
    """Return the loader's model with the first run's LoRA on it."""
    inputs = {"model": ["load", 0], "lora_name": given["lora"], "strength_model": strength}
    return {"lora": core("LoraLoaderModelOnly", **inputs)}


def merged(node, **inputs):
    """Return the loader's model with its own LoRA on it and both in a merge node of core."""
    return {**tuned(), "merge": core(node, model1=["lora", 0], model2=["load", 0], **inputs)}


def sampled(model):
    """Draw with a MODEL output of the graph."""
    wires = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        "drawn": core("KSampler", model=[model, 0], **wires, **EULER),
        "picture": core("VAEDecode", samples=["drawn", 0], vae=["load", 2]),
        "shown": core("PreviewImage", images=["picture", 0]),
    }


def told(graph, fresh=False):
    """Run a graph, on the models that are loaded unless afresh; return the run's name, or the error."""
    ran = comfy_side.run_prompt(graph, want={"run": ("3", 4)}, fresh=fresh)
    return ran.error or str(ran.problems or "") or ran.values["run"]


def steps(run):
    """List the steps of a run's rows."""
    return [row["step"] for row in runs.RunFolder(hosting.run_place(run)).metrics()]


def saved(name):
    """Return the nodes that save the difference of a model to the loader's as a LoRA."""
    minus = core("ModelMergeSubtract", model1=[name, 0], model2=["load", 0], multiplier=1.0)
    wires = {"model_diff": ["minus", 0], "rank": 2, "lora_type": "standard", "bias_diff": True}
    return {"minus": minus, "save": core("LoraSave", filename_prefix="difference", **wires)}


def as_before(run, name):
    """Make of a run what an earlier version left: no word on patches, and a name that does not count them."""
    folder = runs.RunFolder(hosting.run_place(run))
    content = folder.config()
    del content["config"]["model"]["patches"]
    folder.save_config(content)
    former = name or training.name_of(content, given["train"]["recipe"])
    folder.path.rename(folder.path.with_name(former))
    return former


ASK = {"if_settings_changed": "ask"}
LONGER = {"steps": given["train"]["steps"] + 1}
SIMPLE, SUBTRACT = merged("ModelMergeSimple", ratio=0.5), merged("ModelMergeSubtract", multiplier=0.7)
BETWEEN = {
    "merged and sampled": SIMPLE | sampled("merge"),
    "subtracted and sampled": SUBTRACT | sampled("merge"),
    "added and sampled": merged("ModelMergeAdd") | sampled("merge"),
    "merged and saved": SIMPLE | saved("merge"),
    "subtracted, sampled and saved": SUBTRACT | sampled("merge") | saved("lora"),
    "sampled with a LoRA": tuned() | sampled("lora"),
}
OTHERS = {"base": ("load", {}), "weaker": ("lora", tuned(0.5)), "merge": ("merge", SIMPLE)}


def between():
    """Do something else with the model between two runs; it stays loaded as that left it."""
    found = {}
    for number, (name, graph) in enumerate(BETWEEN.items()):
        for run in (f"between{number}", ""):
            changes = {"run": run, "seed": number}
            before = told(train(**changes))
            ran = comfy_side.run_prompt({**GRAPH, **graph}, fresh=False)
            assert ran.ok, ran
            found[f"{name}, run {run!r}"] = [before, told(train(**changes, **LONGER)), steps(before)]
    return found


def known():
    """Load a merged model wholly, in place and in part; return what the models are known by, and backups."""
    want = {"base": ("load", 0), "merge": ("merge", 0)}
    models = comfy_side.run_prompt({**GRAPH, **SUBTRACT}, want).values
    merge, backups = models["merge"], []
    comfy.model_management.unload_all_models()
    prints = [fingerprints.fingerprint(models["base"])]
    for memory, in_place in ((0, False), (0, True), (10_000_000, False)):
        merge.weight_inplace_update = in_place
        merge.patch_model(merge.load_device, lowvram_model_memory=memory)
        backups.append(len(merge.backup))
        prints += [fingerprints.fingerprint(model) for model in models.values()]
        merge.unpatch_model(merge.offload_device)
    return prints, backups


def earlier():
    """Continue runs of an earlier version on models with and without patches, named and unnamed."""
    found = {}
    for seed, (model, more) in enumerate([("load", {}), ("lora", tuned()), ("merge", SUBTRACT)], start=20):
        for name in ("", f"{model}-before"):
            begun = told({**train(model, seed=seed, run=name and f"{model}-now"), **more})
            former = as_before(begun, name)
            ran = told({**train(model, seed=seed, run=name, **LONGER), **more})
            found[f"{model}, run {name!r}"] = [former, ran, steps(former)]
    return found


def carried(**changes):
    """Run Train LoRA on models that carry patches."""
    return [
        told({**train("lora", run="lora", **changes), **tuned()}),
        told({**train("merge", run="merge", **changes), **SUBTRACT}),
        told({**train("lora", seed=9), **tuned()}),
    ]


def out_of_memory_from(call):
    """Run out of memory from the given forward on, with batches of any size; from 0, never."""
    looks = iter(range(1, 10**6))

    def check():
        if next(looks) >= call > 0:
            raise torch.cuda.OutOfMemoryError("no memory left")

    hosting.check_interrupted = check


def too_large():
    """Run out of memory, then run again with other settings; list what was told, and steps."""
    found = {}
    for name, (call, changes) in given["smaller"].items():
        out_of_memory_from(call)
        first = told(train(run=name, steps=2))
        out_of_memory_from(0)
        place = hosting.run_place(name)
        if name == "voted":
            (place / "votes.jsonl").write_text("")
        held = steps(name)
        found[name] = [first, held, told(train(run=name, **changes)), steps(name)]
        found[name].append(runs.RunFolder(place).config()["config"]["model"]["width"])
    loops = [{**GRAPH, "3": block("LoRAPolicy", model=["load", 0], run="loop", rank=rank)} for rank in (4, 2)]
    ran = [comfy_side.run_prompt(loop, want={"step": ("3", 2)}) for loop in loops]
    return found | {"loop": [ran[0].error, ran[1].error, ran[1].values.get("step")]}


def announced():
    """Run again what is finished, in part made, or longer than asked for; return what the node says."""
    said, found = [], {}
    hosting.PromptServer.instance.send_sync = lambda event, data, sid=None: (
        event == "g2rpo.text" and said.append((data["node"], data["text"]))
    )
    for name, changes in given["again and again"].items():
        ran = told(train(run=name.split()[0], **changes), fresh=True)
        found[name] = [ran, [text for node, text in said if node == "3"], steps(name.split()[0])[-1]]
        said.clear()
    return found


if given.get("again"):
    answer = carried(**LONGER)
else:
    answer = {"first": told(train(run="first")), "between": between(), "known": known(), "carried": carried()}
    answer["plain"] = told(train(seed=9))
    answer["others"] = {
        name: told({**train(model, run="lora", **LONGER, **ASK), **more})
        for name, (model, more) in OTHERS.items()
    }
    answer["large"], answer["announced"] = too_large(), announced()
    answer["old"], answer["then"] = earlier(), told(train(run="lora-before", seed=21, steps=3, **ASK))
comfy_side.answer(answer)
