"""Qwen-Image-Edit and its Plus on tiny random models: against diffusers' own pipelines, and a run that
edits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import family_model as family
import native_names
import pytest
import qwen_edit_folder
import torch
from diffusers import QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from drawn_pictures import picture, starting
from family_model import close
from PIL import Image
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import read_tensors, write_tensors
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.cost.estimate import count
from g2rpo_trainer.cost.timing import measure
from g2rpo_trainer.families.flux import pack, unpack
from g2rpo_trainer.families.qwen_edit import QwenEdit, area
from g2rpo_trainer.model.inference import draw

pytestmark = pytest.mark.xdist_group("qwen_edit")  # one process makes what they share

TEXT, OTHER = "make it night", "add a red hat and a scarf"
WIDTH, HEIGHT, SHAPE = 64, 48, (16, 6, 8)


@pytest.fixture(scope="module", params=qwen_edit_folder.KINDS)
def folder(request, tmp_path_factory) -> Path:
    """Folders as they are published: of Edit and of Plus."""
    return qwen_edit_folder.save(tmp_path_factory.mktemp("qwen_edit") / "model", request.param)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    """Two pictures of different shapes."""
    place = tmp_path_factory.mktemp("pictures")
    return {"wide": picture(place / "wide.png", 96, 64), "tall": picture(place / "tall.png", 40, 80)}


def section(folder: Path, **more: object) -> ModelSection:
    """Write the model's section of a configuration, with references of few tokens."""
    usual = {"family": "qwen_image", "path": str(folder), "width": WIDTH, "height": HEIGHT}
    return ModelSection(**usual | {"reference_size": 64} | more)


def load(folder: Path, **more: object) -> QwenEdit:
    """Load the model as a run does."""
    return families.load(section(folder, **more), folder, "cpu")


@pytest.fixture(scope="module")
def base(folder) -> QwenEdit:
    """A model that tests leave as it is."""
    return load(folder)


@pytest.fixture
def batch(pictures) -> tuple[Tensor, Tensor, list[str]]:
    """Three latents at three noise levels; prompts of two lengths with pictures of two shapes."""
    asked = ((TEXT, "wide"), (TEXT, "tall"), (OTHER, "wide"))
    prompts = [starting(text, pictures[name]) for text, name in asked]
    return seeded_noise((3, *SHAPE), "latents"), torch.tensor(family.SIGMA), prompts


