"""The flux2 family on tiny random models against diffusers' own pipelines, and a run of it from the recipe
to the LoRA file.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import family_model as family
import flux2_folder
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from family_model import LONG, SHORT, SIGMA, Batch, close
from program import call
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.lora.forms import Form, in_core
from comfy_g2rpo.lora.key_names import BOTH, FLUX2, family_of_model
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, seeded_noise
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import load as load_recipe
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.flux2 import Flux2
from g2rpo_trainer.run import continue_from

pytestmark = pytest.mark.xdist_group("flux2")  # one process makes what they share

PROMPTS = (SHORT, LONG, "a dog")
WIDTH, HEIGHT, SHAPE = 64, 48, (128, 3, 4)
LENGTHS = {"klein base": 64, "klein": 64, "dev": 340}  # dev's template has a long message of its own
MODULES = 8 + 4 + 2 * 2


@pytest.fixture(scope="module", params=flux2_folder.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Go through the published kinds."""
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders as they are published."""
    place = tmp_path_factory.mktemp("flux2")
    return {kind: flux2_folder.save(place / kind, kind) for kind in flux2_folder.KINDS}


def load(folders: dict[str, Path], kind: str, **more: object) -> Flux2:
    """Load a model as a run does."""
    section = {"family": "flux2", "path": str(folders[kind]), "width": WIDTH, "height": HEIGHT}
    section |= {"max_sequence_length": LENGTHS[kind], **more}
    return families.load(ModelSection(**section), folders[kind], "cpu")


@pytest.fixture(scope="module")
def bases(folders) -> dict[str, Flux2]:
    """Models without adapter; tests leave them as they are."""
    guidance = {"klein base": 4.0, "klein": 1.0, "dev": 4.0}
    return {kind: load(folders, kind, guidance=guidance[kind]) for kind in flux2_folder.KINDS}


@pytest.fixture
def base(bases: dict[str, Flux2], kind: str) -> Flux2:
    """One of them."""
    return bases[kind]


def batch(policy: Flux2) -> Batch:
    """Give three latents at three noise levels, with three prompts."""
    return seeded_noise((3, *SHAPE), "latents"), torch.tensor(SIGMA), policy.encode(PROMPTS)


def plain(policy: Flux2, x: Tensor, sigma: float, tokens: Tensor) -> Tensor:
    """Call diffusers' transformer on one sample as its pipelines do, guidance included."""
    dev, ids = policy.transformer.config.guidance_embeds, Flux2Pipeline._prepare_latent_ids(x[None])

    def model(text: Tensor) -> Tensor:
        return policy.transformer(
            Flux2Pipeline._pack_latents(x[None]),
            text[None],
            torch.tensor([sigma]),
            ids,
            Flux2Pipeline._prepare_text_ids(text[None]),
            torch.tensor([4.0]) if dev else None,
            return_dict=False,
        )[0]

    packed = model(tokens)
    if not dev and policy.guidance > 1:
        empty = model(policy.encode([""])[0].tokens)
        packed = empty + policy.guidance * (packed - empty)
    return Flux2Pipeline._unpack_latents_with_ids(packed, ids)[0]


def test_the_velocity_is_diffusers_own_at_every_noise_level_whatever_else_is_in_the_batch(base):
    x, sigma, cond = given = batch(base)
    family.check_rows(
        base, given, lambda row: plain(base, x[row], sigma[row].item(), cond[row].tokens), alone=False
    )


def test_a_deterministic_rollout_is_the_pipelines_own_sampling(base):
    sigmas = base.pipeline_sigmas(4, SHAPE)
    rollout = roll_out(base, deterministic(4), sigmas, base.encode([LONG]), [5], SHAPE)
    asked = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "guidance_scale": base.guidance}
    asked |= {"latents": rollout.noise(0, 0)[None], "max_sequence_length": base.max_sequence_length}
    picture = base.pipeline(prompt=LONG, **asked, output_type="pt").images
    assert torch.equal(sigmas, base.pipeline.scheduler.sigmas)
    assert close(base.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1))


