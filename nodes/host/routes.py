"""What the page asks the server: which runs there are, and the rows, samples and progress of one.

GET /g2rpo/runs                      {"runs": [{"id", "steps", "step", "modified", "finished"}]}, newest first
GET /g2rpo/runs/{id}/metrics?after=N {"id", "rows", "next", "total", "total_steps", "finished", "created",
"samples", "reset"}

`next` is what to ask for as `after` the next time; while it is less than `total` there are more rows at once.
Everything here only reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ...comfy_g2rpo.blocks.run_names import RUN_ID
from ...comfy_g2rpo.files.safe import finite, open_file
from ...comfy_g2rpo.run.folder import is_run

STEP = re.compile(r"[0-9]{1,12}")
PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\.png")

MAX_RUNS = 200
MAX_FOLDERS = 10_000
MAX_ROWS = 5000
MAX_AFTER = 10**9
MAX_METRICS_BYTES = 2**30  # a million rows
MAX_LINE_BYTES = 2**16
MAX_ANSWER_BYTES = 4 * 2**20
MAX_JSON_BYTES = 2**20
MAX_PICTURES = 64
MAX_PROMPT = 500
NEWEST_SAMPLES = 3
TAIL_BYTES = 2 * MAX_LINE_BYTES


class NotFoundError(ValueError):
    """What was asked for is not there."""


def runs_root() -> Path:
    """Return the folder of the runs that were made inside ComfyUI."""
    import folder_paths

    return Path(folder_paths.get_output_directory()) / "g2rpo"


def register() -> None:
    """Add the routes to ComfyUI's server, if there is one and it has none of them yet."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or any(getattr(route, "path", "") == "/g2rpo/runs" for route in server.routes):
        return
    from aiohttp import web

    async def answer(request: web.Request, read: Callable[[], dict[str, Any]]) -> web.Response:
        # aiohttp adds HEAD to every GET; ComfyUI's copy of the routes under /api forgets to prevent it.
        if request.method != "GET":
            raise web.HTTPMethodNotAllowed(request.method, ["GET"])
        try:
            return web.json_response(await asyncio.to_thread(read))
        except ValueError as error:
            status = 404 if isinstance(error, NotFoundError) else 400
            return web.json_response({"error": str(error)}, status=status)
        except OSError:
            text = "the run's files cannot be read at the moment; try again"
            return web.json_response({"error": text}, status=503)

    @server.routes.get("/g2rpo/runs")
    async def runs(request: web.Request) -> web.Response:
        return await answer(request, lambda: {"runs": list_runs(runs_root())})

    @server.routes.get("/g2rpo/runs/{id}/metrics")
    async def metrics(request: web.Request) -> web.Response:
        run, after = request.match_info["id"], request.query.get("after", "0")
        return await answer(request, lambda: read_metrics(runs_root(), run, after))


def list_runs(root: Path) -> list[dict[str, Any]]:
    """List the runs under a folder, newest first."""
    found = []
    for name in _folder_names(root):
        place = inside(root, name)
        metrics = place and inside(place, "metrics.jsonl")
        if metrics and (modified := _modified(metrics)) is not None:
            found.append((modified, name, place))
    found.sort(key=lambda entry: (-entry[0], entry[1]))
    runs: list[dict[str, Any]] = []
    for modified, name, place in found:
        if len(runs) == MAX_RUNS:
            break
        if is_run(place):
            # What has gone meanwhile, or cannot be read, hides no other.
            with suppress(OSError):
                step = _count(_last_row(place / "metrics.jsonl").get("step"))
                row = {"id": name, "steps": _total_steps(place), "step": step, "modified": modified}
                runs.append({**row, "finished": _finished(place)})
    return runs


def read_metrics(root: Path, run: str, after: str = "0") -> dict[str, Any]:
    """Return a run's rows after the first `after`, at most MAX_ROWS, and what else the page shows of it."""
    if not RUN_ID.fullmatch(run):
        raise ValueError(
            "a run's id has 1 to 64 letters, digits, dots, dashes and underscores, and starts with a "
            "letter or digit"
        )
    if not re.fullmatch(r"[0-9]{1,10}", after) or int(after) > MAX_AFTER:
        raise ValueError(f"after must be a whole number from 0 to {MAX_AFTER}")
    place = inside(root, run)
    if place is None or inside(place, "metrics.jsonl") is None or not is_run(place):
        raise NotFoundError("there is no run of this name under the output folder's g2rpo")
    if (place / "metrics.jsonl").stat().st_size > MAX_METRICS_BYTES:
        most = MAX_METRICS_BYTES // 2**20
        raise ValueError(f"the run's metrics.jsonl has more than {most} MiB, and the page reads no more")
    rows, total = _rows_after(place / "metrics.jsonl", int(after))
    answer = {
        "id": run,
        "rows": rows,
        "next": min(int(after), total) + len(rows),
        "total": total,
        "total_steps": _total_steps(place),
        "finished": _finished(place),
        "created": (place / "config.json").stat().st_mtime,
        "samples": _samples(place),
    }
    return answer | {"reset": True} if int(after) > total else answer


