"""Models from ComfyUI's split files and from checkpoints: the folder's weights, tokens and answers, or one
clear line.
"""

import json
import shutil
import subprocess
from pathlib import Path

import diffusers
import flux_folder
import native_files
import pytest
import torch
import transformers
from comfy_host import COMFYUIS, environment, python_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comfy_g2rpo.files.safe import FileError, read_tensors
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import ConfigError, from_dict
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.files import sizes
from g2rpo_trainer.families.files.single_file import Held
from g2rpo_trainer.families.files.text_files import CONFIGS, TextFiles, facts_of_text, kind_of, named
from g2rpo_trainer.families.files.tokenizers import load_tokenizers
from g2rpo_trainer.lora.weight_files import Stored
from g2rpo_trainer.model import prompt_cache
from g2rpo_trainer.model.inference import draw
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.run import train

pytestmark = pytest.mark.xdist_group("single_files")  # one process makes what they share

PROMPT = "a red circle"
# Core reads its flags when it is imported, and only where a program says so.
BEFORE = "import sys; sys.path.insert(0, ''); import comfy.options; comfy.options.enable_args_parsing()"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Write every model as a folder, as files and as a checkpoint."""
    root = tmp_path_factory.mktemp("files")
    return {name: native_files.write(root / name.replace(" ", "_"), name) for name in native_files.FAMILIES}


@pytest.fixture(scope="module")
def sd3(models) -> dict[str, Path]:
    """Return the files of a Stable Diffusion 3.5."""
    return models["sd3"]


def load(name: str, path: Path | None, **given: object):
    """Load a tiny model as a recipe does that names these files."""
    section = {"family": native_files.FAMILIES[name][0], "guidance": 1, "max_sequence_length": 16, **given}
    return families.load(ModelSection(**section), path, "cpu")


def split(files: dict[str, Path]) -> dict[str, object]:
    """Name the files of the parts as a recipe does; tokenizers are the folder's."""
    texts = tuple(str(path) for part, path in files.items() if part.startswith("text_encoder"))
    return {
        "transformer": str(files["transformer"]),
        "vae": str(files["vae"]),
        "text_encoders": texts,
        "tokenizers": str(files["folder"]),
    }


def weights(policy) -> dict[str, Tensor]:
    """List the weights of all parts of a policy's pipeline."""
    parts = {name: part for name, part in policy.pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
    }


def differing(one, other) -> list[str]:
    """Name the weights in which two policies differ."""
    ours, theirs = weights(one), weights(other)
    shared = ours.keys() & theirs.keys()
    alike = {
        name
        for name in shared
        if ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
    }
    return sorted((ours.keys() | theirs.keys()) - alike)


@pytest.mark.parametrize("name", native_files.FAMILIES)
def test_split_files_and_checkpoints_are_the_model_of_the_folder(models, name):
    files = models[name]
    folder, got = load(name, files["folder"]), load(name, None, **split(files))
    assert differing(got, folder) == []
    assert differing(load(name, files["checkpoint"], tokenizers=str(files["folder"])), folder) == []
    t5 = [
        part
        for key, part in got.pipeline.components.items()
        if key.startswith("text_encoder") and hasattr(part, "shared")
    ]
    assert all(part.shared.weight.data_ptr() == part.encoder.embed_tokens.weight.data_ptr() for part in t5)
    theirs, ours = folder.encode([PROMPT])[0], got.encode([PROMPT])[0]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    shape = folder.latent_shape(64, 64)
    assert torch.equal(got.pipeline_sigmas(5, shape), folder.pipeline_sigmas(5, shape))
    x, sigma = torch.randn(1, *shape), torch.tensor([0.6])
    with torch.no_grad():
        assert torch.equal(got.velocity(x, sigma, [ours]), folder.velocity(x, sigma, [theirs]))
        assert torch.equal(got.decode(x), folder.decode(x))


@pytest.mark.parametrize("name", native_files.FAMILIES)
def test_files_may_have_the_names_of_diffusers_too(models, name):
    folder = models[name]["folder"]
    found = {
        part: str(next((folder / part).glob("*.safetensors")))
        for part in models[name]
        if (folder / part).is_dir() and part != "folder"
    }
    texts = tuple(path for part, path in found.items() if part.startswith("text_encoder"))
    given = {
        "transformer": found["transformer"],
        "vae": found["vae"],
        "text_encoders": texts,
        "tokenizers": str(folder),
    }
    assert differing(load(name, None, **given), load(name, folder)) == []


