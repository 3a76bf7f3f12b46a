"""A job of the spool as seen from the graph: how it stands, what it has made, and its end on request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import comfy.sd
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...comfy_g2rpo import lora
from ...comfy_g2rpo.files import picture_files
from ...comfy_g2rpo.files.safe import FileError, read_tensors, stamps
from ...comfy_g2rpo.files.spool import CANCELLED, DONE, RUNNING, WAITING, Spool, check_id
from ...comfy_g2rpo.run.folder import RunFolder, is_run
from .comfyui import run_place
from .open_run import plain_errors
from .routes import read_metrics, runs_root
from .write_job import SPOOL, plain

WORKER = "g2rpo worker --comfyui FOLDER"
RECENT = 20  # steps by which the time of those to come is told
MAX_ROWS = 200_000
MAX_SAMPLES, MAX_SAMPLE_PIXELS = 64, 2**24
LONGEST = 500  # characters of why a job failed
TRIES = 5  # a checkpoint may be removed while it is read, by the run that goes on


@dataclass(frozen=True)
class Standing:
    """How a job stands: its state, that in words, and its run where it has begun one."""

    job_id: str
    state: str
    text: str
    rows: list[dict[str, Any]]
    total: int | None
    folder: RunFolder | None


def the_spool() -> Spool:
    """Return the spool, whose place follows from how ComfyUI was started."""
    return Spool(runs_root() / SPOOL)


def stop_job(job_id: str) -> None:
    """Ask for a job's end; one that no worker has taken has ended at once."""
    spool = the_spool()
    if known_state(spool, job_id) in (WAITING, RUNNING):
        spool.stop(job_id)


def want_newest(job_id: str) -> None:
    """Ask for the LoRA of the newest checkpoint, which a training elsewhere sends on request."""
    spool = the_spool()
    if known_state(spool, job_id) in (WAITING, RUNNING):
        spool.ask_newest(job_id)


def known_state(spool: Spool, job_id: str) -> str:
    """Return the state of a job; ValueError where there is none of this name."""
    try:
        return spool.state(job_id)
    except FileError as error:
        raise ValueError(f"run: {plain(error, spool)}; connect the run of Submit Training") from error


def standing(job_id: str) -> Standing:
    """Look at a job and at its run."""
    spool = the_spool()
    state = known_state(spool, job_id)
    place = run_place(job_id)
    folder = RunFolder(place) if is_run(place) else None
    rows, total = all_rows(folder) if folder else ([], None)
    text = said(spool, job_id, state, rows, total)
    return Standing(job_id, state, text, rows, total, folder)


def said(spool: Spool, job_id: str, state: str, rows: Sequence[Mapping[str, Any]], total: int | None) -> str:
    """Say how a job stands."""
    step = int(rows[-1].get("step") or 0) if rows else 0
    at = f"step {step}" + (f" of {total}" if total else "")
    stopping = spool.cancelled(job_id)
    if state == WAITING:
        begun = f", stopped at {at}" if rows else ""
        how = "it ends when a worker takes it" if stopping else f"start one where ComfyUI runs: {WORKER}"
        return f"{job_id} waits for a worker{begun}; {how}"
    if state == RUNNING:
        noted = spool.noted(job_id)
        left = f"; {noted[:LONGEST]}" if noted else "" if stopping else time_left(rows, step, total)
        return f"{job_id} {'stops after' if stopping else 'trains,'} {at if rows else 'its start'}{left}"
    if state == DONE:
        return f"{job_id} is done, {at}"
    if state == CANCELLED:
        kept = ", and its newest checkpoint is kept" if rows else ""
        return f"{job_id} was stopped at {at}{kept}" if rows else f"{job_id} was stopped before it began"
    why = " ".join(str((spool.ended(job_id) or {}).get("error") or "nobody knows why").split())
    return f"{job_id} failed: {why[:LONGEST]}"


