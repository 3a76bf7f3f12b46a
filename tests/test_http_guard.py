"""The guard of what is served over HTTP: its token, its address, its patience.

What it refuses is asked for at every address in test_job_server.py and test_judges_server.py.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from guarded import TOKEN, guarded, send
from multidict import CIMultiDict

from g2rpo_trainer.service import http_guard
from g2rpo_trainer.service.http_guard import (
    Guard,
    GuardError,
    Refusal,
    check_private,
    listen,
    names_of,
    read_token,
    token_of,
)

OURS = "127.0.0.1:80"


@pytest.mark.parametrize("hosts", [[], [OURS] * 2, [OURS, "evil.example"], ["evil.example", OURS]])
def test_a_request_names_one_host_whatever_the_parser_lets_through(hosts: list[str]) -> None:
    guard = Guard(TOKEN, [OURS], lambda address: {})
    headers = CIMultiDict([("Authorization", f"Bearer {TOKEN}"), *(("Host", host) for host in hosts)])
    with pytest.raises(Refusal, match="not called that") as caught:
        guard.admit(make_mocked_request("GET", "/jobs", headers))
    assert caught.value.status == 421


# Its token and its address


def test_the_token_is_made_once_and_is_its_users_alone(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "token"
    token = token_of(place)
    assert token_of(place) == token and len(token) >= 43 and token_of(tmp_path / "other") != token
    assert os.name == "nt" or stat.S_IMODE(place.stat().st_mode) == 0o600


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("how", ["readable", "writable", "another's", "pipe", "folder"])
def test_a_token_file_that_others_may_reach_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "token"
    if how == "pipe":
        os.mkfifo(place, 0o600)
    elif how == "folder":
        place.mkdir(0o700)
    else:
        token_of(place)
        place.chmod({"readable": 0o640, "writable": 0o602}.get(how, 0o600))
    if how == "another's":
        monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    with pytest.raises(GuardError, match="no plain file that only you can read"):
        token_of(place)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links")
def test_a_token_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    token_of(tmp_path / "elsewhere")
    (tmp_path / "token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="token"):
        token_of(tmp_path / "token")


NO_TOKENS = {
    "nothing": b"",
    "31 signs": b"t" * 31,
    "blanks within": b"a b" * 20,
    "letters beyond ASCII": "é".encode() * 40,
    "bytes that are no text": b"\xff" * 40,
    "a sign that steers a terminal": b"a" * 20 + b"\x07" + b"b" * 20,
    "two lines": b"a" * 40 + b"\n" + b"b" * 40,
}


@pytest.mark.parametrize("name", NO_TOKENS)
def test_a_token_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    place = tmp_path / "token"
    token_of(place)
    place.write_bytes(NO_TOKENS[name])
    with pytest.raises(GuardError, match="holds no token of at least 32 signs"):
        token_of(place)


def test_names_are_exact_and_every_address_needs_one() -> None:
    assert names_of("127.0.0.1", 80, []) == ("127.0.0.1:80", "localhost:80")
    assert names_of("::1", 8765, ["judge.lan:8765"]) == ("[::1]:8765", "localhost:8765", "judge.lan:8765")
    assert names_of("0.0.0.0", 8765, ["judge:8765"]) == ("judge:8765",)
    with pytest.raises(GuardError, match="--known-as"):
        names_of("0.0.0.0", 8765, [])
    with pytest.raises(GuardError, match="give an IP address"):
        listen("localhost", 0)


def test_a_port_that_is_taken_is_named_once() -> None:
    with listen("127.0.0.1", 0) as at:
        port = at.getsockname()[1]
        with pytest.raises(
            GuardError, match=f"cannot listen at 127.0.0.1 port {port}: [a-z ]+; choose another"
        ):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "10.0.0.1", "::ffff:10.0.0.1"])
def test_what_is_beyond_this_machine_needs_a_proxy_that_encrypts(host: str) -> None:
    with pytest.raises(GuardError, match="--behind-tls-proxy"):
        check_private(host, False)
    check_private(host, True)


def test_this_machine_needs_none_and_a_name_is_no_address() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1"):
        check_private(host, False)
    with pytest.raises(GuardError, match="give an IP address"):
        check_private("gpu.example.com", True)


def test_a_token_that_is_to_be_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_token(tmp_path / "token")
    assert read_token(Path(token_of(tmp_path / "token") and tmp_path / "token")) == token_of(
        tmp_path / "token"
    )


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: a\r\nX: ", b"\x16\x03\x01"])
def test_a_head_that_does_not_come_is_not_waited_for(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "HEAD_SECONDS", 0.5)
    with (
        guarded(lambda address: {}) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        begin = time.monotonic()
        connection.sendall(sent)
        while connection.recv(4096):
            pass
        assert time.monotonic() - begin < 8


def test_more_connections_than_a_bound_are_hung_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_guard, "MAX_CONNECTIONS", 5)
    with guarded(lambda address: {}) as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(5)]
        time.sleep(0.3)
        assert send(port, "GET", "/") == 0
        for connection in held:
            connection.close()
        time.sleep(0.3)
        assert send(port, "GET", "/") == 405


def test_who_is_refused_is_asked_nothing_more() -> None:
    answer = b""
    with guarded(lambda address: {}) as port, socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: evil\r\n\r\n" * 3)
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    assert answer.count(b"HTTP/1.1 421") == 1


def test_whatever_breaks_one_line_leaves_and_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    from guarded import send_for_answer

    async def broken(request: object) -> dict[str, object]:
        raise RuntimeError("secret\nplace")

    with guarded(lambda address: {"GET": broken}) as port:
        status, answer = send_for_answer(port, "GET", "/")
    assert status == 500 and "secret" not in answer and "Traceback" not in answer and ".py" not in answer
    assert len(caplog.records) == 1 and "secret place" in caplog.text


def test_what_a_handler_has_sent_itself_is_followed_by_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def streamed(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"all of it")
        return response

    with (
        guarded(lambda address: {"GET": streamed}) as port,
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        head = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.endswith(b"\r\n\r\n9\r\nall of it\r\n0\r\n\r\n") and not caplog.records
