"""A judge to be judged: a local server that speaks OpenAI's chat completions and misbehaves as it is told
to.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from PIL import Image
from torch import Tensor

from g2rpo_trainer.rewards.judges import connect
from g2rpo_trainer.rewards.judges.client import Limits

Misbehaviour = Callable[["JudgeHost", web.Request, dict[str, Any]], Any]


def section(**changes: Any) -> SimpleNamespace:
    """Describe a judge as a recipe does, with little patience."""
    about = {"name": "judge", "url": "", "protocol": "yes_no", "model": "toy", "question": None}
    return SimpleNamespace(
        **(about | {"timeout": 2.0, "retries": 3, "concurrency": 8, "batch": 32} | changes)
    )


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take no key from the environment, and wait little between attempts."""
    for name in [name for name in os.environ if name.startswith("G2RPO_JUDGE")]:
        monkeypatch.delenv(name)
    make, waits = Limits.__init__, {"first_wait": 0.01, "longest_wait": 0.05, "longest_asked_wait": 0.3}
    monkeypatch.setattr(Limits, "__init__", lambda self, **given: make(self, **(waits | given)))


def pictures_of(body: dict[str, Any]) -> list[np.ndarray]:
    """Read the pictures of a chat request."""
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [picture(part["image_url"]["url"].removeprefix("data:image/png;base64,")) for part in parts]


def picture(text: str) -> np.ndarray:
    """Read a PNG in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def text_of(body: dict[str, Any]) -> str:
    """Read the question of a chat request."""
    return body["messages"][0]["content"][-1]["text"]


def brightness(image: np.ndarray) -> float:
    """Judge a picture [H, W, 3]: what every sound answer of this judge is made of."""
    return float(image.mean() / 255)


def completion(chances: dict[str, float], blank: bool = False) -> dict[str, Any]:
    """Answer as chat completions do, with the probabilities of the first word."""
    top = [
        {"token": word, "logprob": math.log(p) if p else -9999.0, "bytes": None}
        for word, p in chances.items()
    ]
    word = max(chances, key=chances.get)
    content = [{"token": word, "logprob": top[0]["logprob"], "top_logprobs": top}]
    if blank:
        content.insert(0, {"token": "▁", "logprob": 0.0, "top_logprobs": [{"token": "▁", "logprob": 0.0}]})
    return {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": word}, "logprobs": {"content": content}}
        ],
    }


def sound(body: dict[str, Any]) -> dict[str, Any]:
    """Answer soundly: yes as likely as the picture is bright.

    The brighter of two, with a liking for the first.
    """
    shown = [brightness(image) for image in pictures_of(body)]
    if len(shown) == 2:
        first = 1 / (1 + math.exp(-20 * (shown[0] - shown[1]) - 0.5))
        return completion({"1": first, " 2": 1 - first})
    if "digit" in text_of(body):
        return completion({"5": shown[0], "1": 1 - shown[0]})
    return completion({"Yes": 0.9 * shown[0], " no": 0.9 * (1 - shown[0]), "Maybe": 0.1})


class JudgeHost:
    """The server, in a thread; `behave` answers instead of it where it returns something."""

    def __init__(self, behave: Misbehaviour | None = None, keep: bool = True) -> None:
        self.behave, self.keep, self.random = behave, keep, random.Random(0)
        self.asked = self.now = self.most = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._started = threading.Event()

    def __enter__(self) -> JudgeHost:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self.url = f"{self.address}/v1"
        self.connections = lambda: len(runner.server.connections)
        self._started.set()
        await self._end.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            body = await request.json() if request.can_read_body else {}
            if self.keep:
                self.bodies.append(body)
                self.headers.append(dict(request.headers))
            if self.behave:
                answer = self.behave(self, request, body)
                answer = await answer if asyncio.iscoroutine(answer) else answer
                if answer is not None:
                    return answer if isinstance(answer, web.StreamResponse) else web.json_response(answer)
            await asyncio.sleep(0)
            if request.path == "/v1/models":
                return web.json_response({"data": [{"id": "toy"}]})
            return web.json_response(sound(body))
        finally:
            self.now -= 1


@contextmanager
def judging(
    behave: Misbehaviour | None = None, keep: bool = True, **changes: Any
) -> Iterator[tuple[JudgeHost, Any]]:
    """Serve a judge and reach it as a recipe does."""
    with JudgeHost(behave, keep) as host:
        yield host, connect(section(url=host.url, **changes))


def ask(judge: Any, images: Tensor) -> Tensor:
    """Ask a judge about pictures, all by one prompt."""
    return judge.score(images, ["x"] * len(images))


def after(count: int, behave: Misbehaviour) -> Misbehaviour:
    """Behave well for the first questions, such as the trial one."""
    return lambda host, request, body: behave(host, request, body) if host.asked > count else None


def sometimes(share: float, behave: Misbehaviour) -> Misbehaviour:
    """Misbehave for a share of the questions."""
    return lambda host, request, body: behave(host, request, body) if host.random.random() < share else None


def status(code: int, **headers: str) -> Misbehaviour:
    """Answer with a status alone."""
    return lambda *_: web.Response(status=code, headers=headers)


async def slow(host: JudgeHost, request: web.Request, body: dict[str, Any]) -> None:
    """Take some time."""
    await asyncio.sleep(0.05)


async def hang(host: JudgeHost, request: web.Request, body: dict[str, Any]) -> None:
    """Never answer."""
    await asyncio.sleep(3600)


async def close_mid_body(host: JudgeHost, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Promise more than is sent, and hang up."""
    content = json.dumps(sound(body)).encode()
    response = web.StreamResponse(
        headers={"Content-Length": str(len(content)), "Content-Type": "application/json"}
    )
    await response.prepare(request)
    with suppress(ConnectionError):
        await response.write(content[: len(content) // 2])
    request.transport.close()
    return response
