"""The flux family on a tiny model of the real architecture: velocity, schedule, pictures, prompts on disk,
LoRA files, whole runs.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import family_model as family
import flux_folder
import pytest
import torch
from comfy_host import COMFYUIS, make_base, run_script
from diffusers import FluxPipeline
from flux_folder import TOKENS
from program import call
from safetensors.torch import save_file
from torch import Tensor

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import read_tensors
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.recipes import Recipe
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.schedule import shifted_sigmas
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import ConfigError, load, model_folder
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.files.diffusers_folder import load_pipeline
from g2rpo_trainer.families.flux import Flux, pack, unpack
from g2rpo_trainer.model import prompt_cache

PROMPTS = ("two red circles", "a green square left of a blue triangle")
SHAPE, SIZE = (16, 8, 12), {"height": 64, "width": 96}
MODULES = 2 * (8 + 4) + 2 * (3 + 2)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a dev, in shards, and a schnell."""
    root = tmp_path_factory.mktemp("flux")
    return {
        "dev": flux_folder.save(root / "dev", shard="2MB"),
        "schnell": flux_folder.save(root / "schnell", "schnell"),
    }


def section(folder: Path, **changes: object) -> ModelSection:
    """Describe a tiny model as a recipe does."""
    usual = {"family": "flux", "path": str(folder), "guidance": 3.5, "max_sequence_length": TOKENS}
    return ModelSection(**{**usual, **changes})


def loaded(folder: Path, **changes: object) -> Flux:
    """Load through the families' door, as a run does."""
    policy = families.load(section(folder, **changes), folder, "cpu")
    assert isinstance(policy, Flux)
    return policy


@pytest.fixture(scope="session")
def dev(folders: dict[str, Path]) -> Flux:
    """A dev without adapter; tests leave it as it is."""
    return loaded(folders["dev"])


@pytest.fixture(scope="session")
def tuned(folders: dict[str, Path]) -> Flux:
    """A dev with an adapter, whose alpha is not its rank, on purpose; tests leave it as it is."""
    return family.moved(loaded(folders["dev"]), size=0.05)


@pytest.fixture
def batch(dev: Flux) -> tuple[Tensor, Tensor, list]:
    """Two latents at two noise levels, with their prompts."""
    return seeded_noise((2, *SHAPE), "latents"), torch.tensor([0.9, 0.3]), dev.encode(PROMPTS)


