"""The qwen_image family on a tiny random model against diffusers' own pipeline, and a run of it from the
configuration to the LoRA file.
"""

from __future__ import annotations

import math
from pathlib import Path

import family_model as family
import pytest
import qwen_folder
import torch
from diffusers import QwenImagePipeline
from family_model import LONG, SHORT, SIGMA, Batch, close
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from g2rpo_trainer import families
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.flux import unpack
from g2rpo_trainer.families.qwen_image import QwenImage

pytestmark = pytest.mark.xdist_group("qwen_image")  # one process makes what they share

WIDTH, HEIGHT, SHAPE = 64, 48, (16, 6, 8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder as it is published."""
    return qwen_folder.save(tmp_path_factory.mktemp("qwen") / "model")


def load(folder: Path, **more: object) -> QwenImage:
    """Load the model as a run does."""
    section = {"family": "qwen_image", "path": str(folder), "width": WIDTH, "height": HEIGHT} | more
    return families.load(ModelSection(**section), folder, "cpu")


@pytest.fixture(scope="session")
def base(folder) -> QwenImage:
    """A model without adapter; tests leave it as it is."""
    return load(folder)


@pytest.fixture
def batch(base: QwenImage) -> Batch:
    """Three latents at three noise levels, with prompts of different lengths."""
    return seeded_noise((3, *SHAPE), "latents"), torch.tensor(SIGMA), base.encode([SHORT, LONG, ""])


def plain(policy: QwenImage, x: Tensor, sigma: float, tokens: Tensor) -> Tensor:
    """Call diffusers' transformer on one sample as its pipeline does."""
    packed = QwenImagePipeline._pack_latents(x[None], 1, *x.shape)
    shapes = [[(1, x.shape[1] // 2, x.shape[2] // 2)]]
    out = policy.transformer(packed, tokens[None], None, torch.tensor([sigma]), shapes, return_dict=False)[0]
    return QwenImagePipeline._unpack_latents(out, 4 * 2 * x.shape[1], 4 * 2 * x.shape[2], 8)[0, :, 0]


def test_the_velocity_is_diffusers_own_at_every_noise_level_whatever_else_is_in_the_batch(base, batch):
    x, sigma, cond = batch
    assert len({len(c.tokens) for c in cond}) == 3
    family.check_rows(base, batch, lambda row: plain(base, x[row], sigma[row].item(), cond[row].tokens))


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (4.0, None), (4.0, "a dog, blurred")])
def test_a_deterministic_rollout_is_the_pipelines_own_sampling(folder, guidance, negative):
    policy = load(folder, guidance=guidance, negative_prompt=negative)
    sigmas = policy.pipeline_sigmas(4, SHAPE)
    rollout = roll_out(policy, deterministic(4), sigmas, policy.encode([LONG]), [5], SHAPE)
    start = QwenImagePipeline._pack_latents(rollout.noise(0, 0)[None], 1, *SHAPE)
    guided = {"negative_prompt": negative or " ", "true_cfg_scale": guidance} if guidance > 1 else {}
    asked = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "latents": start}
    latents = policy.pipeline(LONG, **asked, **guided, output_type="latent").images
    assert close(rollout.latents[0], unpack(latents, 3, 4))
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)
    picture = policy.pipeline(LONG, **asked, **guided, output_type="pt").images
    assert close(policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1))


def test_guidance_keeps_the_norm_of_every_token(base, folder, batch):
    x, sigma, cond = batch
    with torch.no_grad():
        given, guided = base.velocity(x, sigma, cond), load(folder, guidance=4.0).velocity(x, sigma, cond)
    assert not torch.allclose(given, guided, atol=1e-3)
    norms = [v.unfold(2, 2, 2).unfold(3, 2, 2).square().sum((1, 4, 5)) for v in (given, guided)]
    assert torch.allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("shape", [(16, 64, 64), (16, 128, 128), (16, 104, 160)])
def test_its_schedule_is_shifted_by_resolution_and_ends_where_the_scheduler_says(base, steps, shape):
    sigmas = base.pipeline_sigmas(steps, shape)
    mu = 0.5 + (shape[1] * shape[2] / 4 - 256) * (0.9 - 0.5) / (8192 - 256)
    linear = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    shifted = math.exp(mu) * linear / (1 + (math.exp(mu) - 1) * linear)
    stretched = 1 - (1 - shifted) * (1 - 0.02) / (1 - shifted[-1])
    assert torch.allclose(sigmas.double(), torch.cat([stretched, torch.zeros(1)]), atol=1e-6)
    assert sigmas[0] == 1 and (sigmas.diff() < 0).all()


