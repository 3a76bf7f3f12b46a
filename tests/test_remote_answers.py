"""What the client of a service makes of answers that are cut off, too large or no answers at all."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from job_host import connections_to
from test_remote import client

from g2rpo_trainer.service.remote_client import MAX_FILE, RemoteError, RemoteService


def answering(content: bytes) -> Any:
    """Return what answers to every request alike, and hangs up."""

    def take(connection: socket.socket) -> None:
        with connection:
            connection.recv(2**16)
            connection.sendall(content)

    return connections_to(take)


def test_what_a_service_refuses_is_not_called_silence() -> None:
    with (
        answering(b'HTTP/1.1 503 Busy\r\nContent-Length: 14\r\n\r\n{"error": "x"}') as port,
        pytest.raises(RemoteError, match="refuses with 503: x") as found,
    ):
        client(port, -1.0).jobs()
    assert found.value.status == 503


@pytest.mark.parametrize("told", ["", "-5", "abc", "9" * 5000, str(MAX_FILE + 1), "1e3"])
def test_a_file_of_a_size_that_is_none_or_too_large_is_not_begun(told: str, tmp_path: Path) -> None:
    head = f"HTTP/1.1 200 OK\r\n{f'Content-Length: {told}' if told else 'X: y'}\r\n\r\nabcd"
    says = f"sends a file of {told[:40] or 'unknown'} bytes"
    with answering(head.encode()) as port, pytest.raises(RemoteError, match=says):
        client(port, -1.0).fetch("/x", tmp_path / "x.png", None, lambda file: None)
    assert not [*tmp_path.iterdir()]


def test_half_a_file_is_none(tmp_path: Path) -> None:
    with (
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabcd") as port,
        pytest.raises(RemoteError, match=r"does not answer .*the connection dropped on the way"),
    ):
        client(port, -1.0).fetch("/x", tmp_path / "x.png", None, lambda file: None)
    assert not [*tmp_path.iterdir()]


def test_nothing_is_fetched_where_no_lora_is_told_of(tmp_path: Path) -> None:
    class Without(RemoteService):
        def job(self, job_id: str) -> dict[str, Any]:
            return {"lora": None}

        def download(self, *given: Any) -> None:
            raise AssertionError("fetched")

    with pytest.raises(RemoteError, match="job hand has no LoRA yet; it comes with the first checkpoint"):
        Without("http://127.0.0.1:9", "x" * 43).fetch_lora("hand", tmp_path / "lora.safetensors")
