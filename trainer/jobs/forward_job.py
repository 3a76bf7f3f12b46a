"""Have a job of the spool trained by a service, and show it here as if it were trained here.

    runs/<id>/   the image of its run (mirrored_run.py)

Nothing is remembered beside that. A job is sent again after every start, which makes no second one of it, and
rows are asked for behind those that are here. So either side may be killed at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.one_writer import one_writer
from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.files.spool import CANCELLED, ENDS, FAILED, RUNNING, WAITING, Spool
from comfy_g2rpo.run.folder import is_run

from ..service.remote_client import NONSENSE, RemoteError, RemoteService, plain
from .graph_job import checked_recipe
from .mirrored_run import MirroredRun
from .run_job import outcome

PAUSE, LONGEST_PAUSE, STEP = 2.0, 60.0, 0.2
TRIES = 5
REFUSED = (400, 409, 411, 413, 415, 422)
"""What a service says to a job that it will never take."""
GONE = 404


@dataclass(frozen=True)
class Forward:
    """Passes jobs on to a service."""

    service: RemoteService
    pause: float = PAUSE
    patience: float = 600.0
    """Seconds for which a service is looked for that is to be told of a cancelled job."""

    def train(self, spool: Spool, job_id: str, runs: Path, stop: Callable[[], bool]) -> str:
        """Follow a job to its end and write that; waiting where this worker ends before."""
        run = Path(runs).resolve() / job_id
        with spool.take(job_id) as job, one_writer(run):
            if is_run(run) and not spool.sent(job_id):
                raise RunError(f"{job_id} was begun on this machine; start g2rpo worker without --forward")
            passage = Passage(self, spool, job_id, job, MirroredRun.of(self.service, job_id, run))
            try:
                status, said = passage.follow(stop)
            except RunError:  # this machine's disk is full, say: the job can go on later
                raise
            except ValueError as refusal:
                status, said = FAILED, {"error": " ".join(str(refusal).split())[:2000]}
            spool.note(job_id, "")
            if status != WAITING:
                spool.end(job_id, status, **said, **outcome(run))
        return status


@dataclass
class Passage:
    """One job on its way to a service and back."""

    forward: Forward
    spool: Spool
    job_id: str
    job: Mapping[str, Any]
    mirror: MirroredRun
    sent: bool = field(default=False, init=False)
    failed: int = field(default=0, init=False)
    noted: str = field(default="", init=False)
    unheard: float | None = field(default=None, init=False)
    """Since when a wish to stop has found nobody."""

    def follow(self, stop: Callable[[], bool]) -> tuple[str, dict[str, Any]]:
        """Look after the job until it ends or this worker does; return its status and what is said of it."""
        checked_recipe(self.job)
        pause = self.forward.pause
        while not stop():
            try:
                if ended := self.look():
                    return ended
                pause, self.unheard = self.forward.pause, None
            except (RemoteError, RunError, RecursionError) as error:
                status = getattr(error, "status", 0)
                if status in REFUSED and not self.sent:
                    return FAILED, {"error": f"{error}"}
                self.sent = self.sent and status != GONE
                if self.given_up():
                    return CANCELLED, {
                        "error": f"{error}; if it has the job: g2rpo remote cancel {self.job_id}"
                    }
                self.note(f"it waits: {error}")
                pause = min(2 * pause, LONGEST_PAUSE)
            self.wait(pause, stop)
        return WAITING, {}

    def given_up(self) -> bool:
        """Return whether the job is to stop and nobody was there to be told for long."""
        now = time.monotonic()
        self.unheard = (self.unheard or now) if self.spool.cancelled(self.job_id) else None
        return self.unheard is not None and now - self.unheard > self.forward.patience

    def look(self) -> tuple[str, dict[str, Any]] | None:
        """Send the job, bring what is new, and pass on a wish to stop; return how it has ended, if it has."""
        service, unwanted = self.forward.service, self.spool.cancelled(self.job_id)
        if not self.sent and not unwanted:
            self.spool.send(self.job_id, service.url)
            former = self.spool.former(self.job_id) or {}
            service.submit_graph(self.job_id, self.job, str(former.get("remote") or "")[:40])
            self.sent = True
        try:
            view = service.job(self.job_id)
            if unwanted and view.get("status") not in ENDS:
                view = self.stopped()
        except RemoteError as error:
            if unwanted and error.status == GONE:
                return CANCELLED, {}
            raise
        status = view.get("status")
        if status not in (WAITING, RUNNING, *ENDS):
            raise RemoteError(f"{service.url} tells no state of it; is that a g2rpo serve?", NONSENSE)
        complete = True
        if view.get("steps") is not None:
            self.mirror.begin(self.job, view.get("steps"))
            newest = status not in ENDS and self.spool.newest_asked(self.job_id)
            complete = self.mirror.follow(view, newest)
        self.note(f"it waits its turn at {service.url}" if status == WAITING else "")
        return self.ended(view) if status in ENDS and complete else None

    def stopped(self) -> dict[str, Any]:
        """Ask for the job's end at the service; return how it stands then."""
        try:
            self.forward.service.cancel(self.job_id)
        except RemoteError as error:
            if error.status != 409:  # it has ended meanwhile
                raise
        return self.forward.service.job(self.job_id)

    def ended(self, view: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Bring what is left of a job that has ended; return its status and what is said of it."""
        status, remote = str(view["status"]), plain(view.get("ended") or "")[:40]
        said = {"remote": remote, "error": plain(view["error"])} if view.get("error") else {"remote": remote}
        try:
            self.mirror.finish(view)
        except RemoteError as error:
            self.failed += error.status in (NONSENSE, GONE)
            if self.failed < TRIES:
                raise
            by_hand = f"try again, or look with: g2rpo remote fetch {self.job_id}"
            return FAILED, {"error": f"{status} at the service, but {error}; {by_hand}", "remote": remote}
        return status, said

    def note(self, text: str) -> None:
        """Say what keeps the job from going on, where that is another thing than before."""
        if text != self.noted:
            self.spool.note(self.job_id, text)
            self.noted = text

    def wait(self, seconds: float, stop: Callable[[], bool]) -> None:
        """Wait, but not for long once this worker is to end, or the job."""
        unwanted, end = self.spool.cancelled(self.job_id), time.monotonic() + seconds
        while time.monotonic() < end and not stop() and self.spool.cancelled(self.job_id) == unwanted:
            time.sleep(min(STEP, seconds))
