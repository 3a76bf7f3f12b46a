"""FLUX.1 Kontext on a tiny random model: its velocity and its pictures against diffusers' own pipeline,
and a run that edits.
"""

from __future__ import annotations

import json
from pathlib import Path

import family_model as family
import flux_folder
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from drawn_pictures import picture, starting
from family_model import close
from PIL import Image
from program import call
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.picture_files import read
from comfy_g2rpo.files.picture_files import size_of as size_on_disk
from comfy_g2rpo.files.safe import read_tensors, write_tensors
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.run.evaluation import Evaluation
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import families
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.flux import pack, unpack
from g2rpo_trainer.families.kontext import Kontext, size_of
from g2rpo_trainer.reports.report import GAP, MARGIN, TILE

pytestmark = pytest.mark.xdist_group("kontext")  # one process makes what they share

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
    wide, tall = pictures["wide"], pictures["tall"]
    return [starting(TEXT, wide), starting(OTHER, tall), TEXT, starting(OTHER, wide)]


def noisy() -> tuple[Tensor, Tensor]:
    """Draw four latents, and their noise levels."""
    return seeded_noise((4, *SHAPE), "latents"), torch.tensor([*family.SIGMA, 0.6])


def plain(policy: Kontext, x: Tensor, sigma: float, prompt: str, latent: Tensor | None) -> Tensor:
    """Call diffusers' transformer on one sample as its pipeline does."""
    pipeline, length = policy.pipeline, flux_folder.TOKENS
    tokens, pooled, text_ids = pipeline.encode_prompt(str(prompt), None, max_sequence_length=length)
    parts = [x] if latent is None else [x, latent]
    ids = []
    for number, part in enumerate(parts):
        rows, columns = part.shape[1] // 2, part.shape[2] // 2
        ids.append(pipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32))
        ids[-1][..., 0] = number
    packed = [FluxKontextPipeline._pack_latents(part[None], 1, *part.shape) for part in parts]
    given = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "txt_ids": text_ids}
    given |= {"img_ids": torch.cat(ids), "timestep": torch.tensor([sigma]), "guidance": torch.tensor([2.5])}
    out = policy.transformer(torch.cat(packed, 1), **given, return_dict=False)[0][:, : x[0].numel() // 4]
    return FluxKontextPipeline._unpack_latents(out, 8 * x.shape[1], 8 * x.shape[2], 8)[0]


def test_the_velocity_is_diffusers_own_whatever_pictures_are_in_the_batch(base, prompts):
    (x, sigma), cond = noisy(), base.encode(prompts)
    assert [tuple(c.picture.shape[1:]) for c in cond] == [(6, 10), (12, 6), (0, 0), (6, 10)]

    def expected(row: int) -> Tensor:
        latent = cond[row].picture if cond[row].picture.numel() else None
        return plain(base, x[row], sigma[row].item(), prompts[row], latent)

    family.check_rows(base, (x, sigma, cond), expected, alone=False)
    with torch.no_grad():
        assert not torch.allclose(expected(0), plain(base, x[0], 1.0, prompts[0], None), atol=1e-3)


def test_a_picture_teaches_whatever_else_is_in_the_batch(folder, prompts):
    policy = load(folder)
    policy.add_lora(4, 8, 0)
    (x, sigma), cond = noisy(), policy.encode(prompts)

    def gradient(rows: list[int]) -> Tensor:
        policy.transformer.zero_grad()
        policy.velocity(x[rows], sigma[rows], [cond[row] for row in rows]).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    together, apart = gradient([0, 1, 2, 3]), sum(gradient([row]) for row in range(4))
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_a_deterministic_rollout_is_the_pipelines_own_edit_at_the_size_that_the_model_has_learnt(
    folder, pictures
):
    policy = load(folder, reference_size=1024)
    cond = policy.encode([starting(TEXT, pictures["tall"])])
    assert cond[0].picture.shape == (16, 196, 84)
    sigmas = policy.pipeline_sigmas(2, SHAPE)
    rollout = roll_out(policy, deterministic(2), sigmas, cond, [5], SHAPE)
    asked = {"height": HEIGHT, "width": WIDTH, "max_area": WIDTH * HEIGHT, "num_inference_steps": 2}
    asked |= {"guidance_scale": 2.5}
    asked |= {"latents": pack(rollout.noise(0, 0)[None]), "max_sequence_length": flux_folder.TOKENS}
    with Image.open(pictures["tall"]) as image:
        latents = policy.pipeline(image.convert("RGB"), TEXT, **asked, output_type="latent").images
    assert close(rollout.latents[0], unpack(latents, 3, 4))
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)


