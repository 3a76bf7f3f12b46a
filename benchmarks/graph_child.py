"""Runs inside a ComfyUI for graph.py: one Train LoRA on the tiny model, clocked where `clock` says so."""

import sys

import comfy_side

given = comfy_side.given()
if given["clock"]:
    sys.path.insert(0, given["folder"])
    from stopwatch import Stopwatch

    clock = Stopwatch(given["clock"])
    clock.watch(comfy_side.pack_module("comfy_g2rpo.run.loop"))
graph = {
    "1": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}},
    "2": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": "agreement"}},
    "3": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": "strict"}},
    "4": {
        "class_type": "G2RPO_TrainLoRA",
        "inputs": {
            "model": ["1", 0],
            "clip": ["1", 1],
            "vae": ["1", 2],
            "reward": ["2", 0],
            "heldout_reward": ["3", 0],
            **given["widgets"],
        },
    },
}
ran = comfy_side.run_prompt(graph)
assert ran.ok, ran.error or ran.problems
if given["clock"]:
    clock.close()
comfy_side.answer(ran.ui)
