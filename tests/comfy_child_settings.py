"""Runs inside a ComfyUI: Train LoRA and other blocks on a named run that was made with other settings, and
presets.

What came out goes back to test_nodes_settings.py.
"""

import logging

import comfy_side
from comfy_graphs import block, core, drawing, outputs, reward

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
given = comfy_side.given()

TEXT = "a red circle"
GRAPH = {**drawing(TEXT, steps=2, model=["load", 0]), "reward": reward("agreement"), "jpeg": reward("jpeg")}
LORA = {"lora": core("LoraLoaderModelOnly", model=["load", 0], lora_name=given["lora"], strength_model=1.0)}
said, logged, pressed = [], [], []
hosting.PromptServer.instance.send_sync = lambda event, data, sid=None: (
    event == "g2rpo.text" and said.append((data["node"], data["text"], sid))
)
handler = logging.Handler(logging.INFO)
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger().addHandler(handler)


def train(changes, **more):
    """Build the graph of a short run."""
    own = {"reward": ["reward", 0], **given["train"], **changes}
    nodes = {**GRAPH, **(LORA if own.get("model") == ["lora", 0] else {}), **more}
    return {**nodes, "3": block("TrainLoRA", **own)}


def told(graph, node="3", slot=4, fresh=False):
    """Run a graph; return an output, or what it was refused with."""
    ran = comfy_side.run_prompt(graph, want={"out": (node, slot)}, fresh=fresh)
    return ran.error or str(ran.problems or "") or ran.values.get("out")


def folder(run):
    """Return a run's folder."""
    return runs.RunFolder(hosting.run_place(run))


def steps(run):
    """List the steps of a run's rows."""
    return [row["step"] for row in folder(run).metrics()]


def press(changes):
    """Press Run; return the run, or the refusal, its steps, and what the node and the log said."""
    said.clear()
    logged.clear()
    ran = told(train(changes), fresh=changes in pressed)
    pressed.append(changes)
    texts = [text for node, text, sid in said if node == "3"]
    heard = all(any(line.endswith(text) for line in logged) for text in texts)
    known = ran if isinstance(ran, str) and ": " not in ran else changes.get("run")
    found = steps(known) if runs.is_run(hosting.run_place(known)) else []
    return {"run": ran, "steps": found, "said": texts, "logged": heard}


answer = {
    "stories": {name: [press(changes) for changes in story] for name, story in given["stories"].items()}
}
answer["rates"] = [row["lr"] for row in folder("goes-on").metrics() if "nfe" in row]
damaged = hosting.runs_root() / "rate-4"
damaged.mkdir()
(damaged / "metrics.jsonl").write_bytes(folder("rate").metrics_file.read_bytes())
(damaged / "config.json").write_text("[")
answer["beside a damaged one"] = press({"run": "rate", "learning_rate": 4e-3})["run"]
answer["written"] = {name: folder(name).config() for name in ("goes-on", "finished")}

# Everything that may differ, under ask and under continue.
answer["asked"] = {
    name: told(train({"run": "base", **changes, "if_settings_changed": "ask"}))
    for name, changes in given["changes"].items()
}
answer["continued"] = {
    name: told(train({"run": "base", "steps": 2, **changes, "if_settings_changed": "continue"}))
    for name, changes in given["fixed"].items()
}
answer["base"] = steps("base")

# Names that stand for something else, in every block that opens a run.
policy = {"load": GRAPH["load"], "policy": block("LoRAPolicy", model=["load", 0], run="loop")}
tree = {
    **GRAPH,
    **policy,
    "guider": core("BasicGuider", model=["policy", 1], conditioning=["text", 0]),
    "rollout": block("Rollout", branch_steps="0", group_size=2, slots=4),
    "scores": block("ScoreRollout", reward=["reward", 0], prompt=TEXT),
    "advantages": block("Advantages", scores=["scores", 0]),
    "update": block("UpdateLoRA", policy=["policy", 0], advantages=["advantages", 0], micro_batch=1),
}
pictures = {"rollout": ["rollout", 0], "pictures": ["scores", 1], "prompt": TEXT, "votes": ""}
vote = {**tree, "vote": block("VoteRollout", run="loop", **pictures)}
del vote["update"], vote["advantages"]
save = {
    **train({"run": "base"}),
    "save": block("SaveLoRA", lora=["3", 1], name="saved", key_names="native", run=["name", 0]),
    "name": core("PrimitiveString", value="loop"),
}
monitor = {"monitor": block("RunMonitor", run="loop")}


