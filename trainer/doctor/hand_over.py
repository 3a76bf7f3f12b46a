"""The spool folder of a ComfyUI, and the service for other machines."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from .findings import OK, PROBLEM, WARNING, Finding

SPOOL = Path("output/g2rpo/spool")
TOKEN = "G2RPO_REMOTE_TOKEN"


def check_spool(comfyui: Path) -> Iterator[Finding]:
    """Look at the jobs that wait in a ComfyUI's output folder, and at locks of workers that are gone."""
    from comfy_g2rpo.files.one_writer import LOCK
    from comfy_g2rpo.files.spool import WAITING, JobError, Spool

    if not comfyui.is_dir():
        yield Finding("spool", PROBLEM, f"{comfyui} is no folder", "give the folder of ComfyUI, with main.py")
        return
    place = comfyui / SPOOL
    if not place.is_dir():
        yield Finding("spool", OK, f"no job was ever handed over: {place} is not there")
        return
    spool, states = Spool(place), Counter()
    for job in spool.ids():
        # First: asking for the state clears away what a worker left that is gone.
        begun = (place / f"{job}.taken" / LOCK).exists()
        try:
            state = spool.state(job)
        except (JobError, OSError) as error:
            yield Finding(f"job {job}", PROBLEM, str(error), f"remove {place / job}.*")
            continue
        states[state] += 1
        if state == WAITING and begun:
            gone = "was begun by a worker that is gone"
            yield Finding(f"job {job}", WARNING, gone, "start a worker: it takes the job up and goes on")
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no jobs"
    if states[WAITING]:
        yield Finding("spool", WARNING, f"{counts} in {place}", "start a worker for those that wait")
    else:
        yield Finding("spool", OK, f"{counts} in {place}")
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding("spool", PROBLEM, f"{place} cannot be written", "a worker must run as a user who may")


def check_service(url: str) -> Iterator[Finding]:
    """Ask a service how it is, with the token that clients give."""
    from .asking import ask

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        yield Finding("service", PROBLEM, f"--url is {url[:200]!a}", "write it as http://host:port")
        return
    token = os.environ.get(TOKEN, "")
    if not token:
        yield Finding(
            "service", WARNING, f"{TOKEN} is not set", "set it to what the service's token file holds"
        )
    headers = (
        {"Authorization": f"Bearer {token}"} if token.isascii() and token.isprintable() and token else {}
    )
    try:
        status, said = ask(url.rstrip("/") + "/health", headers)
    except OSError as error:
        yield Finding("service", PROBLEM, f"{url} does not answer: {error}", "start it there, or mend --url")
        return
    if status in (401, 403):
        remedy = f"set {TOKEN} to what the service's token file holds"
        yield Finding("service", PROBLEM, f"{url} refuses this token ({status})", remedy)
    elif status != 200:
        yield Finding("service", PROBLEM, f"{url}/health answers with status {status}", "check --url")
    else:
        try:
            shown = json.dumps(json.loads(said), ensure_ascii=False)[:200]
        except (ValueError, RecursionError):
            yield Finding("service", PROBLEM, f"{url}/health is no JSON: another program", "check --url")
        else:
            yield Finding("service", OK, f"{url} answers: {shown}")
