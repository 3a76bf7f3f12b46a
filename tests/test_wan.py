"""The wan family on tiny random models against diffusers' own pipeline, and a run of it from the
configuration to the LoRA file.
"""

from __future__ import annotations

from pathlib import Path

import family_model as family
import pytest
import torch
import wan_folder
from diffusers import FlowMatchEulerDiscreteScheduler
from family_model import LONG, SHORT, SIGMA, Batch, close
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.lora.key_names import WAN
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from g2rpo_trainer import families
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.wan import Wan
from g2rpo_trainer.run import continue_from

pytestmark = pytest.mark.xdist_group("wan")  # one process makes what they share

WIDTH, HEIGHT, TOKENS = 64, 96, 64
PROMPTS = (SHORT, LONG, "")
SMALL = {"family": "wan", "width": WIDTH, "height": HEIGHT, "max_sequence_length": TOKENS}


@pytest.fixture(scope="session", params=wan_folder.KINDS)
def folder(request, tmp_path_factory) -> Path:
    """Folders as they are published: of Wan 2.1 and of the 5B of Wan 2.2."""
    return wan_folder.save(tmp_path_factory.mktemp("wan") / "model", request.param)


def load(folder: Path, **more: object) -> Wan:
    """Load the model as a run does."""
    return families.load(ModelSection(**SMALL | {"path": str(folder)} | more), folder, "cpu")


@pytest.fixture(scope="session")
def base(folder) -> Wan:
    """A model without adapter; tests leave it as it is."""
    return load(folder)


@pytest.fixture
def batch(base: Wan) -> Batch:
    """Three latents at three noise levels, with prompts of different lengths."""
    latents = seeded_noise((3, *base.latent_shape(WIDTH, HEIGHT)), "latents")
    return latents, torch.tensor(SIGMA), base.encode(PROMPTS)


def plain(policy: Wan, x: Tensor, sigma: float, prompt: str) -> Tensor:
    """Call diffusers' transformer on one sample as its pipeline does."""
    tokens, _ = policy.pipeline.encode_prompt(
        prompt, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    time = torch.tensor([sigma * 1000])
    if policy.pipeline.config.expand_timesteps:
        time = (torch.ones(x.shape[1:])[::2, ::2] * time).flatten()[None]
    return policy.transformer(x[None, :, None], time, tokens, return_dict=False)[0][0, :, 0]


def test_the_velocity_is_diffusers_own_at_every_noise_level_whatever_else_is_in_the_batch(base, batch):
    x, sigma, cond = batch
    assert len({len(c.tokens) for c in cond}) == 3
    family.check_rows(base, batch, lambda row: plain(base, x[row], sigma[row].item(), PROMPTS[row]))


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "a dog, blurred")])
def test_a_deterministic_rollout_is_the_pipelines_own_sampling_with_an_euler_scheduler(
    folder, guidance, negative
):
    policy = load(folder, guidance=guidance, negative_prompt=negative)
    policy.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    shape = policy.latent_shape(WIDTH, HEIGHT)
    sigmas, cond = policy.pipeline_sigmas(4, shape), policy.encode([LONG])
    rollout = roll_out(policy, deterministic(4), sigmas, cond, [5], shape)
    asked = {"height": HEIGHT, "width": WIDTH, "num_frames": 1, "num_inference_steps": 4}
    asked |= {"guidance_scale": guidance, "negative_prompt": negative}
    asked |= {"max_sequence_length": TOKENS, "latents": rollout.noise(0, 0)[None, :, None]}
    latents = policy.pipeline(LONG, **asked, output_type="latent").frames
    assert close(rollout.latents[0], latents[:, :, 0])
    picture = policy.pipeline(LONG, **asked, output_type="pt").frames[:, 0]
    assert close(policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1))


@pytest.mark.parametrize("steps", [2, 8, 50])
def test_its_schedule_is_its_schedulers_and_begins_at_pure_noise(base, steps):
    scheduler = base.pipeline.scheduler
    scheduler.set_timesteps(steps)
    sigmas = base.pipeline_sigmas(steps, base.latent_shape(WIDTH, HEIGHT))
    assert close(sigmas, scheduler.sigmas.float(), 2e-6)
    assert torch.equal(sigmas[1:], scheduler.sigmas[1:].float())
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_in_16_bit_the_model_still_sees_the_exact_noise_level(folder):
    policy = load(folder, dtype="bf16")
    seen = family.given_to(policy.transformer.condition_embedder.timesteps_proj)
    sigma = torch.tensor([0.9545, 0.954])
    with torch.no_grad():
        x = seeded_noise((2, *policy.latent_shape(WIDTH, HEIGHT)), "latents")
        policy.velocity(x, sigma, policy.encode([SHORT, LONG]))
    assert torch.equal(seen[0], sigma * 1000)


