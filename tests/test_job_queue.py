"""What waits at the service: whatever lies in its folder, nothing is lost, stuck, or failed by others."""

from __future__ import annotations

import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from guarded import send, send_for_answer
from job_host import job, service
from test_job_server import graph

from comfy_g2rpo.files.spool import Spool
from g2rpo_trainer.jobs.worker_loop import Worker
from g2rpo_trainer.service.job_schema import job_request


def listed(port: int) -> dict[str, str]:
    """Return how the jobs stand of which a service tells."""
    answer = json.loads(send_for_answer(port, "GET", "/jobs")[1].partition("\r\n\r\n")[2])
    return {each["id"]: each["status"] for each in answer["jobs"]}


def test_jobs_wait_while_old_ones_hold_all_the_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "runs").mkdir()
    with service(tmp_path, gigabytes=0.001) as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
    (tmp_path / "runs/old").write_bytes(b"x" * 10**6)
    with service(tmp_path, gigabytes=0.001, works=True) as (port, made):
        deadline = time.monotonic() + 20
        while "jobs hold 0.001 GB" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert made.spool.state("one") == "waiting" and [*made._open] == ["one"]
    assert "jobs hold 0.001 GB; remove old ones" in caplog.text
    assert not (tmp_path / "runs/one.log").exists()


def foreign(spool: Spool) -> None:
    """Lay into a spool what editors, other users and full disks leave there."""
    (spool.path / ".#sound.job.json").symlink_to("somebody@elsewhere.1")
    (spool.path / "locked.taken/.lock").mkdir(parents=True)
    (spool.path / "ended.end.json").touch()


def test_what_is_no_job_holds_up_no_other(tmp_path: Path) -> None:
    with service(tmp_path) as (port, made):
        for name in ("sound", "locked", "ended"):
            assert send(port, "POST", "/jobs", body=job(name)) == 200
        foreign(made.spool)
        assert listed(port) == {"sound": "waiting"} and send(port, "GET", "/jobs/none") == 404
    with service(tmp_path) as (port, made):  # which starts
        assert [*made._open] == ["sound", "locked"]
    said: list[str] = []
    ran: list[str] = []

    class Ends:
        def train(self, spool: Spool, job_id: str, runs: Path, stop: Any) -> str:
            ran.append(job_id)
            spool.end(job_id, "done")
            return "done"

    assert Worker(made.spool.path, tmp_path / "runs", Ends(), said.append).work(once=True)
    assert (
        ran == ["sound"] and any("locked" in each for each in said) and any("ended" in each for each in said)
    )


def test_a_job_that_the_service_has_lost_sight_of_is_found_when_it_is_sent_again(tmp_path: Path) -> None:
    with service(tmp_path) as (port, made):
        made.spool.submit("one", job_request(job("one")).job)  # as when the disk fails behind its name
        assert not made._open and send(port, "POST", "/jobs", body=job("one")) == 200
        assert [*made._open] == ["one"] and made.spool.ids() == ["one"]


def test_asking_again_is_counted_and_undone_by_nobody(tmp_path: Path) -> None:
    with service(tmp_path, queue=1) as (port, made):
        assert send(port, "POST", "/jobs", body=graph()) == 200
        made.spool.end("two", "failed")
        made._let_go("two")
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        end = made.spool.ended("two")["at"]
        assert send(port, "POST", "/jobs", body=graph(again=end)) == 429
        assert made.spool.stop("one") == "cancelled"
        made._let_go("one")
        assert send(port, "POST", "/jobs", body=graph(again=end)) == 200
        made._let_go("two")  # as a worker does that has just seen how it ended before
        assert [*made._open] == ["two"]


def test_many_who_ask_again_at_once_are_all_answered(tmp_path: Path) -> None:
    with service(tmp_path) as (port, made):
        assert send(port, "POST", "/jobs", body=graph()) == 200
        for _ in range(5):
            made.spool.end("two", "failed")
            body, ready = graph(again=made.spool.ended("two")["at"]), threading.Barrier(6)

            def ask(i: int, body: bytes = body, ready: threading.Barrier = ready) -> int:
                ready.wait(20)
                return send(port, "POST", "/jobs", body=body)

            with ThreadPoolExecutor(6) as pool:
                assert {*pool.map(ask, range(6))} == {200}
            assert made.spool.ended("two") is None


def test_a_job_sent_twice_at_once_takes_one_place_and_lets_no_other_past_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, room, go = threading.Event(), threading.Event(), threading.Event()
    write = Spool.submit

    def slowly(spool: Spool, job_id: str, content: Any) -> bool:
        (room if writing.is_set() else writing).set()
        assert go.wait(20)
        return write(spool, job_id, content)

    monkeypatch.setattr(Spool, "submit", slowly)
    with service(tmp_path, queue=1) as (port, made), ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(send, port, "POST", "/jobs", body=job("one"))
            assert writing.wait(20)
            second = pool.submit(send, port, "POST", "/jobs", body=job("one"))
            assert room.wait(20)
            assert send(port, "POST", "/jobs", body=job("two")) == 429
        finally:
            go.set()
        assert (first.result(20), second.result(20)) == (200, 200)
        assert send(port, "POST", "/jobs", body=job("two")) == 429 and made.spool.ids() == ["one"]
