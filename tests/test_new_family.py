"""A model family is added by its file, its line and its recipe alone: the README's template, in an empty
clone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
)
from flux_folder import t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

ROOT = Path(__file__).parent.parent
IMPORTS = """
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import AuraFlowPipeline
from torch import Tensor

from .shared.peft_policy import PeftPolicy, cells
"""
RECIPE = """
model: {family: auraflow, path: PATH, width: 32, height: 32, guidance: 2.0, max_sequence_length: 16}
lora: {rank: 2, alpha: 2}
method: {num_steps: 4, group_size: 2, granularities: [1, 2]}
rewards: [{name: colourfulness}]
heldout_rewards: [sharpness]
prompts: {train: prompts/pictures.txt, heldout_share: 0.05}
train: {steps: 1, prompts_per_step: 1, eval_prompts: 1}
"""


def small_model(folder: Path) -> Path:
    """Write an AuraFlow with random weights that costs nothing."""
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    text = UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        transformer=AuraFlowTransformer2DModel(
            sample_size=32, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=32, **sizes
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the program, and add a family as the README says: a file, a line, a recipe."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("comfy_g2rpo", "trainer", "recipes", "prompts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "g2rpo_trainer").symlink_to(root / "trainer")
    readme = (root / "trainer/families/README.md").read_text("utf-8")
    template = re.search(r"```python\n(.*?)```", readme, re.S)[1].replace("\n   ", "\n").removeprefix("   ")
    (root / "trainer/families/auraflow.py").write_text(IMPORTS + template, "utf-8")
    names = root / "trainer/config/family_names.py"
    line = re.search(r'`("auraflow": Family\(.*?\))`', readme)[1]
    text = names.read_text("utf-8")
    assert text.count("}\nDEFAULT_FAMILY") == 1
    names.write_text(text.replace("}\nDEFAULT_FAMILY", f"    {line},\n}}\nDEFAULT_FAMILY"), "utf-8")
    model = small_model(root / "auraflow")
    (root / "recipes/auraflow.yaml").write_text(RECIPE.replace("PATH", str(model)), "utf-8")
    return root


def g2rpo(clone: Path, *arguments: str) -> str:
    """Run the clone's own program."""
    program = [sys.executable, "-c", "from g2rpo_trainer.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    ran = subprocess.run(program, cwd=clone, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.long
def test_a_new_family_is_planned_with_its_memory(clone: Path) -> None:
    said = g2rpo(clone, "plan", "auraflow")
    assert "memory, estimated" in said and "forwards per step" in said


def test_a_new_family_is_trained(clone: Path) -> None:
    g2rpo(clone, "train", "auraflow", "--out", "run")
    summary = json.loads((clone / "run/summary.json").read_text("utf-8"))
    assert summary["steps"] == 1 and (clone / "run" / summary["lora"]).is_file()