def difference(one: Tensor, other: Tensor) -> float:
    """Compare by the largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


def test_tokens_are_packed_as_the_pipeline_packs_them() -> None:
    x = seeded_noise((2, *SHAPE), "x")
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, *SHAPE))
    assert torch.equal(unpack(pack(x), SHAPE[1] // 2, SHAPE[2] // 2), x)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_the_velocity_is_the_transformers_own_with_noise_levels_per_sample(folders, batch, guidance):
    policy, (x, sigma, cond) = loaded(folders["dev"], guidance=guidance), batch
    rows, columns = SHAPE[1] // 2, SHAPE[2] // 2
    with torch.no_grad():
        direct = policy.transformer(
            hidden_states=FluxPipeline._pack_latents(x, 2, *SHAPE),
            timestep=sigma,
            guidance=torch.full((2,), guidance),
            pooled_projections=torch.stack([c.pooled for c in cond]),
            encoder_hidden_states=torch.stack([c.tokens for c in cond]),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, rows, columns, "cpu", torch.float32),
            txt_ids=torch.zeros(TOKENS, 3),
            return_dict=False,
        )[0]
        ours = policy.velocity(x, sigma, cond)
    assert difference(ours, FluxPipeline._unpack_latents(direct, SIZE["height"], SIZE["width"], 8)) <= 1e-5


@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_a_deterministic_rollout_is_the_pipelines_own_sampling(folders, kind):
    policy = loaded(folders[kind], guidance=3.5 if kind == "dev" else 1.0)
    sigmas = families.sigmas(policy, "pipeline", Recipe(num_steps=4), SHAPE)
    rollout = roll_out(policy, deterministic(4), sigmas, policy.encode(PROMPTS[:1]), [5], SHAPE)
    policy.pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": TOKENS, **SIZE}
    asked["latents"] = pack(rollout.noise(0, 0)[None])
    picture = policy.pipeline(PROMPTS[0], **asked, output_type="pt").images
    assert torch.equal(policy.pipeline.scheduler.sigmas, sigmas)
    assert torch.allclose(policy.decode(rollout.latents[:, 0]), picture.permute(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize(("kind", "guidance"), [("dev", 3.5), ("schnell", 1.0)])
def test_a_negative_prompt_is_refused_for_guidance_is_an_input(folders, kind, guidance):
    with pytest.raises(ValueError, match=r"model\.negative_prompt has no effect: .* remove it"):
        loaded(folders[kind], guidance=guidance, negative_prompt="blur")


def test_dev_is_shifted_by_resolution_and_schnell_not(folders, dev):
    small, large = (dev.pipeline_sigmas(8, dev.latent_shape(side, side)) for side in (256, 1024))
    for sigmas, mu in ((small, 0.5), (large, 1.15)):
        assert torch.allclose(sigmas, shifted_sigmas(8, math.exp(mu)), atol=1e-6)
    schnell = loaded(folders["schnell"], guidance=1)
    assert torch.allclose(schnell.pipeline_sigmas(4, SHAPE), shifted_sigmas(4, 1.0), atol=1e-6)


def test_a_schedule_is_the_methods_or_comfyuis_where_the_recipe_says_so(folders, dev):
    recipe = Recipe(num_steps=8, shift=3.0)
    assert torch.equal(families.sigmas(dev, "method", recipe, SHAPE), shifted_sigmas(8, 3.0))
    assert torch.equal(families.sigmas(dev, "comfyui", recipe, SHAPE), shifted_sigmas(8, math.exp(1.15)))
    schnell = loaded(folders["schnell"], guidance=1)
    assert torch.equal(families.sigmas(schnell, "comfyui", recipe, SHAPE), shifted_sigmas(8, 1.0))


def test_noise_levels_and_guidance_are_not_rounded_to_16_bit(folders):
    policy = loaded(folders["dev"], dtype="bf16")
    seen = family.given_to(policy.transformer.time_text_embed.time_proj)
    sigma = torch.tensor([0.9545454, 0.1234567])
    with policy.inference():
        policy.velocity(seeded_noise((2, *SHAPE), "x"), sigma, policy.encode(PROMPTS))
    assert torch.equal(seen[0], sigma * 1000) and torch.equal(seen[1], torch.full((2,), 3500.0))


def test_the_reference_is_the_model_without_adapter(dev, tuned, batch):
    with torch.no_grad():
        with tuned.reference():
            assert difference(tuned.velocity(*batch), dev.velocity(*batch)) <= 1e-6
        assert difference(tuned.velocity(*batch), dev.velocity(*batch)) > 1e-2


def test_every_attention_and_feed_forward_layer_gets_an_adapter(folders, tuned):
    assert len(tuned.pairs()) == MODULES
    attention = loaded(folders["dev"])
    attention.add_lora(4, 8, 0)
    assert set(attention.pairs()) == {name for name in tuned.pairs() if ".attn." in name}


def test_sizes_between_tokens_and_settings_that_the_model_does_not_take_are_refused(folders, dev):
    assert dev.latent_shape(96, 64) == SHAPE
    with pytest.raises(ValueError, match="72×64; both must be multiples of 16"):
        dev.latent_shape(72, 64)
    says = r"model\.guidance is 3\.5, but this FLUX\.1 \(schnell\) takes no guidance"
    with pytest.raises(ValueError, match=says):
        loaded(folders["schnell"])
    with pytest.raises(ValueError, match=r"max_sequence_length is 512; FLUX\.1 schnell takes 256"):
        loaded(folders["schnell"], guidance=1, max_sequence_length=512)
    with pytest.raises(ValueError, match=r"max_sequence_length is 0"):
        loaded(folders["dev"], max_sequence_length=0)


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep prompts on disk although the encoders are small."""
    return family.keep_prompts(tmp_path, monkeypatch)


