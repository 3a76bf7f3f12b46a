"""Files and links that are no sound run, picture or text: whoever reads a user's folder answers at once, in
words, and shows the rest of it.
"""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import Server, traced
from program import leave
from test_routes import comfyui, make_run, refused, routes

from comfy_g2rpo.files.captions import caption_of
from comfy_g2rpo.files.safe import RunError, read_json, stamps
from comfy_g2rpo.files.save_pictures import save_png

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such files")


def sock(path: Path) -> None:
    """Make a socket file; its name may be longer than a socket's address."""
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


ODD_FILES: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": sock,
    "folder": Path.mkdir,
    "link to nothing": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a pipe": lambda path: [os.mkfifo(path.with_name("beside")), path.symlink_to("beside")],
    "nothing but zeros": lambda path: [path.touch(), os.truncate(path, 2**40)],
    "no readable file": lambda path: [path.write_text("{"), path.chmod(0)],
}
ODD_RUNS: dict[str, Callable[[Path], Any]] = {
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "links in a circle": lambda path: [
        path.symlink_to("other"),
        path.with_name("other").symlink_to(path.name),
    ],
    "a link to a file": lambda path: [path.with_name("file").touch(), path.symlink_to("file")],
    "a link to its own folder": lambda path: path.symlink_to("."),
    "a closed folder": lambda path: path.mkdir(mode=0),
    "a pipe": os.mkfifo,
}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Break off what waits for a pipe."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("still waiting")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("odd", ODD_RUNS)
def test_one_bad_entry_hides_no_run(tmp_path: Path, odd: str) -> None:
    for name in ("one", "two"):
        make_run(tmp_path, name)
    ODD_RUNS[odd](tmp_path / "odd")
    assert {run["id"] for run in routes.list_runs(tmp_path)} == {"one", "two"}
    assert "no run of this name" in refused(tmp_path, "odd")


@pytest.mark.parametrize("odd", ODD_FILES)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "summary.json", "images", "images/000000/index.json"]
)
def test_a_file_of_another_kind_is_answered_at_once_and_hides_no_other_run(
    tmp_path: Path, name: str, odd: str
) -> None:
    make_run(tmp_path, "sound")
    place = make_run(tmp_path, "odd").path / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    ODD_FILES[odd](place)
    assert "sound" in {run["id"] for run in routes.list_runs(tmp_path)}
    try:
        answer = routes.read_metrics(tmp_path, "odd")
    except ValueError as error:
        assert name in ("metrics.jsonl", "config.json") and "\n" not in str(error)
    else:
        assert (answer["total"], answer["samples"]) == (3, []) and name != "metrics.jsonl"


def test_a_run_that_goes_while_it_is_looked_at_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "gone", "two"):
        make_run(tmp_path, name)

    def seen(place: Path) -> bool:
        if place.name == "gone":
            shutil.rmtree(place)
        return True

    monkeypatch.setattr(routes, "is_run", seen)
    assert {run["id"] for run in routes.list_runs(tmp_path)} == {"one", "two"}


def test_metrics_that_are_too_long_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "MAX_METRICS_BYTES", 2**20)
    os.truncate(make_run(tmp_path).metrics_file, 2**20 + 1)
    assert "has more than 1 MiB" in refused(tmp_path, "run")
    assert [run["id"] for run in routes.list_runs(tmp_path)] == ["run"]


SPECIAL = [name for name in ODD_FILES if name not in ("nothing but zeros", "no readable file")]


@pytest.mark.parametrize("odd", SPECIAL)
def test_a_picture_that_is_none_is_named_in_one_line(
    tmp_path: Path, odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "odd.png"
    ODD_FILES[odd](place)
    code, _, error = leave(capsys, "score", place, "--reward", "jpeg")
    assert code == 2 and str(place) in error and error.count("\n") == 1


@pytest.mark.parametrize("odd", SPECIAL)
def test_a_text_beside_a_picture_that_is_none_is_no_prompt(tmp_path: Path, odd: str) -> None:
    save_png(tmp_path / "a.png", torch.zeros(4, 4, 3))
    ODD_FILES[odd](tmp_path / "a.txt")
    assert caption_of(tmp_path / "a.png") == ("", "")


@pytest.mark.parametrize("odd", SPECIAL)
def test_a_table_of_a_run_that_is_no_file_is_named(tmp_path: Path, odd: str) -> None:
    ODD_FILES[odd](tmp_path / "odd.json")
    with pytest.raises(RunError, match=r"cannot read .*odd\.json"):
        read_json(tmp_path / "odd.json")


@pytest.mark.parametrize("odd", ["link to nothing", "link to itself", "pipe"])
def test_what_has_changed_shows_beside_a_bad_file(tmp_path: Path, odd: str) -> None:
    good = tmp_path / "good"
    good.write_text("a")
    ODD_FILES[odd](tmp_path / "odd")
    before = stamps([tmp_path / "odd", good])
    assert stamps([tmp_path / "odd", good]) == before
    good.write_text("ab")
    assert stamps([tmp_path / "odd", good]) != before


@comfyui
def test_odd_entries_keep_no_page_waiting(served: Server) -> None:
    root = served.base / "output/g2rpo"
    make_run(root, "sound")
    for number, make in enumerate(ODD_RUNS.values()):
        (root / str(number)).mkdir()
        make(root / str(number) / "odd")
        (root / f"odd{number}").symlink_to(f"{number}/odd")
    for number, make in enumerate(ODD_FILES.values()):
        run = make_run(root, f"bad{number}").metrics_file
        run.unlink()
        make(run)
    assert "sound" in {run["id"] for run in served.get("/g2rpo/runs")["runs"]}
    for name in [*(f"odd{i}" for i in range(len(ODD_RUNS))), *(f"bad{i}" for i in range(len(ODD_FILES)))]:
        status, body = served.request("GET", f"/g2rpo/runs/{name}/metrics")
        assert status in (400, 404) and list(json.loads(body)) == ["error"], name
    assert not traced(served.log)
