"""What follows a run: curves.png on its way, and trackers, none of which may break it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from program import leave
from test_run import StopAt, config

from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.config.reading import ConfigError
from g2rpo_trainer.reports import listeners
from g2rpo_trainer.reports.listeners import check_trackers, flat, listening
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.reports.report import SMOOTHING, smooth
from g2rpo_trainer.run import train

TRACKERS = ("tensorboard", "trackio", "wandb")


class Heard(Silent):
    """Remember remarks and rows."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, metrics: Mapping[str, Any]) -> None:
        self.rows.append(metrics)


class Watching(Heard):
    """Remember at which rows curves.png was there, and take it away."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self.seen = file, []

    def step(self, metrics: Mapping[str, Any]) -> None:
        super().step(metrics)
        if self.file.exists():
            self.seen.append(len(self.rows) - 1)
            self.file.unlink()


def rows_of(*steps: tuple[int, bool]) -> list[dict[str, float]]:
    """Make rows of steps, and of evaluations of them."""
    return [{"step": step, "heldout/a/mean" if looked else "reward/a/mean": 0.5} for step, looked in steps]


LOOKS = rows_of((0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True))
BLIND = rows_of((1, False), (2, False), (3, False), (4, False))


@pytest.fixture
def no_pause(monkeypatch):
    """Let every drawing happen that is due."""
    monkeypatch.setattr(listeners, "PAUSE", 0.0)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(
    ("rows", "changes", "drawn_at"),
    [
        (LOOKS, {"eval_every": 2, "checkpoint_every": 1}, [3]),
        (LOOKS, {"eval_every": 0, "checkpoint_every": 3}, [3, 4]),
        (BLIND, {"eval_every": 2, "checkpoint_every": 2}, [1]),
    ],
)
def test_curves_are_renewed_at_evaluations_or_at_checkpoints(tmp_path, rows, changes, drawn_at):
    prompts = {} if rows is LOOKS else {"heldout": None}
    made = config(tmp_path, train={"steps": 4, **changes}, prompts=prompts)
    folder = RunFolder.create(tmp_path / "run", {})
    file, drawn = folder.path / "curves.png", []
    with listening(Heard(), made, folder, True) as heard:
        heard.start(4, 0, "")
        for place, row in enumerate(rows):
            folder.append(row)
            heard.step(row)
            if file.exists():
                drawn.append(place)
                file.unlink()
    assert drawn == drawn_at


@pytest.mark.usefixtures("no_pause")
def test_curves_that_cannot_be_written_are_said_once(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    (folder.path / "curves.png").mkdir()
    made, progress = config(tmp_path, train={"steps": 9, "eval_every": 1}), Heard()
    with listening(progress, made, folder, True) as heard:
        heard.start(9, 0, "")
        for row in LOOKS:
            folder.append(row)
            heard.step(row)
    assert len(progress.rows) == len(LOOKS)
    (note,) = progress.notes
    assert note.startswith("curves.png has failed and is left out from here on: ")


def test_between_two_drawings_is_a_pause(tmp_path, monkeypatch):
    clock = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.5, 21.0])  # the start; rows; and after a drawing once more
    monkeypatch.setattr(listeners.time, "monotonic", lambda: next(clock))
    folder, drawn = RunFolder.create(tmp_path / "run", {}), []
    monkeypatch.setattr(listeners, "curves", lambda rows, path: drawn.append(len(rows)))
    follow = listeners.LiveCurves(Heard(), folder, 1)
    follow.total = 9
    for row in rows_of(*((step, True) for step in range(1, 6))):
        folder.append(row)
        follow.step(row)
    assert drawn == [2, 4]


@pytest.mark.usefixtures("no_pause")
def test_a_run_renews_its_curves_on_its_way(tmp_path):
    watching = Watching(tmp_path / "run/curves.png")
    train(config(tmp_path), tmp_path / "run", progress=watching)
    assert [watching.rows[place]["step"] for place in watching.seen] == [3]
    assert (tmp_path / "run/curves.png").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 7, 300])
def test_the_trend_is_the_average_with_falling_weights(count):
    values = np.random.default_rng(count).normal(size=count)
    weights = (1 - SMOOTHING) ** np.arange(count)
    plain = [np.average(values[: i + 1], weights=weights[i::-1] if i else weights[:1]) for i in range(count)]
    assert smooth(values) == pytest.approx(np.array(plain))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_one_line_before_the_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    words = ["train", "demo", "--out", tmp_path / "run", "--set", f"report.trackers={name}"]
    code, _, error = leave(capsys, *words)
    says = f"error: report.trackers has {name}, which is not installed; install it with: pip install {name}\n"
    assert (code, error) == (2, says) and not (tmp_path / "run").exists()


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="wandb, which is not installed"):
        check_trackers(("wandb",))


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=r"report\.trackers\.0 is 'tensorbord' \(did you mean 'tensorboard'"
    ):
        config(tmp_path, report={"trackers": ["tensorbord"]})


PACKAGE = """
class Run:
    def log(self, values, step=None):
        {log}
    def finish(self):
        {finish}

