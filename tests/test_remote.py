"""The other side of the service: watch, fetch, submit and cancel over connections that drop."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guarded import TOKEN, send
from job_host import DEMO, SMALL, connections_to, grown_run, job, service
from program import call, leave
from safetensors.torch import save_file

from comfy_g2rpo.files.safe import FileError, write_json
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.service import remote_client
from g2rpo_trainer.service.http_guard import read_token
from g2rpo_trainer.service.metric_stream import MetricLines
from g2rpo_trainer.service.remote_client import RemoteError, RemoteService, address_of

PAIR = "transformer.transformer_blocks.0.attn.to_q"


@contextmanager
def dropping(port: int, after: int, times: int) -> Iterator[int]:
    """Stand before a server and hang up hard after so many bytes of an answer, on the first connections."""
    left = [times]

    def pass_on(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server, suppress(OSError):
            here = client.getsockname()[1]
            asked = client.recv(2**20).replace(str(here).encode(), str(port).encode(), 1)
            server.sendall(asked)
            drops, sent = left[0] > 0, 0
            left[0] -= 1
            while part := server.recv(512):
                client.sendall(part)
                sent += len(part)
                if drops and sent > after:
                    return

    with connections_to(pass_on) as at:
        yield at


def client(port: int, patience: float = 20.0) -> RemoteService:
    """Reach a service at a port."""
    return RemoteService(f"http://127.0.0.1:{port}", TOKEN, patience)


def with_lora(
    run: RunFolder, step: int = 5, sha256: str | None = None, content: bytes | None = None
) -> bytes:
    """Write a checkpoint by hand; return its LoRA's bytes."""
    place = run.checkpoints / f"{step:06d}"
    place.mkdir(parents=True)
    pair = {f"{PAIR}.lora_A.weight": torch.ones(2, 4), f"{PAIR}.lora_B.weight": torch.ones(4, 2)}
    save_file(pair, place / "lora.safetensors")
    save_file({"x": torch.ones(1)}, place / "state.safetensors")
    if content is not None:
        (place / "lora.safetensors").write_bytes(content)
    found = (place / "lora.safetensors").read_bytes()
    write_json(
        place / "state.json", {"sha256": {"lora.safetensors": sha256 or hashlib.sha256(found).hexdigest()}}
    )
    return found


def test_a_watch_begins_behind_any_line_and_ends_with_the_job(tmp_path: Path) -> None:
    with service(tmp_path) as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        grown_run(made, "one", 5)
        made.spool.end("one", "failed", error=f"no room in {tmp_path}/served/x")
        for after, expected in ((0, [2, 3, 4, 5, 6]), (1, [2, 3, 4, 5, 6]), (4, [5, 6]), (6, []), (99, [])):
            events = list(client(port).watch("one", after))
            assert [event.line for event in events if event.kind == "metrics"] == expected
            assert events[-1].kind == "end" and events[-1].content["status"] == "failed"
            assert str(tmp_path) not in events[-1].content["error"]


def test_a_watch_goes_on_over_connections_that_drop_and_tells_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_client, "PAUSE", 0.02)
    with service(tmp_path) as (port, made), dropping(port, 3000, 12) as front:
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        run = grown_run(made, "one", 200)
        threading.Timer(1.0, lambda: [run.append({"step": 201}), made.spool.end("one", "done")]).start()
        rows = [event.content["step"] for event in client(front).watch("one") if event.kind == "metrics"]
    assert rows == list(range(1, 202))


def test_a_watch_gives_up_on_a_service_that_is_gone_and_on_a_wrong_token_at_once(tmp_path: Path) -> None:
    with service(tmp_path) as (port, _):
        with pytest.raises(RemoteError, match="refuses with 401"):
            list(RemoteService(f"http://127.0.0.1:{port}", "x" * 43).watch("one"))
        with pytest.raises(RemoteError, match="refuses with 404: there is no job one"):
            list(client(port).watch("one"))
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="does not answer"):
        list(client(port, patience=0.5).watch("one"))
    assert time.monotonic() - begin < 10


