"""What a run is made from may not change under it unnoticed: prompts, own rewards, LoRAs, weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from program import Notes
from safetensors.torch import load_file, save_file
from some_cases import some
from test_run import config
from test_run import training as host

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.config import input_files
from g2rpo_trainer.config.reading import Config, from_dict
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("run inputs")
ROOT = Path(__file__).parent.parent
REWARD = "def warm(images, prompts):\n    return images[..., 0].mean((1, 2))\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of two steps from a model, a LoRA, a reward and prompts of its own."""
    path = tmp_path_factory.mktemp("inputs")
    shutil.copytree(ROOT / "models/tiny", path / "tiny")
    (path / "warm.py").write_text(REWARD)
    host.train(asked(path, steps=1, init=None), path / "first", progress=Silent())
    shutil.copy(path / "first/checkpoints/000001/lora.safetensors", path / "init.safetensors")
    host.train(asked(path, steps=2), path / "run", progress=Silent())
    return path


def asked(path: Path, steps: int = 3, init: str | None = "init.safetensors") -> Config:
    """Ask for that run, with so many steps."""
    return config(
        path,
        model={"path": str(path / "tiny")},
        lora={"init": str(path / init) if init else None},
        rewards=[{"name": "warm", "path": str(path / "warm.py:warm")}],
        heldout_rewards=["agreement"],
        train={"steps": steps, "eval_every": 0, "watch": "off"},
    )


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """Copy all of it; the run's configuration then names the copies."""
    place = Path(shutil.copytree(made, tmp_path / "copy"))
    held = (place / "run/config.json").read_text()
    (place / "run/config.json").write_text(held.replace(str(made), str(place)))
    return place


def bump(file: Path) -> None:
    """Change one number of a safetensors file."""
    tensors = load_file(file)
    name = min(name for name in tensors if tensors[name].is_floating_point())
    tensors[name] = tensors[name] + 1e-3 * torch.ones_like(tensors[name])
    save_file(tensors, file)


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a training prompt": (
        "prompts.train",
        lambda place: (place / "train.txt").write_text("a red circle\ntwo blue squares\na red triangle\n"),
    ),
    "their order": (
        "prompts.train",
        lambda place: (place / "train.txt").write_text("two blue squares\na red circle\na green triangle\n"),
    ),
    "a held-out prompt": (
        "prompts.heldout",
        lambda place: (place / "heldout.txt").write_text("a yellow circle\n"),
    ),
    "a reward": ("rewards.0.path", lambda place: (place / "warm.py").write_text(REWARD + "# other\n")),
    "the LoRA to start from": ("lora.init", lambda place: bump(place / "init.safetensors")),
    "the transformer": (
        "model.path",
        lambda place: bump(place / "tiny/transformer/diffusion_pytorch_model.safetensors"),
    ),
    "a text encoder": ("model.path", lambda place: bump(place / "tiny/text_encoder/model.safetensors")),
    "the scheduler": (
        "model.path",
        lambda place: (place / "tiny/scheduler/scheduler_config.json").write_text("{}"),
    ),
}


