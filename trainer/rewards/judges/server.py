"""The server of `g2rpo rewards serve`: one reward behind two addresses, for those who hold its token
(protocol.py says what is spoken).

What comes in is checked in this order, on every method and address alike: Host, marks of a browser, token;
then address, method, size, form. The rest of the world is refused before anything of its request but the head
is looked at.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import secrets
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aiohttp import web
from pydantic import ValidationError
from torch import Tensor

from comfy_g2rpo.files.safe import finite
from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.rewards import Reward, RewardError, checked

from .judge_protocol import PROTOCOL, About, Request, without_places
from .sent_pictures import MAX_PIXELS, PictureError, from_base64

MAX_BODY = 72 * 2**20  # what MAX_PIXELS may take as PNG in base64, and the prompts
MAX_WAITING = 16
BODY_SECONDS = 60.0
FETCH = ("Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Sec-Fetch-User")
BROWSER = ("Origin", "Referer", *FETCH, "Cookie")
MAX_LOGGED = 300  # characters of a line

log = logging.getLogger(__name__)


def in_one_line(record: logging.LogRecord) -> bool:
    """Turn a record into one printable line without a traceback: what it tells of, strangers have sent."""
    error = record.exc_info[1] if record.exc_info else None
    said = record.getMessage() + (f": {type(error).__name__}: {error}" if error else "")
    line = " ".join(said.split())[:MAX_LOGGED]
    record.msg, record.args = "".join(sign if sign.isprintable() else "?" for sign in line), ()
    record.exc_info = record.exc_text = None
    return True


log.addFilter(in_one_line)


class Refusal(Exception):
    """A request that is not served, with its status and one line."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class JudgeServer:
    """Answers requests about one reward, from any number of clients, judging for one at a time."""

    def __init__(self, reward: Reward, token: str, hosts: Sequence[str]) -> None:
        if reward.needs_group:
            raise RewardError(
                f"reward {reward.name!r} compares the pictures of a group, which a served reward never "
                "sees whole; choose another"
            )
        self.reward, self.hosts = reward, frozenset(host.lower() for host in hosts)
        self._token = f"Bearer {token}".encode()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._waiting = 0
        self.routes: dict[str, dict[str, Callable[[web.BaseRequest], Awaitable[dict[str, Any]]]]] = {
            "/about": {"GET": self.about},
            "/score": {"POST": self.score},
        }

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        """Answer one request."""
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "g2rpo"}
        try:
            self.admit(request)
            methods = self.routes.get(request.raw_path)
            if methods is None:
                raise Refusal(404, "there is GET /about and POST /score")
            if request.method not in methods:
                headers["Allow"] = ", ".join(methods)
                raise Refusal(405, f"{request.raw_path} takes {headers['Allow']}")
            status, content = 200, await methods[request.method](request)
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)}
            log.warning("%s: refused with %d: %s", request.remote, status, refusal)
        if status == 503:
            headers["Retry-After"] = "1"
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        answer = web.json_response(content, status=status, headers=headers)
        if request.body_exists and not request.content.is_eof():
            # What was not read is not worth waiting for.
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

    async def about(self, request: web.BaseRequest) -> dict[str, Any]:
        """Say who judges."""
        reward = self.reward
        about = {
            "name": reward.name,
            "licence": reward.licence[:200],
            "compares_across_prompts": bool(reward.compares_across_prompts),
        }
        return About(protocol=PROTOCOL, note=str(reward.note)[:2000], **about).model_dump()

    async def score(self, request: web.BaseRequest) -> dict[str, Any]:
        """Judge pictures, one request after another."""
        if self._waiting >= MAX_WAITING:
            raise Refusal(503, f"{MAX_WAITING} requests wait already")
        self._waiting += 1
        try:
            content = await read_body(request)
            loop = asyncio.get_running_loop()
            return {
                "scores": finite(await loop.run_in_executor(self._thread, self._in_turn, request, content))
            }
        finally:
            self._waiting -= 1

    def _in_turn(self, request: web.BaseRequest, content: bytes) -> list[float]:
        """Judge, unless whoever asked gave up while others were judged."""
        if request.transport is None:
            raise Refusal(408, "nobody waits any more")
        return judge(self.reward, content)

    def close(self) -> None:
        """End the thread after what it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)


async def read_body(request: web.BaseRequest) -> bytes:
    """Read a body of JSON whose length is known and bounded."""
    if (
        request.headers.get("Content-Type", "").lower() != "application/json"
        or "Content-Encoding" in request.headers
    ):
        raise Refusal(415, "send application/json as it is, uncompressed")
    if request.content_length is None:
        raise Refusal(411, "send a Content-Length")
    if request.content_length > MAX_BODY:
        raise Refusal(413, f"at most {MAX_BODY} bytes are taken; send fewer pictures at once")
    try:
        return await asyncio.wait_for(request.content.read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"the body did not come within {BODY_SECONDS:g} s") from error


def judge(reward: Reward, content: bytes) -> list[float]:
    """Check a request's form and pictures, and score them."""
    try:
        asked = Request.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Refusal(
            400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"[:300]
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error
    columns = (
        [{}] * len(asked.images)
        if asked.columns is None
        else [without_places(each) for each in asked.columns]
    )
    if not len(asked.images) == len(asked.prompts) == len(columns):
        raise Refusal(
            400,
            (
                f"{len(asked.images)} images, {len(asked.prompts)} prompts, {len(columns)} columns; give "
                "one of each per image"
            ),
        )
    prompts = [
        Prompt(text, more) if more else text for text, more in zip(asked.prompts, columns, strict=True)
    ]
    try:
        return checked(reward, pictures(asked.images), prompts).tolist()
    except PictureError as error:
        raise Refusal(400, str(error)) from error
    except RewardError as error:
        raise Refusal(500, " ".join(str(error).split())[:300]) from error


def pictures(images: Sequence[str]) -> Tensor:
    """Read pictures of one size as [B, H, W, 3] float32 in [0, 1]."""
    found: list[np.ndarray] = []
    for i, text in enumerate(images):
        picture = from_base64(text, f"images.{i}")
        if found and picture.shape != found[0].shape:
            raise PictureError(f"images.{i} is not of the size of images.0; send one size at a time")
        if picture.shape[0] * picture.shape[1] * len(images) > MAX_PIXELS:
            raise PictureError(
                f"{len(images)} images of this size have more than {MAX_PIXELS} pixels; send fewer at once"
            )
        found.append(picture)
    return torch.from_numpy(np.stack(found)).float() / 255


def token_of(path: Path) -> str:
    """Read the token from its file, which only the user may read; make one where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except FileExistsError:
        pass
    # A pipe is not waited for.
    handle = os.open(path, os.O_RDONLY | flags | getattr(os, "O_NONBLOCK", 0))
    state = os.fstat(handle)
    if os.name == "posix" and (
        not stat.S_ISREG(state.st_mode) or state.st_mode & 0o077 or state.st_uid != os.getuid()
    ):
        os.close(handle)
        raise RewardError(
            f"token file {path} is no plain file that only you can read; remove it, or make it yours "
            "alone (chmod 600)"
        )
    with os.fdopen(handle, encoding="utf-8", errors="replace") as file:
        token = file.read(4096).strip()
    if len(token) < 32 or not token.isascii() or not token.isprintable() or " " in token:
        raise RewardError(
            f"token file {path} holds no token of at least 32 signs; remove it, and a new one is made"
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """Open the address that is served; port 0 takes a free one."""
    try:
        address = ip_address(host)
    except ValueError as error:
        raise RewardError(f"--host is {host[:80]!a}; give an IP address, such as 127.0.0.1") from error
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if address.version == 6 else socket.AF_INET
        )
    except OSError as error:
        # The error's own words name the address once more.
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise RewardError(f"cannot listen at {host} port {port}: {reason}; choose another --port") from error


def names_of(host: str, port: int, known_as: Sequence[str]) -> tuple[str, ...]:
    """List what a request may call this server: address and port, localhost, and what the user says."""
    address = ip_address(host)
    if address.is_unspecified and not known_as:
        raise RewardError(
            f"--host {host} is every address of this machine; say with --known-as HOST:PORT what "
            "clients call it"
        )
    own = [f"[{host}]" if address.version == 6 else host] if not address.is_unspecified else []
    return (
        *(f"{name}:{port}" for name in [*own, *(["localhost"] if address.is_loopback else [])]),
        *known_as,
    )


async def serve(server: JudgeServer, at: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until cancelled."""
    times = {"lingering_time": 1.0, "keepalive_timeout": 30.0}
    low = web.Server(server, logger=log, access_log=None, auto_decompress=False, **times)
    runner = web.ServerRunner(low)
    await runner.setup()
    try:
        await web.SockSite(runner, at).start()
        ready()
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
        server.close()
