"""Jobs in a folder: written once, taken by one, ended once, whoever is killed in between."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.files.spool import JOB_BYTES, JobError, Spool

HOLD = """
import sys, time
from pathlib import Path
from comfy_g2rpo.files.spool import Spool
with Spool(Path(sys.argv[1])).take("one"):
    print("held", flush=True)
    time.sleep(600)
"""
RACE = """
import os, sys
from pathlib import Path
from comfy_g2rpo.files.spool import JobError, Spool
def no_links(*places):
    raise PermissionError(1, "Operation not permitted")
if sys.argv[3] == "without links":
    os.link = no_links
try:
    print(Spool(Path(sys.argv[1])).submit("one", {"by": sys.argv[2]}))
except JobError as error:
    print("refused")
"""


def test_a_job_goes_from_waiting_to_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    assert spool.submit("one", {"recipe": {"train": {"steps": 2}}})
    assert not spool.submit("one", {"recipe": {"train": {"steps": 2}}})
    assert spool.ids() == ["one"] and spool.state("one") == "waiting"
    with spool.take("one") as job:
        assert job == {"recipe": {"train": {"steps": 2}}}
        assert spool.state("one") == "running"
        with pytest.raises(RunError, match=r"one\.taken is being written by process"), spool.take("one"):
            pass
        spool.cancel("one")
        assert spool.cancelled("one")
        spool.end("one", "cancelled", run="somewhere")
    assert spool.state("one") == "cancelled" and spool.ended("one")["run"] == "somewhere"
    with pytest.raises(JobError, match="job one has ended; submit another one"), spool.take("one"):
        pass
    assert not [path for path in spool.path.iterdir() if path.name.startswith(".")]


def test_what_is_no_job_is_refused_by_name(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for name in ("", "..", "a/b", "A", "nul", "x" * 65, ".x", "a\n", "ä", None):
        with pytest.raises(JobError, match="a job cannot be called"):
            spool.submit(name, {})
    with pytest.raises(JobError, match="is the limit"):
        spool.submit("one", {"much": "x" * JOB_BYTES})
    deep: list[object] = []
    for _ in range(2000):
        deep = [deep]
    for content in ({"deep": deep}, {"half": "\ud800"}):
        with pytest.raises(JobError, match="nested too deeply, or has half signs"):
            spool.submit("one", content)
    spool.submit("one", {"a": 1})
    with pytest.raises(JobError, match="with other content; choose another id"):
        spool.submit("one", {"a": 2})
    with pytest.raises(JobError, match="there is no job two; known are: one"):
        spool.job("two")
    for content in (b"[1]", b"{", b"[" * 100_000, b" " * (JOB_BYTES + 1)):
        (tmp_path / "bad.job.json").write_bytes(content)
        with pytest.raises(JobError, match=r"bad\.job\.json .* remove it"):
            spool.job("bad")
    with pytest.raises(ValueError, match="ends as one of"):
        spool.end("one", "finished")


def test_whoever_is_killed_loses_his_job(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.submit("one", {})
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert spool.state("one") == "running"
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 30
    while spool.state("one") != "waiting" and time.monotonic() < deadline:
        time.sleep(0.05)
    with spool.take("one"):
        assert spool.state("one") == "running"


@pytest.mark.parametrize("system", ["with links", "without links"])
def test_of_many_who_submit_the_same_id_one_wins(tmp_path: Path, system: str) -> None:
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    children = [
        subprocess.Popen([*command, str(i), system], stdout=subprocess.PIPE, text=True) for i in range(5)
    ]
    said = sorted(child.communicate()[0].strip() for child in children)
    assert said == ["True", *["refused"] * 4]
    assert Spool(tmp_path).ids() == ["one"] and [path.name for path in tmp_path.iterdir()] == ["one.job.json"]


def test_what_is_said_of_a_job_is_a_line_and_an_end_is_kept_when_it_is_tried_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.submit("one", {})
    assert spool.noted("one") == spool.sent("one") == "" and spool.former("one") is None
    spool.note("one", "it waits\n for you" + "x" * 9000)
    assert spool.noted("one").startswith("it waits for you") and len(spool.noted("one")) < 5000
    spool.note("one", "")
    assert spool.noted("one") == "" and not spool.newest_asked("one")
    spool.ask_newest("one")
    assert spool.newest_asked("one")
    spool.end("one", "failed", error="why")
    ended = spool.ended("one")
    assert spool.again("one") and spool.former("one") == ended and spool.ended("one") is None
    spool.end("one", "failed", error="why")
    assert spool.ended("one")["at"] > ended["at"]