@pytest.mark.parametrize("what", some(CHANGES, 1))
def test_a_changed_input_is_refused_by_name_and_allowed_by_a_flag(
    what: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    field, change = CHANGES[what]
    wanted = asked(copy)
    change(copy)
    before = {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=rf"^{field} \({copy}.*\) changed since .* \(--changed-inputs\)"):
        host.train(wanted, copy / "run", resume=True, progress=Silent())
    assert before == {path: path.read_bytes() for path in (copy / "run").rglob("*") if path.is_file()}
    notes = Notes()
    host.train(wanted, copy / "run", resume=True, progress=notes, changed_inputs=True)
    assert RunFolder(copy / "run").latest().name == "000003"
    assert notes.said[0].startswith(f"going on with what changed since the run was made: {field} ({copy}/")
    # From then on the run knows what it goes on with.
    host.train(wanted, copy / "run", resume=True, progress=Silent())


def test_what_did_not_change_is_not_named(copy: Path) -> None:
    (copy / "tiny/README.md").write_text("other words")
    notes = Notes()
    host.train(asked(copy), copy / "run", resume=True, progress=notes)
    assert not any("changed" in line for line in notes.said)


def test_comments_in_a_prompt_file_are_no_change(copy: Path) -> None:
    wanted = asked(copy)
    text = (copy / "train.txt").read_text()
    (copy / "train.txt").write_text("# mine\n\n" + text)
    host.train(wanted, copy / "run", resume=True, progress=Silent())


def test_files_that_only_moved_are_found_by_their_new_path(copy: Path) -> None:
    wanted = asked(copy)
    moved = {
        "model": {"path": str(copy / "tiny")},
        "lora": {"init": str(copy / "init.safetensors")},
        "prompts": {"train": str(copy / "train.txt")},
    }
    tree = wanted.model_dump(mode="json")
    for section, values in moved.items():
        for field, value in values.items():
            place = Path(value)
            target = place.with_name(f"moved-{place.name}")
            place.rename(target)
            tree[section][field] = str(target)
    host.train(from_dict(tree), copy / "run", resume=True, progress=Silent())
    kept = RunFolder(copy / "run").config()["config"]
    assert kept["lora"]["init"].endswith("moved-init.safetensors")


def test_another_file_under_another_path_is_refused_by_its_path(copy: Path) -> None:
    wanted = asked(copy)
    bump(copy / "init.safetensors")
    (copy / "init.safetensors").rename(copy / "new.safetensors")
    tree = wanted.model_dump(mode="json")
    tree["lora"]["init"] = str(copy / "new.safetensors")
    with pytest.raises(RunError, match=r"lora\.init .*changed since"):
        host.train(from_dict(tree), copy / "run", resume=True, progress=Silent())


def test_a_run_of_an_earlier_version_is_not_asked(copy: Path) -> None:
    wanted = asked(copy)
    held = json.loads((copy / "run/config.json").read_text())
    del held["inputs"]
    (copy / "run/config.json").write_text(json.dumps(held))
    (copy / "warm.py").write_text(REWARD + "# other\n")
    host.train(wanted, copy / "run", resume=True, progress=Silent())
    assert "rewards.0.path" in RunFolder(copy / "run").config()["inputs"]


def test_a_picture_that_a_prompt_names_counts_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"one")
    named = [Prompt("redder", {"image": str(tmp_path / "a.png"), "why": "x"})]
    before = input_files.digest_of_prompts(named)
    (tmp_path / "b.png").write_bytes(b"one")
    assert (
        input_files.digest_of_prompts([Prompt("redder", {"image": str(tmp_path / "b.png"), "why": "x"})])
        == before
    )
    (tmp_path / "a.png").write_bytes(b"two")
    assert input_files.digest_of_prompts(named) != before


def test_of_large_files_size_ends_and_blocks_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(input_files, "BLOCK", 10)
    monkeypatch.setattr(input_files, "BLOCKS", 5)
    file = tmp_path / "large"
    content = bytearray(range(256)) * 8
    file.write_bytes(content)
    before = input_files.digest_of_file(file)
    for place in (0, len(content) - 1, len(content) // 2):
        other = bytearray(content)
        other[place] ^= 1
        file.write_bytes(other)
        assert input_files.digest_of_file(file) != before
    file.write_bytes(content + b"x")
    assert input_files.digest_of_file(file) != before
    file.write_bytes(content)
    assert input_files.digest_of_file(file) == before


@pytest.mark.parametrize("size", [0, 999, 1000])
def test_files_up_to_the_limit_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(input_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(input_files, "BLOCK", 2)
    monkeypatch.setattr(input_files, "BLOCKS", 3)
    (tmp_path / "file").write_bytes(bytes(size))
    assert input_files.digest_of_file(tmp_path / "file") == hashlib.sha256(bytes(size)).hexdigest()
    (tmp_path / "file").write_bytes(bytes(1001))
    assert input_files.digest_of_file(tmp_path / "file").startswith("sampled ")
