"""The picture beside a LoRA file: which sample, how large, and whose pictures stay."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from comfy_g2rpo.files.picture_files import texts
from comfy_g2rpo.lora.preview import MARK, MAX_BYTES, run_of, save_preview
from comfy_g2rpo.run.folder import RunFolder, Sample

REWARDS = [{"name": "red", "weight": 1.0}, {"name": "blue", "weight": 0.0}]


def plain(level: float, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Fill a picture with one grey."""
    return torch.full((*size, 3), level)


def sample(number: int, red: float | None, picture: Tensor | None = None, blue: float = 0.0) -> Sample:
    """Make a sample whose grey is its number."""
    image = plain(number / 10) if picture is None else picture
    return Sample(f"prompt {number}", number, {"red": red, "blue": blue}, image)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Make a run without samples."""
    return RunFolder.create(tmp_path / "runs/mine", {"config": {"rewards": REWARDS}})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Make a place for a LoRA file."""
    (tmp_path / "loras").mkdir()
    return tmp_path / "loras/my.v2.safetensors"


def preview(file: Path) -> Image.Image:
    """Open the picture beside a file."""
    return Image.open(file.with_name("my.v2.preview.png"))


def shown(file: Path) -> tuple[int, int]:
    """Return the number and step of the sample in the picture beside a file."""
    note = json.loads(texts(file.with_name("my.v2.preview.png"))[MARK])
    return note["seed"], note["step"]


@pytest.mark.parametrize(
    ("reds", "blues", "best"),
    [
        ([0.1, 0.9, 0.5], [0, 0, 9], 1),
        ([None, -3.0, -2.0], [9, 0, 0], 2),
        ([0.5, 0.5, 0.5], [1, 2, 3], 0),
        ([None, None, None], [0, 0, 5], 0),
    ],
)
def test_the_sample_is_the_one_that_the_trained_rewards_score_best(
    run: RunFolder, file: Path, reds: list[float | None], blues: list[float], best: int
) -> None:
    rows = enumerate(zip(reds, blues, strict=True))
    run.save_samples(4, [sample(i, red, blue=blue) for i, (red, blue) in rows])
    assert save_preview(file, run, 4) == ""
    assert shown(file) == (best, 4)
    assert np.asarray(preview(file))[0, 0, 0] == round(best / 10 * 255)


def test_rewards_count_by_their_weights_and_not_by_their_scales(run: RunFolder, file: Path) -> None:
    for weight, best in ((0.1, 1), (3.0, 0), (-3.0, 1)):
        rows = [{"name": "red", "weight": 1.0}, {"name": "blue", "weight": weight}]
        run.save_config({"config": {"rewards": rows}})
        run.save_samples(1, [sample(0, 0.0, blue=900.0), sample(1, 1.0, blue=-900.0)])
        assert save_preview(file, run, 1) == ""
        assert shown(file)[0] == best


@pytest.mark.parametrize("config", [{}, {"config": {"rewards": [{"name": "x"}]}}, {"config": {"rewards": 3}}])
def test_an_odd_configuration_hides_no_picture(run: RunFolder, file: Path, config: dict) -> None:
    run.save_config(config)
    run.save_samples(1, [sample(1, 0.1), sample(2, 0.9)])
    assert save_preview(file, run, 1) == "" and shown(file)[0] == 2


@pytest.mark.parametrize(("step", "seen"), [(0, 0), (3, 0), (4, 4), (9, 4)])
def test_the_samples_are_those_of_the_step_or_the_last_before(
    run: RunFolder, file: Path, step: int, seen: int
) -> None:
    for at in (0, 4):
        run.save_samples(at, [sample(at, 0.5)])
    assert save_preview(file, run, step) == ""
    assert shown(file)[0] == seen


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, (320, 320)), (100, 40, (120, 300)), (400, 300, (300, 400)), (2048, 1024, (256, 512))],
)
def test_a_picture_is_large_enough_to_read_and_no_larger(
    run: RunFolder, file: Path, height: int, width: int, size: tuple[int, int]
) -> None:
    run.save_samples(1, [sample(1, 1.0, plain(0.5, (height, width)))])
    save_preview(file, run, 1)
    assert preview(file).size == size