class config:
    update = staticmethod(lambda values, allow_val_change: None)

def init(project, **given):
    {init}
    return Run()
"""


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(name, broken, tmp_path, monkeypatch):
    parts = dict.fromkeys(("init", "log", "finish"), "pass")
    parts[broken] = "raise ConnectionError('no\\nnetwork')"
    place = tmp_path / "site"
    (place / name).mkdir(parents=True)
    (place / name / "__init__.py").write_text(PACKAGE.format(**parts))
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(place)
    # accelerate has looked for them when it was imported.
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType(name)])
    folder, progress = RunFolder.create(tmp_path / "run", {}), Heard()
    made = config(tmp_path, train={"steps": 4}, report={"trackers": [name]})
    try:
        with listening(progress, made, folder, True) as heard:
            heard.start(4, 0, "")
            for row in LOOKS:
                folder.append(row)
                heard.step(row)
    finally:
        sys.modules.pop(name, None)
    assert progress.rows == LOOKS
    assert progress.notes == [f"{name} has failed and is left out from here on: no network"]


def test_settings_lie_flat_for_a_tracker():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "[1, 2]", "d": None}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Read what TensorBoard would show of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: {each.step: each.value for each in events.Scalars(name)} for name in events.Tags()["scalars"]
    }


def test_tensorboard_shows_every_number_once_also_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    made = config(tmp_path, report={"trackers": ["tensorboard"]})
    with pytest.raises(KeyboardInterrupt):
        train(made, tmp_path / "run", progress=StopAt(2))
    # Another tracker may follow what goes on: it changes nothing that is learned.
    train(
        config(tmp_path, report={"trackers": "tensorboard"}), tmp_path / "run", resume=True, progress=Silent()
    )
    shown, rows = scalars(tmp_path / "run"), RunFolder.open(tmp_path / "run").metrics()
    for name in ("reward/agreement/mean", "heldout/agreement/mean", "lr", "grad_norm"):
        written = {row["step"]: row[name] for row in rows if name in row}
        assert shown[name] == pytest.approx(written) and written
    train(config(tmp_path, train={"steps": 4}), tmp_path / "run", resume=True, progress=Silent())
    assert os.listdir(tmp_path / "run/tensorboard")


def interrupted_and_resumed(tmp_path: Path, name: str) -> list[Mapping[str, Any]]:
    """Stop a run after its second step, go back before that, and let it end; return its rows."""
    made, run = config(tmp_path, report={"trackers": [name], "project": "ours"}), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(made, run, progress=StopAt(2))
    if (run / "checkpoints/000001").exists():
        shutil.rmtree(run / "checkpoints/000002")
    heard = Heard()
    train(made, run, resume=True, progress=heard)
    assert [note for note in heard.notes if name in note] == []
    return RunFolder.open(run).metrics()


@pytest.mark.long
def test_trackio_shows_every_row_once_also_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read as it is imported
    pytest.importorskip("trackio")
    rows = interrupted_and_resumed(tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").rglob("*.db")
    with closing(sqlite3.connect(file)) as base:
        shown = [
            (step, *json.loads(text)) for step, text in base.execute("SELECT step, metrics FROM metrics")
        ]
    assert sorted(step for step, *_ in shown) == sorted(row["step"] for row in rows)
    assert sum("grad_norm" in names for _, *names in shown) == 3


def wandb_records(file: Path) -> Iterator[bytes]:
    """Read a file that wandb keeps offline: blocks of 32 KiB, with records that may go over several."""
    content, at, part = file.read_bytes(), 7, b""
    while at < len(content):
        if (room := -at % 2**15) and room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


@pytest.mark.long
def test_wandb_works_without_a_network_and_takes_every_row_once(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = interrupted_and_resumed(tmp_path, "wandb")
    files = sorted((tmp_path / "run").rglob("*.wandb"))
    records = [Record.FromString(content) for file in files for content in wandb_records(file)]
    history = [record.history for record in records if record.HasField("history")]
    names = [{item.key or "/".join(item.nested_key) for item in each.item} for each in history]
    assert wandb.run is None and len({each.run.run_id for each in records if each.HasField("run")}) == 1
    assert sum("grad_norm" in each for each in names) == sum("grad_norm" in row for row in rows) == 3
    assert sorted({each.step.num for each in history}) == sorted({row["step"] for row in rows})
