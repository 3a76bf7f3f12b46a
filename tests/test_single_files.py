"""Models from ComfyUI's split files and from checkpoints: the folder's weights, tokens and answers, or one
clear line.
"""

import json
import shutil
import subprocess
from pathlib import Path

import flux_folder
import native_files
import pytest
import torch
from comfy_host import COMFYUIS, environment, python_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comfy_g2rpo.files.safe import FileError, read_tensors
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import families
from g2rpo_trainer.config.reading import ConfigError, from_dict
from g2rpo_trainer.config.sections import ModelSection
from g2rpo_trainer.families.files.text_files import FACTS, TextFiles
from g2rpo_trainer.families.files.tokenizers import load_tokenizers
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


def split(files: dict[str, Path], **changed: object) -> dict[str, object]:
    """Name the files of the parts as a recipe does; tokenizers are the folder's. Some may be others."""
    texts = tuple(path for part, path in files.items() if part.startswith("text_encoder"))
    given = {"transformer": files["transformer"], "vae": files["vae"], "text_encoders": texts}
    given |= {"tokenizers": files["folder"], **changed}
    return {
        name: tuple(map(str, it)) if isinstance(it, tuple) else it and str(it) for name, it in given.items()
    }


def refused(name: str, message: str, **given: object) -> None:
    """See that files are refused in these words."""
    with pytest.raises(ValueError, match=message):
        load(name, None, **given)


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
    parts = [part for part in models[name] if (folder / part).is_dir() and part != "folder"]
    found = {part: next((folder / part).glob("*.safetensors")) for part in parts}
    assert differing(load(name, None, **split({**found, "folder": folder})), load(name, folder)) == []


@pytest.mark.parametrize("name", ["wan 2.1", "flux2 klein"])
def test_in_16_bit_what_a_folder_keeps_exact_is_exact(models, name):
    got = load(name, None, dtype="bf16", **split(models[name]))
    assert differing(got, load(name, models[name]["folder"], dtype="bf16")) == []


