"""What a person does with a named run between two presses of Run, told to a ComfyUI over HTTP: its model is
merged and saved by core's nodes, its rate is changed, it is asked for fewer steps.
"""

from typing import Any

import pytest
from comfy_host import Server
from test_clients import WIRES
from test_nodes_continuing import SHORT
from test_nodes_training import TRAIN

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("served")]

REWARD = {"load": ["G2RPO_TinyDemoLoader", {}], "reward": ["G2RPO_LoadReward", {"reward": "agreement"}]}
TEXT = {"text": "a red circle", "clip": ["load", 1]}
SAMPLE = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
ENDS = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
MERGED = {
    "merged": ["ModelMergeSimple", {"model1": ["train", 0], "model2": ["load", 0], "ratio": 0.5}],
    "text": ["CLIPTextEncode", TEXT],
    "empty": ["EmptySD3LatentImage", {"width": 64, "height": 64, "batch_size": 1}],
    "drawn": ["KSampler", {"model": ["merged", 0], **SAMPLE, **ENDS}],
    "decoded": ["VAEDecode", {"samples": ["drawn", 0], "vae": ["load", 2]}],
    "seen": ["PreviewImage", {"images": ["decoded", 0]}],
}
SAVED = {
    "minus": ["ModelMergeSubtract", {"model1": ["train", 0], "model2": ["load", 0], "multiplier": 1.0}],
    "kept": [
        "LoraSave",
        {"filename_prefix": "loras/story", "rank": 2, "lora_type": "standard", "bias_diff": False}
        | {"model_diff": ["minus", 0]},
    ],
}
PRESSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, MERGED),
    ({}, SAVED),
    ({"steps": 2}, {}),
    ({"steps": 2, "learning_rate": 2e-3}, {}),
    ({"steps": 2, "learning_rate": 2e-3}, {}),
    ({"steps": 1}, {}),
]
"""What each press changes of Train LoRA, and the nodes that stand behind it."""


def press(host: Server, changed: dict[str, Any], behind: dict[str, Any]) -> dict[str, Any]:
    """Press Run; return what /history says of Train LoRA."""
    train = {**WIRES, "reward": ["reward", 0], **TRAIN, **SHORT, "run": "story", **changed}
    nodes = {**REWARD, "train": ["G2RPO_TrainLoRA", train], **behind}
    graph = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}
    ended = host.wait(host.post_prompt(graph))
    assert ended["status"]["status_str"] == "success", ended["status"]
    (result,) = ended["outputs"]["train"]["g2rpo_result"]
    return dict(result)


def test_a_named_run_is_gone_on_with_through_merging_saving_and_changed_settings(served: Server) -> None:
    told = [press(served, changed, behind) for changed, behind in PRESSES]
    assert [(one["run"], one["steps"]) for one in told] == [
        ("story", 1),
        ("story", 1),
        ("story", 1),
        ("story", 2),
        ("story-2", 2),
        ("story-2", 2),
        ("story", 2),
    ]
    assert told[4] == told[5] and told[3]["reward_after"] == told[6]["reward_after"]
    assert [one["lora"] for one in told] == [f"g2rpo/{one['run']}.safetensors" for one in told]
    assert list((served.base / "output" / "loras").glob("story*.safetensors"))
