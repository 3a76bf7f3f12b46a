"""Jobs in a folder: whoever wants a run writes one file there, whoever trains takes it. No port, no token.

    <id>.job.json     what to train; written once and never changed
    <id>.cancel       somebody wants it to end
    <id>.sent         the address of the service that trains it, or is about to
    <id>.newest       somebody wants the LoRA of its newest checkpoint, which a run elsewhere keeps to itself
    <id>.note         what keeps it from going on for now, in words
    <id>.end.json     how it ended; such a job is taken no more, unless somebody asks for it again
    <id>.former.json  how it ended before that
    <id>.taken/       the lock of the process that works on it

A worker that is killed loses its lock, and the next one takes the job and resumes its run: a job runs to its
end exactly once.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .one_writer import LOCK, one_writer, opened, release, who
from .safe import FileError, RunError, finite, folder_on_disk, on_disk, open_file, write_bytes, writing

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)")
"""Names that Windows keeps for devices."""
JOB_BYTES, NOTE_BYTES = 2**20, 2**12
PATIENCE = 30.0  # seconds
WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"
ENDS = (DONE, FAILED, CANCELLED)


class JobError(FileError):
    """A job that cannot be submitted, read or ended, in one line that names it and the remedy."""


def check_id(job_id: str) -> str:
    """Return the id of a job; JobError where it could not be a file's name everywhere."""
    if not isinstance(job_id, str) or not NAME.fullmatch(job_id) or RESERVED.fullmatch(job_id):
        rule = "use 1 to 64 of a-z, 0-9, _ and -, beginning with a letter or digit"
        raise JobError(f"a job cannot be called {str(job_id)[:40]!a}; {rule}")
    return job_id