def test_prompts_are_encoded_as_the_pipeline_does_and_their_padding_is_not_kept(base):
    tokens, _ = base.pipeline.encode_prompt(
        [SHORT, LONG], do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    for row, cond in enumerate(base.encode([SHORT, LONG])):
        assert close(cond.tokens, tokens[row, : len(cond.tokens)])
        assert not tokens[row, len(cond.tokens) :].any() and len(cond.tokens) < TOKENS


def test_the_cache_gives_the_same_features_and_spares_the_encoder(folder, tmp_path, monkeypatch):
    family.keep_prompts(tmp_path, monkeypatch)
    first, again = load(folder).encode([SHORT, LONG]), load(folder)
    again.pipeline.text_encoder = None
    assert family.same_features(first, again.encode([SHORT, LONG]))


def test_guidance_needs_no_text_encoder_once_it_is_dropped(folder, batch):
    family.check_dropped(load(folder, guidance=5.0), load(folder, guidance=5.0), batch)


def test_a_batch_is_decoded_as_its_pictures_one_by_one(base, batch):
    pictures = base.decode(batch[0])
    assert close(pictures, torch.cat([base.decode(x[None]) for x in batch[0]]))
    assert pictures.shape == (3, HEIGHT, WIDTH, 3) and pictures.is_contiguous()
    assert pictures.dtype == torch.float32


def test_a_fresh_adapter_sits_on_both_attentions_of_every_block_and_changes_nothing(base, folder, batch):
    policy = load(folder)
    policy.add_lora(4, 4, 1, feed_forward=True)
    attention = [f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*attention, "ffn.net.0.proj", "ffn.net.2"]
    assert set(policy.pairs()) == {f"blocks.{number}.{name}" for number in range(2) for name in block}
    with torch.no_grad():
        assert close(policy.velocity(*batch), base.velocity(*batch), 1e-6)


def test_the_reference_is_the_model_without_adapter(base, folder, batch):
    family.check_reference(family.moved(load(folder)), base, batch)


def test_what_the_model_does_not_take_is_refused(base, folder, tmp_path):
    factor = 2 * base.pipeline.vae_scale_factor_spatial
    with pytest.raises(ValueError, match=f"72×64; both must be multiples of {factor}"):
        base.latent_shape(72, 64)
    with pytest.raises(ValueError, match="max_sequence_length is 0"):
        load(folder, max_sequence_length=0)
    with pytest.raises(ValueError, match=r"two transformers \(2\.2 A14B\)"):
        load(wan_folder.save(tmp_path / "two", second=True))


@pytest.fixture(scope="session")
def run(folder, tmp_path_factory) -> tuple[dict, Path]:
    """One whole step with guidance, the model's own schedule and all targets, and a look at a held-out
    prompt.
    """
    return family.one_step(tmp_path_factory.mktemp("run"), SMALL | {"path": str(folder), "guidance": 5.0})


def test_a_run_learns_and_leaves_a_lora_that_diffusers_loads_with_the_same_effect(run, folder, batch):
    _, place = run
    assert family.learnt(place)
    ours, theirs = load(folder), load(folder)
    ours.load_lora(family.lora_of(place))
    # Diffusers itself, on the file as it lies there.
    theirs.pipeline.load_lora_weights(family.lora_of(place))
    x, sigma, _ = batch
    with torch.no_grad():
        changed, untrained = ours.velocity(*batch), load(folder).velocity(*batch)
    family.check_effect(
        changed, lambda row: plain(theirs, x[row], sigma[row].item(), PROMPTS[row]), untrained
    )


def test_a_run_names_its_modules_as_the_published_files_do(run):
    links = [link for link in WAN.links if link.native.startswith("blocks.")]
    of_pictures = {f"blocks.{number}.cross_attn.{name}_img" for number in range(2) for name in "kv"}
    published = {link.at(str(number)).native for link in links for number in range(2)} - of_pictures
    assert family.modules_in(read_tensors(family.lora_of(run[1]))[0]) == published


def test_a_run_continues_from_the_file_of_another(run, folder, batch):
    file = family.lora_of(run[1])
    drawn, continued = load(folder), load(folder)
    drawn.load_lora(file)
    continued.add_lora(4, 8, seed=3, feed_forward=True)
    continue_from(continued, file, 8 / 4, "wan")
    with torch.no_grad():
        assert close(continued.velocity(*batch), drawn.velocity(*batch))


def test_a_lora_of_another_model_is_refused(folder, tmp_path):
    pair = (torch.ones(2, 8), torch.ones(24, 2))
    lora.write(tmp_path / "other.safetensors", {"joint_blocks.0.x_block.attn.qkv": pair}, 2.0)
    with pytest.raises(lora.LoraError, match="choose a LoRA that was made for it"):
        load(folder).load_lora(tmp_path / "other.safetensors")


def test_pictures_can_be_drawn_with_the_lora_of_a_run(run):
    family.check_drawing(*run, HEIGHT, WIDTH)