def test_in_16_bit_the_model_still_sees_the_exact_noise_level(folder):
    policy = load(folder, dtype="bf16")
    seen = family.given_to(policy.transformer.time_text_embed.time_proj)
    sigma = torch.tensor([0.9545, 0.954])
    with torch.no_grad():
        policy.velocity(seeded_noise((2, *SHAPE), "latents"), sigma, policy.encode([SHORT, LONG]))
    assert torch.equal(seen[0], sigma)


def test_prompts_are_encoded_as_the_pipeline_does_and_cut_at_the_length_asked_for(base, folder):
    tokens, mask = base.pipeline.encode_prompt([SHORT, LONG], max_sequence_length=512)
    for row, cond in enumerate(base.encode([SHORT, LONG])):
        assert close(cond.tokens, tokens[row][mask[row].bool()])
    assert len(load(folder, max_sequence_length=140).encode([LONG])[0].tokens) == 140


def test_the_cache_gives_the_same_features_and_spares_the_encoder(folder, tmp_path, monkeypatch):
    family.keep_prompts(tmp_path, monkeypatch)
    first, again = load(folder).encode([SHORT, LONG]), load(folder)
    again.pipeline.text_encoder = None
    assert family.same_features(first, again.encode([SHORT, LONG]))


def test_guidance_needs_no_text_encoder_once_it_is_dropped(folder, batch):
    family.check_dropped(load(folder, guidance=4.0), load(folder, guidance=4.0), batch)


def test_decoding_is_the_pipelines_own_with_every_channel_at_its_mean_and_scale(base):
    latents = seeded_noise((2, *SHAPE), "latents")
    config = base.vae.config
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std))
    raw = [(latent[:, None] * std + mean)[None] for latent in latents]
    expected = torch.cat([base.vae.decode(latent).sample[:, :, 0] for latent in raw])
    pictures = base.decode(latents)
    assert close(pictures, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    assert pictures.shape == (2, HEIGHT, WIDTH, 3) and pictures.is_contiguous()


def test_a_fresh_adapter_sits_on_both_streams_of_every_block_and_changes_nothing(base, folder, batch):
    policy = load(folder)
    policy.add_lora(4, 4, 1, feed_forward=True)
    block = "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj"
    block += " attn.to_add_out img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj txt_mlp.net.2"
    wanted = {f"transformer_blocks.{number}.{name}" for number in range(2) for name in block.split()}
    assert set(policy.pairs()) == wanted
    with torch.no_grad():
        assert close(policy.velocity(*batch), base.velocity(*batch), 1e-6)


def test_the_reference_is_the_model_without_adapter(base, folder, batch):
    family.check_reference(family.moved(load(folder)), base, batch)


def test_a_size_between_tokens_and_a_length_of_nothing_are_refused(base, folder):
    with pytest.raises(ValueError, match="72×64; both must be multiples of 16"):
        base.latent_shape(72, 64)
    with pytest.raises(ValueError, match="max_sequence_length is 0"):
        load(folder, max_sequence_length=0)


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory) -> tuple[dict, Path]:
    """One whole step with guidance, the model's own schedule and all targets, and a look at a held-out
    prompt.
    """
    model = {"family": "qwen_image", "path": str(folder), "width": WIDTH, "height": HEIGHT, "guidance": 4.0}
    return family.one_step(tmp_path_factory.mktemp("run"), model)


@pytest.mark.long
def test_a_run_learns_and_leaves_a_lora_that_diffusers_loads_with_the_same_effect(run, folder, batch):
    _, place = run
    file = family.lora_of(place)
    assert family.learnt(place) and any(up.any() for _, up in lora.read(file).pairs.values())
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in read_tensors(file)[0])
    ours, theirs = load(folder), load(folder)
    ours.load_lora(file)
    # Diffusers itself, on the file as it lies there.
    theirs.pipeline.load_lora_weights(file)
    x, sigma, cond = batch
    with torch.no_grad():
        changed, untrained = ours.velocity(*batch), load(folder).velocity(*batch)
    family.check_effect(
        changed, lambda row: plain(theirs, x[row], sigma[row].item(), cond[row].tokens), untrained
    )


@pytest.mark.long
def test_pictures_can_be_drawn_with_the_lora_of_a_run(run):
    family.check_drawing(*run, HEIGHT, WIDTH)