def test_rows_that_are_written_again_are_not_told_again(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    lines = MetricLines(run.metrics_file)
    assert lines.read() == []
    for step in range(1, 6):
        run.append({"step": step})
    assert [number for number, _ in lines.read()] == [2, 3, 4, 5, 6] and lines.read() == []
    run.truncate_metrics(2)
    assert lines.read() == []
    for step in range(3, 8):
        run.append({"step": step})
    assert [json.loads(row)["step"] for _, row in lines.read()] == [6, 7]
    with open(run.metrics_file, "ab") as file:
        file.write(b'{"step": 8')  # half a row
    assert lines.read() == [] and MetricLines(tmp_path / "nothing").read() == []


def test_a_lora_comes_whole_over_connections_that_drop_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_client, "PAUSE", 0.02)
    with service(tmp_path / "served") as (port, made), dropping(port, 300, 3) as front:
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        with pytest.raises(RemoteError, match="has no LoRA yet"):
            client(port).fetch_lora("one", tmp_path / "one.safetensors")
        content = with_lora(grown_run(made, "one", 5))
        assert client(front).fetch_lora("one", tmp_path / "one.safetensors")["step"] == 5
        assert (tmp_path / "one.safetensors").read_bytes() == content
        (tmp_path / "one.safetensors").write_bytes(b"mine")
        with pytest.raises(FileError, match="exists; choose another --to, or give --replace"):
            client(port).fetch_lora("one", tmp_path / "one.safetensors")
        assert (tmp_path / "one.safetensors").read_bytes() == b"mine"
        client(port).fetch_lora("one", tmp_path / "one.safetensors", replace=True)
        assert (tmp_path / "one.safetensors").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "served"]


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "another content": ({"sha256": "0" * 64}, "changed on its way"),
    "no tensors": ({"content": b"<html>"}, "is no LoRA"),
    "no pairs": ({"content": b"\x02\x00\x00\x00\x00\x00\x00\x00{}"}, "is no LoRA"),
    "a pickle": ({"content": b"\x80\x04" + b"x" * 99}, "is no LoRA"),
    "nothing": ({"content": b""}, "is no LoRA"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_no_sound_lora_does_not_get_to_its_place(name: str, tmp_path: Path) -> None:
    how, words = DAMAGED[name]
    with service(tmp_path / "served") as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        with_lora(grown_run(made, "one", 5), sha256=how.get("sha256"), content=how.get("content"))
        with pytest.raises(RemoteError, match=words):
            client(port).fetch_lora("one", tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://gpu.example.com", "unencrypted"),
        ("http://192.168.0.7:8766", "unencrypted"),
        ("http://localhost.example.com", "unencrypted"),
        ("ftp://127.0.0.1", "write it as"),
        ("127.0.0.1:8766", "write it as"),
        ("https://", "write it as"),
        ("https://u:p@x.example", "write it as"),
        ("https://x.example/?a=b", "write it as"),
        ("https://x.example/#a", "write it as"),
        ("https://x.example:port", "write it as"),
    ],
)
def test_an_address_that_is_none_or_would_show_the_token_is_refused(url: str, words: str) -> None:
    with pytest.raises(RemoteError, match=words):
        address_of(url)


def test_addresses_of_this_machine_and_encrypted_ones_are_taken() -> None:
    assert address_of("http://127.0.0.1:8766") == (False, "127.0.0.1", 8766, "")
    assert address_of("http://localhost") == (False, "localhost", 80, "")
    assert address_of("http://[::1]:9") == (False, "::1", 9, "")
    assert address_of("https://gpu.example.com/g2rpo/") == (True, "gpu.example.com", 443, "/g2rpo")


@pytest.mark.parametrize("value", [date(2026, 1, 1), float("nan")])
def test_what_json_has_no_word_for_is_refused_before_it_is_sent(value: Any) -> None:
    with pytest.raises(RemoteError, match="put dates in quotes, and give finite numbers"):
        client(1).submit({"model": {"path": value}})


def test_a_job_is_submitted_once_however_often_it_is_sent(tmp_path: Path) -> None:
    with service(tmp_path, queue=2) as (port, made):
        far = client(port)
        assert far.submit(DEMO, SMALL, "one")["new"] and not far.submit(DEMO, SMALL, "one")["new"]
        far.submit(DEMO, SMALL, "two")
        assert not far.submit(DEMO, SMALL, "one")["new"]  # though the queue is full
        with pytest.raises(RemoteError, match="refuses with 429: 2 jobs wait already"):
            far.submit(DEMO, SMALL, "three")
        assert [each["id"] for each in far.jobs()] == ["two", "one"] and far.job("one")["recipe"] == DEMO
        assert far.cancel("one") == {"id": "one", "status": "cancelled"}
        assert far.submit(DEMO, SMALL, "three")["new"]
        assert made.spool.ids() == ["one", "two", "three"]


