"""One published file over HTTP: whole or not there; an interrupted download goes on where it stopped.

A mirror stands in for the hub by $HF_ENDPOINT and for GitHub's raw files by $G2RPO_GITHUB. No account is used
and no token is sent: every file here is public.
"""

from __future__ import annotations

import errno
import http.client
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...files.safe import folder_on_disk, on_disk
from ..models.catalogue import Published

CHUNK = 2**20
SECONDS = 60  # without a byte, after which a connection counts as lost
TRIES = 3
PAUSE = 1.0
HTTP = ("https://", "http://")
LOST = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


class FetchError(ValueError):
    """A reward that cannot be fetched, in one line that says what to do."""


@dataclass(frozen=True)
class Sources:
    """Where published files come from."""

    hub: str = "https://huggingface.co"
    github: str = "https://raw.githubusercontent.com"

    @classmethod
    def chosen(cls, mirror: str | None = None) -> Sources:
        """Take a mirror of both if one is given, else mirrors from the environment."""
        hub = mirror or os.environ.get("HF_ENDPOINT") or cls.hub
        github = mirror or os.environ.get("G2RPO_GITHUB") or cls.github
        for address in (hub, github):
            if not address.startswith(HTTP):
                raise FetchError(f"mirror {address[:80]!a} is no web address; begin it with https://")
        return cls(hub.rstrip("/"), github.rstrip("/"))

    def address(self, file: Published) -> str:
        """Return where a file is."""
        path = urllib.parse.quote(file.path)
        if file.place == "hub":
            return f"{self.hub}/{file.repo}/resolve/{file.revision}/{path}"
        return f"{self.github}/{file.repo}/{file.revision}/{path}"


def download(address: str, target: Path, shown: Callable[[int, int], None]) -> None:
    """Bring a file from an address; what has come of it stays in `<name>.part` if the connection is lost.

    `shown` hears how many bytes there are and how many there will be, 0 where the server does not say.
    """
    part = target.with_name(f"{target.name}.part")
    for left in reversed(range(TRIES)):
        try:
            _receive(address, part, shown)
            break
        except LOST as error:
            if not left or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                raise FetchError(_lost(address, error)) from error
            time.sleep(PAUSE)
        except OSError as error:
            if error.errno in FULL:
                part.unlink(missing_ok=True)
            raise
    os.replace(part, target)
    folder_on_disk(target.parent)


def _receive(address: str, part: Path, shown: Callable[[int, int], None]) -> None:
    """Append to a part what it lacks, or write it anew where the server cannot go on."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "g2rpo", "Accept-Encoding": "identity"}
    request = urllib.request.Request(address, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS, context=_trusted(address))
    except urllib.error.HTTPError as error:
        # Nothing lies behind what is here: its hash tells whether it is the file.
        if have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return
        raise
    with answer:
        goes_on = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if goes_on and answer.status == http.client.PARTIAL_CONTENT else 0
        length = answer.headers.get("Content-Length")
        whole = start + int(length) if length else 0
        with open(part, "ab" if start else "wb") as out:
            _copy(answer, out, start, whole, shown)
            on_disk(out)


def _copy(
    answer: http.client.HTTPResponse, out: IO[bytes], have: int, whole: int, shown: Callable[[int, int], None]
) -> None:
    """Copy an answer to a file, and see that it came to its end."""
    for block in _blocks(answer):
        out.write(block)
        have += len(block)
        shown(have, whole)
    if have < whole:
        raise ConnectionError(f"the connection ended after {have} of {whole} bytes")


def _blocks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """Read an answer; whatever the system says then is about the connection and not about the disk."""
    while True:
        try:
            block = answer.read(CHUNK)
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not block:
            return
        yield block


def _trusted(address: str) -> ssl.SSLContext | None:
    """Trust the system's certificates, and certifi's where it is there: some Pythons find no system's."""
    if not address.startswith(HTTP[0]):
        return None
    context = ssl.create_default_context()
    try:
        import certifi
    except ImportError:
        return context
    context.load_verify_locations(certifi.where())
    return context


def _lost(address: str, error: Exception) -> str:
    """Return what was lost, why, and what to do."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return f"cannot download {address}: {reason}; try again, it goes on, or name a mirror by --mirror"


def on_terminal(have: int, whole: int) -> None:
    """Show on a terminal how far a download is, in one line that the next one overwrites."""
    if sys.stderr.isatty():
        share = f" of {whole / 1e6:.0f} MB, {have / whole:.0%}" if whole else " MB"
        print(f"\r  {have / 1e6:.0f}{share} ", end="\n" if have == whole else "", file=sys.stderr, flush=True)