def test_prompts_come_from_the_disk_as_they_were_encoded_and_need_no_encoder(folders, dev, on_disk):
    loaded(folders["dev"]).encode(PROMPTS)
    again = loaded(folders["dev"])
    again.drop_text_encoders()
    for known, fresh in zip(again.encode(PROMPTS), dev.encode(PROMPTS), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(known, fresh, strict=True))
    assert len(list(on_disk.rglob("*.safetensors"))) == len(PROMPTS)


def test_a_damaged_prompt_is_encoded_again(folders, dev, on_disk):
    loaded(folders["dev"]).encode(PROMPTS)
    for file in on_disk.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(loaded(folders["dev"]).encode(PROMPTS)[0].tokens, dev.encode(PROMPTS)[0].tokens)
    assert all(read_tensors(file) for file in on_disk.rglob("*.safetensors"))


def test_other_encoders_and_other_settings_have_prompts_of_their_own(folders, on_disk):
    ways = [(dtype, length) for dtype in ("fp32", "bf16") for length in (24, 32)]
    caches = [prompt_cache.for_model(folders["dev"], "flux", *way) for way in ways]
    config = folders["schnell"] / "text_encoder/config.json"
    config.write_text(config.read_text() + " ")
    caches.append(prompt_cache.for_model(folders["schnell"], "flux", "fp32", 24))
    assert len({cache.folder for cache in caches}) == 5
    assert caches[0].folder == prompt_cache.for_model(folders["dev"], "flux", "fp32", 24).folder


def test_small_encoders_are_quicker_than_the_disk(dev):
    assert dev.cache is None


@pytest.fixture
def adapter(tuned: Flux, tmp_path: Path) -> Path:
    """Write the adapter as a run does."""
    lora.write(tmp_path / "lora.safetensors", tuned.pairs(), 8.0)
    return tmp_path / "lora.safetensors"


def test_diffusers_and_the_next_run_load_the_lora_with_equal_output(folders, tuned, batch, adapter):
    theirs, ours = loaded(folders["dev"]), loaded(folders["dev"])
    theirs.pipeline.load_lora_weights(adapter)
    ours.load_lora(adapter)
    assert len(ours.layers) == MODULES
    with torch.no_grad():
        expected = tuned.velocity(*batch)
        assert difference(theirs.velocity(*batch), expected) <= 1e-5
        assert difference(ours.velocity(*batch), expected) <= 1e-5


def test_a_lora_of_another_model_is_refused(dev, tmp_path):
    lora.write(tmp_path / "other.safetensors", {"blocks.0.q": (torch.ones(1, 2), torch.ones(2, 1))}, 1.0)
    with pytest.raises(ValueError, match="fits no module"):
        dev.load_lora(tmp_path / "other.safetensors")


def train(folder: Path, out: Path, *settings: str) -> int:
    """Run the bundled recipe on a tiny model."""
    size = ("model.width=64", "model.height=64", f"model.max_sequence_length={TOKENS}")
    return family.train_recipe("flux_dev", folder, out, *size, *settings)