def test_a_negative_prompt_is_klein_bases_alone(folders, bases):
    base = load(folders, "klein base", guidance=4.0, negative_prompt="a dog")
    x, sigma, cond = batch(base)
    with torch.no_grad():
        given, without = (base._forward(x, sigma, some) for some in (cond, base.encode(["a dog"]) * len(x)))
        assert close(base.velocity(x, sigma, cond), without + 4 * (given - without))
        assert not close(base.velocity(x, sigma, cond), bases["klein base"].velocity(x, sigma, cond), 1e-3)
    for kind, guidance, says in (("dev", 4.0, "as an input"), ("klein", 1.0, "at model.guidance 1")):
        with pytest.raises(ValueError, match=says):
            load(folders, kind, guidance=guidance, negative_prompt="a dog")


def test_latents_stand_as_the_pipeline_cuts_them_and_pictures_are_whole(base):
    latents = seeded_noise((2, *SHAPE), "latents")
    mean, var = (value.view(1, -1, 1, 1) for value in (base.vae.bn.running_mean, base.vae.bn.running_var))
    raw = Flux2Pipeline._unpatchify_latents(latents * (var + 1e-4).sqrt() + mean)
    pictures = base.decode(latents)
    expected = (base.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert close(pictures, expected)
    assert pictures.shape == (2, HEIGHT, WIDTH, 3) and pictures.is_contiguous()


@pytest.mark.parametrize(
    ("steps", "shape", "mu"),
    [(50, (128, 32, 32), 1.7020), (10, (128, 32, 32), 1.9878), (28, (128, 64, 128), 1.8433)],
)
def test_its_schedule_is_shifted_by_resolution_and_steps(bases, steps, shape, mu):
    exponential = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    exponential.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    assert torch.allclose(bases["dev"].pipeline_sigmas(steps, shape), exponential.sigmas, rtol=0, atol=1e-4)


def test_in_16_bit_the_model_still_sees_the_exact_noise_level_and_guidance(folders):
    policy = load(folders, "dev", dtype="bf16", guidance=3.3)
    seen = family.given_to(policy.transformer.time_guidance_embed.time_proj)
    sigma = torch.tensor([0.9545454, 0.1234567])
    with policy.inference():
        policy.velocity(seeded_noise((2, *SHAPE), "x"), sigma, policy.encode([SHORT, LONG]))
    assert torch.equal(seen[0], sigma * 1000) and torch.allclose(seen[1], torch.tensor(3300.0), rtol=1e-6)


def test_the_cache_gives_the_same_features_and_spares_the_encoder(folders, tmp_path, monkeypatch):
    family.keep_prompts(tmp_path, monkeypatch)
    first, again = load(folders, "klein base").encode([SHORT, LONG]), load(folders, "klein base")
    again.drop_text_encoders()
    assert again.pipeline.text_encoder is None
    assert family.same_features(first, again.encode([SHORT, LONG]))


def test_guidance_needs_no_text_encoder_once_it_is_dropped(folders, bases):
    base = bases["klein base"]
    family.check_dropped(base, load(folders, "klein base", guidance=4.0), batch(base))


@pytest.fixture(scope="module")
def tuned(folders) -> Flux2:
    """Dev with a LoRA on attention and feed-forward layers that has moved away from zero."""
    return family.moved(load(folders, "dev", guidance=4.0))


def test_the_adapter_sits_on_both_kinds_of_blocks_and_the_reference_is_the_model_without_it(
    folders, bases, tuned
):
    double = "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj"
    double += " attn.to_add_out"
    single = [f"{block}.attn.{name}" for block in range(2) for name in ("to_qkv_mlp_proj", "to_out")]
    attention = {f"transformer_blocks.0.{name}" for name in double.split()}
    attention |= {f"single_transformer_blocks.{name}" for name in single}
    forward = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
    more = {f"transformer_blocks.0.{name}" for name in forward}
    assert set(tuned.pairs()) == attention | more and len(attention | more) == MODULES
    fresh = load(folders, "klein base")
    fresh.add_lora(4, 8, 0)
    assert set(fresh.pairs()) == attention
    family.check_reference(tuned, bases["dev"], batch(bases["dev"]))


def test_what_the_models_do_not_take_is_refused(folders, bases):
    assert bases["klein"].latent_shape(WIDTH, HEIGHT) == SHAPE
    assert bases["dev"].comfyui_shift == math.exp(2.02)
    with pytest.raises(ValueError, match="72×64; both must be multiples of 16"):
        bases["dev"].latent_shape(72, 64)
    with pytest.raises(ValueError, match="max_sequence_length is 0"):
        load(folders, "dev", max_sequence_length=0)
    says = r"model\.guidance is 4, but this FLUX\.2 \(klein, distilled\) takes no guidance; set it to 1"
    with pytest.raises(ValueError, match=says):
        load(folders, "klein", guidance=4.0)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_dev_says_that_its_published_tokenizer_needs_torchvision(folders, tmp_path):
    index = (folders["dev"] / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace("Qwen2Tokenizer", "PixtralProcessor"))
    says = "by a PixtralProcessor, which needs torchvision: pip install torchvision"
    with pytest.raises(ValueError, match=says):
        families.load(ModelSection(family="flux2", path=str(tmp_path)), tmp_path, "cpu")


def test_a_folder_is_known_to_have_diffusers_names_and_a_file_native_ones(bases):
    weights = bases["dev"].transformer.state_dict()
    for given, naming in ((weights, "diffusers"), (flux2_folder.published(weights), "native")):
        assert family_of_model(name.removesuffix(".weight") for name in given) == (FLUX2, naming)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory) -> Path:
    """One whole step of the bundled recipe on the tiny klein base, all targets."""
    place = tmp_path_factory.mktemp("run") / "run"
    more = (f"model.width={WIDTH}", f"model.height={HEIGHT}", "model.max_sequence_length=64")
    targets = "lora.targets=attention+feed_forward"
    assert family.train_recipe("flux2_klein", folders["klein base"], place, *more, targets) == 0
    return place


