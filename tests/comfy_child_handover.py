"""Runs inside a ComfyUI for test_nodes_handover.py: trainings are handed over and looked at."""

from __future__ import annotations

import comfy_side
import torch
from comfy_graphs import block, core, reward

given = comfy_side.given()


def look(name, **more):
    """Run Submit Training, Training Result and what needs its LoRA; return how that ended."""
    submit = {**given["submit"], "run": name, **more.pop("submit", {})}
    graph = {
        "load": block("TinyDemoLoader"),
        "reward": reward("agreement"),
        "strict": reward("strict"),
        "submit": block("SubmitTraining", reward=["reward", 0], heldout_reward=["strict", 0], **submit),
        "result": block("TrainingResult", run=["submit", 0], model=["load", 0], **more),
        # An image of the tuned model, which nobody may draw before there is one.
        "text": core("CLIPTextEncode", clip=["load", 1], text="a red circle"),
        "empty": core("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "draw": core(
            "KSampler",
            **{"model": ["result", 0], "positive": ["text", 0], "negative": ["text", 0]},
            **{"latent_image": ["empty", 0], "seed": 0, "steps": 1, "cfg": 1.0, "denoise": 1.0},
            **{"sampler_name": "euler", "scheduler": "simple"},
        ),
    }
    slots = {"tuned": 0, "lora": 1, "curve": 2, "samples": 3, "state": 4}
    want = {key: ("result", slot) for key, slot in slots.items()} | {"image": ("draw", 0)}
    ran = comfy_side.run_prompt(graph, want)
    found = ran.values
    told = ran.ui.get("result", {})
    return found, {
        "error": ran.error or str(ran.problems or ""),
        "state": found.get("state"),
        "came": sorted(found),
        "patches": len(found["tuned"].patches) if "tuned" in found else 0,
        "file": told.get("g2rpo_file"),
        "result": told.get("g2rpo_result"),
        "said": ran.ui.get("submit", {}).get("text"),
        "curve": list(found["curve"].shape) if "curve" in found else None,
        "samples": list(found["samples"].shape) if "samples" in found else None,
    }


def unsaid(**reward_of):
    """Return what Submit Training says to a reward that no job can name."""
    graph = {
        **reward_of,
        "submit": block("SubmitTraining", reward=["judge", 0], **{**given["submit"], "run": "unsaid"}),
    }
    return comfy_side.run_prompt(graph, {"out": ("submit", 0)}).error


answer, tensors = {}, {}
for key, (name, more) in given["looks"].items():
    found, answer[key] = look(name, **more)
    print(key, answer[key]["state"] or answer[key]["error"], flush=True)
    if "lora" in found:
        tensors |= {f"{key} {weight}": tensor for weight, tensor in found["lora"].items()}
if given.get("refusals"):
    mine = block("ReferenceReward", kind="palette", colours="#ff0000")
    answer["made in the graph"] = unsaid(judge=mine)
    unwired = {"result": block("TrainingResult", run="nobody")}
    answer["no job"] = comfy_side.run_prompt(unwired, {"out": ("result", 4)}).error
    opened = comfy_side.pack_module("nodes.host.open_run")
    for name in ("hand", "unwanted", "nobody"):
        try:
            answer[f"train {name}"] = opened.refuse_handed_over(name)
        except ValueError as error:
            answer[f"train {name}"] = str(error)
    # A step of two processes: 4 s, of which this one waits a second and the other longer.
    row = {"step": 1, "nfe": 9, "time/rollout": 2.0, "time/update": 1.0, "time/waiting": 1.0}
    rows = [{"step": 0}, row | {"time/waiting_max": 99.0}]
    answer["left"] = comfy_side.pack_module("nodes.host.watch_job").time_left(rows, 1, 11)
assert torch.is_inference_mode_enabled() is False
comfy_side.answer(answer, tensors)
