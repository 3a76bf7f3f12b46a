"""The bundled model: complete, small, offline, and shaped so that ComfyUI loads it."""

import json
import stat
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from comfy_g2rpo.rewards.shapes.vocabulary import COLOURS, NUMBERS, RELATIONS, SHAPES, parse

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "models" / "tiny"
PROMPTS = [
    "a red circle",
    "two blue squares",
    "a green triangle above a yellow circle",
    "four purple triangles",
]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    loaded = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipeline: StableDiffusion3Pipeline, seed: int) -> torch.Tensor:
    """Sample one picture per prompt, [4, 64, 64, 3] in [0, 1]."""
    pictures = pipeline(
        PROMPTS,
        num_inference_steps=8,
        guidance_scale=1.0,
        max_sequence_length=0,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return torch.from_numpy(pictures)


def weight_files() -> list[Path]:
    return sorted(FOLDER.rglob("*.safetensors"))


def test_loads_in_one_precision_without_being_told(pipeline: StableDiffusion3Pipeline) -> None:
    networks = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {network.dtype for network in networks} == {torch.float32}


def test_has_a_weight_file_for_each_of_its_four_networks() -> None:
    assert [path.parent.name for path in weight_files()] == [
        "text_encoder",
        "text_encoder_2",
        "transformer",
        "vae",
    ]


def test_is_no_larger_than_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16e6


def test_weight_files_can_be_read_by_every_user() -> None:
    assert {stat.S_IMODE(path.stat().st_mode) & 0o444 for path in weight_files()} == {0o444}


def test_comfyui_recognises_the_transformer_because_layers_equal_heads() -> None:
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    layers = config["num_layers"]
    assert (
        config["num_attention_heads"],
        config["attention_head_dim"],
        config["caption_projection_dim"],
    ) == (layers, 64, 64 * layers)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_every_word_is_one_token(name: str) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / name, local_files_only=True)
    words = {
        "and",
        *COLOURS,
        *SHAPES,
        *NUMBERS,
        *(f"{shape}s" for shape in SHAPES),
        *" ".join(RELATIONS).split(),
    }
    assert {word: len(tokenizer.tokenize(word)) for word in words} == dict.fromkeys(words, 1)


def test_the_longest_prompt_fits_the_text_encoders(pipeline: StableDiffusion3Pipeline) -> None:
    ids = pipeline.tokenizer("a green triangle right of a yellow triangle").input_ids
    assert (
        len(ids)
        <= pipeline.tokenizer.model_max_length
        == pipeline.text_encoder.config.max_position_embeddings
    )


def test_pictures_are_colourful_shapes_on_grey(pipeline: StableDiffusion3Pipeline) -> None:
    pictures = draw(pipeline, seed=1)
    vivid = (pictures.amax(-1) - pictures.amin(-1) > 0.3).float().mean((1, 2))
    assert ((vivid > 0.01) & (vivid < 0.5)).all()


def test_the_seed_decides_the_picture(pipeline: StableDiffusion3Pipeline) -> None:
    first, again, other = (draw(pipeline, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean((1, 2, 3)).min() > 0.003


def test_prompt_lists_are_disjoint_and_within_the_grammar() -> None:
    lists = [
        (ROOT / "prompts" / f"shapes_{name}.txt").read_text().splitlines()
        for name in ("train", "tune", "heldout")
    ]
    prompts = [prompt for prompts in lists for prompt in prompts]
    assert [len(prompts) for prompts in lists] == [240, 96, 96]
    assert len(set(prompts)) == len(prompts)
    assert all(map(parse, prompts))