@dataclass(frozen=True)
class Spool:
    """A folder of jobs, shared by those who submit and those who train."""

    path: Path

    def submit(self, job_id: str, job: Mapping[str, Any]) -> bool:
        """Write a job; False where the very same one is there already.

        JobError for an id that another job has, and for more than 1 MiB.
        """
        place = self._file(job_id, "job.json")
        try:
            content = (json.dumps(finite(job), indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()
        except (RecursionError, UnicodeEncodeError) as error:
            raise JobError(f"job {job_id} is nested too deeply, or has half signs; mend it") from error
        if len(content) > JOB_BYTES:
            raise JobError(f"job {job_id} has {len(content):,} bytes; {JOB_BYTES:,} is the limit")
        # A name of its own for each who writes: one of them alone gives it the final name.
        ready = self.path / f".{job_id}.{os.getpid()}.{os.urandom(4).hex()}.partial"
        try:
            with writing(place):
                self.path.mkdir(parents=True, exist_ok=True)
                with open(ready, "xb") as file:
                    file.write(content)
                    on_disk(file)
            made = named_first(ready, place)
        finally:
            ready.unlink(missing_ok=True)
        if not made and self._read(place) != json.loads(content):
            raise JobError(f"job {job_id} is there already, with other content; choose another id")
        return made

    def ids(self) -> list[str]:
        """List the jobs, oldest first."""
        found = []
        for file in self.path.glob("*.job.json"):
            name = file.name.removesuffix(".job.json")
            if NAME.fullmatch(name):
                with suppress(OSError):  # it may be removed just now
                    found.append((file.stat().st_mtime_ns, name))
        return [name for _, name in sorted(found)]

    def job(self, job_id: str) -> dict[str, Any]:
        """Read a job."""
        found = self._told(job_id, "job.json")
        if found is None:
            raise JobError(f"there is no job {job_id}; known are: {', '.join(self.ids()[-9:]) or 'none'}")
        return found

    def state(self, job_id: str) -> str:
        """Return waiting, running, done, failed or cancelled."""
        self.job(job_id)
        if (ended := self.ended(job_id)) is not None:
            return str(ended.get("status", FAILED))
        lock = self._file(job_id, "taken") / LOCK
        if not lock.exists():
            return WAITING
        handle = opened(lock)
        if handle is None:
            return RUNNING
        release(handle, lock)
        return WAITING

    @contextmanager
    def take(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Hold a job and give its content; RunError if another process holds it, JobError once ended."""
        job = self.job(job_id)
        with one_writer(self._file(job_id, "taken")):
            if self.ended(job_id) is not None:
                raise JobError(f"job {job_id} has ended; submit another one")
            yield job

    def cancel(self, job_id: str) -> None:
        """Ask for the end of a job; whoever holds it stops at the next step."""
        self.job(job_id)
        write_bytes(self._file(job_id, "cancel"), b"")

    def stop(self, job_id: str) -> str:
        """Ask for a job's end and return its state: one that nobody has, nor a service, has ended."""
        self.cancel(job_id)
        with suppress(RunError, JobError), self.take(job_id):
            if not self.sent(job_id):
                self.end(job_id, CANCELLED)
        return self.state(job_id)

    def cancelled(self, job_id: str) -> bool:
        """Return whether somebody has asked for a job's end."""
        return self._file(job_id, "cancel").exists()

    def end(self, job_id: str, status: str, **said: Any) -> None:
        """Write how a job ended: done, failed or cancelled, and what else is to be said of it."""
        if status not in ENDS:
            raise ValueError(f"a job ends as one of {', '.join(ENDS)}, not {status!a}")
        at = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        content = json.dumps(finite({"status": status, "at": at, **said}), ensure_ascii=False) + "\n"
        write_bytes(self._file(job_id, "end.json"), content.encode())

    def ended(self, job_id: str) -> dict[str, Any] | None:
        """Return how a job ended; None while it has not."""
        return self._told(job_id, "end.json")

    def former(self, job_id: str) -> dict[str, Any] | None:
        """Return how a job ended before somebody asked for it again; None where nobody has."""
        return self._told(job_id, "former.json")

    def _told(self, job_id: str, kind: str) -> dict[str, Any] | None:
        """Read what was said of a job, where something was."""
        return self._read(self._file(job_id, kind))

    def note(self, job_id: str, text: str) -> None:
        """Say what keeps a job from going on for now; nothing where it goes on."""
        place = self._file(job_id, "note")
        if text:
            write_bytes(place, text.encode("utf-8", "replace"))
            return
        with writing(place):
            place.unlink(missing_ok=True)

    def noted(self, job_id: str) -> str:
        """Return what keeps a job from going on, in one line; nothing where it goes on."""
        return self._line(job_id, "note")

    def send(self, job_id: str, address: str) -> None:
        """Note which service is about to get a job."""
        if self.sent(job_id) != address:
            write_bytes(self._file(job_id, "sent"), address.encode("utf-8", "replace"))

    def sent(self, job_id: str) -> str:
        """Return the address of the service that has a job; nothing where none has."""
        return self._line(job_id, "sent")

    def _line(self, job_id: str, kind: str) -> str:
        """Read a line that was said of a job; nothing where none was."""
        with suppress(OSError), open_file(self._file(job_id, kind)) as file:
            return " ".join(file.read(NOTE_BYTES).decode("utf-8", "replace").split())
        return ""

    def ask_newest(self, job_id: str) -> None:
        """Ask for the LoRA of a job's newest checkpoint, also of those to come."""
        if not self.newest_asked(job_id):
            write_bytes(self._file(job_id, "newest"), b"")

    def newest_asked(self, job_id: str) -> bool:
        """Return whether somebody wants the LoRA of a job's newest checkpoint."""
        return self._file(job_id, "newest").exists()

    def again(self, job_id: str) -> bool:
        """Let a job that failed or was cancelled wait once more; False where it has not ended so.

        Its run goes on where it stood, as after a worker that was killed.
        """
        self.job(job_id)
        with one_writer(self._file(job_id, "taken")):
            if (self.ended(job_id) or {}).get("status") not in (FAILED, CANCELLED):
                return False
            # The end last: whoever is killed in between leaves a job that has ended.
            with writing(end := self._file(job_id, "end.json")):
                self._file(job_id, "cancel").unlink(missing_ok=True)
                os.replace(end, self._file(job_id, "former.json"))
                folder_on_disk(self.path)
        return True

    def _file(self, job_id: str, kind: str) -> Path:
        """Return where a file of a job lies."""
        return Path(self.path) / f"{check_id(job_id)}.{kind}"

    def _read(self, place: Path) -> dict[str, Any] | None:
        """Read a file of a job, within bounds; None where there is none."""
        try:
            with open_file(place) as file:
                content = file.read(JOB_BYTES + 1)
            found = json.loads(content) if len(content) <= JOB_BYTES else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise JobError(f"{place} cannot be read as a job ({type(error).__name__}); remove it") from error
        if not isinstance(found, dict):
            raise JobError(f"{place} holds no job; remove it")
        return found


def named_first(ready: Path, place: Path) -> bool:
    """Give a finished file its name; False where another one has it already."""
    with writing(place):
        try:
            os.link(ready, place)
        except FileExistsError:
            return False
        except OSError:
            # FAT and some network drives know no links: there, whoever has the lock looks and moves.
            with in_turn(place.with_suffix(".writing")):
                if place.exists():
                    return False
                os.replace(ready, place)
        folder_on_disk(place.parent)
    return True


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Wait for a lock that others hold for an instant only, and hold it."""
    deadline = time.monotonic() + PATIENCE
    while (handle := opened(folder / LOCK)) is None:
        if time.monotonic() > deadline:
            raise JobError(f"{folder} is being written by {who(folder / LOCK)}; try again")
        time.sleep(0.01)
    try:
        yield
    finally:
        release(handle, folder / LOCK)