def test_a_picture_is_brought_to_a_size_that_the_model_has_learnt_or_to_that_shape_in_fewer_pixels():
    learnt = set(PREFERRED_KONTEXT_RESOLUTIONS)
    assert {size_of(width / height) for width, height in learnt} == learnt
    assert size_of(1.0, 512) == (512, 512) and size_of(1.6, 512) == (672, 400)
    assert size_of(9.0, 64) == (96, 48)


def test_features_are_kept_by_text_and_content_of_the_picture(folder, pictures, tmp_path, monkeypatch):
    place = family.keep_prompts(tmp_path, monkeypatch)
    copy = tmp_path / "other name.png"
    copy.write_bytes(pictures["wide"].read_bytes())
    asked = [
        TEXT,
        *(starting(text, pictures[name]) for text, name in ((TEXT, "wide"), (TEXT, "tall"), (OTHER, "wide"))),
    ]
    first = load(folder).encode([*asked, starting(TEXT, copy)])
    assert len(list(place.rglob("*.safetensors"))) == 4
    assert torch.equal(first[1].picture, first[4].picture)
    assert first[1].picture.shape != first[2].picture.shape
    again = load(folder)
    again.drop_text_encoders()
    again.load_text_encoders = again.pipeline.image_processor = None
    for known, fresh in zip(again.encode(asked), first, strict=False):
        assert all(torch.equal(one, other) for one, other in zip(known, fresh, strict=True))


def test_its_transformers_file_is_enough_beside_the_parts_of_another_flux(base, tmp_path, prompts):
    write_tensors(tmp_path / "kontext.safetensors", flux_folder.published(base.transformer.state_dict()))
    dev = flux_folder.save(tmp_path / "dev")
    policy = load(dev, transformer=str(tmp_path / "kontext.safetensors"), edits="kontext")
    given = noisy()
    with torch.no_grad():
        ours = policy.velocity(*given, policy.encode(prompts))
        assert torch.equal(ours, base.velocity(*given, base.encode(prompts)))
    says = r"model\.edits is kontext, which is no Wan 2\.1 and 2\.2; set model\.family: flux"
    with pytest.raises(ValueError, match=says):
        families.load(ModelSection(family="wan", path=str(dev), edits="kontext"), dev, "cpu")


def test_a_model_that_takes_no_picture_refuses_a_prompt_with_one(tmp_path, pictures):
    dev = load(flux_folder.save(tmp_path / "dev"))
    says = r"has an image to start from, but this model takes none; .* choose FLUX\.1 Kontext"
    with pytest.raises(ValueError, match=says):
        dev.encode([starting(TEXT, pictures["wide"])])


def test_a_run_learns_to_edit_and_shows_which_picture_it_started_from(folder, pictures, tmp_path, capsys):
    rows = [{"prompt": TEXT, "image": str(pictures[name])} for name in ("wide", "tall")] + [
        {"prompt": "a dog"}
    ]
    for name, part in (("train", rows[1:]), ("heldout", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    _, place = family.one_step(
        tmp_path,
        section(folder, schedule="pipeline").model_dump(),
        lora={"rank": 4, "alpha": 8},
        method={"name": "g2rpo", "num_steps": 3, "group_size": 3, "learning_rate": 1e-2},
        prompts={name: str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")},
    )
    run = RunFolder.open(place)
    assert family.learnt(place)
    shown = tuple(sample.prompt for sample in run.samples(1))
    assert Evaluation.read(run, 1).prompts == (f"{TEXT} (wide.png)",) == shown
    start = run.samples(1)[0].start
    assert start.parent == run.path / "images/000001" and torch.equal(read(start), read(pictures["wide"]))
    with Image.open(run.path / "before_after.png") as report:
        # Where nothing would be without the picture that the edit starts from.
        beside = MARGIN + 64 + TILE + GAP + TILE // 2
        column = {report.getpixel((beside, y)) for y in range(5 * MARGIN, 5 * MARGIN + TILE // 2)}
        assert column != {report.getpixel((0, 0))}
    file = run.latest() / "lora.safetensors"
    assert any(up.any() for _, up in lora.read(file).pairs.values())
    assert all(key.startswith("transformer.") for key in read_tensors(file)[0])
    words = ("--prompt", TEXT, "--image", pictures["tall"], "--out", tmp_path / "edit.png")
    assert call("sample", place, *words) == 0
    assert size_on_disk(tmp_path / "edit.png") == (WIDTH, HEIGHT)
