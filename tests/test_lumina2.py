"""The lumina2 family on a tiny random model against diffusers' own pipeline, and a run of it from the
recipe to the LoRA file.
"""

from __future__ import annotations

from pathlib import Path

import family_model as family
import lumina2_folder
import pytest
import torch
from family_model import LONG, SHORT, SIGMA, Batch, close
from program import call
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.lora.forms import Form, in_core
from comfy_g2rpo.lora.key_names import BOTH, LUMINA2, family_of_model
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.schedule import shifted_sigmas
from g2rpo_trainer import families
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.lumina2 import Lumina2

pytestmark = pytest.mark.xdist_group("lumina2")  # one process makes what they share

PROMPTS = (SHORT, LONG, "a dog")
WIDTH, HEIGHT, SHAPE = 64, 48, (16, 6, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is published."""
    return lumina2_folder.save(tmp_path_factory.mktemp("lumina2") / "model")


def load(folder: Path, **more: object) -> Lumina2:
    """Load the model as a run does."""
    section = {"family": "lumina2", "path": str(folder), "width": WIDTH, "height": HEIGHT}
    return families.load(ModelSection(**section | {"max_sequence_length": 256} | more), folder, "cpu")


@pytest.fixture(scope="module")
def base(folder: Path) -> Lumina2:
    """A model without adapter and with guidance; tests leave it as it is."""
    return load(folder, guidance=4.0)


@pytest.fixture
def batch(base: Lumina2) -> Batch:
    """Three latents at three noise levels, with prompts of different lengths."""
    return seeded_noise((3, *SHAPE), "latents"), torch.tensor(SIGMA), base.encode(PROMPTS)


def plain(policy: Lumina2, x: Tensor, sigma: float, prompt: str) -> Tensor:
    """Call diffusers' transformer on one sample as its pipeline does, texts padded to the full length."""
    tokens, mask, empty, empty_mask = policy.pipeline.encode_prompt(prompt, max_sequence_length=256)
    time = torch.tensor([1 - sigma])
    given, without = (
        policy.transformer(x[None], time, text, seen, return_dict=False)[0]
        for text, seen in ((tokens, mask), (empty, empty_mask))
    )
    guided = without + policy.guidance * (given - without)
    return -(guided * given.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))[0]


def test_the_velocity_is_diffusers_own_at_every_noise_level_whatever_else_is_in_the_batch(base, batch):
    x, sigma, cond = batch
    assert len({len(c.tokens) for c in cond}) > 1
    family.check_rows(
        base, batch, lambda row: plain(base, x[row], sigma[row].item(), PROMPTS[row]), alone=False
    )


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (4.0, None), (4.0, "a dog, blurred")])
def test_a_deterministic_rollout_is_the_pipelines_own_sampling(folder, guidance, negative):
    policy = load(folder, guidance=guidance, negative_prompt=negative)
    sigmas = policy.pipeline_sigmas(4, SHAPE)
    rollout = roll_out(policy, deterministic(4), sigmas, policy.encode([LONG]), [5], SHAPE)
    asked = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "guidance_scale": guidance}
    asked |= {"negative_prompt": negative}
    asked |= {"latents": rollout.noise(0, 0)[None]}
    picture = policy.pipeline(LONG, **asked, output_type="pt").images
    assert torch.equal(sigmas, policy.pipeline.scheduler.sigmas)
    assert close(policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1))


@pytest.mark.parametrize("steps", [2, 30])
def test_its_schedule_is_shifted_as_comfyuis_is(base, steps):
    assert close(base.pipeline_sigmas(steps, SHAPE), shifted_sigmas(steps, base.comfyui_shift), 1e-6)


def test_in_16_bit_the_model_still_sees_the_exact_noise_level(folder):
    policy = load(folder, dtype="bf16")
    seen = family.given_to(policy.transformer.time_caption_embed.time_proj)
    sigma = torch.tensor([0.9545, 0.954])
    with torch.no_grad():
        policy.velocity(seeded_noise((2, *SHAPE), "latents"), sigma, policy.encode([SHORT, LONG]))
    assert close(seen[0], 1 - sigma, 1e-6)


def test_the_cache_gives_the_same_features_and_the_encoder_stays_on_the_disk(folder, tmp_path, monkeypatch):
    family.keep_prompts(tmp_path, monkeypatch)
    first, again = load(folder).encode([SHORT, LONG, ""]), load(folder)
    assert family.same_features(first, again.encode([SHORT, LONG, ""]))
    assert again.pipeline.text_encoder is None


def test_a_negative_prompt_and_a_prompt_of_the_same_text_are_kept_apart(folder, tmp_path, monkeypatch):
    family.keep_prompts(tmp_path, monkeypatch)
    asked, avoided = (load(folder, guidance=4.0, negative_prompt=text) for text in (None, SHORT))
    first, other = asked.encode([SHORT])[0], avoided.encode([SHORT])[0]
    assert len(first.tokens) > len(other.tokens)
    assert family.same_features([first], load(folder).encode([SHORT]))


def test_what_the_model_does_not_take_is_refused(base, folder):
    assert family_of_model(name for name, _ in base.transformer.named_modules()) == (LUMINA2, "diffusers")
    with pytest.raises(ValueError, match="72×64; both must be multiples of 16"):
        base.latent_shape(72, 64)
    with pytest.raises(ValueError, match="max_sequence_length is 0"):
        load(folder, max_sequence_length=0)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """One whole step of the bundled recipe on the tiny model, all targets."""
    place = tmp_path_factory.mktemp("run") / "run"
    size = (f"model.width={WIDTH}", f"model.height={HEIGHT}")
    assert family.train_recipe("lumina2", folder, place, *size, "lora.targets=attention+feed_forward") == 0
    return place


def test_a_run_learns_and_leaves_a_lora_that_comfyui_maps_and_diffusers_loads_once_it_is_exported(
    run, folder, base, batch, tmp_path
):
    file, exported = family.lora_of(run), tmp_path / "diffusers.safetensors"
    written = lora.read(file)
    assert family.learnt(run)
    # q, k and v are one.
    assert len(written.pairs) == 4 * 5 and all(up.any() for _, up in written.pairs.values())
    assert {in_core(LUMINA2, module, Form("diffusion_model.")) for module in written.pairs} == {BOTH}
    call("export", file, "--form", "diffusers", "--no-alpha", "--out", exported)
    ours, theirs = load(folder, guidance=4.0), load(folder, guidance=4.0)
    ours.load_lora(file)
    theirs.pipeline.load_lora_weights(exported)
    theirs.take_text_encoders()
    x, sigma, _ = batch
    with torch.no_grad():
        changed, untrained = ours.velocity(*batch), base.velocity(*batch)
    family.check_effect(
        changed, lambda row: plain(theirs, x[row], sigma[row].item(), PROMPTS[row]), untrained, 1e-4
    )