def inside(folder: Path, name: str) -> Path | None:
    """Return folder/name if it exists and truly lies in the folder, links followed."""
    base = os.path.realpath(folder)
    place = os.path.realpath(os.path.join(base, name))
    try:
        within = os.path.commonpath((base, place)) == base
    except ValueError:  # on Windows: another drive
        return None
    return Path(place) if within and os.path.exists(place) else None


def _modified(path: Path) -> float | None:
    """Return when a file was changed last; None for what is no file, or has gone."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_mtime if stat.S_ISREG(state.st_mode) else None


def _folder_names(folder: Path) -> Iterator[str]:
    """Name the sub-folders whose names may be a run's; a link that leads nowhere is none."""
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, MAX_FOLDERS):
                if RUN_ID.fullmatch(entry.name) and os.path.isdir(entry.path):
                    yield entry.name
    except (FileNotFoundError, NotADirectoryError):
        return


def _rows_after(path: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """Read the rows after the first `after` and count all; a damaged row is empty, an unfinished one none."""
    rows: list[dict[str, Any]] = []
    size, number, full = 0, -1, False
    for line in _lines(path):
        number += 1
        if number <= after or full:
            continue
        size += len(line)
        full = bool(rows) and size > MAX_ANSWER_BYTES
        if not full:
            rows.append(_row(line))
            full = len(rows) == MAX_ROWS
    return rows, max(number, 0)


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the whole lines of a file, cut at MAX_LINE_BYTES, without ever holding more than one."""
    with open_file(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            cut = line
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES + 1)
            if line:
                yield cut


def _row(line: bytes) -> dict[str, Any]:
    """Read a row as the page can take it: finite numbers by name."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(row, dict):
        return {}
    return finite({key: value for key, value in row.items() if _is_number(value)})


def _is_number(value: Any) -> bool:
    """Return whether a value out of JSON is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _last_row(path: Path) -> dict[str, Any]:
    """Read the last whole row from the end of the file."""
    with open_file(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        lines = file.read(TAIL_BYTES).split(b"\n")
    return _row(lines[-2]) if len(lines) > 1 else {}


def _json_of(run: Path, *names: str) -> Any:
    """Read a JSON file of a run; None if it is absent, leads outside, is too large or damaged."""
    path = inside(run, os.path.join(*names))
    try:
        if path is None or path.stat().st_size > MAX_JSON_BYTES:
            return None
        with open_file(path) as file:
            return json.loads(file.read(MAX_JSON_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _count(value: Any) -> int | None:
    """Return a plausible number of steps, or None."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_AFTER else None


def _total_steps(run: Path) -> int | None:
    """Return how many steps the run was asked for."""
    value = _json_of(run, "config.json")
    for key in ("config", "train", "steps"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return _count(value)


def _finished(run: Path) -> bool:
    """Return whether the run came to its end."""
    return inside(run, "summary.json") is not None


def _samples(run: Path) -> list[dict[str, Any]]:
    """List the pictures of the first step and of the newest ones."""
    images = inside(run, "images")
    try:
        steps = [name for name in (_folder_names(images) if images else ()) if STEP.fullmatch(name)]
    except OSError:
        return []
    steps.sort(key=int)
    shown = steps[:1] + steps[1:][-NEWEST_SAMPLES:]
    files = {name: _pictures(_json_of(run, "images", name, "index.json")) for name in shown}
    return [{"step": int(name), "folder": name, "files": files[name]} for name in shown if files[name]]


def _pictures(index: Any) -> list[dict[str, Any]]:
    """Read the index of a step's pictures; return only what has the form that a run writes."""
    pictures = []
    for row in index[:MAX_PICTURES] if isinstance(index, list) else []:
        given = row if isinstance(row, dict) else {}
        file, prompt, scores = (given.get(key) for key in ("file", "prompt", "scores"))
        if isinstance(file, str) and PICTURE.fullmatch(file):
            scores = scores if isinstance(scores, dict) else {}
            numbers = {str(k)[:64]: v for k, v in scores.items() if isinstance(v, (int, float))}
            prompt = str(prompt or "")[:MAX_PROMPT]
            pictures.append({"file": file, "prompt": prompt, "scores": finite(numbers)})
    return pictures


# ComfyUI's server module is there only where ComfyUI runs.
if "server" in sys.modules:
    register()