@pytest.mark.parametrize("name", ["wan 2.1", "flux2 klein"])
def test_in_16_bit_what_a_folder_keeps_exact_is_exact(models, name):
    assert (
        differing(
            load(name, None, dtype="bf16", **split(models[name])),
            load(name, models[name]["folder"], dtype="bf16"),
        )
        == []
    )


def test_parts_of_a_folder_may_come_from_files_and_its_own_need_not_be_there(sd3, tmp_path):
    whole = load("sd3", sd3["folder"], dtype="bf16")
    folder = shutil.copytree(sd3["folder"], tmp_path / "folder")
    for part in ("transformer", "vae", "text_encoder_3"):
        next((folder / part).glob("*.safetensors")).unlink()
    given = {
        "transformer": str(sd3["transformer"]),
        "vae": str(sd3["vae"]),
        "text_encoders": (str(sd3["text_encoder_3"]),),
    }
    assert differing(load("sd3", folder, dtype="bf16", **given), whole) == []


def test_files_of_their_own_go_before_a_checkpoint_and_the_large_encoder_of_sd3_may_be_missing(sd3, tmp_path):
    held = {key: value for key, value in load_file(sd3["checkpoint"]).items() if "text_encoder_3" not in key}
    save_file(held, tmp_path / "clips.safetensors")
    without = load(
        "sd3", tmp_path / "clips.safetensors", tokenizers=str(sd3["folder"]), max_sequence_length=0
    )
    assert without.pipeline.text_encoder_3 is None and without.encode([PROMPT])[0].tokens.isfinite().all()
    given = {"text_encoders": (str(sd3["text_encoder_3"]),), "tokenizers": str(sd3["folder"])}
    assert differing(load("sd3", tmp_path / "clips.safetensors", **given), load("sd3", sd3["folder"])) == []


def test_text_encoders_are_loaded_for_a_prompt_that_the_cache_lacks_and_not_before(
    sd3, tmp_path, monkeypatch
):
    monkeypatch.setattr(prompt_cache, "SMALL", 0)
    monkeypatch.setenv("G2RPO_PROMPTS", str(tmp_path))
    for path, given in ((None, split(sd3)), (sd3["folder"], {})):
        first = load("sd3", path, **given)
        assert first.pipeline.text_encoder is None
        known = first.encode([PROMPT])[0]
        assert first.pipeline.text_encoder is not None
        again = load("sd3", path, **given)
        assert (
            torch.equal(again.encode([PROMPT])[0].tokens, known.tokens)
            and again.pipeline.text_encoder is None
        )
        first.drop_text_encoders()
        assert first.pipeline.text_encoder is None
        assert torch.equal(first.encode(["another"])[0].tokens, again.encode(["another"])[0].tokens)


