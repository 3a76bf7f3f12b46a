"""Who is served over HTTP: the holder of a token, by the server's exact name, from no browser, in time.

What comes in is checked in this order, on every method and address alike: Host, marks of a browser, token;
then address, method, size, form. The rest of the world is refused before anything of its request but the head
is looked at. Whatever goes wrong, one line leaves, and no trace of the program.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import secrets
import signal
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

from aiohttp import web

HEAD_SECONDS = 30.0  # for the head of a connection's first request, or of the next one
BODY_SECONDS = 60.0
MAX_CONNECTIONS = 256
FETCH = ("Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Sec-Fetch-User")
BROWSER = ("Origin", "Referer", *FETCH, "Cookie")
MAX_LOGGED = 300  # characters of a line
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "g2rpo"}

Answer = Mapping[str, Any] | web.StreamResponse
Handler = Callable[[web.BaseRequest], Awaitable[Answer]]

log = logging.getLogger(__name__)


class GuardError(ValueError):
    """An address or a token that cannot be used, in one line that names it and the remedy."""


class Refusal(Exception):
    """A request that is not served, with its status and one line."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def in_one_line(record: logging.LogRecord) -> bool:
    """Turn a record into one printable line without a traceback: what it tells of, strangers have sent."""
    error = record.exc_info[1] if record.exc_info else None
    said = record.getMessage() + (f": {type(error).__name__}: {error}" if error else "")
    line = " ".join(said.split())[:MAX_LOGGED]
    record.msg, record.args = "".join(sign if sign.isprintable() else "?" for sign in line), ()
    record.exc_info = record.exc_text = None
    return True


log.addFilter(in_one_line)


class Guard:
    """Passes the requests that may be answered to what `find` names for their address and method."""

    def __init__(
        self, token: str, hosts: Sequence[str], find: Callable[[str], Mapping[str, Handler]]
    ) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self._token = f"Bearer {token}".encode()
        self._find = find

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        headers = dict(HEADERS)
        try:
            self.admit(request)
            methods = self._find(request.raw_path)
            if request.method not in methods:
                headers["Allow"] = ", ".join(methods)
                raise Refusal(405, f"this address takes {headers['Allow']}")
            status, content = 200, await methods[request.method](request)
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)}
            log.warning("%s: refused with %d: %s", request.remote, status, refusal)
        except Exception:
            status, content = 500, {"error": "the server has failed at this; its log says how"}
            log.exception("%s: %s %s failed", request.remote, request.method, request.raw_path)
        if isinstance(content, web.StreamResponse):
            return content
        if status in (429, 503):
            headers["Retry-After"] = "1"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        answer = web.json_response(content, status=status, headers=headers)
        if status != 200 or (request.body_exists and not request.content.is_eof()):
            # What was not read is not worth waiting for, nor who asks on and reads no answer.
            answer.force_close()
        return answer

    def admit(self, request: web.BaseRequest) -> None:
        """Refuse who is not meant: another name for this machine, a web page, somebody without the token."""
        hosts = request.headers.getall("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            raise Refusal(421, "this server is not called that; see --known-as")
        if any(mark in request.headers for mark in BROWSER):
            raise Refusal(403, "no browser is served")
        given = request.headers.getall("Authorization", [])
        sent = [each.encode("utf-8", "surrogateescape") for each in given]
        if len(sent) != 1 or not hmac.compare_digest(sent[0], self._token):
            raise Refusal(401, "give the token of the server's token file as bearer token")
        if "Upgrade" in request.headers:
            raise Refusal(400, "there is nothing to upgrade to")


async def read_body(request: web.BaseRequest, limit: int) -> bytes:
    """Read a body of JSON whose length is known and at most `limit`."""
    if (
        request.headers.get("Content-Type", "").lower() != "application/json"
        or "Content-Encoding" in request.headers
    ):
        raise Refusal(415, "send application/json as it is, uncompressed")
    if request.content_length is None:
        raise Refusal(411, "send a Content-Length")
    if request.content_length > limit:
        raise Refusal(413, f"at most {limit} bytes are taken; send less at once")
    try:
        return await asyncio.wait_for(request.content.read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"the body did not come within {BODY_SECONDS:g} s") from error


def token_of(path: Path) -> str:
    """Read the token from its file, which only the user may read; make one where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(path, flags, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        pass
    return read_token(path)


def read_token(path: Path) -> str:
    """Read the token from its file, which only the user may read."""
    # A pipe is not waited for.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    state = os.fstat(handle)
    if os.name == "posix" and (
        not stat.S_ISREG(state.st_mode) or state.st_mode & 0o077 or state.st_uid != os.getuid()
    ):
        os.close(handle)
        raise GuardError(
            f"token file {path} is no plain file that only you can read; remove it, or make it yours "
            "alone (chmod 600)"
        )
    with os.fdopen(handle, encoding="utf-8", errors="replace") as file:
        token = file.read(4096).strip()
    if len(token) < 32 or not token.isascii() or not token.isprintable() or " " in token:
        raise GuardError(
            f"token file {path} holds no token of at least 32 signs; remove it, and a new one is made"
        )
    return token


def address_of(host: str) -> IPv4Address | IPv6Address:
    """Read an IP address."""
    try:
        return ip_address(host)
    except ValueError as error:
        raise GuardError(f"--host is {host[:80]!a}; give an IP address, such as 127.0.0.1") from error


def listen(host: str, port: int) -> socket.socket:
    """Open the address that is served; port 0 takes a free one."""
    address = address_of(host)
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if address.version == 6 else socket.AF_INET
        )
    except OSError as error:
        # The error's own words name the address once more.
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise GuardError(f"cannot listen at {host} port {port}: {reason}; choose another --port") from error


def names_of(host: str, port: int, known_as: Sequence[str]) -> tuple[str, ...]:
    """List what a request may call this server: address and port, localhost, and what the user says."""
    address = ip_address(host)
    if address.is_unspecified and not known_as:
        raise GuardError(
            f"--host {host} is every address of this machine; say with --known-as HOST:PORT what "
            "clients call it"
        )
    own = [f"[{host}]" if address.version == 6 else host] if not address.is_unspecified else []
    return (
        *(f"{name}:{port}" for name in [*own, *(["localhost"] if address.is_loopback else [])]),
        *known_as,
    )


class BoundedServer(web.Server):
    """aiohttp's server, which by itself takes any number of connections."""

    def connection_made(self, handler: web.RequestHandler[Any], transport: asyncio.Transport) -> None:
        """Hang up where there are too many connections already."""
        super().connection_made(handler, transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()


async def serve(guard: Guard, at: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until cancelled, or until SIGTERM."""
    end = asyncio.Event()
    with suppress(NotImplementedError, ValueError, RuntimeError):  # Windows, or a thread
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    times = {"lingering_time": 1.0, "keepalive_timeout": HEAD_SECONDS}
    low = BoundedServer(guard, logger=log, access_log=None, auto_decompress=False, **times)
    runner = web.ServerRunner(low, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.SockSite(runner, at).start()
        ready()
        await end.wait()
    finally:
        await runner.cleanup()


def check_private(host: str, behind_tls_proxy: bool) -> None:
    """Refuse to listen beyond this machine unless something encrypts what passes."""
    address = address_of(host)
    if not address.is_loopback and not behind_tls_proxy:
        raise GuardError(
            f"--host {host} is beyond this machine, and nothing here is encrypted: use a tunnel (ssh -L), or "
            "give --behind-tls-proxy where a proxy encrypts what passes"
        )
