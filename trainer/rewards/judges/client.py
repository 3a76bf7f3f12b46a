"""Ask a judge over HTTP: several questions at once, again after a failure, never for ever; a question without
a sound answer has no score.

Every call runs its own event loop in the thread that it is called from (a rollout calls from the thread of
rewards that run elsewhere), so that nothing is left behind when it ends: no connection, task, file or thread.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any

import aiohttp

from comfy_g2rpo.rewards import RewardError

from .cache import Cache

LOG = logging.getLogger("g2rpo_trainer.judges")
AGAIN = {408, 429}  # and everything from 500 on
REMEDIES = {
    401: "put its key into G2RPO_JUDGE_KEY",
    403: "put its key into G2RPO_JUDGE_KEY",
    404: "check url and model",
    429: "lower concurrency",
}


@dataclass(frozen=True)
class Limits:
    """How long, how often, how many at once, how much; waits are in seconds."""

    timeout: float = 60.0
    retries: int = 3
    concurrency: int = 8
    max_bytes: int = 2**20
    first_wait: float = 0.5
    longest_wait: float = 30.0
    longest_asked_wait: float = 60.0  # of what Retry-After asks for

    @property
    def patience(self) -> int:
        """Return after how many failures in a row the rest of a call is not asked."""
        return max(8, 2 * self.concurrency)


class Fault(Exception):
    """Why a question has no answer: `kind` is counted, `again` says whether to try once more."""

    def __init__(self, kind: str, detail: str = "", *, again: bool = False, wait: float = 0.0) -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.again, self.wait = kind, again, wait


class Nonsense(Fault):
    """An answer that is no score."""


@dataclass(frozen=True)
class Question:
    """One request: the keys of its scores in the cache, its body, and how its answer is read."""

    keys: tuple[str, ...]
    body: Callable[[], dict[str, Any]]
    read: Callable[[Any], Sequence[float]]


class Client:
    """Speaks to one judge at `url`; `key`, where there is one, is its bearer token."""

    def __init__(
        self,
        name: str,
        url: str,
        key: str = "",
        limits: Limits | None = None,
        cache: Cache | None = None,
        seed: int = 0,
    ) -> None:
        self.name, self.url, self.limits, self.cache = (
            name,
            url.rstrip("/"),
            limits or Limits(),
            cache or Cache(),
        )
        self.faults: Counter[str] = Counter()
        self._key, self._random = key, random.Random(f"judge {seed}")
        self._failed = 0  # questions in a row
        self._lock = threading.Lock()
        self._running: dict[asyncio.Task[Any], asyncio.AbstractEventLoop] = {}

    def get(self, path: str, read: Callable[[Any], Any]) -> Any:
        """Return what is read from the JSON at a path; a failure is an error in words."""
        return self._insist(
            lambda session: self._again(session, "GET", path, None, read, self.limits.retries)
        )

    def answer(self, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """Return what is read from the answer to one request; a failure is an error in words."""
        return self._insist(
            lambda session: self._again(session, "POST", path, encoded(body), read, self.limits.retries)
        )

    def ask(self, path: str, questions: Sequence[Question]) -> dict[str, float]:
        """Return all questions' scores by key but the failed ones; each kind of failure is logged once."""
        found: dict[str, float] = {}
        try:
            self._run(lambda session: self._ask_all(session, path, iter(questions), found))
        finally:
            self.cache.put(found)
        return found

    def cancel(self) -> None:
        """Break off whatever is being asked, from any thread."""
        with self._lock:
            for task, loop in self._running.items():
                loop.call_soon_threadsafe(task.cancel)

    def count(self, fault: Fault) -> None:
        """Count a failure; say it the first time."""
        self.faults[fault.kind] += 1
        if self.faults[fault.kind] == 1:
            LOG.warning("judge %r: %s; what it was asked is dropped (this is said once)", self.name, fault)

    def _insist(self, work: Callable[[aiohttp.ClientSession], Any]) -> Any:
        try:
            return self._run(work)
        except Fault as fault:
            raise RewardError(f"judge {self.name!r} at {self.url}: {fault}") from fault

    def _run(self, work: Callable[[aiohttp.ClientSession], Any]) -> Any:
        """Run work with a session in an event loop that ends with it."""
        try:
            return asyncio.run(self._with_session(work))
        except asyncio.CancelledError as stop:
            raise RewardError(f"judge {self.name!r} was broken off") from stop

    async def _with_session(self, work: Callable[[aiohttp.ClientSession], Any]) -> Any:
        task = asyncio.current_task()
        with self._lock:
            self._running[task] = asyncio.get_running_loop()
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            # What is not decompressed cannot grow; what is not followed or read from the environment cannot
            # lead elsewhere.
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.limits.concurrency),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self.limits.timeout),
                headers=headers,
                auto_decompress=False,
                trust_env=False,
            ) as session:
                return await work(session)
        finally:
            with self._lock:
                del self._running[task]

    async def _ask_all(
        self,
        session: aiohttp.ClientSession,
        path: str,
        questions: Iterator[Question],
        found: dict[str, float],
    ) -> None:
        """Answer questions by as many workers as may ask at once."""
        if self._failed >= self.limits.patience and (first := next(questions, None)):
            # It kept failing in the call before: one question, asked once, says whether it has come back.
            await self._settle(session, path, first, 0, found)

        async def work() -> None:
            for question in questions:
                if self._failed < self.limits.patience:
                    await self._settle(session, path, question, self.limits.retries, found)
                else:
                    self.count(Fault("not asked, because the judge kept failing"))

        workers = [asyncio.create_task(work()) for _ in range(self.limits.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _settle(
        self,
        session: aiohttp.ClientSession,
        path: str,
        question: Question,
        retries: int,
        found: dict[str, float],
    ) -> None:
        """Put a question's scores into `found`, or count why there are none."""
        try:
            scores = await self._again(
                session, "POST", path, encoded(question.body()), question.read, retries
            )
            found.update(zip(question.keys, scores, strict=True))
            self._failed = 0
        except Fault as fault:
            self._failed = 0 if isinstance(fault, Nonsense) else self._failed + 1
            self.count(fault)

    async def _again(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        body: bytes | None,
        read: Callable[[Any], Any],
        retries: int,
    ) -> Any:
        """Exchange until there is an answer, it cannot be mended, or the attempts are used up."""
        for attempt in count():
            try:
                return read(await self._exchange(session, method, path, body))
            except Fault as fault:
                if not fault.again or attempt >= retries:
                    raise
                await asyncio.sleep(self._wait(attempt, fault.wait))

    def _wait(self, attempt: int, asked: float) -> float:
        """Return the seconds before another attempt: doubling, random, at least what was asked for."""
        longest = min(self.limits.first_wait * 2**attempt, self.limits.longest_wait)
        return max(longest * self._random.uniform(0.5, 1), min(asked, self.limits.longest_asked_wait))

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, body: bytes | None
    ) -> Any:
        """Send one request and read its JSON."""
        sent = None if body is None else io.BytesIO(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            async with session.request(
                method, self.url + path, data=sent, headers=headers, allow_redirects=False
            ) as response:
                content = await _content(response, self.limits.max_bytes)
                status, asked = response.status, retry_after(response.headers.get("Retry-After", ""))
        except asyncio.TimeoutError as error:
            raise Fault(f"no answer within {self.limits.timeout:g} s", again=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Fault(
                f"connection failed ({type(error).__name__})", self._plain(str(error)), again=True
            ) from error
        if status != 200:
            remedy = f"; {REMEDIES[status]}" if status in REMEDIES else ""
            said = self._plain(content.decode("utf-8", "replace"))
            raise Fault(f"HTTP {status}{remedy}", said, again=status in AGAIN or status >= 500, wait=asked)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Nonsense(
                "the answer is not JSON", self._plain(content.decode("utf-8", "replace"))
            ) from error

    def _plain(self, text: str) -> str:
        """Shorten foreign text to one harmless line without the key."""
        return ascii((text.replace(self._key, "…") if self._key else text)[:200]) if text else ""


async def _content(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read a body of at most `limit` bytes."""
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > limit:
            response.close()
            raise Nonsense(f"the answer is larger than {limit} bytes")
    return b"".join(parts)


def encoded(body: dict[str, Any]) -> bytes:
    """Write a body as JSON."""
    return json.dumps(body, allow_nan=False).encode()


def retry_after(value: str) -> float:
    """Read a Retry-After header, seconds or a date, as seconds from now; 0 where it says nothing."""
    try:
        seconds = (
            float(value)
            if value.strip().isdigit()
            else parsedate_to_datetime(value).timestamp() - time.time()
        )
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
