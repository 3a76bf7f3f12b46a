"""What LoRA files tell programs that list models: true, complete, and the same for the same run."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from lora_models import TINY, layers, random_pairs
from program import call
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_run import config

from comfy_g2rpo import lora
from comfy_g2rpo.files.picture_files import texts
from comfy_g2rpo.files.safe import split_file
from comfy_g2rpo.lora.convert import renamed, shapes
from comfy_g2rpo.lora.key_names import FAMILIES, family_of_model
from comfy_g2rpo.lora.modelspec import about_run, base_of_lora, base_of_model, date_of, handed_out
from comfy_g2rpo.lora.preview import MARK
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import run as host
from g2rpo_trainer.cost.meta_model import made, of_published, published
from g2rpo_trainer.families.sd3 import SD3
from g2rpo_trainer.lora.lora_files import shapes_of
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("lora_modelspec")  # one process makes what they share

MUST = {"sai_model_spec", "architecture", "implementation", "title"}  # of ModelSpec
BASES = {
    "black-forest-labs/FLUX.1-dev": ("flux-1-dev", "flux1"),
    "black-forest-labs/FLUX.1-Kontext-dev": ("flux-1-dev", "flux1"),
    "black-forest-labs/FLUX.1-schnell": ("flux-1-schnell", "flux1"),
    "stabilityai/stable-diffusion-3.5-medium": ("stable-diffusion-v3.5-medium", "sd3.5_medium"),
    "stabilityai/stable-diffusion-3.5-large": ("stable-diffusion-v3.5-large", "sd3.5_large"),
    "Qwen/Qwen-Image": ("qwen-image", "qwen_image"),
    "Qwen/Qwen-Image-Edit-2509": ("qwen-image", "qwen_image"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ("wan-2_1-text2video-1_3b", "wan_2.1"),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": ("wan-2_1-text2video-14b", "wan_2.1"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("wan-2_2-ti2v-5b", "wan_2.2_5b"),
    "Tongyi-MAI/Z-Image": ("z-image", "z_image"),
    "Tongyi-MAI/Z-Image-Turbo": ("z-image", "z_image"),
    "black-forest-labs/FLUX.2-klein-base-4B": ("Flux.2-klein-4b", "flux2_klein_4b"),
    "black-forest-labs/FLUX.2-klein-base-9B": ("Flux.2-klein-9b", "flux2_klein_9b"),
    "black-forest-labs/FLUX.2-dev": ("Flux.2-dev", "flux2"),
    "Alpha-VLLM/Lumina-Image-2.0": ("lumina-2", "lumina2"),
}


def notes(file: Path) -> dict[str, str]:
    """Read a file's metadata as everybody does."""
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("name", published())
def test_a_published_model_has_the_name_that_programs_know(name: str) -> None:
    with torch.device("meta"):
        transformer = made(of_published(published()[name], SD3).transformer)
    found = shapes_of(transformer)
    base = base_of_model(found, "x")
    family = family_of_model(found)[0]
    assert base == BASES[name]
    # Its blocks alone, which a LoRA has, tell as much, but for what no LoRA of FLUX.1 can tell.
    inner = {module: shape for module, shape in found.items() if "blocks." in module or "layers." in module}
    assert base_of_lora(family, inner).architecture in base.architecture


@pytest.mark.parametrize("name", FAMILIES)
def test_both_namings_of_a_model_give_the_same_base(name: str) -> None:
    pairs = random_pairs(layers(TINY[name].make()))
    native = shapes(renamed(FAMILIES[name], pairs, "native"))
    assert base_of_lora(FAMILIES[name], native) == base_of_lora(FAMILIES[name], shapes(pairs))