def scaled(held: dict[str, Tensor], word: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write the matrices of a model in fp8 with a scale each; return that and what it stands for."""
    made, meant = (
        {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if word == "scale_weight" else {},
        {},
    )
    for key, value in held.items():
        made[key] = meant[key] = value
        if value.dim() == 2:
            scale = value.abs().max() / 400
            made[key] = (value / scale).to(torch.float8_e4m3fn)
            made[f"{key.removesuffix('weight')}{word}"], meant[key] = (
                scale.reshape(()),
                made[key].float() * scale,
            )
            if word == "weight_scale":
                made[f"{key.removesuffix('weight')}comfy_quant"] = torch.tensor(
                    list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8
                )
    return made, meant


@pytest.mark.parametrize("word", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_multiplied_by_its_scales(models, tmp_path, word):
    files, given = models["wan 2.1"], {}
    for part in ("transformer", "text_encoder"):
        made, meant = scaled(load_file(files[part]), word)
        save_file(made, tmp_path / f"{part}.safetensors")
        save_file(meant, tmp_path / f"{part} meant.safetensors")
        given[part] = str(tmp_path / f"{part}.safetensors")
    got = load(
        "wan 2.1",
        None,
        **{**split(files), "transformer": given["transformer"], "text_encoders": (given["text_encoder"],)},
    )
    meant = {key: value.replace(".safetensors", " meant.safetensors") for key, value in given.items()}
    want = load(
        "wan 2.1",
        None,
        **{**split(files), "transformer": meant["transformer"], "text_encoders": (meant["text_encoder"],)},
    )
    assert differing(got, want) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.ffn.0.weight_scale": torch.ones(48, 8)},
            r"blocks\.0\.ffn\.0\.weight is packed in blocks, which is not read; give the",
        ),
        ({"blocks.0.ffn.0.weight.absmax": torch.ones(8)}, r"blocks\.0\.ffn\.0\.weight is packed in blocks"),
        (
            {"blocks.0.ffn.0.weight": torch.ones(48, 128, dtype=torch.int8)},
            r"blocks\.0\.ffn\.0\.weight is of type I8, which is not read",
        ),
        ({"extra.weight": torch.ones(2)}, r"1 of its weights, extra\.weight first, are not in the model"),
        (
            {"head.head.weight": None},
            (
                r"model\.transformer .*: it lacks proj_out\.weight of a Wan 2\.1 and 2\.2; give a whole "
                r"model's file"
            ),
        ),
        (
            {"patch_embedding.weight": torch.ones(128, 36, 1, 2, 2)},
            r"takes 36 channels, its last makes 16: a variant that",
        ),
    ],
)
def test_a_transformer_that_cannot_be_read_is_refused_by_name(models, tmp_path, change, message):
    held = {
        key: value
        for key, value in (load_file(models["wan 2.1"]["transformer"]) | change).items()
        if value is not None
    }
    save_file(held, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=message):
        load(
            "wan 2.1",
            None,
            **{**split(models["wan 2.1"]), "transformer": str(tmp_path / "changed.safetensors")},
        )


def test_a_file_in_the_wrong_place_is_refused_with_the_right_one(models, tmp_path):
    flux, wan, small = models["flux dev"], models["wan 2.1"], tmp_path / "vae.safetensors"
    save_file(load_file(flux["vae"]) | {"decoder.conv_in.weight": torch.ones(64, 4, 3, 3)}, small)
    fetch = r"hf download Comfy-Org/Lumina_Image_2\.0_Repackaged split_files/vae/ae\.safetensors"
    wrong = {
        "transformer": [
            (wan["transformer"], r"holds Wan 2\.1 and 2\.2, not FLUX\.1; set model\.family: wan"),
            (flux["vae"], r"holds no transformer of FLUX\.1"),
        ],
        "vae": [
            (
                small,
                (
                    r"has 4 latent channels, but FLUX\.1 works with 16; give the FLUX VAE "
                    rf"\(ae\.safetensors\); fetch it with: {fetch}"
                ),
            ),
            (wan["vae"], rf"is a VAE for video, another kind than this model's; give .*{fetch}"),
            (flux["transformer"], rf"holds no VAE that is read; give .*{fetch}"),
        ],
    }
    for field, cases in wrong.items():
        for path, message in cases:
            with pytest.raises(ValueError, match=rf"model\.{field} .*{message}"):
                load("flux dev", None, **{**split(flux), field: str(path)})
    for texts, message in (
        (
            (flux["text_encoder"],),
            (
                r"lacks T5-XXL \(t5xxl_fp16\.safetensors in ComfyUI's models/text_encoders\) of FLUX\.1; "
                r"fetch it with"
            ),
        ),
        (
            (flux["text_encoder"], wan["text_encoder"]),
            r"is UMT5-XXL, but FLUX\.1 reads its prompts by CLIP-L and T5-XXL; remove it",
        ),
        ((flux["text_encoder"], flux["text_encoder"]), r"is CLIP-L, and so is"),
        ((flux["vae"],), r"holds no text encoder that is known"),
    ):
        with pytest.raises(ValueError, match=rf"model\.text_encoders .*{message}"):
            load("flux dev", None, **{**split(flux), "text_encoders": tuple(map(str, texts))})
    narrow = {"transformer": str(tmp_path / "narrow.safetensors")}
    save_file(load_file(flux["transformer"]) | {"txt_in.weight": torch.ones(128, 48)}, narrow["transformer"])
    with pytest.raises(
        ValueError,
        match=(
            r"text_encoders .* T5-XXL of this size gives 32 features, but this FLUX\.1 reads 48; give the "
            r"text"
        ),
    ):
        load("flux dev", None, **{**split(flux), **narrow})
    with pytest.raises(ValueError, match=r"is the VAE of another Wan; give the Wan 2\.1 VAE"):
        load("wan 2.1", None, **{**split(wan), "vae": str(models["wan 5B"]["vae"])})


def test_a_missing_or_unfinished_file_is_named(sd3, tmp_path):
    unfinished = tmp_path / "half.safetensors"
    unfinished.write_bytes(sd3["transformer"].read_bytes()[:-1000])
    with pytest.raises(FileError, match=r"half\.safetensors is damaged: .*; download or save it again"):
        load("sd3", None, **{**split(sd3), "transformer": str(unfinished)})
    with pytest.raises(
        ValueError,
        match=r"model\.vae is missing: Stable .* decodes with the SD3 VAE .*fetch it with: hf download",
    ):
        load("sd3", None, **{**split(sd3), "vae": None})
    with pytest.raises(ValueError, match=r"model\.path is missing; give it, or model\.transformer"):
        load("sd3", None)
    with pytest.raises(ValueError, match=r"model\.vae .*none\.safetensors is no file"):
        load("sd3", None, **{**split(sd3), "vae": str(tmp_path / "none.safetensors")})


def comfyui_tree(root: Path) -> Path:
    """Make a ComfyUI of what is read of one: its tokenizers."""
    shutil.copytree(flux_folder.TINY / "tokenizer", root / "comfy/sd1_tokenizer")
    flux_folder.t5_tokenizer().save_pretrained(root / "comfy/text_encoders/t5_tokenizer")
    return root


def test_tokenizers_are_those_of_the_comfyui_that_the_files_lie_in_or_that_is_named(
    models, tmp_path, monkeypatch
):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    files, folder = models["flux dev"], load("flux dev", models["flux dev"]["folder"])
    given = {**split(files), "tokenizers": None}
    fetch = (
        r"hf download black-forest-labs/FLUX\.1-dev --include 'tokenizer\*/\*' --local-dir tokens and set "
        r"it to that folder"
    )
    with pytest.raises(
        ValueError, match=rf"model\.tokenizers is missing, and the files lie in no ComfyUI, .*{fetch}"
    ):
        load("flux dev", None, **given)
    root = comfyui_tree(tmp_path / "ComfyUI")
    (root / "models/diffusion_models").mkdir(parents=True)
    moved = shutil.copy(files["transformer"], root / "models/diffusion_models")
    within = load("flux dev", None, **{**given, "transformer": str(moved)})
    monkeypatch.setenv("COMFYUI_PATH", str(root))
    named = load("flux dev", None, **given)
    for policy in (within, named):
        pipeline = policy.pipeline
        assert pipeline.tokenizer(PROMPT).input_ids == folder.pipeline.tokenizer(PROMPT).input_ids
        assert pipeline.tokenizer_2(PROMPT).input_ids == folder.pipeline.tokenizer_2(PROMPT).input_ids
        assert (pipeline.tokenizer.model_max_length, pipeline.tokenizer_2.model_max_length) == (77, 512)


def test_a_folder_of_tokenizers_that_lacks_one_is_refused(models, tmp_path):
    shutil.copytree(models["flux dev"]["folder"] / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(
        ValueError,
        match=r"it lacks the folder tokenizer_2 with the files of a T5TokenizerFast; run: hf download",
    ):
        load("flux dev", None, **{**split(models["flux dev"]), "tokenizers": str(tmp_path)})


def test_the_tokenizer_inside_wans_text_encoder_is_sentencepieces_own(models, tmp_path):
    from sentencepiece import SentencePieceProcessor

    model, files = native_files.sentencepiece(), models["wan 2.1"]
    held = load_file(files["text_encoder"]) | {
        "spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)
    }
    save_file(held, tmp_path / "umt5.safetensors")
    policy = load(
        "wan 2.1",
        None,
        **{**split(files), "text_encoders": (str(tmp_path / "umt5.safetensors"),), "tokenizers": None},
    )
    theirs = SentencePieceProcessor(model_proto=model, add_eos=True)
    for text in ("abcd fega", "Äbcd  öfgg a", "never 123 seen ℌ"):
        assert policy.pipeline.tokenizer(text).input_ids == theirs.encode(text)


def test_a_recipe_of_files_alone_trains_and_draws_without_a_folder(models, tmp_path):
    """Paths are those of a recipe: beside it."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na blue square\n")
    given = {key: value for key, value in split(models["z_image"]).items() if key != "tokenizers"}
    links = {
        "transformer": "t.safetensors",
        "vae": "v.safetensors",
        "text_encoders": ["q.safetensors"],
        "tokenizers": "tokens",
    }
    for field, name in (("transformer", "t"), ("vae", "v")):
        (tmp_path / f"{name}.safetensors").symlink_to(given[field])
    (tmp_path / "q.safetensors").symlink_to(given["text_encoders"][0])
    (tmp_path / "tokens").symlink_to(models["z_image"]["folder"])
    tree = {
        "model": {"family": "z_image", "width": 64, "height": 64, **links},
        "lora": {"rank": 2, "alpha": 4},
        "method": {"num_steps": 3, "group_size": 2, "learning_rate": 1e-2},
        "rewards": [{"name": "colourfulness"}],
        "prompts": {"train": "prompts.txt"},
        "train": {"steps": 1, "prompts_per_step": 1, "checkpoint_every": 1},
    }
    config = from_dict(tree, near=tmp_path)
    train(config, tmp_path / "run", progress=Silent())
    file = RunFolder.open(tmp_path / "run").latest() / "lora.safetensors"
    assert read_tensors(file)[1]["g2rpo.base_model"] == models["z_image"]["transformer"].name
    (with_lora,), (without,) = (draw(config, [PROMPT], 1, lora) for lora in (file, None))
    assert with_lora.shape == (64, 64, 3) and not torch.equal(with_lora, without)
    with pytest.raises(
        ConfigError, match=r"model\.text_encoders\.0 is 'gone\.safetensors', which does not exist"
    ):
        from_dict({**tree, "model": {**tree["model"], "text_encoders": ["gone.safetensors"]}}, near=tmp_path)