def plain(policy: QwenEdit, x: Tensor, sigma: float, tokens: Tensor, latent: Tensor) -> Tensor:
    """Call diffusers' transformer on one sample as its pipelines do."""
    shapes = [[(1, part.shape[1] // 2, part.shape[2] // 2) for part in (x, latent)]]
    packed = [QwenImagePipeline._pack_latents(part[None], 1, *part.shape) for part in (x, latent)]
    given = (torch.cat(packed, 1), tokens[None], None, torch.tensor([sigma]), shapes)
    out = policy.transformer(*given, return_dict=False)[0][:, : x[0].numel() // 4]
    return QwenImagePipeline._unpack_latents(out, 8 * x.shape[1], 8 * x.shape[2], 8)[0, :, 0]


def test_the_velocity_is_diffusers_own_whatever_pictures_are_in_the_batch(base, batch):
    x, sigma, prompts = batch
    cond = base.encode(prompts)
    assert len({len(c.tokens) for c in cond}) > 1 and len({c.picture.shape for c in cond}) == 2

    def expected(row: int) -> Tensor:
        return plain(base, x[row], sigma[row].item(), cond[row].tokens, cond[row].picture)

    family.check_rows(base, (x, sigma, cond), expected, alone=False)


def test_guidance_moves_away_from_the_empty_prompt_with_the_same_picture(base, folder, batch):
    x, sigma, prompts = batch
    cond = load(folder, guidance=4.0).encode(prompts)
    with torch.no_grad():
        guided = load(folder, guidance=4.0).velocity(x, sigma, cond)
        for row, c in enumerate(cond):
            given, without = (
                pack(plain(base, x[row], sigma[row].item(), text, c.picture)[None])
                for text in (c.tokens, c.without)
            )
            mixed = without + 4 * (given - without)
            expected = mixed * given.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)
            assert close(guided[[row]], unpack(expected, 3, 4))
    assert not torch.equal(cond[0].without, cond[2].tokens[: len(cond[0].without)])


def test_a_negative_prompt_is_read_with_the_same_picture_and_cached_by_itself(
    folder, batch, tmp_path, monkeypatch
):
    family.keep_prompts(tmp_path, monkeypatch)
    prompts = batch[2]
    plain, other = (load(folder, guidance=4.0, negative_prompt=text) for text in (None, OTHER))
    before, after, again = plain.encode(prompts), other.encode(prompts), plain.encode(prompts)
    for one, two, three, prompt in zip(before, after, again, prompts, strict=True):
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.without, three.without)
        assert one.without.shape != two.without.shape, prompt
    assert len(list((tmp_path / "prompts").rglob("*.safetensors"))) == 2 * len(prompts)


@pytest.fixture
def smaller(monkeypatch) -> None:
    """Let the pipelines bring pictures to the area of 64² and not of 1024², which takes a tiny model
    seconds.
    """
    real = pipeline_qwenimage_edit.calculate_dimensions

    def small(target: int, ratio: float) -> object:
        return real(target // 16**2, ratio)

    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", small)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64**2)


def test_a_picture_is_brought_to_the_area_that_the_pipelines_bring_it_to():
    for width, height in ((96, 64), (40, 80), (1000, 300)):
        theirs = pipeline_qwenimage_edit_plus.calculate_dimensions(1024**2, width / height)
        assert area(width / height, 1024) == theirs
    assert area(8.0, 64) == (192, 32)


@pytest.mark.usefixtures("smaller")
def test_a_deterministic_rollout_is_the_pipelines_own_edit(folder, pictures):
    policy = load(folder, guidance=4.0)
    cond = policy.encode([starting(TEXT, pictures["wide"])])
    assert cond[0].picture.shape == (16, 8, 8)
    sigmas = policy.pipeline_sigmas(2, SHAPE)
    rollout = roll_out(policy, deterministic(2), sigmas, cond, [5], SHAPE)
    asked = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "true_cfg_scale": 4.0}
    asked |= {"negative_prompt": " ", "latents": pack(rollout.noise(0, 0)[None]), "output_type": "latent"}
    with Image.open(pictures["wide"]) as image:
        latents = policy.pipeline(image=image.convert("RGB"), prompt=TEXT, **asked).images
    assert close(rollout.latents[0], unpack(latents, 3, 4))
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)


def test_the_text_encoder_looks_at_the_picture(base, pictures):
    wide, tall = base.encode([starting(TEXT, pictures[name]) for name in ("wide", "tall")])
    length = min(len(wide.tokens), len(tall.tokens))
    assert not torch.allclose(wide.tokens[-length:], tall.tokens[-length:], atol=1e-3)


def test_in_16_bit_the_model_still_sees_the_exact_noise_level(folder, batch):
    policy = load(folder, dtype="bf16")
    seen = family.given_to(policy.transformer.time_text_embed.time_proj)
    x, _, prompts = batch
    sigma = torch.tensor([0.9545, 0.954])
    with torch.no_grad():
        policy.velocity(x[::2], sigma, policy.encode(prompts[::2]))
    # The 2511 asks for the level 0 of the picture, too.
    extra = torch.zeros(2) if isinstance(policy.pipeline, QwenImageEditPlusPipeline) else torch.empty(0)
    assert torch.equal(seen[0], torch.cat([sigma, extra]))


def test_features_are_kept_by_text_and_picture_and_need_no_encoder_again(
    folder, pictures, tmp_path, monkeypatch
):
    place = family.keep_prompts(tmp_path, monkeypatch)
    asked = [starting(TEXT, pictures["wide"]), starting(TEXT, pictures["tall"])]
    first, again = load(folder, guidance=4.0).encode(asked), load(folder, guidance=4.0)
    again.drop_text_encoders()
    again.load_text_encoders = again.pipeline.image_processor = None
    assert len(list(place.rglob("*.safetensors"))) == 2
    for known, fresh in zip(again.encode(asked), first, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(known, fresh, strict=True))


def test_what_the_model_does_not_take_is_refused(base, folder, tmp_path):
    with pytest.raises(ValueError, match=r"'make it night' has no picture to edit; write it as \{\"prompt\""):
        base.encode([TEXT])
    broken = shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(broken / "processor")
    fetch = r"its processor cannot be read .* hf download OWNER/NAME --include 'processor/\*'"
    with pytest.raises(ValueError, match=fetch):
        load(broken)


def test_its_files_are_the_model_of_the_folder(base, folder, batch, tmp_path):
    kind = type(base.pipeline).__name__
    edits, mark = "qwen_edit", {}
    if kind == qwen_edit_folder.KINDS[1]:
        edits, mark = "qwen_edit_2511", {"__index_timestep_zero__": torch.ones(1)}
    files = {name: tmp_path / f"{name}.safetensors" for name in ("transformer", "vae", "text_encoder")}
    write_tensors(files["transformer"], base.transformer.state_dict() | mark)
    write_tensors(files["vae"], base.vae.state_dict())
    write_tensors(files["text_encoder"], native_names.qwen(base.pipeline.text_encoder.state_dict()))
    given = {"transformer": str(files["transformer"]), "vae": str(files["vae"]), "tokenizers": str(folder)}
    given["text_encoders"] = (str(files["text_encoder"]),)
    policy = families.load(section(folder, path=None, edits=edits, **given), None, "cpu")
    assert type(policy.pipeline).__name__ == kind
    # The published numbers of a picture's marks are no words of a tiny tokenizer.
    policy.pipeline.text_encoder.config.image_token_id = base.pipeline.text_encoder.config.image_token_id
    x, sigma, prompts = batch
    ours, theirs = policy.encode(prompts), base.encode(prompts)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with torch.no_grad():
        assert torch.equal(policy.velocity(x, sigma, ours), base.velocity(x, sigma, theirs))
    if mark:
        own = r"Qwen-Image-Edit-2511 looks at its picture in its own way; set model\.edits: qwen_edit_2511"
        with pytest.raises(ValueError, match=own):
            families.load(section(folder, path=None, edits="qwen_edit_2509", **given), None, "cpu")
    missing = r"no file has that model's transformer; give it as model\.transformer"
    with pytest.raises(ValueError, match=missing):
        families.load(section(folder, path=None, edits=edits, **given | {"transformer": None}), None, "cpu")


@pytest.mark.long
def test_a_run_learns_to_edit_and_leaves_a_lora_that_diffusers_loads_with_the_same_effect(
    pictures, batch, tmp_path
):
    folder = qwen_edit_folder.save(tmp_path / "model", qwen_edit_folder.KINDS[1])
    rows = [{"prompt": TEXT, "image": str(image)} for image in pictures.values()]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    method = {"name": "g2rpo", "num_steps": 3, "group_size": 3, "granularities": [1], "learning_rate": 1e-2}
    few = {"steps": 1, "prompts_per_step": 1, "eval_noises": 1, "watch": "off", "slots": 2, "decode_batch": 1}
    tree, run = family.one_step(
        tmp_path,
        section(folder, guidance=4.0, schedule="pipeline").model_dump(),
        lora={"rank": 4, "alpha": 8},
        method=method,
        prompts={"train": str(tmp_path / "train.jsonl"), "heldout_share": 0.5},
        train=few,
    )
    assert family.learnt(run)
    file = family.lora_of(run)
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in read_tensors(file)[0])
    assert any(up.any() for _, up in lora.read(file).pairs.values())
    x, sigma, prompts = batch
    ours, theirs = load(folder), load(folder)
    ours.load_lora(file)
    # Diffusers itself, on the file as it lies there.
    theirs.pipeline.load_lora_weights(file)
    cond = ours.encode(prompts[:1])
    with torch.no_grad():
        changed = ours.velocity(x[:1], sigma[:1], cond)[0]
        assert close(plain(theirs, x[0], 1.0, cond[0].tokens, cond[0].picture), changed)
        assert not torch.allclose(load(folder).velocity(x[:1], sigma[:1], cond)[0], changed, atol=1e-4)
    assert measure(from_dict(tree), count(from_dict(tree))).step > 0
    (drawn,) = draw(from_dict(tree), prompts[:1], 1, file)
    assert drawn.shape == (HEIGHT, WIDTH, 3)