def test_a_run_trains_end_to_end_and_its_lora_draws(folders, tmp_path):
    assert (
        train(folders["dev"], tmp_path / "run", "train.steps=2", "lora.targets=attention+feed_forward") == 0
    )
    run = RunFolder.open(tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    written = lora.read(tmp_path / "run" / summary["lora"])
    assert [row["grad_norm"] > 0 for row in run.metrics() if "grad_norm" in row] == [True, True]
    assert len(written.pairs) == MODULES and all(up.abs().max() > 0 for _, up in written.pairs.values())
    picture = tmp_path / "a.png"
    assert call("sample", tmp_path / "run", "--prompt", "a circle", "--out", picture) == 0
    assert picture.is_file()


def test_a_run_on_a_single_file_names_it_in_its_lora(folders, weights, tmp_path):
    file = tmp_path / "my_flux.safetensors"
    save_file({name: value.contiguous() for name, value in flux_folder.published(weights).items()}, file)
    assert train(folders["dev"], tmp_path / "run", f"model.transformer={file}") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert lora.read(tmp_path / "run" / summary["lora"]).metadata["g2rpo.base_model"] == "my_flux.safetensors"


def test_schnell_trains_by_its_own_schedule(folders, tmp_path):
    own = ("model.guidance=1", "model.schedule=pipeline")
    assert train(folders["schnell"], tmp_path / "run", *own) == 0


def test_the_bundled_recipe_is_the_published_one() -> None:
    config = load("flux_dev")
    assert (config.model.family, config.model.width, config.model.guidance) == ("flux", 720, 3.5)
    assert (config.lora.rank, config.lora.alpha, config.method.group_size) == (64, 128, 12)


def copy(folder: Path, place: Path) -> Path:
    """Copy a model's folder, to damage it."""
    return shutil.copytree(folder, place / "models--owner--a.model" / "snapshots" / "0")


def test_a_missing_or_unfinished_shard_is_named_with_the_command_that_mends_it(folders, tmp_path):
    model = copy(folders["dev"], tmp_path)
    shard = model / "transformer/diffusion_pytorch_model-00002-of-00004.safetensors"
    whole = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-10])
    mends = r"; fetch it again with: hf download owner/a\.model --include 'transformer/\*'$"
    has = rf"transformer/{shard.name} has {whole - 10:,} of {whole:,} bytes{mends}"
    lacks = rf"transformer lacks 1 of its 4 weight files, {shard.name} first{mends}"
    with pytest.raises(ValueError, match=has):
        load_pipeline(FluxPipeline, model, torch.float32)
    shard.unlink()
    with pytest.raises(ValueError, match=lacks):
        load_pipeline(FluxPipeline, model, torch.float32)


def test_a_component_that_is_not_there_is_named(folders, tmp_path):
    model = copy(folders["dev"], tmp_path)
    shutil.rmtree(model / "text_encoder_2")
    lacks = r"it lacks the folder text_encoder_2 \(T5EncoderModel\); fetch it again"
    with pytest.raises(ValueError, match=lacks):
        load_pipeline(FluxPipeline, model, torch.float32)


def test_a_folder_of_another_family_says_which_to_choose():
    with pytest.raises(ValueError, match=r"it holds Stable Diffusion 3 and 3\.5; set model\.family: sd3"):
        load_pipeline(FluxPipeline, flux_folder.TINY, torch.float32)


def test_gated_weights_that_are_not_here_are_named_with_the_way_to_them():
    fetch = r"hf download black-forest-labs/FLUX\.1-dev \(.*licence.*hf auth login"
    with pytest.raises(ConfigError, match=fetch):
        model_folder("black-forest-labs/FLUX.1-dev")
    give = r"or leave model\.path empty and give model\.text_encoders and model\.vae, too$"
    with pytest.raises(ConfigError, match=give):
        model_folder("black-forest-labs/FLUX.1-dev", files=True)


@pytest.fixture
def weights(dev: Flux) -> dict[str, Tensor]:
    """Return a dev's weights by diffusers' names, norms off their usual 1."""
    found = {name: value.detach().clone() for name, value in dev.transformer.state_dict().items()}
    return {
        name: seeded_noise(value.shape, name) if "norm_" in name else value for name, value in found.items()
    }


@pytest.mark.parametrize("form", ["published", "diffusers", "checkpoint"])
def test_a_single_file_gives_the_weights_of_the_folder(folders, weights, tmp_path, form):
    given = weights if form == "diffusers" else flux_folder.published(weights)
    if form == "checkpoint":
        given = {f"model.diffusion_model.{name}": value for name, value in given.items()}
        given["vae.decoder.bias"] = torch.ones(1)
    save_file({name: value.contiguous() for name, value in given.items()}, tmp_path / "flux.safetensors")
    model = copy(folders["dev"], tmp_path)
    for shard in (model / "transformer").glob("*.safetensors"):
        shard.unlink()
    got = loaded(model, transformer=str(tmp_path / "flux.safetensors")).transformer.state_dict()
    assert got.keys() == weights.keys() and all(torch.equal(got[name], weights[name]) for name in weights)