def time_left(rows: Sequence[Mapping[str, Any]], step: int, total: int | None) -> str:
    """Tell how long the steps to come will take, by those of late."""
    # Of several processes' waiting, a row has the mean and, which is no time beside it, the longest.
    spent = [
        sum(value for name, value in row.items() if name.startswith("time/") and name != "time/waiting_max")
        for row in rows
        if "nfe" in row
    ][-RECENT:]
    if not spent or not total or step >= total:
        return ""
    seconds = math.fsum(spent) / len(spent) * (total - step)
    if seconds < 90:
        return f", about {max(round(seconds), 1)} s left"
    minutes = round(seconds / 60)
    return f", about {minutes} min left" if minutes < 120 else f", about {minutes / 60:.1f} h left"


def all_rows(folder: RunFolder) -> tuple[list[dict[str, Any]], int | None]:
    """Read a run's rows as the page does, finite numbers by name, and how many steps it was asked for."""
    rows: list[dict[str, Any]] = []
    while True:
        answer = read_metrics(folder.path.parent, folder.path.name, str(len(rows)))
        rows += answer["rows"]
        if not answer["rows"] or len(rows) >= min(answer["total"], MAX_ROWS):
            return rows, answer["total_steps"]


def lora_of(now: Standing, newest: bool) -> dict[str, Tensor] | None:
    """Return the LoRA of a job that is done, or of its newest checkpoint on request; None where there is
    none yet.
    """
    if now.folder is None or not (newest or now.state == DONE):
        return None
    with plain_errors(now.job_id):
        for attempt in range(TRIES):
            place = now.folder.outcome() if now.state == DONE else now.folder.latest()
            if place is None:
                return None
            try:
                lora.read(place / "lora.safetensors")  # refuses what is no LoRA, or holds no numbers
                return read_tensors(place / "lora.safetensors")[0]
            except FileError:
                if place.exists() or attempt == TRIES - 1:
                    raise
    return None


def with_lora(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """Return a clone of the model with the LoRA on it; ValueError where it is another model's."""
    tuned = comfy.sd.load_lora_for_models(model, None, dict(weights), 1.0, 0.0)[0]
    if patches(tuned) == patches(model):
        raise ValueError(
            "model: none of the LoRA's layers is in it; connect the model that Submit Training names"
        )
    return tuned


def patches(model: Any) -> int:
    """Count what is laid over a MODEL's weights."""
    return sum(map(len, model.patches.values()))


def samples_of(folder: RunFolder | None) -> Tensor | None:
    """Return the newest pictures of a run [B, H, W, 3] in the size of the first; None where it has none."""
    steps = folder.sampled_steps() if folder else []
    if folder is None or not steps:
        return None
    found: list[Tensor] = []
    with suppress(FileError, picture_files.PictureError):
        for sample in folder.samples(steps[-1])[:MAX_SAMPLES]:
            image = picture_files.read(sample.path)[None]
            size = found[0].shape[1:3] if found else image.shape[1:3]
            if size.numel() * (len(found) + 1) > MAX_SAMPLE_PIXELS:
                break
            same = image.shape[1:3] == size
            found.append(image if same else stretched(image, size))
    return torch.cat(found) if found else None


def stretched(image: Tensor, size: Sequence[int]) -> Tensor:
    """Bring an image [1, H, W, 3] to another size."""
    return interpolate(image.movedim(-1, 1), tuple(size), mode="area").movedim(1, -1)


def stamp(job_id: str | None) -> str:
    """Return what changes when a job or its run does; of all jobs where the name is not known yet."""
    spool = the_spool()
    names = spool.ids() if job_id is None else [job_id]
    marks = []
    for name in names:
        with suppress(OSError, ValueError):
            folder = RunFolder(runs_root() / check_id(name))
            files = [folder.metrics_file, folder.summary_file, folder.checkpoints]
            state = f"{spool.state(name)} {spool.cancelled(name)} {spool.noted(name)}"
            marks.append(f"{state} {stamps(files)}")
    return "\n".join(marks)
