"""The z_image family on a tiny random model against diffusers' own pipeline, and a run of it from the
configuration to the LoRA file.
"""

from __future__ import annotations

from pathlib import Path

import family_model as family
import pytest
import torch
import z_image_folder
from family_model import LONG, SHORT, SIGMA, Batch, close
from torch import Tensor

from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.lora.forms import Form, in_core
from comfy_g2rpo.lora.key_names import NEW, Z_IMAGE, family_of_model
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.schedule import shifted_sigmas
from g2rpo_trainer import families
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.z_image import ZImage
from g2rpo_trainer.run import continue_from

pytestmark = pytest.mark.xdist_group("z_image")  # one process makes what they share

WIDTH, HEIGHT, SHAPE = 64, 96, (16, 12, 8)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder as it is published."""
    return z_image_folder.save(tmp_path_factory.mktemp("z_image") / "model")


def load(folder: Path, **more: object) -> ZImage:
    """Load the model as a run does."""
    section = {"family": "z_image", "path": str(folder), "width": WIDTH, "height": HEIGHT} | more
    return families.load(ModelSection(**section), folder, "cpu")


@pytest.fixture(scope="session")
def base(folder) -> ZImage:
    """A model without adapter; tests leave it as it is."""
    return load(folder)


@pytest.fixture
def batch(base: ZImage) -> Batch:
    """Three latents at three noise levels, with prompts of different lengths."""
    return seeded_noise((3, *SHAPE), "latents"), torch.tensor(SIGMA), base.encode([SHORT, LONG, ""])


def plain(policy: ZImage, x: Tensor, sigma: float, tokens: Tensor) -> Tensor:
    """Call diffusers' transformer on one sample as its pipeline does."""
    time = (1000 - torch.tensor([sigma]) * 1000) / 1000
    return -policy.transformer([x[:, None]], time, [tokens], return_dict=False)[0][0][:, 0]


def test_the_velocity_is_diffusers_own_at_every_noise_level_whatever_else_is_in_the_batch(base, batch):
    x, sigma, cond = batch
    # In steps of 32 tokens, which is what the model pads them to.
    assert len({-(-len(c.tokens) // 32) for c in cond}) == 2 and len({len(c.tokens) for c in cond}) == 3
    family.check_rows(base, batch, lambda row: plain(base, x[row], sigma[row].item(), cond[row].tokens))


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "a dog, blurred")])
def test_a_deterministic_rollout_is_the_pipelines_own_sampling(folder, guidance, negative):
    policy = load(folder, guidance=guidance, negative_prompt=negative)
    sigmas = policy.pipeline_sigmas(4, SHAPE)
    rollout = roll_out(policy, deterministic(4), sigmas, policy.encode([LONG]), [5], SHAPE)
    # The pipeline's scale counts from 0: pos + s (pos − neg).
    asked = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "guidance_scale": guidance - 1}
    asked |= {"latents": rollout.noise(0, 0)[None], "max_sequence_length": 256}
    asked |= {"negative_prompt": negative}
    latents = policy.pipeline(LONG, **asked, output_type="latent").images
    assert close(rollout.latents[0], latents)
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)
    picture = policy.pipeline(LONG, **asked, output_type="pt").images
    assert close(policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1))


@pytest.mark.parametrize("steps", [2, 9, 50])
@pytest.mark.parametrize("shape", [(16, 64, 64), (16, 128, 128)])
def test_its_schedule_has_a_static_shift_or_one_by_resolution_as_the_folder_says(
    base, tmp_path, steps, shape
):
    assert close(base.pipeline_sigmas(steps, shape), shifted_sigmas(steps, 3.0), 1e-6)
    dynamic = load(z_image_folder.save(tmp_path / "dynamic", "dynamic"))
    mu = 0.5 + (shape[1] * shape[2] / 4 - 256) * (1.15 - 0.5) / (4096 - 256)
    shift = torch.tensor(mu, dtype=torch.float64).exp().item()
    assert close(dynamic.pipeline_sigmas(steps, shape), shifted_sigmas(steps, shift), 1e-6)