def named(graph, node, **inputs):
    """Return a graph with other inputs of a node."""
    return {**graph, node: {**graph[node], "inputs": {**graph[node]["inputs"], **inputs}}}


answer["loop"] = comfy_side.run_prompt(tree, want=outputs(update="policy")).ok
answer["newest"] = {
    "TrainLoRA": told(train({"run": "newest"})),
    "TrainLoRA, other case": told(train({"run": " Newest "})),
    "LoRAPolicy": told(named(policy, "policy", run="newest"), "policy", 2),
    "VoteRollout": told(named(vote, "vote", run="newest"), "vote", 0),
    "SaveLoRA": told(named(save, "name", value="newest"), "save", 0),
}

# Refusals of every block that opens a run: what is wrong with it, and what is told.
refused = {"LoRAPolicy, rank": told(named(policy, "policy", rank=2), "policy", 2)}
refused["LoRAPolicy, LoRA"] = told({**named(policy, "policy", model=["lora", 0]), **LORA}, "policy", 2)
openers = {"LoRAPolicy": (policy, "policy", 2), "SaveLoRA": (save, "save", 0)}
openers |= {"RunMonitor": (monitor, "monitor", 1), "VoteRollout": (vote, "vote", 0)}
place = folder("loop").path
for name, file in given["damaged"].items():
    opener, what = name.split(", ")
    path = (folder("loop").latest() if what in ("state", "lora") else place) / file
    kept = path.read_bytes() if path.exists() else None
    path.write_bytes(b"[\n")
    refused[name] = told(*openers[opener], fresh=True)
    path.unlink() if kept is None else path.write_bytes(kept)
for saved in folder("asks").saved():
    (saved / "state.json").write_bytes(b"[")
refused["TrainLoRA, state"] = told(train({"run": "asks", "steps": 3}))
(hosting.runs_root() / "mine").mkdir()
(hosting.runs_root() / "mine" / "holiday.txt").write_text("mine")
refused["TrainLoRA, a folder"] = told(train({"run": "mine"}))
refused["LoRAPolicy, a folder"] = told(named(policy, "policy", run="mine"), "policy", 2)
answer["refused"] = refused

# Run Monitor on a wire.
wired = {"monitor": block("RunMonitor", run="newest", run_name=["3", 4])}
both = comfy_side.run_prompt(
    {**train({"run": "base"}), **wired}, want={"text": ("monitor", 1), "run": ("3", 4)}
)
answer["wired"] = [both.error, both.ui.get("monitor", {}).get("g2rpo_run"), both.values["run"]]
stale = {"monitor": block("RunMonitor", run="gone", run_name=["3", 4])}
answer["stale"] = comfy_side.run_prompt({**train({"run": "base"}), **stale}).ui["monitor"]["g2rpo_run"]
answer["gone"] = told({"1": block("RunMonitor", run="gone")}, "1", 1)
answer["no name"] = told({"1": block("RunMonitor", run="newest", run_name="../x")}, "1", 1)

# Presets; blank names count the numbers and nothing else.
answer["presets"] = {name: press(changes) for name, changes in given["presets"].items()}
answer["numbers"] = {
    name: folder(found["run"]).config()["config"]
    for name, found in answer["presets"].items()
    if ": " not in found["run"]
}
result = comfy_side.run_prompt(train({"run": "base"})).ui["3"]
answer["result"] = [result["g2rpo_run"], result["g2rpo_result"]]
comfy_side.answer(answer)
