"""The service for a remote GPU: jobs come in as JSON, one after another is trained, and files go out.

Who may ask at all is up to http_guard.py, what a job may be to job_schema.py. A job itself runs in a process
of its own (jobs/run_job.py), so that no run can break the service.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from comfy_g2rpo.files.safe import FileError, RunError, open_file
from comfy_g2rpo.files.spool import ENDS, WAITING, JobError, Spool
from comfy_g2rpo.run.folder import RunFolder, is_run

from ..config.reward_checks import rewards_root
from ..jobs.graph_job import Owner
from ..jobs.run_job import Rules, run_job
from ..workflows.model_files import ModelFolders
from .api_document import ROUTES, Route, document
from .http_guard import HEADERS, Answer, Handler, Refusal, in_one_line, read_body
from .job_schema import Asked, RequestError, check_job, is_of_graph, job_request, ready_job, without
from .job_views import PICTURES, job_view, lora_of, rows_view, samples_view, short_view
from .metric_stream import MetricLines

MAX_BODY = 256 * 2**10
MAX_STREAMS = 64
MAX_LISTED = 1000
WRITE_SECONDS = 60.0
POLL_SECONDS, PING_SECONDS, FULL_SECONDS = 0.5, 15.0, 60.0
BLOCK = 2**18

log = logging.getLogger(__name__)
log.addFilter(in_one_line)


@dataclass(frozen=True)
class Quotas:
    """What all jobs together, and one of them, may take."""

    queue: int = 16
    hours: float = 24.0
    gigabytes: float = 50.0


class JobService:
    """Takes jobs, trains them one at a time in a thread that starts processes, and answers about them."""

    def __init__(
        self,
        folder: Path,
        models: Sequence[Path] = (),
        quotas: Quotas | None = None,
        settings: Sequence[str] = (),
        preset: str | None = None,
    ) -> None:
        self.folder, self.quotas = Path(folder).resolve(), quotas or Quotas()
        self.models = [Path(each).expanduser().resolve() for each in models]
        self._hidden = [self.folder, *self.models, rewards_root().parent]
        self._owner = Owner(ModelFolders.of(self.models), settings, preset)
        self.spool, self.runs = Spool(self.folder / "spool"), self.folder / "runs"
        self.spool.path.mkdir(parents=True, exist_ok=True)
        self._open = {each: None for each in self.spool.ids() if self._goes_on(each)}
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self._writers = ThreadPoolExecutor(8, thread_name_prefix="writer")
        self._counting, self._coming = threading.RLock(), Counter[str]()
        self._stop, self._more, self._streams = threading.Event(), threading.Event(), 0
        self._size = (float("-inf"), 0)
        self._worker = threading.Thread(target=self._work, name="worker")

    def start(self) -> None:
        """Begin to train."""
        self._worker.start()

    def close(self) -> None:
        """Stop the run of now at its next step; its job and those that wait go on with the next service."""
        self._stop.set()
        self._more.set()
        if self._worker.is_alive():
            self._worker.join()
        self._disk.shutdown()
        self._writers.shutdown()

    def find(self, address: str) -> Mapping[str, Handler]:
        """Return what answers at an address, by method."""
        path, sign, query = address.partition("?")
        found: dict[str, Handler] = {}
        for route in ROUTES:
            if (match := route.pattern.fullmatch(path)) and (not sign or route.query):
                after = route.query.fullmatch(query) if sign else None
                if sign and not after:
                    raise Refusal(400, "the query is not after=NUMBER; leave it out")
                given = [*match.groups(), *([int(after[1]) if after else 0] if route.query else [])]
                found[route.method] = partial(self._answer, route, given)
        if not found:
            raise Refusal(404, "there is nothing here; GET /openapi.json lists the addresses")
        return found

    async def _answer(self, route: Route, given: Sequence[Any], request: web.BaseRequest) -> Answer:
        """Answer at a route; what was asked for and is not there is a refusal in words."""
        if route.method != "POST" and request.body_exists:
            raise Refusal(400, "send no body")
        try:
            return await getattr(self, route.handler)(*given, request)
        except JobError as error:
            raise Refusal(404, without(str(error), self._hidden)) from error
        except RunError as error:
            log.warning("%s", error)
            raise Refusal(507, "the service cannot write; its disk may be full") from error
        except RequestError as error:
            raise Refusal(400, str(error)) from error

    async def _do(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do what touches the disk, one after another, away from the loop that serves."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, partial(work, *given))

    async def health(self, request: web.BaseRequest) -> Answer:
        """Say that the service is there, and how much it has to do."""
        return {"ok": True, "open": len(self._open), "queue": self.quotas.queue}

    async def openapi(self, request: web.BaseRequest) -> Answer:
        """Give the description of all addresses."""
        return document()

    async def submit(self, request: web.BaseRequest) -> Answer:
        """Take a job. While one is being written, which waits for the disk, others are checked."""
        content = await read_body(request, MAX_BODY)
        asked = await self._do(self._checked, content)
        return await asyncio.get_running_loop().run_in_executor(self._writers, self._submit, asked)

    def _checked(self, content: bytes) -> Asked:
        """Read and check a job, and give it a name if it has none."""
        asked = job_request(content)
        if asked.id is None:
            asked = replace(asked, id=f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}")
        if not self._known(asked.id):
            self._check_quotas(asked.id)
            check_job(asked.job, self.models, self._owner)
        return asked

    def _known(self, job_id: str) -> bool:
        """Return whether there is a job of that name."""
        return (self.spool.path / f"{job_id}.job.json").exists()

    def _submit(self, asked: Asked) -> dict[str, Any]:
        """Write a job into the spool."""
        try:
            with self._counted(asked):
                new = self.spool.submit(asked.id, asked.job)
                with self._counting:
                    if self._again(asked):
                        self.spool.again(asked.id)
        except JobError as error:
            raise Refusal(409, without(str(error), self._hidden)) from error
        self._more.set()
        return {"id": asked.id, "status": WAITING if new else self.spool.state(asked.id), "new": new}

    @contextmanager
    def _counted(self, asked: Asked) -> Iterator[None]:
        """Count a job while it is written, for which there must be room; sent by several, it counts once."""
        with self._counting:
            if not self._known(asked.id) or self._again(asked):
                self._check_quotas(asked.id)
            self._coming[asked.id] += 1
        try:
            yield
        finally:
            with self._counting:
                self._coming -= Counter([asked.id])
                # Also one that was sent before, when the disk failed behind its name.
                if self._goes_on(asked.id):
                    self._open.setdefault(asked.id)

    def _again(self, asked: Asked) -> bool:
        """Return whether a job is to be tried once more: the end that is named is its newest."""
        return (self.spool.ended(asked.id) or {}).get("at") == asked.again

    def _goes_on(self, job_id: str) -> bool:
        """Return whether there is a job that has not ended; one that cannot be read does not go on."""
        try:
            self.spool.job(job_id)
            return self.spool.ended(job_id) is None
        except JobError as error:
            log.warning("%s", error)
            return False

    def _let_go(self, job_id: str) -> None:
        """Forget a job that has ended, unless somebody has asked for it again meanwhile."""
        with self._counting:
            if not self._goes_on(job_id):
                self._open.pop(job_id, None)

    def _check_quotas(self, job_id: str) -> None:
        """Refuse a job for which there is no room, unless it has some already."""
        with self._counting:
            if job_id in self._coming:
                return
            count = len(self._open) + sum(each not in self._open for each in self._coming)
        if count >= self.quotas.queue:
            raise Refusal(429, f"{count} jobs wait already; come back later")
        if self._full():
            raise Refusal(429, f"jobs hold {self.quotas.gigabytes:g} GB already; have old ones removed")

    def _full(self) -> bool:
        """Return whether all jobs together hold what they may."""
        return self._used() >= self.quotas.gigabytes * 1e9

    def _used(self) -> int:
        """Return the bytes of all jobs, counted anew every ten seconds."""
        if time.monotonic() - self._size[0] > 10:
            size = size_of(self.folder)
            self._size = (time.monotonic(), size)
        return self._size[1]

    async def jobs(self, request: web.BaseRequest) -> Answer:
        """List jobs, the newest first."""
        return {"jobs": await self._do(self._listed)}

    def _listed(self) -> list[dict[str, Any]]:
        """List what can be read of the newest jobs."""
        found = []
        for job_id in reversed(self.spool.ids()[-MAX_LISTED:]):
            with suppress(JobError, RunError, OSError):
                found.append(short_view(self.spool, self.runs, job_id))
        return found

    async def job(self, job_id: str, request: web.BaseRequest) -> Answer:
        """Tell all of a job."""
        return await self._do(job_view, self.spool, self.runs, job_id, self._hidden)

    async def cancel(self, job_id: str, request: web.BaseRequest) -> Answer:
        """End a job: at once while it waits, at its next step while it runs."""
        return await self._do(self._cancel, job_id)

    def _cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for a job's end."""
        if (status := self.spool.state(job_id)) in ENDS:
            raise Refusal(409, f"job {job_id} has ended already: {status}")
        status = self.spool.stop(job_id)
        self._let_go(job_id)
        return {"id": job_id, "status": status}

    async def events(self, job_id: str, after: int, request: web.BaseRequest) -> Answer:
        """Tell of a job while it goes on: its rows of metrics behind a line, and how it ends."""
        await self._do(self.spool.job, job_id)
        if self._streams >= MAX_STREAMS:
            raise Refusal(429, f"{MAX_STREAMS} watch already; come back later")
        self._streams += 1
        try:
            response = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for event in self._told(job_id, after):
                await written(response, event.encode())
        except (OSError, FileError, asyncio.TimeoutError):
            # Whoever reads too slowly comes back, and says what the last line was.
            if request.transport:
                request.transport.abort()
        finally:
            self._streams -= 1
        return response

    async def _told(self, job_id: str, after: int) -> AsyncIterator[str]:
        """Make the events of a job until it has ended."""
        lines, said, quiet = MetricLines(self.runs / job_id / "metrics.jsonl", after), "", time.monotonic()
        while True:
            ended = await self._do(self.spool.ended, job_id)
            # How it stood is asked for before the rows: so no row comes behind the end.
            while rows := lines.read():
                for number, row in rows:
                    yield f"id: {number}\nevent: metrics\ndata: {row}\n\n"
                quiet = time.monotonic()
            if ended is not None:
                view = await self._do(self._ended_view, job_id)
                yield f"event: end\ndata: {json.dumps(view)}\n\n"
                return
            status = await self._do(self.spool.state, job_id)
            if status != said:
                yield f"event: state\ndata: {json.dumps({'status': status})}\n\n"
                said = status
            elif time.monotonic() - quiet > PING_SECONDS:
                yield ": still here\n\n"
                quiet = time.monotonic()
            await asyncio.sleep(POLL_SECONDS)

    def _ended_view(self, job_id: str) -> dict[str, Any]:
        """Tell how a job ended."""
        ended = self.spool.ended(job_id) or {}
        error = without(str(ended.get("error", "")), self._hidden)
        return {"status": ended.get("status"), **({"error": error} if error else {})}

    async def metrics(self, job_id: str, after: int, request: web.BaseRequest) -> Answer:
        """Give some rows of metrics behind a line."""
        await self._do(self.spool.job, job_id)
        return await self._do(rows_view, self.runs / job_id, after)

    async def samples(self, job_id: str, step: str, request: web.BaseRequest) -> Answer:
        """List the pictures of a step."""
        await self._do(self.spool.job, job_id)
        try:
            return await self._do(samples_view, self.runs / job_id, int(step))
        except FileError as error:
            raise Refusal(404, f"job {job_id} has no pictures of step {int(step)}") from error

    async def sample(self, job_id: str, step: str, name: str, request: web.BaseRequest) -> Answer:
        """Send a picture of a step."""
        await self._do(self.spool.job, job_id)
        place = self.runs / job_id / "images" / f"{int(step):06d}" / name
        return await sent_file(request, place, "application/octet-stream")

    async def lora(self, job_id: str, request: web.BaseRequest) -> Answer:
        """Send the LoRA of a job: its result, or that of its newest checkpoint."""
        place = await self._do(self._lora_place, job_id)
        return await sent_file(request, place, "application/octet-stream")

    def _lora_place(self, job_id: str) -> Path:
        """Return where a job's LoRA lies."""
        self.spool.job(job_id)
        place = lora_of(self.runs / job_id)
        if place is None:
            raise Refusal(404, f"job {job_id} has no LoRA yet; it comes with the first checkpoint")
        return place

    async def picture(self, job_id: str, name: str, request: web.BaseRequest) -> Answer:
        """Send one of the pictures that a run draws."""
        await self._do(self.spool.job, job_id)
        if name not in PICTURES:
            raise Refusal(404, f"there is no picture of that name; there are {' and '.join(PICTURES)}")
        return await sent_file(request, self.runs / job_id / name, "image/png")

    async def report(self, job_id: str, request: web.BaseRequest) -> Answer:
        """Give the summary of a finished run."""
        await self._do(self.spool.job, job_id)
        run = self.runs / job_id
        summary = RunFolder(run).summary() if is_run(run) else {}
        if not summary:
            raise Refusal(404, f"job {job_id} has no report yet; it comes with the end of its run")
        return summary

    def _work(self) -> None:
        """Train what waits, oldest first, until the service ends."""
        while not self._stop.is_set():
            job_id = next(iter([*self._open]), None)
            if job_id is None or self._full():
                if job_id:
                    log.warning("jobs hold %g GB; remove old ones, then others go on", self.quotas.gigabytes)
                self._more.wait(FULL_SECONDS if job_id else 1)
                self._more.clear()
                continue
            try:
                status = run_job(self.spool, job_id, self.runs, self._rules(job_id))
                log.info("job %s: %s", job_id, status)
                self._let_go(job_id)
            except JobError as error:
                log.info("job %s: %s", job_id, error)
                self._let_go(job_id)
            except Exception:
                # Such as a full disk: the job goes on once there is room.
                log.exception("job %s could not be run; it is tried again", job_id)
                self._open[job_id] = self._open.pop(job_id, None)
                self._stop.wait(5)

    def _rules(self, job_id: str) -> Rules:
        """Return how a job is run here."""
        begin = time.monotonic()

        def prepare(job: Mapping[str, Any]) -> Mapping[str, Any]:
            if is_of_graph(job):
                return self._owner.prepare(job, self.runs / job_id)
            return ready_job(job, self.models)

        def over(run: Path) -> str:
            if time.monotonic() - begin > self.quotas.hours * 3600:
                return f"it ran for {self.quotas.hours:g} hours, the limit of this service (--hours)"
            if self._used() > self.quotas.gigabytes * 1e9:
                return f"jobs hold {self.quotas.gigabytes:g} GB, the limit of this service (--gigabytes)"
            return ""

        return Rules(prepare=prepare, stop=self._stop.is_set, over=over)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


async def written(response: web.StreamResponse, content: bytes) -> None:
    """Write a part of an answer, but wait only so long for whoever reads it."""
    await asyncio.wait_for(response.write(content), WRITE_SECONDS)


async def sent_file(request: web.BaseRequest, place: Path, kind: str) -> web.StreamResponse:
    """Send a file as it is, whatever becomes of its name meanwhile."""
    try:
        file = open_file(place)
    except OSError as error:
        raise Refusal(404, f"there is no {place.name} yet") from error
    with file:
        headers = {**HEADERS, "Content-Type": kind, "Content-Length": str(os.fstat(file.fileno()).st_size)}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            while block := file.read(BLOCK):
                await written(response, block)
        except (OSError, asyncio.TimeoutError):
            if request.transport:
                request.transport.abort()
    return response
