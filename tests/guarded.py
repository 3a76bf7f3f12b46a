"""Sound and foreign requests, sent by hand, and a server behind the guard to send them to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from g2rpo_trainer.service import http_guard

TOKEN = "t" * 43
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "BREW")


@contextmanager
def guarded(
    find: Callable[[str], Mapping[str, http_guard.Handler]], module: ModuleType = http_guard, port: int = 0
) -> Iterator[int]:
    """Serve behind the guard in a thread, at any port or a given one; give the port."""
    ready = threading.Event()
    with module.listen("127.0.0.1", port) as at:
        port, box = at.getsockname()[1], []
        guard = module.Guard(TOKEN, module.names_of("127.0.0.1", port, []), find)

        async def run() -> None:
            box.extend([asyncio.get_running_loop(), asyncio.current_task()])
            await module.serve(guard, at, ready.set)

        def work() -> None:
            with pytest.raises(asyncio.CancelledError):
                asyncio.run(run())

        thread = threading.Thread(target=work)
        thread.start()
        assert ready.wait(20)
        try:
            yield port
        finally:
            box[0].call_soon_threadsafe(box[1].cancel)
            thread.join(20)
            assert not thread.is_alive()


def send(port: int, method: str, path: str, *given: Any, **named: Any) -> int:
    """Send one request by hand as send_for_answer does; return the status."""
    return send_for_answer(port, method, path, *given, **named)[0]


def send_for_answer(
    port: int,
    method: str,
    path: str,
    headers: dict[str, Any] | None = None,
    body: bytes = b"",
    patience: float = 10,
) -> tuple[int, str]:
    """Send one request by hand, the sound headers changed by `headers` (None leaves one out, a list
    repeats one); return the status and the whole answer.
    """
    sound: dict[str, Any] = {"Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {TOKEN}"}
    sound["Connection"] = "close"
    if body or method in ("POST", "PUT", "PATCH"):
        sound |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1"]
    for name, value in (sound | (headers or {})).items():
        values = value if isinstance(value, list) else [value]
        lines += [f"{name}: {one}" for one in values if one is not None]
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b""
        try:
            while not whole(answer, method) and (part := connection.recv(65536)):
                answer += part
        except (TimeoutError, ConnectionError):
            pass
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer.decode("utf-8", "replace")


def whole(answer: bytes, method: str) -> bool:
    """Say whether all of an answer has come."""
    head, end, body = answer.partition(b"\r\n\r\n")
    named = [line.lower().partition(b"content-length:") for line in head.split(b"\r\n")]
    length = next((int(value) for before, name, value in named if name and not before), 0)
    return bool(end) and (method == "HEAD" or len(body) >= length)


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket"}
STRANGERS: dict[str, tuple[dict[str, Any], int]] = {
    "another host": ({"Host": "evil.example"}, 421),
    "no host": ({"Host": None}, 421),
    "another port": ({"Host": "127.0.0.1:1"}, 421),
    "no port": ({"Host": "127.0.0.1"}, 421),
    "a host that ends like ours": ({"Host": "evil.127.0.0.1"}, 421),
    "a page": ({"Origin": "http://127.0.0.1"}, 403),
    "a page without a name": ({"Origin": "null"}, 403),
    "a link": ({"Referer": "http://127.0.0.1/"}, 403),
    "a browser": ({"Sec-Fetch-Site": "same-origin"}, 403),
    "a browser's mode": ({"Sec-Fetch-Mode": "no-cors"}, 403),
    "cookies": ({"Cookie": "a=b"}, 403),
    "no token": ({"Authorization": None}, 401),
    "an empty token": ({"Authorization": "Bearer "}, 401),
    "another token": ({"Authorization": "Bearer " + "u" * 43}, 401),
    "a longer token": ({"Authorization": f"Bearer {TOKEN}t"}, 401),
    "a shorter token": ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
    "two tokens": ({"Authorization": [f"Bearer {TOKEN}"] * 2}, 401),
    "the token of another scheme": ({"Authorization": f"Basic {TOKEN}"}, 401),
    "the token in other letters": ({"Authorization": f"Bearer {TOKEN.upper()}"}, 401),
    "no token but an upgrade": ({"Authorization": None, **UPGRADE}, 401),
}