def held(port: int, job_id: str) -> socket.socket:
    """Watch a job and read nothing of what is told."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lines = [
        f"GET /jobs/{job_id}/events HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        f"Authorization: Bearer {TOKEN}",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def memory() -> float:
    """Return the megabytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_who_watch_and_do_not_read_hold_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2rpo_trainer.service import job_server

    with service(tmp_path) as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        grown_run(made, "one", 200_000)  # 8 MB
        monkeypatch.setattr(job_server, "MAX_STREAMS", 8)
        before = memory()
        slow = [held(port, "one") for _ in range(8)]
        deadline = time.monotonic() + 20
        while made._streams < 8 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert send(port, "GET", "/jobs/one/events") == 429
        begin = time.monotonic()
        assert {send(port, "GET", path) for path in ("/health", "/jobs", "/jobs/one")} == {200}
        assert time.monotonic() - begin < 10 and memory() - before < 60
        for connection in slow:
            connection.close()
        made.spool.end("one", "done")
        while made._streams and time.monotonic() < deadline + 20:
            time.sleep(0.05)
        assert made._streams == 0


def test_what_another_server_answers_is_told_apart() -> None:
    assert remote_client.table_of(b"[", {}) == {} and remote_client.event_of({"data": "{}"}) is None
    assert remote_client.event_of({"event": "x", "id": "9" * 5000}).line == 0
    with pytest.raises(RemoteError, match="no table of JSON"):
        remote_client.table_of(b"[]")
    with pytest.raises(RemoteError, match="no list of jobs"):
        remote_client.list_of({"jobs": 3}, "jobs")


def test_what_changed_on_its_way_or_is_not_there_does_not_get_to_its_place(tmp_path: Path) -> None:
    with service(tmp_path / "served") as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        with pytest.raises(RemoteError, match="job one has no LoRA yet"):
            client(port).fetch_lora("one", tmp_path / "lora")
        content = b"\x89PNG"
        (grown_run(made, "one", 1).path / "curves.png").write_bytes(content)
        path, place, digest = "/jobs/one/pictures/curves.png", tmp_path / "x.png", hashlib.sha256(content)
        with pytest.raises(RemoteError, match=r"x\.png changed on its way"):
            client(port).fetch(path, place, "0" * 64, lambda file: None)
        assert not place.exists() and not (tmp_path / "lora").exists()
        client(port).fetch(path, place, digest.hexdigest(), lambda file: None)
        assert place.read_bytes() == content


def test_a_sign_of_life_is_no_event() -> None:
    def take(connection: socket.socket) -> None:
        with connection:
            connection.recv(2**16)
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n: still here\n\nevent: end\ndata: {}\n\n")

    with connections_to(take) as port:
        assert [event.kind for event in client(port).watch("one")] == ["end"]


def test_an_answer_that_comes_too_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [b"x", b"y"]
    slow = SimpleNamespace(read1=lambda size: left.pop() if left else b"")
    assert [*remote_client.blocks(slow)] == [b"y", b"x"]
    left += [b"x", b"y"]
    monkeypatch.setattr(remote_client, "TIMEOUT", -1.0)
    with pytest.raises(ConnectionError, match="too slowly"):
        [*remote_client.blocks(slow)]


# The commands


