"""The client of `g2rpo serve`: submit, watch, cancel and fetch jobs, over connections that may drop."""

from __future__ import annotations

import http.client
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import FileError, digest_of, folder_on_disk, on_disk, writing
from comfy_g2rpo.files.spool import check_id, named_first

TIMEOUT = 60.0
PAUSE, LONGEST_PAUSE = 0.5, 15.0
MAX_ANSWER, MAX_LINE, MAX_FILE = 2**22, 2**21, 2**31
MAX_DIGITS = 15
BLOCK = 2**20
NONSENSE = 200
"""Status of what was answered and is of no use."""
SLOWEST = 2**10
"""Bytes a second: whoever sends less for longer than the timeout is hung up on."""
LOST = (OSError, http.client.HTTPException)
"""What a connection that drops, or answers nonsense, raises."""


class RemoteError(ValueError):
    """What a service refuses or cannot do, in one line; `status` is that of HTTP, 0 for no answer, NONSENSE
    for one of no use.
    """

    def __init__(self, words: str, status: int = 0) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Event:
    """What is told of a watched job: metrics (content: a row), state, or end."""

    kind: str
    content: dict[str, Any]
    line: int = 0
    """Of metrics: the line of the row, from which a later watch goes on."""


class RemoteService:
    """Speaks to a service at `url` for the holder of its token."""

    def __init__(self, url: str, token: str, patience: float = 120.0) -> None:
        self._secure, self._host, self._port, self._path = address_of(url)
        self.url, self._token, self.patience = url, token, patience

    def submit(
        self, recipe: Mapping[str, Any], settings: Sequence[str] = (), job_id: str = "", source: str = ""
    ) -> dict[str, Any]:
        """Submit a job; with an id it may be sent any number of times, and is one job."""
        job = {"recipe": recipe, "settings": list(settings), "source": source}
        return self._patiently("POST", "/jobs", job | ({"id": job_id} if job_id else {}), again=bool(job_id))

    def submit_graph(self, job_id: str, graph: Mapping[str, Any], again: str = "") -> dict[str, Any]:
        """Submit a graph's job; `again` names an end of it after which it is tried once more."""
        body = {"id": job_id, "graph": graph} | ({"again": again} if again else {})
        return self._patiently("POST", "/jobs", body)

    def health(self) -> dict[str, Any]:
        """Return how much the service has to do."""
        return self._patiently("GET", "/health")

    def rows(self, job_id: str, after: int) -> list[Any]:
        """Return some rows of a job's metrics behind a line; none where there are no more for now."""
        return list_of(self._patiently("GET", at(job_id, f"/metrics?after={after}")), "rows")

    def samples(self, job_id: str, step: int) -> list[Any]:
        """List the pictures of a step."""
        return list_of(self._patiently("GET", at(job_id, f"/samples/{step}")), "samples")

    def jobs(self) -> list[dict[str, Any]]:
        """List jobs, the newest first."""
        return list_of(self._patiently("GET", "/jobs"), "jobs")

    def job(self, job_id: str) -> dict[str, Any]:
        """Return all of a job."""
        return self._patiently("GET", at(job_id))

    def report(self, job_id: str) -> dict[str, Any]:
        """Return the summary of a finished run."""
        return self._patiently("GET", at(job_id, "/report"))

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for the end of a job."""
        return self._patiently("DELETE", at(job_id))

    def watch(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """Give what happens to a job until it ends, from behind a line on, over as many connections as it
        takes; RemoteError once none has come about for longer than the patience.
        """
        last, since, pause = after, time.monotonic(), PAUSE
        while True:
            error: Exception = ConnectionError("it hung up")
            try:
                for event in self._events(job_id, last):
                    since, pause = time.monotonic(), PAUSE
                    if event is None:
                        continue
                    last = max(last, event.line)
                    yield event
                    if event.kind == "end":
                        return
            except (*LOST, RemoteError) as fault:
                error = fault
            self._give_up(error, since)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def download(self, path: str, place: Path, check: Callable[[Path], None], replace: bool = False) -> None:
        """Bring a file to its place, whole and checked, or not at all; one that is there stays, unless it is
        to be replaced.
        """
        refuse_existing(place, replace)
        begin = time.monotonic()
        with writing(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        os.close(handle)
        try:
            while True:
                try:
                    self._receive(path, Path(name))
                    break
                except LOST as error:
                    self._give_up(error, begin)
                    time.sleep(PAUSE)
            check(Path(name))
            put(Path(name), place, replace)
        finally:
            Path(name).unlink(missing_ok=True)

    def fetch_lora(self, job_id: str, place: Path, replace: bool = False) -> dict[str, Any]:
        """Bring a job's LoRA to its place; what is damaged on the way, or no LoRA, does not get there."""
        refuse_existing(place, replace)
        about = self.job(job_id).get("lora")
        if not isinstance(about, dict):
            raise RemoteError(f"job {job_id} has no LoRA yet; it comes with the first checkpoint", 404)

        def check(file: Path) -> None:
            try:
                if not lora.read(file).pairs:
                    raise FileError("it holds no pairs")
            except FileError as error:
                reason = str(error).replace(str(file), "it")
                raise RemoteError(f"what came for job {job_id} is no LoRA: {reason}", NONSENSE) from error
            found = digest_of(file)
            if about.get("sha256") not in (None, found):
                # A job that still runs may have gone on to its next checkpoint meanwhile.
                newer = self.job(job_id).get("lora")
                about.update(newer if isinstance(newer, dict) else {})
            if about.get("sha256") not in (None, found):
                raise RemoteError(f"the LoRA of job {job_id} changed on its way; fetch it again", NONSENSE)

        self.download(at(job_id, "/lora"), place, check, replace)
        return about

    def fetch(self, path: str, place: Path, digest: Any, check: Callable[[Path], None]) -> None:
        """Bring a file to its place, if it is as it should be and has the digest that was announced."""

        def both(file: Path) -> None:
            check(file)
            if digest is not None and digest != digest_of(file):
                raise RemoteError(f"{place.name} changed on its way", NONSENSE)

        self.download(path, place, both, replace=True)

    def _give_up(self, error: Exception, since: float) -> None:
        """Raise what cannot be mended by trying again, or was tried for long enough."""
        if isinstance(error, RemoteError) and error.status < 500:
            raise error
        if time.monotonic() - since > self.patience:
            if isinstance(error, RemoteError):
                raise error
            reason = str(error) or type(error).__name__
            raise RemoteError(
                f"{self.url} does not answer ({reason}); is it there, and the tunnel?"
            ) from error

    def _patiently(self, method: str, path: str, body: Any = None, again: bool = True) -> dict[str, Any]:
        """Return what is answered; what may be repeated is tried for as long as the patience is."""
        begin, pause = time.monotonic(), PAUSE
        while True:
            try:
                with self._asked(method, path, body) as response:
                    return table_of(whole_answer(response))
            except (*LOST, RemoteError) as error:
                if not again and not isinstance(error, ConnectionRefusedError):
                    self._give_up(error, float("-inf"))
                self._give_up(error, begin)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _events(self, job_id: str, after: int) -> Iterator[Event | None]:
        """Give the events of one connection; None for a sign of life."""
        with self._asked("GET", at(job_id, f"/events?after={after}")) as response:
            fields: dict[str, str] = {}
            while line := response.readline(MAX_LINE):
                text = line.decode("utf-8", "replace").rstrip("\r\n")
                name, _, value = text.partition(":")
                if name in ("event", "id", "data"):
                    fields[name] = value.removeprefix(" ")
                if text:
                    continue
                yield event_of(fields)
                fields = {}

    def _receive(self, path: str, place: Path) -> None:
        """Bring what is at a path into a file, whole."""
        with self._asked("GET", path) as response, open(place, "wb") as file:
            wanted = response.getheader("Content-Length") or ""
            if not wanted.isdecimal() or len(wanted) > 12 or int(wanted) > MAX_FILE:
                size_told = plain(wanted)[:40] or "unknown"
                raise RemoteError(f"{self.url} sends a file of {size_told} bytes", NONSENSE)
            size = 0
            for block in blocks(response):
                with writing(place):
                    file.write(block)
                size += len(block)
            if int(wanted) != size:
                raise ConnectionError("the connection dropped on the way")
            on_disk(file)

    @contextmanager
    def _asked(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """Ask for something; RemoteError for what is refused. Nothing is followed elsewhere."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        with closing(kind(self._host, self._port, timeout=TIMEOUT)) as connection:
            headers = {"Authorization": f"Bearer {self._token}", "Accept-Encoding": "identity"}
            content = None
            if body is not None:
                # As it is, for the bound on a body counts bytes.
                try:
                    text = json.dumps(body, allow_nan=False, ensure_ascii=False)
                except (TypeError, ValueError) as error:
                    remedy = "put dates in quotes, and give finite numbers"
                    raise RemoteError(f"the job holds what JSON has no word for; {remedy}", 400) from error
                content = text.encode(errors="surrogatepass")
                headers["Content-Type"] = "application/json"
            connection.request(method, self._path + path, content, headers)
            response = connection.getresponse()
            if response.status != 200:
                said = plain(table_of(whole_answer(response), {}).get("error", response.reason))
                raise RemoteError(f"{self.url} refuses with {response.status}: {said}", response.status)
            yield response


def blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Give an answer's body as it comes; ConnectionError where it comes too slowly to be waited for."""
    begin, size = time.monotonic(), 0
    while block := response.read1(BLOCK):
        yield block
        size += len(block)
        if time.monotonic() - begin > TIMEOUT + size / SLOWEST:
            raise ConnectionError("it sends too slowly")


def whole_answer(response: http.client.HTTPResponse) -> bytes:
    """Read a body that is no larger than answers are."""
    content = bytearray()
    for block in blocks(response):
        content += block
        if len(content) > MAX_ANSWER:
            return bytes(content)
    if response.length:
        raise ConnectionError("the connection dropped on the way")
    return bytes(content)


def at(job_id: str, rest: str = "") -> str:
    """Return the path of a job, or of what belongs to it."""
    return f"/jobs/{check_id(job_id)}{rest}"


def address_of(url: str) -> tuple[bool, str, int, str]:
    """Read an address: whether it is encrypted, host, port and path; ValueError for one that is none.

    Without encryption the token goes to this machine alone, where a tunnel may begin.
    """
    try:
        parts = urlsplit(url)
        host, port, secure = parts.hostname, parts.port, parts.scheme == "https"
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or parts.query or parts.fragment or parts.username:
        raise RemoteError(
            f"--url is {url[:200]!a}; write it as http://127.0.0.1:8766 or https://gpu.example.com"
        )
    if not secure and host != "localhost":
        try:
            private = ip_address(host).is_loopback
        except ValueError:
            private = False
        if not private:
            raise RemoteError(
                f"--url {url[:200]} would send the token unencrypted; use https, or a tunnel (ssh -L) to it"
            )
    return secure, host, port or (443 if secure else 80), parts.path.rstrip("/")


def table_of(content: bytes, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read an answer's JSON."""
    try:
        found = json.loads(content) if len(content) <= MAX_ANSWER else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    if otherwise is not None:
        return otherwise
    raise RemoteError("the answer is no table of JSON; is that address a g2rpo serve?", NONSENSE)


def list_of(answer: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of an answer."""
    found = answer.get(name, [])
    if not isinstance(found, list):
        raise RemoteError(f"the answer has no list of {name}; is that address a g2rpo serve?", NONSENSE)
    return found


def event_of(fields: Mapping[str, str]) -> Event | None:
    """Make an event of its fields; None for a comment, or what is none."""
    if "event" not in fields:
        return None
    line = fields.get("id", "0")
    content = table_of(fields.get("data", "").encode(), {})
    number = line.isascii() and line.isdecimal() and len(line) <= MAX_DIGITS
    return Event(fields["event"], content, int(line) if number else 0)


def plain(text: Any) -> str:
    """Shorten foreign text to one harmless line."""
    line = " ".join(str(text).split())[:500]
    return "".join(sign if sign.isprintable() else "?" for sign in line)


def refuse_existing(place: Path, replace: bool) -> None:
    """Refuse a place that is taken, unless what is there is to be replaced."""
    if place.exists() and not replace:
        raise FileError(f"{place} exists; choose another --to, or give --replace")


def put(file: Path, place: Path, replace: bool) -> None:
    """Move a finished file to its place; without `replace`, what came there meanwhile stays."""
    with writing(place):
        os.chmod(file, 0o644)
        if replace:
            os.replace(file, place)
            folder_on_disk(place.parent)
        elif not named_first(file, place):
            refuse_existing(place, replace)