def test_an_unknown_model_has_its_classs_name() -> None:
    assert base_of_model({"blocks.0.odd": (3, 3)}, "HiDream") == ("hidream", "hidream")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the same run twice: at once, and stopped and resumed."""
    folder = tmp_path_factory.mktemp("modelspec")
    host.train(config(folder), folder / "whole", progress=Silent())
    host.train(config(folder, train={"steps": 1}), folder / "parts", progress=Silent())
    host.train(config(folder), folder / "parts", resume=True, progress=Silent())
    return folder


def test_a_checkpoint_tells_all_but_what_changes_from_one_writing_to_the_next(runs: Path) -> None:
    file = RunFolder(runs / "whole").outcome() / "lora.safetensors"
    found = notes(file)
    assert {f"modelspec.{key}" for key in MUST} <= found.keys()
    assert found["modelspec.architecture"] == "stable-diffusion-v3-medium/lora"
    assert found["modelspec.resolution"] == "64x64" and found["modelspec.implementation"] == "diffusers"
    assert (found["ss_base_model_version"], found["ss_sd_model_name"]) == ("sd3_medium", "tiny")
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4")
    assert "1 agreement" in found["modelspec.description"] and "agreement" in found["modelspec.tags"]
    varying = {"modelspec.date", "modelspec.hash_sha256", "sshs_model_hash", "ss_output_name", "g2rpo.run"}
    assert not varying & found.keys()
    ranks = {len(down) for down, _ in lora.read(file).pairs.values()}
    assert ranks == {4}


def test_a_resumed_run_writes_the_same_bytes(runs: Path) -> None:
    for step in ("000002", "000003"):
        one, other = (
            (runs / name / "checkpoints" / step / "lora.safetensors") for name in ("whole", "parts")
        )
        assert one.read_bytes() == other.read_bytes()


def test_an_exported_run_is_complete_and_has_its_picture(runs: Path, tmp_path: Path, capsys) -> None:
    file = RunFolder(runs / "whole").outcome() / "lora.safetensors"
    first, again = tmp_path / "my-lora.safetensors", tmp_path / "again/my-lora.safetensors"
    assert call("export", runs / "whole", "--out", first) == 0
    assert "my-lora.preview.png" in capsys.readouterr().out
    assert call("export", file, "--out", again) == 0
    assert first.read_bytes() == again.read_bytes()
    found = notes(first)
    assert found["modelspec.title"] == found["ss_output_name"] == "my-lora"
    assert found["modelspec.date"] == date_of(file.stat().st_mtime)["modelspec.date"]
    assert found["ss_steps"] == found["g2rpo.step"] == "3"
    digest = hashlib.sha256(split_file(first.read_bytes())[1]).hexdigest()
    assert found["modelspec.hash_sha256"] == f"0x{digest}" and found["sshs_model_hash"] == digest
    pictures = [each.with_name("my-lora.preview.png") for each in (first, again)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes() and MARK in texts(pictures[0])
    assert all(torch.equal(x, load_file(file)[key]) for key, x in load_file(first).items())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--rank", "2"), {"ss_network_dim": "2", "ss_network_alpha": "2"}),
        (("--form", "native"), {"modelspec.implementation": lora.IMPLEMENTATIONS["native"]}),
        (("--precision", "bf16"), {"modelspec.implementation": "diffusers"}),
    ],
)
def test_what_a_conversion_changes_is_told_anew(
    runs: Path, tmp_path: Path, words: tuple[str, ...], expected: dict[str, str]
) -> None:
    plain, changed = tmp_path / "plain.safetensors", tmp_path / "changed.safetensors"
    assert call("export", runs / "whole", "--out", plain) == 0
    assert call("export", plain, *words, "--out", changed) == 0
    found, before = notes(changed), notes(plain)
    assert expected.items() <= found.items()
    assert found["modelspec.hash_sha256"] != before["modelspec.hash_sha256"]
    assert found["modelspec.date"] == before["modelspec.date"] and found["modelspec.title"] == "changed"
    assert not changed.with_name("changed.preview.png").exists()


def test_a_strangers_file_keeps_its_title_and_date_and_gets_a_true_hash(tmp_path: Path) -> None:
    pairs = random_pairs(layers(TINY["flux"].make("cpu")))
    named = lora.named(renamed(FAMILIES["flux"], pairs, "native"), 3.0, "", "native")
    theirs = {"modelspec.title": "My Dragon", "modelspec.date": "2024-01-01", "modelspec.author": "somebody"}
    stale = {"sshs_model_hash": "0", "sshs_legacy_hash": "1", "modelspec.hash_sha256": "0x0"}
    save_file(named, tmp_path / "a.safetensors", {**theirs, **stale, "ss_network_dim": "99"})
    assert (
        call("export", tmp_path / "a.safetensors", "--form", "native", "--out", tmp_path / "b.safetensors")
        == 0
    )
    found = notes(tmp_path / "b.safetensors")
    assert theirs.items() <= found.items() and "sshs_legacy_hash" not in found
    assert len(found["sshs_model_hash"]) == 64 and found["ss_network_dim"] == "Dynamic"
    # Of a LoRA alone nobody can say whether it was made for dev or schnell.
    assert found["modelspec.architecture"] == "flux-1/lora" and found["ss_base_model_version"] == "flux1"


def test_ranks_that_differ_are_called_dynamic(tmp_path: Path) -> None:
    named = lora.named({"a": (torch.ones(2, 3), torch.ones(3, 2))}, 2.0, "")
    named |= lora.named({"b": (torch.ones(1, 3), torch.ones(3, 1))}, 1.0, "")
    (tmp_path / "x.safetensors").write_bytes(lora.file_bytes(named, "diffusers"))
    assert notes(tmp_path / "x.safetensors")["ss_network_dim"] == "Dynamic"


@pytest.mark.parametrize(
    ("before", "title"),
    [
        ({}, "new"),
        ({"modelspec.title": "By hand"}, "By hand"),
        ({"modelspec.title": "By hand", "ss_output_name": "old", "g2rpo.recipe": "g2rpo"}, "By hand"),
        ({"modelspec.title": "old", "ss_output_name": "old", "g2rpo.recipe": "g2rpo"}, "new"),
        ({"modelspec.title": "g2rpo LoRA for red", "g2rpo.recipe": "g2rpo"}, "new"),
    ],
)
def test_a_title_that_somebody_gave_stays(before: dict[str, str], title: str, tmp_path: Path) -> None:
    named = lora.named({"a": (torch.ones(2, 3), torch.ones(3, 2))}, 2.0, "")
    content = handed_out(lora.file_bytes(named, "diffusers", before), "new")
    (tmp_path / "x.safetensors").write_bytes(content)
    assert notes(tmp_path / "x.safetensors")["modelspec.title"] == title
    assert lora.read(tmp_path / "x.safetensors").pairs.keys() == {"a"}
    assert handed_out(content, "new") == content


def test_without_a_size_no_resolution_is_claimed() -> None:
    base = base_of_model({}, "X")
    assert "modelspec.resolution" not in about_run(base, "graph", {"red": "1 red"}, None)
    assert about_run(base, "graph", {"red": "1 red"}, (64, 32))["modelspec.resolution"] == "64x32"


def test_export_keeps_a_picture_of_the_users_own(runs: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(runs / "whole/images/000003/000.png", tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    assert call("export", runs / "whole", "--out", tmp_path / "mine.safetensors") == 0
    assert "mine.png is kept as the picture of mine.safetensors" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == before
    assert not (tmp_path / "mine.preview.png").exists()
