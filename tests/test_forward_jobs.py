"""`g2rpo worker --forward`: jobs of the spool that a service trains, and that look here as if they were ours.

Runs at the service are written by hand, where nothing needs to be learned from training them.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from graph_forms import model_file
from guarded import TOKEN
from job_host import connections_to, grown_run, service
from PIL import Image
from program import leave
from some_cases import ALL
from test_graph_job import job_of
from test_remote import memory, with_lora

from comfy_g2rpo.files.safe import write_json
from comfy_g2rpo.files.spool import Spool
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.jobs import forward_job
from g2rpo_trainer.jobs.forward_job import Forward
from g2rpo_trainer.jobs.worker_loop import Worker
from g2rpo_trainer.service.http_guard import token_of
from g2rpo_trainer.service.remote_client import RemoteService

NEVER = 60.0


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    """Make a spool as Submit Training does, with one job that waits."""
    found = Spool(tmp_path / "out/g2rpo/spool")
    found.submit("hand", job_of())
    return found


class Forwarding:
    """A worker in a thread, which passes one job on; `stop` ends it."""

    def __init__(self, spool: Spool, url: str, job_id: str = "hand", patience: float = NEVER) -> None:
        self.spool, self.job_id, self.ending = spool, job_id, threading.Event()
        self.forward = Forward(RemoteService(url, TOKEN, -1.0), 0.02, patience)
        self.status = ""
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        self.status = self.forward.train(self.spool, self.job_id, self.spool.path.parent, self.ending.is_set)

    def until(self, holds: Callable[[], Any]) -> None:
        """Wait until something holds, or the worker ends."""
        deadline = time.monotonic() + NEVER
        while not holds() and self.thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert holds()

    def end(self) -> str:
        """Wait for its end."""
        self.thread.join(NEVER)
        assert not self.thread.is_alive()
        return self.status

    def stop(self) -> str:
        """Stop it."""
        self.ending.set()
        return self.end()


def at(port: int) -> str:
    """Return the address of a port here."""
    return f"http://127.0.0.1:{port}"


def run_of(spool: Spool, job_id: str = "hand") -> RunFolder:
    """Return the image of a run."""
    return RunFolder(spool.path.parent / job_id)


def with_samples(run: RunFolder, step: int, count: int = 2) -> None:
    """Write pictures of held-out prompts by hand, the second of a clip."""
    place, rows = run.path / "images" / f"{step:06d}", []
    place.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (step, i, 0)).save(place / f"{i:03d}.png")
        rows.append({"file": f"{i:03d}.png", "prompt": f"{i} cats", "seed": i, "scores": {"x": i / 7}})
    Image.new("RGB", (8, 8)).save(place / "001.webp")
    rows[1] |= {"clip": "001.webp", "frames": 3}
    write_json(place / "index.json", rows)


def test_a_run_elsewhere_looks_like_one_of_ours_while_it_goes_on_and_at_its_end(
    spool: Spool, tmp_path: Path
) -> None:
    with service(tmp_path / "served") as (port, made):
        worker = Forwarding(spool, at(port))
        worker.until(lambda: "waits its turn" in spool.noted("hand"))
        assert made.spool.job("hand") == spool.job("hand") and spool.state("hand") == "running"
        with made.spool.take("hand"):
            run = grown_run(made, "hand", 5)
            with_samples(run, 5)
            lora = with_lora(run, 5)
            mine = run_of(spool)
            worker.until(lambda: mine.path.is_dir() and mine.sampled_steps() == [5])
            assert mine.metrics() == run.metrics() and mine.metrics_file.read_bytes().count(b"\n") == 6
            assert mine.config()["config"]["train"]["steps"] == 99 and not spool.noted("hand")
            shown, theirs = mine.samples(5), run.samples(5)
            assert [(each.prompt, each.seed, each.scores, each.frames) for each in shown] == [
                (each.prompt, each.seed, each.scores, each.frames) for each in theirs
            ]
            for one in ("000.png", "001.png", "001.webp"):
                came, made_there = (each.path / "images/000005" / one for each in (mine, run))
                assert came.read_bytes() == made_there.read_bytes()
            assert mine.latest() is None
            spool.ask_newest("hand")
            worker.until(mine.latest)
            run.append({"step": 6, "reward/x/mean": None})
            with_lora(run, 6)
            run.save_summary({"steps": 6, "lora_step": 5})
            (run.path / "curves.png").write_bytes((run.path / "images/000005/000.png").read_bytes())
        made.spool.end("hand", "done", seconds=3.5)
        assert worker.end() == "done"
    ended = spool.ended("hand")
    assert ended["lora"] == "checkpoints/000005/lora.safetensors" and ended["step"] == 5
    assert (mine.outcome() / "lora.safetensors").read_bytes() == lora and len(mine.saved()) == 1
    assert mine.metrics() == run.metrics() and (mine.path / "curves.png").is_file()
    assert not list(mine.path.glob(".*"))


def test_whoever_begins_again_in_the_middle_brings_no_row_twice(spool: Spool, tmp_path: Path) -> None:
    with service(tmp_path / "served") as (port, made):
        worker, mine = Forwarding(spool, at(port)), run_of(spool)
        worker.until(lambda: made.spool.ids())
        run = grown_run(made, "hand", 3000)
        worker.until(lambda: mine.path.joinpath("metrics.jsonl").is_file() and len(mine.metrics()) > 1)
        assert worker.stop() == "waiting" and spool.state("hand") == "waiting"
        with open(mine.metrics_file, "ab") as file:
            file.write(b'{"step": 9')  # as a kill leaves it
        with_lora(run, 7)
        made.spool.end("hand", "done")
        assert Forwarding(spool, at(port)).end() == "done"
        same = RunFolder(mine.path).metrics() == run.metrics()  # pytest would compare all of them
        assert same and made.spool.ids() == ["hand"]


def test_a_wish_to_stop_is_passed_on_whenever_it_comes(spool: Spool, tmp_path: Path) -> None:
    spool.submit("early", job_of(rank=3))
    spool.submit("late", job_of(rank=4))
    spool.cancel("early")
    with service(tmp_path / "served") as (port, made):
        assert Forwarding(spool, at(port), "early").end() == "cancelled" and not made.spool.ids()
        worker = Forwarding(spool, at(port))
        worker.until(lambda: made.spool.ids())
        spool.cancel("hand")
        assert worker.end() == "cancelled" and made.spool.state("hand") == "cancelled"
        # Nobody is there when it is stopped, and the service has it.
        worker = Forwarding(spool, at(port), "late")
        worker.until(lambda: "late" in made.spool.ids())
        assert worker.stop() == "waiting"
        assert spool.stop("late") == "waiting" and made.spool.state("late") == "waiting"
        assert Forwarding(spool, at(port), "late").end() == "cancelled"
        assert made.spool.state("late") == "cancelled"
    assert not run_of(spool).path.exists()


def test_what_failed_says_why_and_is_tried_again_once_for_each_wish(spool: Spool, tmp_path: Path) -> None:
    with service(tmp_path / "served") as (port, made):
        worker = Forwarding(spool, at(port))
        worker.until(lambda: made.spool.ids())
        made.spool.end("hand", "failed", error=f"no room in {tmp_path}/served/x")
        assert worker.end() == "failed" and spool.ended("hand")["error"] == "no room in x"
        assert spool.again("hand")
        worker = Forwarding(spool, at(port))
        worker.until(lambda: made.spool.state("hand") == "waiting")
        assert worker.stop() == "waiting"
        made.spool.end("hand", "failed", error="no room again")
        # The wish was granted before: it is not granted once more after a kill.
        assert Forwarding(spool, at(port)).end() == "failed"
        assert spool.ended("hand")["error"] == "no room again"
        assert made.spool.state("hand") == "failed"


def test_a_service_that_is_not_there_yet_loses_nothing(spool: Spool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    worker = Forwarding(spool, at(port))
    worker.until(lambda: "does not answer" in spool.noted("hand"))
    with service(tmp_path / "served", port=port) as (_, made):
        worker.until(lambda: made.spool.ids())
        assert worker.stop() == "waiting"


def test_a_job_can_be_cancelled_though_its_service_is_gone_for_good(spool: Spool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    worker = Forwarding(spool, at(port), patience=0.1)
    worker.until(lambda: "does not answer" in spool.noted("hand"))
    spool.cancel("hand")
    assert worker.end() == "cancelled"
    assert "if it has the job: g2rpo remote cancel hand" in spool.ended("hand")["error"]


def test_another_token_and_a_full_queue_are_waited_for(spool: Spool, tmp_path: Path) -> None:
    with service(tmp_path / "served", queue=1) as (port, made):
        made.spool.submit("other", {})
        made._open["other"] = None
        worker = Forwarding(spool, at(port))
        worker.until(lambda: "refuses with 429: 1 jobs wait already" in spool.noted("hand"))
        made._open.clear()
        worker.until(lambda: "hand" in made.spool.ids())
        assert worker.stop() == "waiting"
        worker = Forwarding(spool, at(port))
        worker.forward.service._token = "x" * 43
        worker.until(lambda: "refuses with 401" in spool.noted("hand"))
        assert worker.stop() == "waiting"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "votes": ({"rewards": [{"name": "votes"}]}, "rewards has votes, and a worker asks nobody"),
    "a picture": ({"rewards": [{"name": "psnr", "reference": "x.png"}]}, "rewards.reference is nothing"),
    "a path": ({"out": "/tmp/x"}, "'out' is no section"),
    "a reward that is not there": ({"rewards": [{"name": "pickscore"}]}, "refuses with 400: reward"),
    "many prompts": ({"prompts": {"train": ["a" * 1999] * 200, "heldout": []}}, "413: at most 262144 bytes"),
    "a long prompt": ({"prompts": {"train": ["a" * 3000], "heldout": []}}, "recipe.prompts.train.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_fails_in_one_line(name: str, spool: Spool, tmp_path: Path) -> None:
    changes, words = REFUSED[name]
    job = job_of()
    spool.submit("odd", {**job, "recipe": {**job["recipe"], **changes}})
    with service(tmp_path / "served") as (port, made):
        assert Forwarding(spool, at(port), "odd").end() == "failed" and not made.spool.ids()
    error = spool.ended("odd")["error"]
    assert words in error and "\n" not in error and str(tmp_path) not in error


def test_models_are_found_by_name_in_the_folders_of_the_service(spool: Spool, tmp_path: Path) -> None:
    model_file(tmp_path / "big/checkpoints/a.safetensors", "flux")
    (tmp_path / "big/checkpoints/bad.safetensors").write_bytes(b"")
    (tmp_path / "big/checkpoints/out.safetensors").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"")
    with service(tmp_path / "served", models=(tmp_path / "big",)) as (port, made):
        for name in ("a", "b", "bad", "../../secret", "out"):
            job, job_id = job_of(), f"of-{name.strip('./')}"
            job["models"] |= {"folder": "checkpoints", "model": f"{name}.safetensors"}
            spool.submit(job_id, job)
            worker = Forwarding(spool, at(port), job_id)
            if name == "a":
                worker.until(lambda: made.spool.ids() == ["of-a"])
                assert worker.stop() == "waiting"
            else:
                assert worker.end() == "failed"
                error = spool.ended(job_id)["error"]
                assert f"{name}.safetensors" in error and str(tmp_path) not in error
        ready = made._rules("of-a").prepare(made.spool.job("of-a"))
        assert ready["recipe"]["model"]["path"] == str(tmp_path / "big/checkpoints/a.safetensors")


def test_a_run_that_was_begun_here_is_not_passed_on_and_a_worker_waits_beside_it(
    spool: Spool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder.create(run_of(spool).path, {})
    with service(tmp_path / "served") as (port, made):
        worker = Worker(spool.path, spool.path.parent, Forward(RemoteService(at(port), TOKEN, -1.0)))
        assert worker.work(once=True) and not made.spool.ids() and spool.state("hand") == "waiting"
    assert capsys.readouterr().out.count("hand was begun on this machine; start g2rpo worker without") == 1


def test_another_job_of_that_name_is_told_apart(spool: Spool, tmp_path: Path) -> None:
    with service(tmp_path / "served") as (port, made):
        made.spool.submit("hand", {})
        assert Forwarding(spool, at(port)).end() == "failed"
    assert "refuses with 409: job hand is there already, with other content" in spool.ended("hand")["error"]


# A service that is none, or means no good


@contextmanager
def answering(answer: Callable[[str, str], bytes]) -> Iterator[int]:
    """Answer requests by hand, by method and path, one per connection."""

    def one(client: socket.socket) -> None:
        with client, suppress(OSError, ValueError):
            method, path, _ = client.recv(2**20).split(b"\r\n")[0].decode().split(" ")
            for part in endless(answer(method, path)):
                client.sendall(part)

    with connections_to(one) as port:
        yield port


def endless(content: bytes) -> Iterator[bytes]:
    """Give a content; one that ends with ... goes on without end."""
    more = content.endswith(b"...")
    yield content
    while more:
        yield content[-(2**16) :]


def ok(content: Any, length: int | None = None) -> bytes:
    """Write an answer."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


