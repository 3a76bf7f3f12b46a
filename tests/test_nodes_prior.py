"""Noise priors in a real ComfyUI: what they move, what they leave alone, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from comfy_host import Answer, run_script

from comfy_g2rpo.priors.noise_prior import Vectors
from comfy_g2rpo.priors.prior_training import feature_of
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.run import prepare

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_prior.py")
PROMPT = "three green squares"
REFUSED = {
    "other": "prior is for another checkpoint (other, ",
    "broken": "broken.safetensors is damaged",
    "text": "prior reads text features of 64 numbers, and these have 128",
    "wide": "prior is for latents of the shape [16, 8, 16], and this one has [16, 8, 8]",
    "gone": "prior",
    "../loras/x": "prior",
    "strength -0.1": "strength",
    "strength 2.1": "strength",
    "strength much": "strength",
    "strength nan": "strength",
    "no text": "conditioning: it holds no text features",
    "no tensors": "conditioning: it holds no text features",
    "half": "conditioning: it holds no text features",
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, {"prompt": PROMPT})


def test_the_picture_is_another_one_and_ordinary_sampling_stays(done: Answer) -> None:
    assert done.data["different"] > done.data["half"] > 0.01
    assert done.data["strength 0"] and done.data["after"] and done.data["again"]
    assert done.data["seed"] == [5, 5]


@pytest.mark.parametrize("case", ["batch", "batch index", "one frame", "two prompts"])
def test_noise_is_moved_by_the_priors_shift(case: str, done: Answer) -> None:
    assert done.data[case] < 1e-5


def test_the_command_line_and_the_graph_read_the_same_of_a_prompt_and_a_checkpoint(done: Answer) -> None:
    policy = prepare(load("demo", []), Accelerator(cpu=True)).policy
    feature = feature_of(policy.encode([PROMPT])[0])
    assert (done.tensors["feature"][0] - feature).abs().max() < 1e-5
    assert feature.std() > 0.01
    there = Vectors(*done.data["vectors"])
    here = Vectors.of(policy.transformer.named_parameters())
    assert here.count == there.count > 1000 and abs(here.mean / there.mean - 1) < 1e-6


def test_the_report_says_what_it_is_for_and_what_it_gained(done: Answer) -> None:
    said = "for latents of 16×8×8\ngained agreement +0.1 ± 0.05\nKL 3.5"
    assert done.data["report"] == said
    assert done.data["none yet"] == ["(none in models/noise_priors)"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_its_name(case: str, done: Answer) -> None:
    assert REFUSED[case] in done.data["refused"][case]


def test_another_size_is_refused_when_noise_is_drawn(done: Answer) -> None:
    assert "shape [16, 8, 8], and this one has [16, 8, 16]" in done.data["another size"]


def test_the_shift_is_finite(done: Answer) -> None:
    assert torch.isfinite(done.tensors["shift"]).all()