def test_a_picture_that_nothing_packs_stays_small(run: RunFolder, file: Path) -> None:
    noise = torch.rand(1024, 1024, 3, generator=torch.Generator().manual_seed(0))
    run.save_samples(1, [sample(1, 1.0, noise)])
    save_preview(file, run, 1)
    place = file.with_name("my.v2.preview.png")
    assert 100_000 < place.stat().st_size <= MAX_BYTES and max(preview(file).size) >= 256


def test_of_a_clip_it_is_the_frame_in_the_middle(run: RunFolder, file: Path) -> None:
    clip = torch.stack([plain(level, (32, 48)) for level in (0, 50, 100, 150, 200)]).to(torch.uint8)
    run.save_samples(1, [sample(1, 1.0, clip)])
    save_preview(file, run, 1)
    assert preview(file).size == (48 * 7, 32 * 7) and np.unique(np.asarray(preview(file))).tolist() == [100]


def test_the_same_run_makes_the_same_picture_and_writes_it_once(run: RunFolder, file: Path) -> None:
    run.save_samples(1, [sample(1, 1.0)])
    save_preview(file, run, 1)
    place = file.with_name("my.v2.preview.png")
    before, content = place.stat().st_mtime_ns, place.read_bytes()
    assert save_preview(file, run, 1) == "" and place.stat().st_mtime_ns == before
    place.unlink()
    save_preview(file, run, 1)
    assert place.read_bytes() == content
    run.save_samples(5, [sample(7, 1.0)])
    assert save_preview(file, run, 5) == "" and shown(file) == (7, 5)


@pytest.mark.parametrize(
    "name", ["my.v2.png", "my.v2.preview.png", "my.v2.JPG", "my.v2.preview.webp", "my.v2.mp4"]
)
def test_a_picture_of_the_users_own_stays_and_is_alone(run: RunFolder, file: Path, name: str) -> None:
    run.save_samples(1, [sample(1, 1.0)])
    own = BytesIO()
    Image.new("RGB", (9, 9), "red").save(own, "PNG")
    file.with_name(name).write_bytes(own.getvalue())
    assert name in save_preview(file, run, 1)
    assert [path.name for path in file.parent.iterdir()] == [name]
    assert file.with_name(name).read_bytes() == own.getvalue()


def test_pictures_of_other_files_are_no_concern(run: RunFolder, file: Path) -> None:
    run.save_samples(1, [sample(1, 1.0)])
    for name in ("my.png", "my.v2.more.png", "my.v20.preview.png", "my.v2.txt"):
        file.with_name(name).write_bytes(b"x")
    assert save_preview(file, run, 1) == "" and shown(file) == (1, 1)


def test_without_a_picture_that_can_be_read_it_says_so_and_goes_on(run: RunFolder, file: Path) -> None:
    assert "no held-out prompts" in save_preview(file, run, 3)
    run.save_samples(3, [sample(1, 1.0)])
    (run.path / "images/000003/000.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    assert "gets no picture" in save_preview(file, run, 3)
    (run.path / "images/000003/index.json").write_text("{}")
    assert "gets no picture" in save_preview(file, run, 3)
    run.save_samples(3, [sample(1, 1.0)])
    assert "gets no picture" in save_preview(file.parent / "absent" / file.name, run, 3)
    assert list(file.parent.iterdir()) == []


def test_a_checkpoints_file_knows_its_run(run: RunFolder, tmp_path: Path) -> None:
    place = run.path / "checkpoints/000004"
    found = run_of(place / "lora.safetensors")
    assert found is not None and (found[0].path, found[1]) == (run.path, 4)
    for other in (run.path / "lora.safetensors", run.path / "checkpoints/damaged-000004/lora.safetensors"):
        assert run_of(other) is None
    assert run_of(tmp_path / "checkpoints/000004/lora.safetensors") is None
