"""The wan family on tiny random models against diffusers' own pipeline, and a run of it from the
configuration to the LoRA file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import wan_folder
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.lora.key_names import WAN
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.wan import Wan
from g2rpo_trainer.model import prompt_cache
from g2rpo_trainer.model.inference import draw
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import continue_from, train

SHORT, LONG = "a cat", "a red circle left of two blue squares, in the rain"
WIDTH, HEIGHT, TOKENS = 64, 96, 64


@pytest.fixture(scope="session", params=wan_folder.KINDS)
def folder(request, tmp_path_factory) -> Path:
    """Folders as they are published: of Wan 2.1 and of the 5B of Wan 2.2."""
    return wan_folder.save(tmp_path_factory.mktemp("wan") / "model", request.param)


def load(folder: Path, lora_seed: int | None = None, **more: object) -> Wan:
    """Load the model as a run does; a LoRA that is asked for has moved away from zero."""
    section = {
        "family": "wan",
        "path": str(folder),
        "width": WIDTH,
        "height": HEIGHT,
        "max_sequence_length": TOKENS,
    } | more
    policy = families.load(ModelSection(**section), folder, "cpu")
    if lora_seed is not None:
        policy.add_lora(4, 8, lora_seed, feed_forward=True)
        with torch.no_grad():
            for name, (_, up) in policy.pairs().items():
                up.copy_(0.02 * seeded_noise(up.shape, "up", name))
    return policy


@pytest.fixture(scope="session")
def base(folder) -> Wan:
    """A model without adapter; tests leave it as it is."""
    return load(folder)


@pytest.fixture
def batch(base: Wan) -> tuple[Tensor, Tensor, list]:
    """Three latents at three noise levels, with prompts of different lengths."""
    latents = seeded_noise((3, *base.latent_shape(WIDTH, HEIGHT)), "latents")
    return latents, torch.tensor([1.0, 0.6, 0.123]), base.encode([SHORT, LONG, ""])


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
    with torch.no_grad():
        together = base.velocity(x, sigma, cond)
        for row, prompt in enumerate((SHORT, LONG, "")):
            expected = plain(base, x[row], sigma[row].item(), prompt)
            assert torch.allclose(together[row], expected, rtol=0, atol=1e-5)
            assert torch.allclose(
                base.velocity(x[[row]], sigma[[row]], [cond[row]])[0], expected, rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_deterministic_rollout_is_the_pipelines_own_sampling_with_an_euler_scheduler(folder, guidance):
    policy = load(folder, guidance=guidance)
    policy.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    shape = policy.latent_shape(WIDTH, HEIGHT)
    rollout = roll_out(
        policy, deterministic(4), policy.pipeline_sigmas(4, shape), policy.encode([LONG]), [5], shape
    )
    asked = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": 1,
        "num_inference_steps": 4,
        "guidance_scale": guidance,
    }
    asked |= {"max_sequence_length": TOKENS, "latents": rollout.noise(0, 0)[None, :, None]}
    latents = policy.pipeline(LONG, **asked, output_type="latent").frames
    assert torch.allclose(rollout.latents[0], latents[:, :, 0], rtol=0, atol=1e-5)
    picture = policy.pipeline(LONG, **asked, output_type="pt").frames[:, 0]
    assert torch.allclose(
        policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("steps", [2, 8, 50])
def test_its_schedule_is_its_schedulers_and_begins_at_pure_noise(base, steps):
    scheduler = base.pipeline.scheduler
    scheduler.set_timesteps(steps)
    sigmas = base.pipeline_sigmas(steps, base.latent_shape(WIDTH, HEIGHT))
    assert torch.allclose(sigmas, scheduler.sigmas.float(), rtol=0, atol=2e-6) and torch.equal(
        sigmas[1:], scheduler.sigmas[1:].float()
    )
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_in_16_bit_the_model_still_sees_the_exact_noise_level(folder):
    policy, seen = load(folder, dtype="bf16"), []
    policy.transformer.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].clone())
    )
    sigma = torch.tensor([0.9545, 0.954])
    with torch.no_grad():
        policy.velocity(
            seeded_noise((2, *policy.latent_shape(WIDTH, HEIGHT)), "latents"),
            sigma,
            policy.encode([SHORT, LONG]),
        )
    assert torch.equal(seen[0], sigma * 1000)


def test_prompts_are_encoded_as_the_pipeline_does_and_their_padding_is_not_kept(base):
    tokens, _ = base.pipeline.encode_prompt(
        [SHORT, LONG], do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    for row, cond in enumerate(base.encode([SHORT, LONG])):
        assert torch.allclose(cond.tokens, tokens[row, : len(cond.tokens)], rtol=0, atol=1e-5)
        assert not tokens[row, len(cond.tokens) :].any() and len(cond.tokens) < TOKENS


def test_the_cache_gives_the_same_features_and_spares_the_encoder(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("G2RPO_PROMPTS", str(tmp_path / "prompts"))
    monkeypatch.setattr(prompt_cache, "SMALL", 0)
    first, again = load(folder).encode([SHORT, LONG]), load(folder)
    again.pipeline.text_encoder = None
    assert all(
        torch.equal(a.tokens, b.tokens) for a, b in zip(first, again.encode([SHORT, LONG]), strict=True)
    )


def test_guidance_needs_no_text_encoder_once_it_is_dropped(folder, batch):
    expected = load(folder, guidance=5.0).velocity(*batch)
    fresh = load(folder, guidance=5.0)
    fresh.drop_text_encoders()
    assert fresh.pipeline.text_encoder is None and torch.equal(fresh.velocity(*batch), expected)


def test_a_batch_is_decoded_as_its_pictures_one_by_one(base, batch):
    pictures = base.decode(batch[0])
    assert torch.allclose(pictures, torch.cat([base.decode(x[None]) for x in batch[0]]), rtol=0, atol=1e-5)
    assert (
        pictures.shape == (3, HEIGHT, WIDTH, 3)
        and pictures.is_contiguous()
        and pictures.dtype == torch.float32
    )


def test_a_fresh_adapter_sits_on_both_attentions_of_every_block_and_changes_nothing(base, folder, batch):
    policy = load(folder)
    policy.add_lora(4, 4, 1, feed_forward=True)
    attention = [f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    block = [*attention, "ffn.net.0.proj", "ffn.net.2"]
    assert set(policy.pairs()) == {f"blocks.{number}.{name}" for number in range(2) for name in block}
    with torch.no_grad():
        assert torch.allclose(policy.velocity(*batch), base.velocity(*batch), rtol=0, atol=1e-6)


def test_the_reference_is_the_model_without_adapter(base, folder, batch):
    policy = load(folder, lora_seed=0)
    with torch.no_grad():
        with policy.reference():
            assert torch.allclose(policy.velocity(*batch), base.velocity(*batch), rtol=0, atol=1e-6)
        assert not torch.allclose(policy.velocity(*batch), base.velocity(*batch), atol=1e-3)


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
    place = tmp_path_factory.mktemp("run")
    (place / "train.txt").write_text(f"{SHORT}\n{LONG}\n")
    (place / "heldout.txt").write_text("a dog\n")
    model = {
        "family": "wan",
        "path": str(folder),
        "width": WIDTH,
        "height": HEIGHT,
        "max_sequence_length": TOKENS,
    }
    tree = {
        "model": model | {"guidance": 5.0, "schedule": "pipeline"},
        "lora": {"rank": 4, "alpha": 8, "targets": "attention+feed_forward"},
        "method": {"name": "g2rpo", "num_steps": 4, "group_size": 3, "learning_rate": 1e-2},
        "rewards": [{"name": "colourfulness"}],
        "prompts": {"train": str(place / "train.txt"), "heldout": str(place / "heldout.txt")},
        "train": {"steps": 1, "prompts_per_step": 2, "eval_noises": 1, "checkpoint_every": 1},
    }
    train(from_dict(tree), place / "run", progress=Silent())
    return tree, place / "run"


def test_a_run_learns_and_leaves_a_lora_that_diffusers_loads_with_the_same_effect(run, folder, batch):
    _, place = run
    assert any(row.get("grad_norm", 0) > 0 for row in RunFolder.open(place).metrics())
    file = RunFolder.open(place).latest() / "lora.safetensors"
    ours, theirs = load(folder), load(folder)
    ours.load_lora(file)
    # Diffusers itself, on the file as it lies there.
    theirs.pipeline.load_lora_weights(file)
    x, sigma, cond = batch
    with torch.no_grad():
        changed = ours.velocity(x, sigma, cond)
        for row, prompt in enumerate((SHORT, LONG, "")):
            assert torch.allclose(
                plain(theirs, x[row], sigma[row].item(), prompt), changed[row], rtol=0, atol=1e-5
            )
    assert not torch.equal(changed, load(folder).velocity(x, sigma, cond))


def test_a_run_names_its_modules_as_the_published_files_do(run):
    keys = read_tensors(RunFolder.open(run[1]).latest() / "lora.safetensors")[0]
    modules = {
        key.removeprefix("diffusion_model.").rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in keys
    }
    assert all(key.startswith("diffusion_model.") for key in keys)
    assert modules == {
        link.at(str(number)).native
        for link in WAN.links
        for number in range(2)
        if link.native.startswith("blocks.")
    } - {f"blocks.{number}.cross_attn.{name}_img" for number in range(2) for name in "kv"}


def test_a_run_continues_from_the_file_of_another(run, folder, batch):
    file = RunFolder.open(run[1]).latest() / "lora.safetensors"
    drawn, continued = load(folder), load(folder)
    drawn.load_lora(file)
    continued.add_lora(4, 8, seed=3, feed_forward=True)
    continue_from(continued, file, 8 / 4, "wan")
    with torch.no_grad():
        assert torch.allclose(continued.velocity(*batch), drawn.velocity(*batch), rtol=0, atol=1e-5)


def test_a_lora_of_another_model_is_refused(folder, tmp_path):
    lora.write(
        tmp_path / "other.safetensors",
        {"joint_blocks.0.x_block.attn.qkv": (torch.ones(2, 8), torch.ones(24, 2))},
        2.0,
    )
    with pytest.raises(lora.LoraError, match="choose a LoRA that was made for it"):
        load(folder).load_lora(tmp_path / "other.safetensors")


def test_pictures_can_be_drawn_with_the_lora_of_a_run(run):
    tree, place = run
    file = RunFolder.open(place).latest() / "lora.safetensors"
    (with_lora,), (without,) = (draw(from_dict(tree), [LONG], 1, given) for given in (file, None))
    assert with_lora.shape == (HEIGHT, WIDTH, 3) and not torch.equal(with_lora, without)