@pytest.mark.long
def test_a_run_learns_and_names_its_modules_as_every_comfyui_that_has_the_model(run):
    keys, written = read_tensors(family.lora_of(run))[0], lora.read(family.lora_of(run))
    assert family.learnt(run)
    # q, k and v are one.
    assert len(written.pairs) == 2 + 2 + 4 + 2 * 2 and all(up.any() for _, up in written.pairs.values())
    assert all(f"diffusion_model.{module}.alpha" in keys for module in written.pairs)
    assert {in_core(FLUX2, module, Form("diffusion_model.")) for module in written.pairs} == {BOTH}


def test_the_exported_lora_of_a_run_has_the_same_effect_in_diffusers_and_in_the_next_run(
    run, folders, bases, tmp_path
):
    file, base, exported = family.lora_of(run), bases["klein base"], tmp_path / "diffusers.safetensors"
    call("export", file, "--form", "diffusers", "--no-alpha", "--out", exported)
    ours, theirs, continued = (load(folders, "klein base", guidance=4.0) for _ in range(3))
    ours.load_lora(file)
    theirs.pipeline.load_lora_weights(exported)
    continued.add_lora(4, 8, seed=3, feed_forward=True)
    continue_from(continued, file, 8 / 4, "flux2")
    x, sigma, cond = given = batch(base)
    with torch.no_grad():
        changed, untrained = ours.velocity(*given), base.velocity(*given)
        assert close(continued.velocity(*given), changed)
    family.check_effect(
        changed, lambda row: plain(theirs, x[row], sigma[row].item(), cond[row].tokens), untrained, 1e-4
    )


@pytest.mark.parametrize(
    ("recipe", "guidance", "model"),
    [("flux2_klein", 4.0, "FLUX.2-klein-base-4B"), ("flux2_dev", 4.0, "FLUX.2-dev")],
)
def test_the_bundled_recipes_are_the_published_ones(recipe, guidance, model):
    config = load_recipe(recipe)
    assert config.model.path == f"black-forest-labs/{model}" and config.model.guidance == guidance
    assert (config.model.family, config.model.max_sequence_length) == ("flux2", 512)
    assert (config.lora.rank, config.lora.alpha) == (64, 128)
    assert json.loads(config.model_dump_json())["method"]["group_size"] == 12
