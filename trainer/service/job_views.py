"""What the service tells of a job."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import FileError, digest_of, open_file, read_table
from comfy_g2rpo.files.spool import ENDS, FAILED, Spool
from comfy_g2rpo.run.folder import RunFolder, is_run

from .job_schema import without
from .metric_stream import MetricLines

PICTURES = ("curves.png", "before_after.png")
TAIL = 2**16
MAX_STEPS, MAX_SAMPLES = 1000, 64
MAX_ROWS = 2000


def standing(spool: Spool, job_id: str) -> tuple[str, dict[str, Any]]:
    """Return how a job stands, and what was said of its end, of one moment: it may end in between."""
    while (ended := spool.ended(job_id)) is None:
        if (status := spool.state(job_id)) not in ENDS:
            return status, {}
    return str(ended.get("status", FAILED)), ended


def short_view(spool: Spool, runs: Path, job_id: str) -> dict[str, Any]:
    """Tell how a job stands."""
    return briefly(spool, runs, job_id, *standing(spool, job_id))


def briefly(spool: Spool, runs: Path, job_id: str, status: str, ended: Mapping[str, Any]) -> dict[str, Any]:
    """Tell how a job stands of which that is known."""
    when = (spool.path / f"{job_id}.job.json").stat().st_mtime
    return {
        "id": job_id,
        "status": status,
        "submitted": datetime.fromtimestamp(when, timezone.utc).isoformat(timespec="seconds"),
        "source": str(spool.job(job_id).get("source", "")),
        "step": last_step(runs / job_id),
        "seconds": ended.get("seconds"),
    }


def job_view(spool: Spool, runs: Path, job_id: str, hidden: Sequence[Path]) -> dict[str, Any]:
    """Tell all of a job but where it lies."""
    job, run = spool.job(job_id), runs / job_id
    status, ended = standing(spool, job_id)
    error = str(ended.get("error", ""))
    return {
        **briefly(spool, runs, job_id, status, ended),
        "recipe": job.get("recipe"),
        "settings": job.get("settings") or [],
        "steps": steps_of(run),
        "error": without(error, hidden) if error else None,
        "ended": ended.get("at"),
        "lora": lora_view(run),
        "samples": RunFolder(run).sampled_steps()[-MAX_STEPS:] if is_run(run) else [],
        "pictures": [name for name in PICTURES if (run / name).is_file()],
        "report": (run / "summary.json").is_file(),
    }


def lora_of(run: Path) -> Path | None:
    """Return the LoRA of a run: its result, or that of its newest checkpoint."""
    place = RunFolder(run).outcome() if is_run(run) else None
    return place / "lora.safetensors" if place else None


def lora_view(run: Path) -> dict[str, Any] | None:
    """Tell of a run's LoRA what whoever fetches it can check."""
    with suppress(FileError, OSError):
        if place := lora_of(run):
            sums = read_table(place.with_name("state.json")).get("sha256") or {}
            known = {"step": int(place.parent.name), "bytes": place.stat().st_size}
            return known | {"sha256": sums.get(place.name)}
    return None


def rows_view(run: Path, after: int) -> dict[str, Any]:
    """Tell some of a run's rows of metrics behind a line."""
    found = MetricLines(run / "metrics.jsonl", after).read()[:MAX_ROWS]
    rows = [row_of(text) for _, text in found]
    return {"rows": rows, "line": found[-1][0] if found else after}


def row_of(text: str) -> dict[str, Any]:
    """Read a row of metrics; a damaged one is empty."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def samples_view(run: Path, step: int) -> dict[str, Any]:
    """Tell of a step's pictures what whoever fetches them can check; FileError where there are none."""
    found = []
    for sample in RunFolder(run).samples(step)[:MAX_SAMPLES]:
        # A clip has a film beside its picture, an edit the picture that it starts from.
        beside = (sample.path, sample.path.with_suffix(".webp"), sample.start)
        files = [each for each in beside if each and each.is_file()]
        known = {"prompt": sample.prompt, "seed": sample.seed, "scores": sample.scores}
        found.append({**known, "frames": sample.frames, "files": [file_view(each) for each in files]})
    return {"step": step, "samples": found}


def file_view(file: Path) -> dict[str, Any]:
    """Tell of a file what whoever fetches it can check."""
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest_of(file)}


def steps_of(run: Path) -> int | None:
    """Return how many steps a run is to take; None before it has begun."""
    with suppress(FileError, KeyError, TypeError):
        if is_run(run):
            return int(RunFolder(run).config()["config"]["train"]["steps"])
    return None


def last_step(run: Path) -> int | None:
    """Return the step of a run's last row; None before the first."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        with open_file(run / "metrics.jsonl") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().split(b"\n")
        return json.loads(lines[-2]).get("step") if len(lines) > 1 else None
    return None
