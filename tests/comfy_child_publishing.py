"""Runs inside a ComfyUI: where Train LoRA and Save LoRA put their files, and what core shows of them.

What came out goes back to test_nodes_publishing.py.
"""

import asyncio
import shutil
from pathlib import Path

import comfy_side
import folder_paths
from aiohttp.test_utils import TestClient, TestServer
from comfy_graphs import block, drawing, reward

runs = comfy_side.pack_module("comfy_g2rpo.run.folder")
hosting = comfy_side.pack_module("nodes.host.comfyui")
publishing = comfy_side.pack_module("nodes.host.publish")
given = comfy_side.given()

GRAPH = {**drawing("a red circle", steps=2, model=["load", 0]), "reward": reward("agreement")}
place = Path(folder_paths.get_folder_paths("loras")[0]) / "g2rpo"


def train(run, save="", **changes):
    """Run a short run; return its error, what the page is told of its file, and what Save LoRA wrote."""
    graph = {
        **GRAPH,
        "3": block("TrainLoRA", **{"reward": ["reward", 0], **given["train"], "run": run, **changes}),
    }
    if save:
        graph["4"] = block("SaveLoRA", lora=["3", 1], name=save, key_names="native", run=["3", 4])
    ran = comfy_side.run_prompt(graph)
    saved = ran.ui.get("4", {}).get("output", ran.ui.get("4", {}))
    told = ran.ui.get("3", {}).get("output", ran.ui.get("3", {}))
    return [ran.error or str(ran.problems or ""), told.get("g2rpo_file"), saved.get("g2rpo_file")]


def files():
    """Return every file beside the LoRAs: when it was written, and its content."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in place.iterdir()}


def touched(before):
    """Name the files that are new, gone or changed since."""
    after = files()
    return sorted(name for name in before.keys() | after if before.get(name) != after.get(name))


def step_of(name):
    """Return the step that a file says it is of."""
    return publishing.notes_of(place / name).get("g2rpo.step")


answer = {"first": train("pub", save="kept"), "files": sorted(files())}

# Run again, with nothing left to do; then after a crash between file and picture; then longer.
before = files()
answer["again"] = [train("pub", save="kept"), touched(before)]
(place / "pub.preview.png").unlink()
for name in (".pub.safetensors.abcd1234", ".pub.preview.png.x_y_z_12", ".others.safetensors.abcd1234"):
    (place / name).write_bytes(b"half")
answer["crashed"] = [train("pub"), touched(before)]
answer["crashed"].append([path.name for path in place.glob(".*")])
(place / ".others.safetensors.abcd1234").unlink()
answer["longer"] = [train("pub", save="kept", steps=2), touched(before), step_of("pub.safetensors")]
answer["kept"] = [step_of("kept.safetensors"), step_of("kept_00002.safetensors")]


async def ask(*paths):
    """Ask core's server, as its page and others do."""
    async with TestClient(TestServer(comfy_side.server().app)) as client:
        found = []
        for path in paths:
            response = await client.get(path)
            found.append([response.status, response.content_type, (await response.read()).hex()])
        return found


answer["asked"] = asyncio.run(
    ask(
        "/experiment/models/preview/loras/0/g2rpo/pub.webp",
        "/view_metadata/loras?filename=g2rpo/pub.safetensors",
        "/experiment/models",
    )
)

# A name that somebody else's file has.
strangers = {
    "lora": (place / "pub.safetensors").read_bytes(),
    "word": b"no LoRA at all",
    "half": (place / "pub.safetensors").read_bytes()[:5000],
    "gone": (place / "pub.safetensors").read_bytes(),
}
answer["taken"] = {}
for name, content in strangers.items():
    (place / f"{name}.safetensors").write_bytes(content)
    (place / f"{name}.png").write_bytes(b"a picture of their own")
    before = files()
    short, long = train(name), train(name, steps=2)
    answer["taken"][name] = [short, long, touched(before), step_of(f"{name}_00002.safetensors")]

# The same name, but another run: its folder was removed, and its settings are others now.
before = files()
shutil.rmtree(hosting.run_place("pub"))
answer["another"] = [train("pub", rank=1), touched(before)]

# A file of an earlier version, which had the step in its name.
train("older")
chosen = runs.RunFolder(hosting.run_place("older")).outcome()
for path in place.glob("older*"):
    path.unlink()
shutil.copy(chosen / "lora.safetensors", place / "older_000001.safetensors")
before = files()
answer["older"] = [train("older"), touched(before), train("older", steps=2), touched(before)]

# A file that cannot be replaced, as on Windows while a loader holds it.
train("held")
before = files()
real = publishing.write_where_it_differs


def refuse(path, content):
    raise publishing.RunError(f"cannot write {path}: permission denied")


publishing.write_where_it_differs = refuse
answer["held"] = [train("held", steps=2), touched(before)]
publishing.write_where_it_differs = real

# A picture of the user's own.
(place / "mine.preview.png").write_bytes(b"their own")
answer["mine"] = [
    train("mine"),
    (place / "mine.preview.png").read_bytes().decode(),
    sorted(place.glob("mine*")) != [],
]

# Without held-out prompts there are no samples.
answer["unseen"] = [
    train("unseen", prompts="a red circle", heldout_prompts=""),
    sorted(p.name for p in place.glob("unseen*")),
]
answer["hidden"] = [name for name in files() if name.startswith(".")]
comfy_side.answer(answer)