@pytest.mark.parametrize("kind", [file.stem.removeprefix("text_") for file in CONFIGS.glob("text_*.json")])
def test_shapes_tell_a_published_text_encoder(kind):
    config = facts_of_text(kind)["config"]
    model = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        shapes = model(model.config_class.from_dict(config)).state_dict()
    held = named(
        Held(
            "model.text_encoders",
            "a text encoder",
            Path(),
            {key: Stored(Path(), "BF16", v.shape, 0, 0) for key, v in shapes.items()},
        )
    )
    found = sizes.TEXT[kind](held)
    tower = found.pop("vision_config", {})
    assert kind_of(held) in (kind, "clip") and found == {key: config[key] for key in found}
    assert tower == {key: config["vision_config"][key] for key in tower}


SD3 = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "in_channels": 16}
FLUX = {
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "in_channels": 64,
    "joint_attention_dim": 4096,
}
LUMINA2 = {"hidden_size": 2304, "num_layers": 26, "num_refiner_layers": 2, "num_attention_heads": 24}
WAN = {"text_dim": 4096, "freq_dim": 256}
# What the configurations say that were published with the models.
PUBLISHED: dict[str, tuple[str, dict[str, object]]] = {
    "3 medium": (
        "sd3",
        {
            **SD3,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
            "qk_norm": None,
        },
    ),
    "3.5 medium": (
        "sd3",
        {
            **SD3,
            **{
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 384,
            },
            **{"qk_norm": "rms_norm", "dual_attention_layers": list(range(13))},
        },
    ),
    "3.5 large": (
        "sd3",
        {
            **SD3,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "dev": ("flux", {**FLUX, "pooled_projection_dim": 768, "guidance_embeds": True}),
    "schnell": ("flux", {**FLUX, "pooled_projection_dim": 768, "guidance_embeds": False}),
    "klein 4B": (
        "flux2",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "Qwen-Image": (
        "qwen_image",
        {
            "num_layers": 60,
            "num_attention_heads": 24,
            "in_channels": 64,
            "out_channels": 16,
            "joint_attention_dim": 3584,
        },
    ),
    "Wan 1.3B": (
        "wan",
        {
            **WAN,
            "num_layers": 30,
            "num_attention_heads": 12,
            "in_channels": 16,
            "out_channels": 16,
            "ffn_dim": 8960,
        },
    ),
    "Wan 14B": (
        "wan",
        {
            **WAN,
            "num_layers": 40,
            "num_attention_heads": 40,
            "in_channels": 16,
            "out_channels": 16,
            "ffn_dim": 13824,
        },
    ),
    "Wan 5B": (
        "wan",
        {
            **WAN,
            "num_layers": 30,
            "num_attention_heads": 24,
            "in_channels": 48,
            "out_channels": 48,
            "ffn_dim": 14336,
        },
    ),
    "Lumina-Image 2.0": ("lumina2", {**LUMINA2, "num_kv_heads": 8, "cap_feat_dim": 2304}),
    "Z-Image": (
        "z_image",
        {
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_tell_every_published_variant(name):
    family, config = PUBLISHED[name]
    shipped = json.loads(next(CONFIGS.glob(f"{family}*.json")).read_text("utf-8"))["transformer"]
    with torch.device("meta"):
        model = getattr(diffusers, shipped["_class_name"]).from_config({**shipped, **config})
    held = {
        key: Stored(Path(), "BF16", tuple(value.shape), 0, 0) for key, value in model.state_dict().items()
    }
    found = sizes.TRANSFORMERS[family](Held("model.transformer", "a model", Path(), held))
    assert found == {**found, **config} and found.get("dual_attention_layers", []) == config.get(
        "dual_attention_layers", []
    )


def tokens_of(name: str, files: dict[str, Path]):
    """Load the tokenizers for a model's files."""
    facts = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    texts = TextFiles(
        name, facts, [str(path) for part, path in files.items() if part.startswith("text_encoder")], None
    )
    return load_tokenizers(facts, None, files["transformer"], texts.held)


@pytest.mark.comfyui
@pytest.mark.parametrize("comfyui", COMFYUIS)
def test_the_tokens_of_a_comfyui_are_the_published_ones(comfyui, models, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    with pytest.raises(
        ValueError,
        match=r"tokenizers: its tokenizer has 49408 words, but CLIP-L of .* knows 583; give the tokenizers",
    ):
        load("sd3", None, **{**split(models["sd3"]), "tokenizers": None})
    texts = tokens_of("sd3", models["sd3"])
    assert texts["tokenizer"]("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = texts["tokenizer_2"]("a photo of a cat", padding="max_length").input_ids
    assert len(padded) == 77 and padded[6:9] == [49407, 0, 0]
    assert texts["tokenizer_3"]("translate English to German: How old").input_ids == [
        13959,
        1566,
        12,
        2968,
        10,
        571,
        625,
        1,
    ]
    chat = tokens_of("z_image", models["z_image"])["tokenizer"]
    words = [{"role": "user", "content": "hello"}]
    asked = chat.apply_chat_template(words, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert asked == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert chat(asked).input_ids == [151644, 872, 198, 14990, 151645, 198, 151644, 77091, 198]


@pytest.mark.comfyui
@pytest.mark.parametrize("comfyui", COMFYUIS)
def test_the_files_of_these_tests_have_the_names_of_comfyuis_own_classes(comfyui, models):
    if "z_image_modulation" not in (comfyui / "comfy/ldm/lumina/model.py").read_text("utf-8"):
        pytest.skip("this ComfyUI does not know Z-Image; the other one has all names")
    child, root = (
        Path(__file__).with_name("comfy_child_files.py").read_text("utf-8"),
        models["sd3"]["checkpoint"].parent.parent,
    )
    command = [python_of(comfyui), "-c", f"{BEFORE}\n{child}", "--cpu"]
    done = subprocess.run(
        command, cwd=comfyui, env=environment(), input=str(root), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    differing = json.loads(done.stdout.splitlines()[-1])
    assert differing.pop("z_image/transformer") == [
        "norm_final.weight"
    ]  # in the file alone, and used by nobody
    assert len(differing) == 10 and {name: names for name, names in differing.items() if names} == {}
