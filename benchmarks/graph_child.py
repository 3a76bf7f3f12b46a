"""Runs inside a ComfyUI for graph.py: one Train LoRA on the tiny model."""

import comfy_side

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
            **comfy_side.given(),
        },
    },
}
ran = comfy_side.run_prompt(graph)
assert ran.ok, ran.error or ran.problems
comfy_side.answer(ran.ui)
