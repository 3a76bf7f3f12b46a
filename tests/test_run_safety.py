"""What a run folder survives: a second writer, a kill, a damaged checkpoint, a signal, a write that
failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from program import Notes
from some_cases import some
from test_run import assert_equal, config, outcome, prepare
from test_run import training as host

from comfy_g2rpo.files import one_writer as locks
from comfy_g2rpo.files.one_writer import LOCK, one_writer
from comfy_g2rpo.files.safe import RunError, sweep, write_tensors
from comfy_g2rpo.run.checkpoint import save
from comfy_g2rpo.run.folder import CHECKPOINT_FILES, RunFolder, file_state
from comfy_g2rpo.run.setup import World, make_learner
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("run safety")

HOLD = """
import sys, time
from comfy_g2rpo.files.one_writer import one_writer
with one_writer(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(120)
"""


def train_whole(path: Path) -> Path:
    """Run once without trouble."""
    host.train(config(path), path / "run", progress=Silent())
    return path


def stop_after_two(whole: Path, place: Path) -> Path:
    """Copy that run, stopped after two of its three steps."""
    shutil.copytree(whole / "run", place / "run")
    shutil.rmtree(place / "run/checkpoints/000003")
    (place / "run/summary.json").unlink()
    return place / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return stop_after_two(whole, tmp_path)


def continued(whole: Path, run: Path) -> list[str]:
    """Resume a run and return what was said; it must end as the whole one did."""
    notes = Notes()
    host.train(config(whole), run, resume=True, progress=notes)
    assert_equal(outcome(run), outcome(whole / "run"))
    return notes.said


# One writer


@pytest.fixture
def held(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Let another process write the run."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "mine\n"
    yield child
    child.kill()
    child.wait()


@pytest.mark.parametrize("how", some([{"resume": True}, {"replace": True}, {}], 1), ids=str)
def test_a_second_writer_is_told_who_writes_and_changes_nothing(
    held: subprocess.Popen[str], run: Path, whole: Path, how: dict[str, bool]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = rf"run is being written by process {held.pid} on \S+ since 2\S+ \S+; stop that one"
    with pytest.raises(RunError, match=said):
        host.train(config(whole), run, progress=Silent(), **how)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_killed_writer_leaves_the_run_to_others(
    held: subprocess.Popen[str], run: Path, whole: Path
) -> None:
    held.kill()
    held.wait()
    assert (run / LOCK).is_file()
    continued(whole, run)
    assert not (run / LOCK).exists()


def test_two_threads_of_a_process_are_two_writers(tmp_path: Path) -> None:
    second = one_writer(tmp_path / "run")
    with one_writer(tmp_path / "run"), pytest.raises(RunError, match="is being written by process"):
        second.__enter__()


@pytest.mark.parametrize("place", ["notes.txt", "link", "sub/notes.txt"])
def test_a_file_in_a_runs_place_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    if place != "notes.txt":
        (tmp_path / place).symlink_to(tmp_path / "notes.txt")
    with pytest.raises(RunError, match=f"{place} is a file and no run"), one_writer(tmp_path / place):
        pass
    assert (tmp_path / place).read_text() == "mine"


def test_a_lock_that_its_owner_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, removed = locks.taken, []

    def late(handle: int) -> bool:
        if len(removed) < 3:
            removed.append((tmp_path / LOCK).unlink())
        return taken(handle)

    monkeypatch.setattr(locks, "taken", late)
    with one_writer(tmp_path):
        assert len(removed) == 3 and (tmp_path / LOCK).is_file()
        with pytest.raises(RunError, match="is being written by process"), one_writer(tmp_path):
            pass


@pytest.mark.long
def test_of_many_who_come_at_once_one_writes(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    time.sleep(0.1)
    deadline = time.monotonic() + 60
    while sum(child.poll() is None for child in children) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [child for child in children if child.poll() is None]
    lost = [child.stderr.read().splitlines()[-1] for child in children if child not in alive]
    for child in alive:
        child.kill()
        child.wait()
    assert len(alive) == 1 and all("is being written by" in line for line in lost)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path: Path) -> None:
    made = config(tmp_path, train={"preview_width": 97, "preview_height": 96})
    with pytest.raises(ValueError, match="preview_width"):
        host.train(made, tmp_path / "run", progress=Silent())
    assert not (tmp_path / "run").exists()


# Checkpoints


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: file.write_bytes(b""),
    "of another run": lambda file: shutil.copy(file.parent.parent / "000001" / file.name, file),
}


FILES = ("lora.safetensors", "state.safetensors", "state.json")


@pytest.mark.parametrize(("how", "name"), some(product(DAMAGE, FILES), 2))
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    run: Path, whole: Path, name: str, how: str
) -> None:
    shutil.copytree(whole / "run/checkpoints/000002", run / "checkpoints/000001", dirs_exist_ok=True)
    rewind(run / "checkpoints/000001", whole)
    DAMAGE[how](run / "checkpoints/000002" / name)
    said = continued(whole, run)
    words = f"checkpoint 000002 is damaged ({name}) and was set aside; continuing from step 1"
    assert said[0] == words or (how, name) == ("of another run", "state.json")
    assert (run / "checkpoints/damaged-000002" / name).exists()


def rewind(place: Path, whole: Path) -> None:
    """Put the whole run's first checkpoint where a run has kept its last two alone."""
    shutil.rmtree(place)
    path = whole / "first"
    if not path.exists():
        host.train(config(whole, train={"steps": 1}), path, progress=Silent())
    shutil.copytree(path / "checkpoints/000001", place)


@pytest.mark.parametrize("name", ["lora.safetensors", "state.safetensors", "state.json"])
def test_where_no_checkpoint_is_sound_nothing_is_touched(run: Path, whole: Path, name: str) -> None:
    for place in (run / "checkpoints").iterdir():
        flip(place / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        RunError, match=rf"checkpoint 000002 is damaged \({name}\), and none before it is sound"
    ):
        continued(whole, run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_an_earlier_version_has_no_sums_and_is_taken(run: Path, whole: Path) -> None:
    state = run / "checkpoints/000002/state.json"
    state.write_text(json.dumps({k: v for k, v in json.loads(state.read_text()).items() if k != "sha256"}))
    assert not [line for line in continued(whole, run) if "damaged" in line]


def test_two_checkpoints_are_kept_at_least(tmp_path: Path) -> None:
    made = config(tmp_path, train={"keep_checkpoints": 1, "watch": "off"})
    host.train(made, tmp_path / "run", progress=Silent())
    assert [place.name for place in RunFolder(tmp_path / "run").saved()] == ["000002", "000003"]


def test_one_process_writes_a_step_once(tmp_path: Path) -> None:
    setup = prepare(config(tmp_path))
    learner, folder = make_learner(setup), RunFolder.create(tmp_path / "run", {})
    save(replace(setup, world=World(index=1, count=2)), learner, folder)
    assert folder.saved() == []
    save(setup, learner, folder)
    files = [folder.checkpoints / "000000" / name for name in CHECKPOINT_FILES]
    before = [file_state(file) for file in files]
    learner.seconds += 9
    save(setup, learner, folder)
    assert [file_state(file) for file in files] == before


@pytest.mark.long
def test_the_untrained_checkpoint_survives_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path)

    def no_room(self: RunFolder, step: int, *rest: object, **more: object) -> Path:
        raise RunError("cannot write: no space left on device; make room")

    with monkeypatch.context() as full, pytest.raises(RunError, match="no space"):
        full.setattr(RunFolder, "save_checkpoint", no_room)
        host.train(made, tmp_path / "run", progress=Silent())
    assert RunFolder(tmp_path / "run").metrics() == []
    host.train(config(tmp_path, train={"steps": 1}), tmp_path / "run", resume=True, progress=Silent())
    assert RunFolder(tmp_path / "run").saved()[0].name == "000000"


def test_equal_contents_are_equal_files(tmp_path: Path) -> None:
    notes = {f"key {i}": str(i) for i in range(12)}
    for name in ("one", "two"):
        write_tensors(tmp_path / name, {"b": torch.ones(3), "a": torch.zeros(2, 2)}, notes)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_resumed_run_ends_with_the_very_files_of_one_that_was_not_stopped(run: Path, whole: Path) -> None:
    continued(whole, run)
    for name in ("lora.safetensors", "state.safetensors"):
        one, two = (path / "checkpoints/000003" / name for path in (run, whole / "run"))
        assert one.read_bytes() == two.read_bytes()


# What interruptions leave


LEFT = (
    ".config.json.a1b2c3d4",
    ".metrics.jsonl.zzzzzzzz",
    "images/000002/.000.png.partial",
    "images/000002/.index.json.0a0a0a0a",
    "checkpoints/.filling-abcd/lora.safetensors",
    "checkpoints/.replaced-2/state.json",
)


@pytest.mark.parametrize("name", LEFT)
def test_what_an_interrupted_write_leaves_is_swept(run: Path, name: str) -> None:
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_bytes(b"half")
    (run / ".keep.me").write_bytes(b"")
    RunFolder.open(run)
    assert not (run / name).exists() and (run / ".keep.me").exists()


def test_sweeping_leaves_what_a_person_put_there(tmp_path: Path) -> None:
    kept = (
        "notes.txt",
        ".hidden",
        ".git/config",
        "checkpoints/best/lora.safetensors",
        "a.partial",
        ".notes.original",
    )
    for name in kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    sweep(tmp_path)
    assert all((tmp_path / name).exists() for name in kept)


# Signals


@pytest.mark.parametrize("name", some(["SIGTERM", "SIGINT", "SIGHUP"], 1))
def test_a_signal_stops_at_the_next_forward_and_leaves_a_checkpoint(
    tmp_path: Path, whole: Path, name: str
) -> None:
    class Signalled(Silent):
        def step(self, metrics: dict[str, float]) -> None:
            if metrics["step"] == 2 and "nfe" in metrics:
                os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(KeyboardInterrupt):
        host.train(config(whole), tmp_path / "run", progress=Signalled())
    assert RunFolder(tmp_path / "run").latest().name == "000002"
    assert signal.getsignal(getattr(signal, name)) == before
    continued(whole, tmp_path / "run")


def test_the_lock_says_who_and_since_when(tmp_path: Path) -> None:
    with one_writer(tmp_path):
        said = json.loads((tmp_path / LOCK).read_text())
        assert said["pid"] == os.getpid() and re.fullmatch(
            (r"2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d.*"), said["since"]
        )
