"""FLUX.1 Kontext on a tiny random model: its velocity and its pictures against diffusers' own pipeline,
and a run that edits.
"""

from __future__ import annotations

import json
from pathlib import Path

import flux_folder
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from drawn_pictures import picture, starting
from PIL import Image
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.picture_files import read
from comfy_g2rpo.files.picture_files import size_of as size_on_disk
from comfy_g2rpo.files.safe import read_tensors, write_tensors
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.run.evaluation import Evaluation
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import cli, families
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.flux import pack, unpack
from g2rpo_trainer.families.kontext import Kontext, size_of
from g2rpo_trainer.model import prompt_cache
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.reports.report import GAP, MARGIN, TILE
from g2rpo_trainer.run import train

TEXT, OTHER = "make it night", "add a red hat"
WIDTH, HEIGHT, SHAPE = 64, 48, (16, 6, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as it is published."""
    return flux_folder.kontext(tmp_path_factory.mktemp("kontext") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Two pictures of different shapes."""
    place = tmp_path_factory.mktemp("pictures")
    return {"wide": picture(place / "wide.png", 96, 64), "tall": picture(place / "tall.png", 40, 80)}


def section(folder: Path, **more: object) -> ModelSection:
    """Write the model's section of a configuration, with references of few tokens."""
    size = {"width": WIDTH, "height": HEIGHT, "reference_size": 64, "max_sequence_length": flux_folder.TOKENS}
    return ModelSection(**{"family": "flux", "path": str(folder), "guidance": 2.5} | size | more)


def load(folder: Path, **more: object) -> Kontext:
    """Load the model as a run does."""
    return families.load(section(folder, **more), folder, "cpu")


@pytest.fixture(scope="module")
def base(folder) -> Kontext:
    """A model that tests leave as it is."""
    return load(folder)


@pytest.fixture
def prompts(pictures) -> list[str]:
    """Prompts with a wide, a tall and no picture, the first one twice."""
    return [
        starting(TEXT, pictures["wide"]),
        starting(OTHER, pictures["tall"]),
        TEXT,
        starting(OTHER, pictures["wide"]),
    ]


def plain(policy: Kontext, x: Tensor, sigma: float, prompt: str, latent: Tensor | None) -> Tensor:
    """Call diffusers' transformer on one sample as its pipeline does."""
    pipeline, length = policy.pipeline, flux_folder.TOKENS
    tokens, pooled, text_ids = pipeline.encode_prompt(str(prompt), None, max_sequence_length=length)
    ids = pipeline._prepare_latent_image_ids(1, x.shape[1] // 2, x.shape[2] // 2, "cpu", torch.float32)
    hidden = FluxKontextPipeline._pack_latents(x[None], 1, *x.shape)
    if latent is not None:
        more = pipeline._prepare_latent_image_ids(
            1, latent.shape[1] // 2, latent.shape[2] // 2, "cpu", torch.float32
        )
        more[..., 0] = 1
        ids = torch.cat([ids, more])
        hidden = torch.cat([hidden, FluxKontextPipeline._pack_latents(latent[None], 1, *latent.shape)], 1)
    rest = {
        "encoder_hidden_states": tokens,
        "pooled_projections": pooled,
        "txt_ids": text_ids,
        "img_ids": ids,
    }
    out = policy.transformer(
        hidden, timestep=torch.tensor([sigma]), guidance=torch.tensor([2.5]), **rest, return_dict=False
    )[0]
    return FluxKontextPipeline._unpack_latents(
        out[:, : x[0].numel() // 4], 8 * x.shape[1], 8 * x.shape[2], 8
    )[0]


def test_the_velocity_is_diffusers_own_whatever_pictures_are_in_the_batch(base, prompts):
    x, sigma, cond = (
        seeded_noise((4, *SHAPE), "latents"),
        torch.tensor([1.0, 0.6, 0.123, 0.6]),
        base.encode(prompts),
    )
    assert [tuple(c.picture.shape[1:]) for c in cond] == [(6, 10), (12, 6), (0, 0), (6, 10)]
    with torch.no_grad():
        together = base.velocity(x, sigma, cond)
        for row, prompt in enumerate(prompts):
            latent = cond[row].picture if cond[row].picture.numel() else None
            expected = plain(base, x[row], sigma[row].item(), prompt, latent)
            assert torch.allclose(together[row], expected, rtol=0, atol=1e-5)
    assert not torch.allclose(together[0], plain(base, x[0], 1.0, prompts[0], None), atol=1e-3)


def test_a_picture_teaches_whatever_else_is_in_the_batch(folder, prompts):
    policy = load(folder)
    policy.add_lora(4, 8, 0)
    x, sigma, cond = (
        seeded_noise((4, *SHAPE), "latents"),
        torch.tensor([1.0, 0.6, 0.123, 0.6]),
        policy.encode(prompts),
    )

    def gradient(rows: list[int]) -> Tensor:
        policy.transformer.zero_grad()
        policy.velocity(x[rows], sigma[rows], [cond[row] for row in rows]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    assert torch.allclose(
        gradient([0, 1, 2, 3]), sum(gradient([row]) for row in range(4)), rtol=1e-4, atol=1e-5
    )


def test_a_deterministic_rollout_is_the_pipelines_own_edit_at_the_size_that_the_model_has_learnt(
    folder, pictures
):
    policy = load(folder, reference_size=1024)
    cond = policy.encode([starting(TEXT, pictures["tall"])])
    assert cond[0].picture.shape == (16, 196, 84)
    sigmas = policy.pipeline_sigmas(2, SHAPE)
    rollout = roll_out(policy, deterministic(2), sigmas, cond, [5], SHAPE)
    asked = {
        "height": HEIGHT,
        "width": WIDTH,
        "max_area": WIDTH * HEIGHT,
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
    }
    asked |= {"latents": pack(rollout.noise(0, 0)[None]), "max_sequence_length": flux_folder.TOKENS}
    with Image.open(pictures["tall"]) as image:
        latents = policy.pipeline(image.convert("RGB"), TEXT, **asked, output_type="latent").images
    assert torch.allclose(rollout.latents[0], unpack(latents, 3, 4), rtol=0, atol=1e-5)
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)


def test_a_picture_is_brought_to_a_size_that_the_model_has_learnt_or_to_that_shape_in_fewer_pixels():
    assert {size_of(width / height) for width, height in PREFERRED_KONTEXT_RESOLUTIONS} == set(
        PREFERRED_KONTEXT_RESOLUTIONS
    )
    assert (
        size_of(1.0, 512) == (512, 512) and size_of(1.6, 512) == (672, 400) and size_of(9.0, 64) == (96, 48)
    )


def test_features_are_kept_by_text_and_content_of_the_picture(folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("G2RPO_PROMPTS", str(tmp_path / "prompts"))
    monkeypatch.setattr(prompt_cache, "SMALL", 0)
    copy = tmp_path / "other name.png"
    copy.write_bytes(pictures["wide"].read_bytes())
    asked = [
        starting(TEXT, pictures["wide"]),
        starting(TEXT, pictures["tall"]),
        TEXT,
        starting(OTHER, pictures["wide"]),
    ]
    first = load(folder).encode([*asked, starting(TEXT, copy)])
    assert len(list((tmp_path / "prompts").rglob("*.safetensors"))) == 4
    assert (
        torch.equal(first[0].picture, first[4].picture) and first[0].picture.shape != first[1].picture.shape
    )
    again = load(folder)
    again.drop_text_encoders()
    again.load_text_encoders = again.pipeline.image_processor = None
    for known, fresh in zip(again.encode(asked), first, strict=False):
        assert all(torch.equal(one, other) for one, other in zip(known, fresh, strict=True))


def test_its_transformers_file_is_enough_beside_the_parts_of_another_flux(base, tmp_path, prompts):
    write_tensors(tmp_path / "kontext.safetensors", flux_folder.published(base.transformer.state_dict()))
    dev = flux_folder.save(tmp_path / "dev")
    policy = load(dev, transformer=str(tmp_path / "kontext.safetensors"), edits="kontext")
    x, sigma = seeded_noise((4, *SHAPE), "latents"), torch.tensor([1.0, 0.6, 0.123, 0.6])
    with torch.no_grad():
        assert torch.equal(
            policy.velocity(x, sigma, policy.encode(prompts)), base.velocity(x, sigma, base.encode(prompts))
        )
    with pytest.raises(
        ValueError, match=r"model\.edits is kontext, which is no Wan 2\.1 and 2\.2; set model\.family: flux"
    ):
        families.load(ModelSection(family="wan", path=str(dev), edits="kontext"), dev, "cpu")


def test_a_model_that_takes_no_picture_refuses_a_prompt_with_one(tmp_path, pictures):
    dev = load(flux_folder.save(tmp_path / "dev"))
    with pytest.raises(
        ValueError, match=r"has an image to start from, but this model takes none; .* choose FLUX\.1 Kontext"
    ):
        dev.encode([starting(TEXT, pictures["wide"])])


def test_a_run_learns_to_edit_and_shows_which_picture_it_started_from(folder, pictures, tmp_path, capsys):
    rows = [
        {"prompt": TEXT, "image": str(pictures["wide"])},
        {"prompt": TEXT, "image": str(pictures["tall"])},
        {"prompt": "a dog"},
    ]
    for name, part in (("train", rows[1:]), ("heldout", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    tree = {
        "model": section(folder, schedule="pipeline").model_dump(),
        "lora": {"rank": 4, "alpha": 8},
        "method": {"name": "g2rpo", "num_steps": 3, "group_size": 3, "learning_rate": 1e-2},
        "rewards": [{"name": "colourfulness"}],
        "prompts": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")},
        "train": {"steps": 1, "prompts_per_step": 2, "eval_noises": 1, "checkpoint_every": 1},
    }
    train(from_dict(tree), tmp_path / "run", progress=Silent())
    run = RunFolder.open(tmp_path / "run")
    assert any(row.get("grad_norm", 0) > 0 for row in run.metrics())
    assert (
        Evaluation.read(run, 1).prompts
        == (f"{TEXT} (wide.png)",)
        == tuple(sample.prompt for sample in run.samples(1))
    )
    start = run.samples(1)[0].start
    assert start.parent == run.path / "images/000001" and torch.equal(read(start), read(pictures["wide"]))
    with Image.open(run.path / "before_after.png") as report:
        beside = (
            MARGIN + 64 + TILE + GAP + TILE // 2
        )  # where nothing would be without the picture that the edit starts from
        assert {report.getpixel((beside, y)) for y in range(5 * MARGIN, 5 * MARGIN + TILE // 2)} != {
            report.getpixel((0, 0))
        }
    file = run.latest() / "lora.safetensors"
    assert any(up.any() for _, up in lora.read(file).pairs.values())
    assert all(key.startswith("transformer.") for key in read_tensors(file)[0])
    arguments = [
        "sample",
        tmp_path / "run",
        "--prompt",
        TEXT,
        "--image",
        pictures["tall"],
        "--out",
        tmp_path / "edit.png",
    ]
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    assert left.value.code == 0 and size_on_disk(tmp_path / "edit.png") == (WIDTH, HEIGHT)
