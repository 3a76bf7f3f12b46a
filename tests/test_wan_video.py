"""Short clips of the wan family against diffusers' own pipeline, rewards that judge frames, and a run up
to its pictures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import wan_folder
from diffusers import FlowMatchEulerDiscreteScheduler
from family_model import LONG, SHORT, close
from PIL import Image
from program import call
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.picture_files import read, strip
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rewards import REWARDS, Reward, Rule
from comfy_g2rpo.rewards.clips import OfFrames, described, judged
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.run.diversity import describe
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.scorer import Scorer
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import ConfigError, from_dict
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.wan import Wan
from g2rpo_trainer.model.inference import draw
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

pytestmark = pytest.mark.xdist_group("wan_video")  # one process makes what they share

WIDTH, HEIGHT, TOKENS, FRAMES = 64, 32, 64, 5
CLIP = {"family": "wan", "max_sequence_length": TOKENS, "frames": FRAMES}


@pytest.fixture(scope="module", params=wan_folder.KINDS)
def folder(request, tmp_path_factory) -> Path:
    """Folders as they are published: of Wan 2.1 and of the 5B of Wan 2.2."""
    return wan_folder.save(tmp_path_factory.mktemp("wan_video") / "model", request.param)


def load(folder: Path, **more: object) -> Wan:
    """Load the model as a run does."""
    return families.load(ModelSection(**CLIP | {"path": str(folder)} | more), folder, "cpu")


@pytest.fixture(scope="module")
def base(folder) -> Wan:
    """A model that tests leave as it is."""
    return load(folder)


def test_a_clips_velocity_is_diffusers_own_at_every_noise_level_whatever_else_is_in_the_batch(base):
    shape = base.latent_shape(WIDTH, HEIGHT)
    assert shape[1] == 2
    x, sigma, prompts = seeded_noise((2, *shape), "clips"), torch.tensor([1.0, 0.3]), [SHORT, LONG]
    with torch.no_grad():
        together = base.velocity(x, sigma, base.encode(prompts))
        for row, prompt in enumerate(prompts):
            tokens, _ = base.pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=TOKENS
            )
            time = sigma[[row]] * 1000
            if base.pipeline.config.expand_timesteps:
                time = (torch.ones(shape[1:])[:, ::2, ::2] * time).flatten()[None]
            expected = base.transformer(x[[row]], time, tokens, return_dict=False)[0][0]
            assert close(together[row], expected)


def test_a_deterministic_rollout_is_the_pipelines_own_clip(folder):
    policy = load(folder, guidance=5.0)
    policy.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    shape = policy.latent_shape(WIDTH, HEIGHT)
    sigmas, cond = policy.pipeline_sigmas(3, shape), policy.encode([LONG])
    rollout = roll_out(policy, deterministic(3), sigmas, cond, [5], shape)
    asked = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 3}
    asked |= {"guidance_scale": 5.0}
    asked |= {"max_sequence_length": TOKENS, "latents": rollout.noise(0, 0)[None]}
    latents = policy.pipeline(LONG, **asked, output_type="latent").frames
    assert close(rollout.latents[0], latents)
    clip = policy.pipeline(LONG, **asked, output_type="pt").frames
    decoded = policy.decode(rollout.latents[:, 0])
    assert decoded.shape == (1, FRAMES, HEIGHT, WIDTH, 3) and decoded.is_contiguous()
    assert close(decoded, clip.permute(0, 1, 3, 4, 2))


def clips() -> Tensor:
    """Make two clips of four frames that brighten and darken."""
    light = torch.tensor([[0.2, 0.4, 0.6, 0.8], [0.9, 0.1, 0.5, 0.5]])
    return light[:, :, None, None, None].expand(2, 4, 8, 6, 3).clone()


def brightness(images: Tensor, prompts: object) -> Tensor:
    """Judge by the mean level."""
    return images.mean((1, 2, 3))


BRIGHT = Rule("bright", brightness, compares_across_prompts=True)


@pytest.mark.parametrize(
    ("mode", "expected"), [("mean", [0.5, 0.5]), ("min", [0.2, 0.1]), ("strip", [0.5, 0.5])]
)
def test_a_clip_is_judged_by_its_frames_mean_its_worst_or_a_strip_of_them(mode, expected):
    assert judged(OfFrames(BRIGHT, mode), clips(), ["a", "b"]).tolist() == pytest.approx(expected)


def test_frames_that_cannot_be_judged_are_left_out_and_a_broken_clip_is_not_judged():
    def shyly(images: Tensor, _: object) -> Tensor:
        level = images.mean((1, 2, 3))
        return torch.where(level > 0.7, torch.nan, level)

    shy = Rule("shy", shyly, True)
    assert judged(shy, clips(), ["a", "b"]).tolist() == pytest.approx([0.4, 1.1 / 3])
    assert judged(OfFrames(shy, "min"), clips(), ["a", "b"]).tolist() == pytest.approx([0.2, 0.1])
    broken = clips()
    broken[0, 2, 0, 0, 0] = torch.nan
    assert judged(BRIGHT, broken, ["a", "b"]).isnan().tolist() == [True, False]
    assert judged(shy, torch.full((1, 2, 4, 4, 3), 0.9), ["a"]).isnan().all()


def test_a_reward_of_groups_compares_frames_of_one_moment():
    class Ranks(Reward):
        """Judge by the place in the group."""

        name, licence, compares_across_prompts, needs_group = "ranks", "yours", False, True

        def score(self, images: Tensor, prompts: object) -> Tensor:
            """Score images [B, H, W, 3]: [B]."""
            return images.mean((1, 2, 3)).argsort().argsort().float()

    scorer = Scorer(lambda latents: latents, [Ranks(), OfFrames(Ranks(), "min")], ["a"], 2)
    scorer([0, 0], [0, 1], clips())
    assert scorer.scores[:, 0].tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_a_reward_of_frames_is_the_reward_on_pictures_and_in_all_else():
    wrapped, pictures = OfFrames(REWARDS["jpeg"], "min"), seeded_noise((2, 16, 16, 3), "pictures").sigmoid()
    assert torch.equal(wrapped.score(pictures, ["a", "b"]), REWARDS["jpeg"].score(pictures, ["a", "b"]))
    for name in ("name", "licence", "compares_across_prompts", "note"):
        assert getattr(wrapped, name) == getattr(REWARDS["jpeg"], name)
    assert wrapped.embed is None and not wrapped.needs_group and not wrapped.runs_elsewhere
    with pytest.raises(ValueError, match="choose one of: mean, min, strip"):
        OfFrames(REWARDS["jpeg"], "max")


def test_clips_of_still_frames_are_as_far_apart_as_their_pictures():
    pictures = seeded_noise((3, 16, 16, 3), "stills").sigmoid()
    pair = (describe(pictures, None)["pixels"], described_of(pictures)["pixels"])
    apart, still = (torch.cdist(pixels, pixels) for pixels in pair)
    assert torch.allclose(apart, still, atol=1e-6)


def described_of(pictures: Tensor) -> dict[str, Tensor]:
    """Describe clips in which nothing moves."""
    return described(lambda images: describe(images, None), pictures[:, None].expand(-1, 4, -1, -1, -1))


def test_a_strip_has_the_first_and_the_last_frame_and_few_between():
    clip = torch.arange(81.0).view(1, 81, 1, 1, 1).expand(1, 81, 2, 3, 3)
    shown = strip(clip)
    assert shown.shape == (1, 2, 18, 3) and shown[0, 0, ::3, 0].tolist() == [0, 16, 32, 48, 64, 80]
    assert strip(clip[:, :5]).shape == (1, 2, 15, 3)


def test_what_makes_no_clip_is_refused(tmp_path):
    model = wan_folder.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.frames is 7; .* set it to 5"):
        load(model, frames=7)
    single = r"model\.frames is 5, but FLUX\.1 makes single pictures; set it to 1"
    with pytest.raises(ValueError, match=single):
        families.load(ModelSection(family="flux", path=str(tmp_path), frames=5), tmp_path, "cpu")


def config(place: Path, model: Path, **more: object) -> dict:
    """Write a whole configuration of two steps with guidance, two rewards and a look at held-out prompts."""
    (place / "train.txt").write_text(f"{SHORT}\n{LONG}\n")
    (place / "heldout.txt").write_text("a dog\n")
    section = CLIP | {"path": str(model), "width": WIDTH, "height": HEIGHT}
    return {
        "model": section | {"guidance": 5.0, "schedule": "comfyui"},
        "lora": {"rank": 4, "alpha": 8},
        "method": {"name": "g2rpo", "num_steps": 3, "group_size": 3, "learning_rate": 1e-2},
        "rewards": [{"name": "colourfulness", "frames": "min"}, {"name": "jpeg"}],
        "prompts": {"train": str(place / "train.txt"), "heldout": str(place / "heldout.txt")},
        "train": {"steps": 1, "prompts_per_step": 1, "eval_noises": 1, "checkpoint_every": 1},
    } | more


def test_votes_are_asked_for_clips_only_as_strips(tmp_path):
    model, rewards = wan_folder.save(tmp_path / "model"), [{"name": "votes"}]
    tree = config(tmp_path, model, rewards=rewards, heldout_rewards=["jpeg"])
    with pytest.raises(ConfigError, match="each of 5 frames; set its frames: strip"):
        from_dict(tree)
    assert from_dict(tree | {"rewards": [{"name": "votes", "frames": "strip"}]}).rewards[0].frames == "strip"


def test_a_run_learns_from_clips_and_shows_them(tmp_path):
    tree = config(tmp_path, wan_folder.save(tmp_path / "model"))
    train(from_dict(tree), tmp_path / "run", progress=Silent())
    run = RunFolder.open(tmp_path / "run")
    row = next(row for row in run.metrics() if "nfe" in row)
    assert row["grad_norm"] > 0 and row["reward/jpeg/std"] > 0 and row["diversity/group"] > 0
    file = run.latest() / "lora.safetensors"
    assert any(up.any() for _, up in lora.read(file).pairs.values())
    (sample,) = run.samples(1)
    assert sample.frames == FRAMES and read(sample.path).shape == (HEIGHT, FRAMES * WIDTH, 3)
    with Image.open(sample.path.with_suffix(".webp")) as clip:
        assert (clip.n_frames, clip.size) == (FRAMES, (WIDTH, HEIGHT))
    assert (run.path / "before_after.png").is_file()
    (drawn,) = draw(from_dict(tree), [LONG], 1, file)
    assert drawn.shape == (FRAMES, HEIGHT, WIDTH, 3)
    words = ("--prompt", LONG, "--seed", 1, "--out", tmp_path / "clip.png")
    assert call("sample", run.path, *words) == 0
    assert torch.allclose(read(tmp_path / "clip.png"), strip(drawn), rtol=0, atol=1 / 255)
    with Image.open(tmp_path / "clip.webp") as clip:
        assert clip.n_frames == FRAMES
