"""Tiny Demo Loader: ordinary graphs of core nodes draw with the bundled model what the diffusers pipeline
draws with it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_host import COMFYUIS, Answer, make_base, run_script
from diffusers import StableDiffusion3Pipeline

from comfy_g2rpo import lora

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

FOLDER = Path(__file__).parent.parent / "models/tiny"
CHILD = Path(__file__).with_name("comfy_child_demo.py")
DRAWN = "a red circle above a blue square"
SEED = 7
PROMPTS = [
    DRAWN,
    "",
    "four purple triangles",
    "A Photo, of  Something\nelse! 日本",
    "a red circle and a blue square and a green triangle and two yellow circles and more",
]


@dataclass(frozen=True)
class Expected:
    """What diffusers computes."""

    features: torch.Tensor  # [prompts, 12, 128]
    pooled: torch.Tensor  # [prompts, 128]
    latent: torch.Tensor  # [3, 16, 8, 8] in model space
    image: torch.Tensor  # [3, 64, 64, 3] in [0, 1]
    encoded: torch.Tensor  # [3, 16, 8, 8]


@pytest.fixture(scope="module")
def expected() -> Expected:
    pipe = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    encoded = [
        pipe.encode_prompt(text, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
        for text in PROMPTS
    ]
    noise = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(SEED))
    size = {
        "height": 64,
        "width": 64,
        "num_images_per_prompt": 3,
        "guidance_scale": 1.0,
        "max_sequence_length": 0,
    }
    latent = pipe(DRAWN, sigmas=np.linspace(1, 1 / 8, 8), latents=noise, output_type="latent", **size).images
    with torch.no_grad():
        pixels = pipe.vae.decode(
            latent / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        ).sample
        image = (pixels / 2 + 0.5).clamp(0, 1)
        raw = pipe.vae.encode(image * 2 - 1).latents
    return Expected(
        torch.cat([item[0].detach() for item in encoded]),
        torch.cat([item[2].detach() for item in encoded]),
        latent,
        image.permute(0, 2, 3, 1),
        (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor,
    )


@pytest.fixture(scope="module", params=COMFYUIS)
def core(
    request: pytest.FixtureRequest, expected: Expected, tmp_path_factory: pytest.TempPathFactory
) -> Answer:
    base = make_base(tmp_path_factory.mktemp("demo"))
    pairs = {"transformer_blocks.0.attn.to_q": (torch.ones(2, 192), torch.ones(192, 2))}
    lora.write(base / "models/loras/a.safetensors", pairs, alpha=2.0, metadata={})
    given = {"prompts": PROMPTS, "drawn": DRAWN, "seed": SEED}
    return run_script(request.param, CHILD, base, given, {"latent": expected.latent})


def test_clip_text_encode_gives_diffusers_features(core: Answer, expected: Expected) -> None:
    assert (core.tensors["features"] - expected.features).abs().max() <= 1e-6 * expected.features.abs().max()
    assert (core.tensors["pooled"] - expected.pooled).abs().max() <= 1e-6 * expected.pooled.abs().max()


def test_ksampler_reaches_the_pipelines_latents(core: Answer, expected: Expected) -> None:
    assert (core.tensors["latent"] - expected.latent).abs().max() < 1e-3


def test_ksampler_and_vae_decode_draw_the_pipelines_picture(core: Answer, expected: Expected) -> None:
    assert expected.image.std() > 0.1
    assert (core.tensors["image"] - expected.image).abs().max() <= 1 / 255


def test_the_vae_alone_decodes_and_encodes_as_diffusers_does(core: Answer, expected: Expected) -> None:
    assert (core.tensors["redecoded"] - expected.image).abs().max() < 1e-5
    assert (core.tensors["encoded"] - expected.encoded).abs().max() < 0.05
    # Tiles see less of their surroundings, in any VAE.
    assert (core.tensors["tiled"] - core.tensors["image"]).abs().mean() < 0.02


def test_the_wires_are_cores_own_objects(core: Answer) -> None:
    assert core.data["types"] == [True, "comfy.model_patcher"]
    assert core.data["shift"] == 3.0
    assert core.data["core_taesd_width"] == 64


def test_other_nodes_and_a_second_run_work(core: Answer) -> None:
    assert core.data["weighted_shape"] == [1, 12, 128]
    assert core.data["same_text"] == [True, True]
    assert core.data["repeats"]


def test_loading_says_nothing_worrying(core: Answer) -> None:
    since = core.log.partition("comfy_side: booted")[2]
    assert since
    assert [
        line
        for line in since.splitlines()
        if re.search("warning|error|missing|unexpected|token indices", line, re.IGNORECASE)
    ] == []