def test_the_commands_speak_to_the_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REMOTE_TOKEN", TOKEN)
    with service(tmp_path / "served") as (port, made):
        at = ("--url", f"http://127.0.0.1:{port}")
        code, out, _ = leave(capsys, "remote", "submit", "demo", "--id", "one", "--set", "train.steps=3", *at)
        assert code == 0 and out == "job one: waiting; watch it with: g2rpo remote watch one\n"
        code, _, error = leave(capsys, "remote", "submit", "demo", "--set", "out=/tmp", *at)
        assert code == 2 and "refuses with 400: out: Extra inputs" in error and error.count("\n") == 1
        run = grown_run(made, "one", 3)
        with_lora(run, 3)
        (run.path / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
        (run.path / "before_after.png").write_bytes(b"<html>")
        run.save_summary({"steps": 3, "lora_step": 3})
        made.spool.end("one", "done")
        code, out, _ = leave(capsys, "remote", "watch", "one", *at)
        assert code == 0 and "step 3/99  reward x 0.429" in out and "job one: done\nfetch it with" in out
        assert leave(capsys, "remote", "list", *at)[1].startswith("one done step 3 2")
        code, out, error = leave(
            capsys, "remote", "fetch", "one", "--pictures", "--to", tmp_path / "got", *at
        )
        assert code == 2 and "is no PNG" in error
        assert {path.name for path in (tmp_path / "got").iterdir()} == {"one.safetensors", "one-curves.png"}
        code, _, error = leave(capsys, "remote", "cancel", "one", *at)
        assert code == 2 and "409: job one has ended already: done" in error


def test_a_job_that_failed_says_why_and_leaves_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REMOTE_TOKEN", TOKEN)
    with service(tmp_path) as (port, made):
        assert send(port, "POST", "/jobs", body=job("one")) == 200
        made.spool.end("one", "failed", error="out of memory\x1b[31m")
        code, out, _ = leave(capsys, "remote", "watch", "one", "--url", f"http://127.0.0.1:{port}")
    assert code == 1 and out == "job one: failed: out of memory?[31m\n"


MISTAKES = {
    "no token": (["list"], "error: the service's token is missing; give --token-file"),
    "an open address": (
        ["list", "--url", "http://gpu.example.com"],
        "error: --url http://gpu.example.com would",
    ),
    "no id": (["watch", "../x", "--url", "http://127.0.0.1:9"], "error: a job cannot be called '../x'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, words = MISTAKES[name]
    monkeypatch.setenv("G2RPO_REMOTE_TOKEN", "" if name == "no token" else TOKEN)
    code, _, error = leave(capsys, "remote", *arguments)
    assert code == 2 and error.startswith(words) and error.count("\n") == 1


SERVING = {
    "beyond this machine": (["--host", "0.0.0.0"], "error: --host 0.0.0.0 is beyond this machine"),
    "no folder of models": (["--models", "/nowhere"], "error: --models is /nowhere, which is no folder"),
    "every address": (["--host", "0.0.0.0", "--behind-tls-proxy"], "error: --host 0.0.0.0 is every address"),
}


@pytest.mark.parametrize("name", SERVING)
def test_a_service_that_cannot_be_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, words = SERVING[name]
    place = ("--token-file", tmp_path / "token", "--jobs", tmp_path / "jobs", "--port", "0")
    code, _, error = leave(capsys, "serve", *arguments, *place)
    assert code == 2 and error.startswith(words) and error.count("\n") == 1


def test_the_description_is_printed_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = leave(capsys, "serve", "--print-openapi")
    assert code == 0 and set(json.loads(out)["paths"]) >= {"/jobs", "/jobs/{id}/events"}


# A real service with a real run, killed in between


@contextmanager
def program(place: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Run `g2rpo serve` in a process of its own, until the context ends."""
    words = ["serve", "--port", str(port), "--jobs", "jobs", "--token-file", "token", "--hours", "1"]
    command = [sys.executable, "-m", "g2rpo_trainer.cli", *words]
    child = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline().startswith("serving ")
        yield child
    finally:
        child.terminate()
        assert child.wait(120) in (0, -signal.SIGKILL)


@pytest.mark.long
def test_a_service_that_is_killed_loses_nothing_and_trains_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    steps: list[int] = []
    ends: list[Any] = []

    def follow() -> None:
        for event in far.watch("one"):
            if event.kind == "metrics" and "nfe" in event.content:
                steps.append(event.content["step"])
            elif event.kind == "end":
                ends.append(event.content["status"])

    with program(tmp_path, port) as child:
        far = RemoteService(f"http://127.0.0.1:{port}", read_token(tmp_path / "token"), 240)
        for name in ("one", "two"):
            far.submit(DEMO, [*SMALL, "train.steps=40" if name == "one" else "train.steps=1"], name)
        watch = threading.Thread(target=follow)
        watch.start()
        deadline = time.monotonic() + 120
        while len(steps) < 7 and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert steps and not ends
    with program(tmp_path, port):
        watch.join(240)
        assert ends == ["done"] and steps == list(range(1, 41))
        assert [event.content for event in far.watch("two") if event.kind == "end"] == [{"status": "done"}]
        far.fetch_lora("one", tmp_path / "one.safetensors")
    rows = RunFolder(tmp_path / "jobs/runs/one").metrics()
    assert [row["step"] for row in rows if "nfe" in row] == list(range(1, 41))
    monkeypatch.chdir(tmp_path)
    assert call("check-lora", "one.safetensors") == 0