def test_plain_fp8_is_read(folders, weights, tmp_path):
    given = {name: value.to(torch.float8_e4m3fn) for name, value in flux_folder.published(weights).items()}
    save_file(given, tmp_path / "fp8.safetensors")
    got = loaded(folders["dev"], transformer=str(tmp_path / "fp8.safetensors")).transformer.state_dict()
    for name, value in weights.items():
        assert torch.equal(got[name], value.to(torch.float8_e4m3fn).float())


def test_a_single_file_that_is_not_the_folders_model_is_refused(folders, weights, tmp_path):
    file = tmp_path / "flux.safetensors"
    given = {name: value.contiguous() for name, value in flux_folder.published(weights).items()}
    save_file(given, file)
    foreign = r"4 of its weights, guidance_in\.in_layer\.bias first, are not in the model"
    with pytest.raises(ValueError, match=foreign):
        loaded(folders["schnell"], guidance=1, transformer=str(file))
    save_file({name: value for name, value in given.items() if name != "img_in.weight"}, file)
    with pytest.raises(ValueError, match=r"it lacks x_embedder\.weight of a FLUX\.1"):
        loaded(folders["dev"], transformer=str(file))
    save_file(given | {"img_in.weight": torch.ones(128, 32)}, file)
    narrow = r"img_in\.weight is \[128, 32\], which does not give x_embedder\.weight \[128, 64\]"
    with pytest.raises(ValueError, match=narrow):
        loaded(folders["dev"], transformer=str(file))


@pytest.mark.comfyui
@pytest.mark.xdist_group("scripts in comfyui")
@pytest.mark.parametrize("comfyui", COMFYUIS)
def test_comfyui_takes_every_key_of_the_lora_and_answers_the_same(
    comfyui, folders, dev, tuned, adapter, batch, tmp_path
):
    if "context_in_dim" not in (comfyui / "comfy/model_detection.py").read_text().partition("txt_in_key")[2]:
        pytest.skip("this ComfyUI loads FLUX at its published size only; a tiny one cannot be tried there")
    x, sigma, cond = batch
    weights = {name: tensor.contiguous() for name, tensor in dev.transformer.state_dict().items()}
    texts = {
        "context": torch.stack([c.tokens for c in cond]),
        "pooled": torch.stack([c.pooled for c in cond]),
    }
    given = {"x": x, "sigma": sigma, **texts}
    given["picture"] = seeded_noise((len(cond), 16, 6, 10), "pictures")
    editor = loaded(folders["dev"], edits="kontext")
    edits = [editor.cond(*c, picture) for c, picture in zip(cond, given["picture"], strict=True)]
    child = Path(__file__).with_name("comfy_child_flux.py")
    save_file(weights, tmp_path / "flux.safetensors")
    base = make_base(tmp_path / "base")
    (base / "models/loras/g2rpo.safetensors").write_bytes(adapter.read_bytes())
    files = {"transformer": str(tmp_path / "flux.safetensors"), "lora": "g2rpo.safetensors"}
    answer = run_script(comfyui, child, base, files, given)
    assert answer.data["warnings"] == [] and answer.data["mapped"] == MODULES
    with torch.no_grad():
        assert difference(answer.tensors["base"], dev.velocity(*batch)) <= 1e-5
        assert difference(answer.tensors["searched"], answer.tensors["plain"]) <= 1e-4
        assert difference(answer.tensors["edited"], editor.velocity(x, sigma, edits)) <= 1e-5
        assert difference(answer.tensors["edited"], answer.tensors["base"]) > 1e-3
        assert difference(answer.tensors["tuned"], tuned.velocity(*batch)) <= 1e-5