VIEW = {"id": "hand", "status": "running", "steps": 9, "samples": [], "lora": None, "pictures": []}
LORA = {"step": 1, "bytes": 4, "sha256": "0" * 64}
PLACE = "../../../../evil"
HOSTILE: dict[str, Callable[[str, str], bytes]] = {
    "garbage": lambda method, path: b"\x00\xff" * 99,
    "a page": lambda method, path: ok(b"<html>"),
    "a list": lambda method, path: ok([]),
    "depth": lambda method, path: ok(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a body without end": lambda method, path: b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 2**16 + b"...",
    "chunks without end": lambda method, path: (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"9\r\nabcdefghi\r\n" * 2**12
        + b"9\r\nabc..."
    ),
    "a head without end": lambda method, path: b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 2**12 + b"A: ...",
    "another place": lambda method, path: (
        b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0\r\n\r\n"
    ),
    "no state": lambda method, path: ok({"status": ["running"], "steps": 1}),
    "odd rows": lambda method, path: ok(
        {"rows": [1, [], None, {"step": "x", "a": {}, "b": 10**400, "c" * 999: 1, "d": 1e300}]}
        if "metrics" in path
        else VIEW
    ),
    "rows without end": lambda method, path: ok(
        {"rows": [{"step": 1, "a": "x" * 400}] * 2000} if "metrics" in path else VIEW
    ),
    "no rows": lambda method, path: ok({"rows": {"a": 1}} if "metrics" in path else VIEW),
    "pictures elsewhere": lambda method, path: ok(
        {"rows": []}
        if "metrics" in path
        else {"samples": [{"files": [{"name": PLACE}, 3, {"name": ["000.png"]}], "prompt": 3, "scores": []}]}
        if "samples" in path
        else {**VIEW, "samples": [1, "../x", -1, 10**30, True], "pictures": [PLACE]}
    ),
    "pictures that are none": lambda method, path: (
        ok(b"MZ" * 99)
        if path.endswith(".png")
        else ok({"rows": []} if "metrics" in path else {"samples": [{"files": [{"name": "000.png"}]}]})
        if "samples" in path or "metrics" in path
        else ok({**VIEW, "samples": [1]})
    ),
    "no LoRA": lambda method, path: ok({"rows": []} if "metrics" in path else {**VIEW, "status": "done"}),
    "another LoRA": lambda method, path: ok(
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}"
        if "lora" in path
        else {"rows": []}
        if "metrics" in path
        else {**VIEW, "status": "done", "lora": LORA}
    ),
    "a LoRA without end": lambda method, path: (
        ok(b"x" * 2**16 + b"...", 10**15)
        if "lora" in path
        else ok({"rows": []} if "metrics" in path else {**VIEW, "status": "done", "lora": LORA})
    ),
}
FAILS = ("no LoRA", "another LoRA", "a LoRA without end", "rows without end")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_service_that_means_no_good_gets_nothing_written_but_the_run_and_costs_little(
    name: str, spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_job, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr("g2rpo_trainer.jobs.mirrored_run.MAX_METRICS", 2**22)
    asked: list[str] = []

    def answer(method: str, path: str) -> bytes:
        asked.append(path)
        return HOSTILE[name](method, path)

    before = memory()
    with answering(answer) as port:
        worker = Forwarding(spool, at(port))
        if name in FAILS:
            assert worker.end() == "failed"
        else:
            worker.until(lambda: len(asked) > 8)
            assert worker.stop() == "waiting" and spool.state("hand") == "waiting"
    assert memory() - before < 120
    mine = run_of(spool).path
    allowed = {"config.json", "metrics.jsonl", "images"}
    assert not mine.exists() or {path.name for path in mine.iterdir()} <= allowed
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {
        *("hand.job.json", "hand.end.json", "hand.sent", "config.json", "metrics.jsonl", "index.json"),
        "hand.note",
    }
    if (mine / "metrics.jsonl").is_file():
        rows = RunFolder(mine).metrics()
        assert all(isinstance(row, dict) for row in rows)
        assert name != "odd rows" or {"d": 1e300} in rows
    if name in FAILS:
        assert len(spool.ended("hand")["error"]) < 500


# The command


def test_what_is_up_to_the_other_machine_is_said_before_any_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "output").mkdir()
    monkeypatch.setenv("G2RPO_REMOTE_TOKEN", "x" * 43)
    base = ("worker", "--comfyui", tmp_path, "--once", "--forward")
    code, _, error = leave(capsys, *base, "http://127.0.0.1:9", "--preset", "16gb")
    assert code == 2 and "--preset is up to the machine that trains; give it to g2rpo serve" in error
    code, _, error = leave(capsys, *base, "http://gpu.example.com")
    assert code == 2 and "--forward http://gpu.example.com would send the token unencrypted" in error
    code, said, error = leave(capsys, *base, "http://127.0.0.1:9")
    assert code == 0 and "jobs wait until it answers" in error and "has http://127.0.0.1:9 train" in said
    with service(tmp_path / "served") as (port, _):
        code, _, error = leave(capsys, *base, at(port))
    assert code == 2 and "refuses with 401" in error
    monkeypatch.delenv("G2RPO_REMOTE_TOKEN")
    code, _, error = leave(capsys, *base, "http://127.0.0.1:9")
    assert code == 2 and "the service's token is missing" in error