def test_in_16_bit_the_model_still_sees_the_exact_noise_level(folder):
    policy = load(folder, dtype="bf16")
    seen = family.given_to(policy.transformer.t_embedder)
    sigma = torch.tensor([0.9545, 0.954])
    with torch.no_grad():
        policy.velocity(seeded_noise((2, *SHAPE), "latents"), sigma, policy.encode([SHORT, LONG]))
    assert torch.allclose(seen[0], 1000 - 1000 * sigma, rtol=0, atol=1e-3)


def test_prompts_are_encoded_as_the_pipeline_does_and_cut_at_the_length_asked_for(base, folder):
    tokens, _ = base.pipeline.encode_prompt([SHORT, LONG], do_classifier_free_guidance=False)
    for cond, own in zip(base.encode([SHORT, LONG]), tokens, strict=True):
        assert close(cond.tokens, own)
    assert len(load(folder, max_sequence_length=40).encode([LONG])[0].tokens) == 40


def test_the_cache_gives_the_same_features_and_spares_the_encoder(folder, tmp_path, monkeypatch):
    family.keep_prompts(tmp_path, monkeypatch)
    first, again = load(folder).encode([SHORT, LONG]), load(folder)
    again.pipeline.text_encoder = None
    assert family.same_features(first, again.encode([SHORT, LONG]))


def test_guidance_needs_no_text_encoder_once_it_is_dropped(folder, batch):
    family.check_dropped(load(folder, guidance=5.0), load(folder, guidance=5.0), batch)


def test_a_fresh_adapter_sits_on_all_blocks_and_changes_nothing(base, folder, batch):
    policy = load(folder)
    policy.add_lora(4, 4, 1, feed_forward=True)
    block = [*(f"attention.{name}" for name in ATTENTION), *(f"feed_forward.w{i}" for i in (1, 2, 3))]
    places = ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.0")
    assert set(policy.pairs()) == {f"{place}.{name}" for place in places for name in block}
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
    model = {"family": "z_image", "path": str(folder), "width": WIDTH, "height": HEIGHT, "guidance": 5.0}
    return family.one_step(tmp_path_factory.mktemp("run"), model)


def test_a_run_learns_and_leaves_a_lora_that_diffusers_loads_with_the_same_effect(run, folder, batch):
    _, place = run
    file = family.lora_of(place)
    assert family.learnt(place)
    ours, theirs, continued = load(folder), load(folder), load(folder)
    ours.load_lora(file)
    # Diffusers itself, on the file as it lies there.
    theirs.pipeline.load_lora_weights(file)
    continued.add_lora(4, 8, seed=3, feed_forward=True)
    continue_from(continued, file, 8 / 4, "z_image")
    x, sigma, cond = batch
    with torch.no_grad():
        changed, untrained = ours.velocity(*batch), load(folder).velocity(*batch)
        assert close(continued.velocity(*batch), changed)
    family.check_effect(
        changed, lambda row: plain(theirs, x[row], sigma[row].item(), cond[row].tokens), untrained
    )


def test_a_run_names_its_modules_as_the_comfyui_that_runs_the_model_maps_them(run):
    modules = family.modules_in(read_tensors(family.lora_of(run[1]))[0])
    assert len(modules) == 4 * 7
    assert {in_core(Z_IMAGE, module, Form("diffusion_model.")) for module in modules} <= {NEW, "both"}


def test_a_folder_is_known_to_have_diffusers_names(base):
    assert family_of_model(name for name, _ in base.transformer.named_modules()) == (Z_IMAGE, "diffusers")


def test_pictures_can_be_drawn_with_the_lora_of_a_run(run):
    family.check_drawing(*run, HEIGHT, WIDTH)