def test_parts_of_a_folder_may_come_from_files_and_its_own_need_not_be_there(sd3, tmp_path):
    whole = load("sd3", sd3["folder"], dtype="bf16")
    folder = shutil.copytree(sd3["folder"], tmp_path / "folder")
    for part in ("transformer", "vae", "text_encoder_3"):
        next((folder / part).glob("*.safetensors")).unlink()
    given = split(sd3, text_encoders=(sd3["text_encoder_3"],), tokenizers=None)
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
    made: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    if word == "scale_weight":
        made["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    quant = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    for key, value in held.items():
        made[key] = meant[key] = value
        if value.dim() == 2:
            scale, module = value.abs().max() / 400, key.removesuffix("weight")
            made[key] = (value / scale).to(torch.float8_e4m3fn)
            made[f"{module}{word}"], meant[key] = scale.reshape(()), made[key].float() * scale
            if word == "weight_scale":
                made[f"{module}comfy_quant"] = quant.clone()
    return made, meant


@pytest.mark.parametrize("word", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_multiplied_by_its_scales(models, tmp_path, word):
    files = models["wan 2.1"]
    got, want = dict(files), dict(files)
    for part in ("transformer", "text_encoder"):
        got[part], want[part] = tmp_path / f"{part}.safetensors", tmp_path / f"{part} meant.safetensors"
        made, meant = scaled(load_file(files[part]), word)
        save_file(made, got[part])
        save_file(meant, want[part])
    assert differing(*(load("wan 2.1", None, **split(given)) for given in (got, want))) == []


FFN = r"blocks\.0\.ffn\.0\.weight"
UNREADABLE = [
    (
        {"blocks.0.ffn.0.weight_scale": torch.ones(48, 8)},
        FFN + " is packed in blocks, which is not read; give the",
    ),
    ({"blocks.0.ffn.0.weight.absmax": torch.ones(8)}, FFN + " is packed in blocks"),
    (
        {"blocks.0.ffn.0.weight": torch.ones(48, 128).to(torch.int8)},
        FFN + " is of type I8, which is not read",
    ),
    ({"extra.weight": torch.ones(2)}, r"1 of its weights, extra\.weight first, are not in the model"),
    (
        {"head.head.weight": None},
        r"model\.transformer .*: it lacks proj_out\.weight of a Wan 2\.1 and 2\.2; give a whole model's file",
    ),
    (
        {"patch_embedding.weight": torch.ones(128, 36, 1, 2, 2)},
        "takes 36 channels, its last makes 16: a variant that",
    ),
]


@pytest.mark.parametrize(("change", "message"), UNREADABLE)
def test_a_transformer_that_cannot_be_read_is_refused_by_name(models, tmp_path, change, message):
    held = load_file(models["wan 2.1"]["transformer"]) | change
    changed = tmp_path / "changed.safetensors"
    save_file({key: value for key, value in held.items() if value is not None}, changed)
    refused("wan 2.1", message, **split(models["wan 2.1"], transformer=changed))


def test_a_file_in_the_wrong_place_is_refused_with_the_right_one(models, tmp_path):
    flux, wan, small = models["flux dev"], models["wan 2.1"], tmp_path / "vae.safetensors"
    save_file(load_file(flux["vae"]) | {"decoder.conv_in.weight": torch.ones(64, 4, 3, 3)}, small)
    fetch = r"hf download Comfy-Org/Lumina_Image_2\.0_Repackaged split_files/vae/ae\.safetensors"
    channels = (
        r"has 4 latent channels, but FLUX\.1 works with 16; give the FLUX VAE \(ae\.safetensors\); fetch it"
    )
    wrong = [
        ("transformer", wan["transformer"], r"holds Wan 2\.1 and 2\.2, not FLUX\.1; set model\.family: wan"),
        ("transformer", flux["vae"], r"holds no transformer of FLUX\.1"),
        ("vae", small, f"{channels} with: {fetch}"),
        ("vae", wan["vae"], f"is a VAE for video, another kind than this model's; give .*{fetch}"),
        ("vae", flux["transformer"], f"holds no VAE that is read; give .*{fetch}"),
    ]
    lacks = r"lacks T5-XXL \(t5xxl_fp16\.safetensors in ComfyUI's models/text_encoders\) of FLUX\.1; fetch"
    other = r"is UMT5-XXL, but FLUX\.1 reads its prompts by CLIP-L and T5-XXL; remove it"
    clip, umt5 = flux["text_encoder"], wan["text_encoder"]
    wrong += [
        ("text_encoders", (clip,), f"{lacks} it with"),
        ("text_encoders", (clip, umt5), other),
        ("text_encoders", (clip, clip), "is CLIP-L, and so is"),
        ("text_encoders", (flux["vae"],), "holds no text encoder that is known"),
    ]
    for field, given, message in wrong:
        refused("flux dev", rf"model\.{field} .*{message}", **split(flux, **{field: given}))
    narrow = tmp_path / "narrow.safetensors"
    save_file(load_file(flux["transformer"]) | {"txt_in.weight": torch.ones(128, 48)}, narrow)
    features = r"T5-XXL of this size gives 32 features, but this FLUX\.1 reads 48; give the text"
    refused("flux dev", f"text_encoders .* {features}", **split(flux, transformer=narrow))
    another = r"is the VAE of another Wan; give the Wan 2\.1 VAE"
    refused("wan 2.1", another, **split(wan, vae=models["wan 5B"]["vae"]))


def test_a_missing_or_unfinished_file_is_named(sd3, tmp_path):
    unfinished = tmp_path / "half.safetensors"
    unfinished.write_bytes(sd3["transformer"].read_bytes()[:-1000])
    with pytest.raises(FileError, match=r"half\.safetensors is damaged: .*; download or save it again"):
        load("sd3", None, **split(sd3, transformer=unfinished))
    missing = r"model\.vae is missing: Stable .* decodes with the SD3 VAE .*fetch it with: hf download"
    refused("sd3", missing, **split(sd3, vae=None))
    refused("sd3", r"model\.path is missing; give it, or model\.transformer")
    gone = split(sd3, vae=tmp_path / "none.safetensors")
    refused("sd3", r"model\.vae .*none\.safetensors is no file", **gone)


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
    fetch = r"hf download black-forest-labs/FLUX\.1-dev --include 'tokenizer\*/\*' --local-dir tokens"
    missing = r"model\.tokenizers is missing, and the files lie in no ComfyUI, "
    given = split(files, tokenizers=None)
    refused("flux dev", rf"{missing}.*{fetch} and set it to that folder", **given)
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
    lacks = "it lacks the folder tokenizer_2 with the files of a T5TokenizerFast; run: hf download"
    refused("flux dev", lacks, **split(models["flux dev"], tokenizers=tmp_path))


def test_the_tokenizer_inside_wans_text_encoder_is_sentencepieces_own(models, tmp_path):
    from sentencepiece import SentencePieceProcessor

    model, files = native_files.sentencepiece(), models["wan 2.1"]
    words = {"spiece_model": torch.frombuffer(bytearray(model), dtype=torch.uint8)}
    umt5 = tmp_path / "umt5.safetensors"
    save_file(load_file(files["text_encoder"]) | words, umt5)
    policy = load("wan 2.1", None, **split(files, text_encoders=(umt5,), tokenizers=None))
    theirs = SentencePieceProcessor(model_proto=model, add_eos=True)
    for text in ("abcd fega", "Äbcd  öfgg a", "never 123 seen ℌ"):
        assert policy.pipeline.tokenizer(text).input_ids == theirs.encode(text)


def test_a_recipe_of_files_alone_trains_and_draws_without_a_folder(models, tmp_path):
    """Paths are those of a recipe: beside it."""
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na blue square\n")
    files = models["z_image"]
    links = {"transformer": "t.safetensors", "vae": "v.safetensors", "tokenizers": "tokens"}
    for field, name in links.items():
        (tmp_path / name).symlink_to(files["folder" if field == "tokenizers" else field])
    (tmp_path / "q.safetensors").symlink_to(files["text_encoder"])
    links["text_encoders"] = ["q.safetensors"]
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
    assert read_tensors(file)[1]["g2rpo.base_model"] == files["transformer"].name
    (with_lora,), (without,) = (draw(config, [PROMPT], 1, lora) for lora in (file, None))
    assert with_lora.shape == (64, 64, 3) and not torch.equal(with_lora, without)
    gone = {**tree["model"], "text_encoders": ["gone.safetensors"]}
    says = r"model\.text_encoders\.0 is 'gone\.safetensors', which does not exist"
    with pytest.raises(ConfigError, match=says):
        from_dict({**tree, "model": gone}, near=tmp_path)


def tokens_of(name: str, files: dict[str, Path]):
    """Load the tokenizers for a model's files."""
    facts = json.loads((FACTS / f"{name}.json").read_text("utf-8"))
    parts = [str(path) for part, path in files.items() if part.startswith("text_encoder")]
    return load_tokenizers(facts, None, files["transformer"], TextFiles(name, facts, parts, None).held)


@pytest.mark.comfyui
@pytest.mark.parametrize("comfyui", COMFYUIS)
def test_the_tokens_of_a_comfyui_are_the_published_ones(comfyui, models, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    words = r"its tokenizer has 49408 words, but CLIP-L of .* knows 583; give the tokenizers"
    refused("sd3", f"tokenizers: {words}", **split(models["sd3"], tokenizers=None))
    texts = tokens_of("sd3", models["sd3"])
    assert texts["tokenizer"]("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = texts["tokenizer_2"]("a photo of a cat", padding="max_length").input_ids
    assert len(padded) == 77 and padded[6:9] == [49407, 0, 0]
    german = texts["tokenizer_3"]("translate English to German: How old").input_ids
    assert german == [13959, 1566, 12, 2968, 10, 571, 625, 1]
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
    child = Path(__file__).with_name("comfy_child_files.py").read_text("utf-8")
    root = models["sd3"]["checkpoint"].parent.parent
    command = [python_of(comfyui), "-c", f"{BEFORE}\n{child}", "--cpu"]
    done = subprocess.run(
        command, cwd=comfyui, env=environment(), input=str(root), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    differing = json.loads(done.stdout.splitlines()[-1])
    # In the file alone, and used by nobody.
    assert differing.pop("z_image/transformer") == ["norm_final.weight"]
    assert len(differing) == 10 and {name: names for name, names in differing.items() if names} == {}