# A real worker and a real service, both killed


@contextmanager
def program(*words: object, **where: Any) -> Iterator[subprocess.Popen[str]]:
    """Run the program in a process of its own, which the context ends."""
    command = [sys.executable, "-m", "g2rpo_trainer.cli", *map(str, words)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **where)
    try:
        assert child.stdout.readline()
        yield child
    finally:
        child.terminate()
        assert child.wait(120) in (0, -signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("rounds", [3, 12] if ALL else [3])
def test_whoever_is_killed_a_job_elsewhere_is_trained_once_and_ends_once(tmp_path: Path, rounds: int) -> None:
    chance, base = random.Random(rounds), tmp_path / "comfy"
    for folder in ("models", "output"):
        (base / folder).mkdir(parents=True)
    spool = Spool(base / "output/g2rpo/spool")
    changes = "num_steps = 2\ngroup_size = 2\neval_noises = 1\ncheckpoint_every = 1"
    spool.submit("hand", job_of(steps=6, changes=changes, eval_every=2))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = token_of(tmp_path / "token") and tmp_path / "token"
    serve = ("serve", "--port", port, "--jobs", tmp_path / "jobs", "--token-file", token)
    worker = ("worker", "--comfyui", base, "--forward", at(port), "--token-file", token)
    served, mine = RunFolder(tmp_path / "jobs/runs/hand"), run_of(spool)

    def wait(least: int, patience: float) -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not spool.ended("hand"):
            if mine.metrics_file.is_file() and mine.metrics_file.read_bytes().count(b"\n") > least:
                return
            time.sleep(0.1)

    for _ in range(rounds):
        with program(*serve) as far, program(*worker) as near:
            wait(chance.randrange(1, 8), chance.uniform(1, 40))
            for child in chance.choice([[far], [near], [far, near], [near, far]]):
                child.kill()
                time.sleep(chance.uniform(0, 2))
    with program(*serve), program(*worker):
        wait(10**9, 300)
        end = (spool.path / "hand.end.json").read_bytes()
        assert json.loads(end)["status"] == "done" and json.loads(end)["step"] == 6, end
        time.sleep(3)
    assert (spool.path / "hand.end.json").read_bytes() == end
    assert mine.metrics() == served.metrics()
    assert [row["step"] for row in mine.metrics() if "nfe" in row] == [1, 2, 3, 4, 5, 6]
    ours, theirs = mine.outcome() / "lora.safetensors", served.outcome() / "lora.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()
    assert mine.sampled_steps() == served.sampled_steps() and mine.summary() == served.summary()
    assert Spool(tmp_path / "jobs/spool").ids() == ["hand"]
