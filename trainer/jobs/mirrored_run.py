"""The image of a run at a service: a run folder here that blocks, pages and reports read as any other.

It has the rows of metrics, the pictures of the held-out prompts, one LoRA and the summary. Whatever a service
sends, it gets names of ours, bounds, and a look at what it is before it takes its place.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_g2rpo.files.safe import finite, on_disk, write_json, writing
from comfy_g2rpo.files.spool import JobError
from comfy_g2rpo.run.folder import RunFolder, is_run, write_state

from ..config.reading import Config, dump
from ..service.remote_client import NONSENSE, RemoteError, RemoteService, at
from .graph_job import checked_prompts, checked_recipe, prompts_as_text

MAX_STEP = 10**9
MAX_ROW, MAX_FIELDS, MAX_NAME, MAX_TEXT = 2**16, 1000, 100, 500
MAX_SAMPLES, MAX_PROMPT = 64, 2000
AT_ONCE = 16  # answers with rows, between two looks at the job
MAX_METRICS, MAX_BYTES = 2**28, 2**32
"""Bytes that may come for one job: rows of metrics; all but its LoRA."""
MAGIC = {".png": b"\x89PNG\r\n\x1a\n", ".webp": b"RIFF"}
PICTURES = ("curves.png", "before_after.png")


@dataclass
class MirroredRun:
    """A run at a service, and its folder here."""

    service: RemoteService
    job_id: str
    folder: RunFolder
    lines: int = 0
    """Lines of metrics that are here."""
    size: int = 0
    given_up: set[int] = field(default_factory=set)
    """Steps whose pictures cannot be had."""

    @classmethod
    def of(cls, service: RemoteService, job_id: str, run: Path) -> MirroredRun:
        """Go on with what is there."""
        mirror = cls(service, job_id, RunFolder(run))
        if is_run(run):
            RunFolder.open(run)
            with open(mirror.folder.metrics_file, "rb") as file:
                mirror.lines = sum(1 for _ in file)
        return mirror

    def begin(self, job: Mapping[str, Any], steps: Any) -> None:
        """Make the folder, unless it is there."""
        if is_run(self.folder.path):
            return
        recipe = checked_recipe(job)
        texts = {name: checked_prompts(name, lines) for name, lines in recipe["prompts"].items()}
        model = {**recipe["model"], "path": str(job.get("models", {}).get("model"))[:512]}
        sections = {**recipe, "prompts": prompts_as_text(texts), "model": model}
        content = dump(Config.model_validate(sections))
        if whole(steps, MAX_STEP):
            content["config"]["train"]["steps"] = steps
        RunFolder.create(self.folder.path, content)
        self.lines = 1

    def follow(self, view: Mapping[str, Any], newest: bool) -> bool:
        """Bring what has come since the last time: rows, pictures, and the newest LoRA on request.

        Return whether all rows are here: somebody may wish to stop before they are.
        """
        complete = not all(self.take_rows() for _ in range(AT_ONCE))
        here = {*self.folder.sampled_steps(), *self.given_up}
        steps = view.get("samples")
        for step in steps[-MAX_FIELDS:] if isinstance(steps, list) else ():
            if whole(step, MAX_STEP) and step not in here:
                self.take_samples(step)
        about = view.get("lora")
        if newest and isinstance(about, dict) and about.get("step") != self.lora_step():
            self.take_lora()
        return complete

    def finish(self, view: Mapping[str, Any]) -> None:
        """Bring the LoRA of a job that has ended, where it has one, and of one that is done its report."""
        done = view.get("status") == "done"
        if done and not isinstance(view.get("lora"), dict):
            raise RemoteError(f"{self.service.url} calls {self.job_id} done, and has no LoRA of it", NONSENSE)
        if isinstance(view.get("lora"), dict):
            self.take_lora()
        pictures = view.get("pictures")
        for name in PICTURES:
            if isinstance(pictures, list) and name in pictures:
                self.take_file(at(self.job_id, f"/pictures/{name}"), self.folder.path / name)
        if done and view.get("report"):
            summary = self.service.report(self.job_id)
            self.spend(len(json.dumps(summary)))
            self.folder.save_summary(summary)

    def take_rows(self) -> bool:
        """Write the rows that have come; False where there are no more for now."""
        if not self.lines:
            return False
        rows = self.service.rows(self.job_id, self.lines)
        content = b"".join(map(row_line, rows))
        self.spend(len(content))
        file = self.folder.metrics_file
        if file.stat().st_size + len(content) > MAX_METRICS:
            raise too_much(self.service)
        with writing(file), open(file, "ab") as metrics:
            metrics.write(content)
            on_disk(metrics)
        self.lines += len(rows)
        return bool(rows)

    def take_samples(self, step: int) -> None:
        """Bring the pictures of a step, and their index last; those that cannot be had are left out."""
        place = self.folder.path / "images" / f"{step:06d}"
        try:
            rows = self.service.samples(self.job_id, step)[:MAX_SAMPLES]
            index = [self.take_sample(place, i, row) for i, row in enumerate(rows)]
        except RemoteError as error:
            if error.status not in (NONSENSE, 404):
                raise
            self.given_up.add(step)
            return
        write_json(place / "index.json", index)

    def take_sample(self, place: Path, i: int, row: Any) -> dict[str, Any]:
        """Bring the files of a picture; return its row of the index."""
        known = row if isinstance(row, dict) else {}
        scores = known.get("scores")
        scores = numbers(scores) if isinstance(scores, dict) else {}
        index: dict[str, Any] = {"file": f"{i:03d}.png", "scores": scores}
        index["prompt"] = str(known.get("prompt", ""))[:MAX_PROMPT]
        index["seed"] = known["seed"] if whole(known.get("seed"), 2**63) else 0
        files = known.get("files")
        listed = [each for each in files if isinstance(each, dict)] if isinstance(files, list) else []
        sums = {each["name"]: each for each in listed if isinstance(each.get("name"), str)}
        for ending, key in ((".png", "file"), (".webp", "clip"), ("-start.png", "start")):
            name = f"{i:03d}{ending}"
            if name in sums:
                path = at(self.job_id, f"/samples/{int(place.name)}/{name}")
                self.take_file(path, place / name, sums[name])
                index[key] = name
        if whole(known.get("frames"), 10_000):
            index["frames"] = known["frames"]
        return index

    def take_file(self, path: str, place: Path, about: Mapping[str, Any] | None = None) -> None:
        """Bring a picture to its place, if it is one, and the one that was announced."""

        def check(file: Path) -> None:
            with open(file, "rb") as content:
                magic = MAGIC[place.suffix]
                if content.read(len(magic)) != magic:
                    raise RemoteError(f"what came as {place.name} is no picture", NONSENSE)

        self.service.fetch(path, place, (about or {}).get("sha256"), check)
        self.spend(place.stat().st_size)

    def take_lora(self) -> None:
        """Bring the LoRA that the job has now, as the one checkpoint that is here."""
        came = self.folder.path / ".lora.safetensors"
        try:
            about = self.service.fetch_lora(self.job_id, came, replace=True)
            if not whole(step := about.get("step"), MAX_STEP) or not about.get("sha256"):
                raise RemoteError(f"the LoRA of {self.job_id} comes without step or digest", NONSENSE)

            def write(filling: Path) -> None:
                os.replace(came, filling / "lora.safetensors")
                write_state(filling, {}, {"step": step})

            place = self.folder.save_checkpoint(step, write)
        finally:
            came.unlink(missing_ok=True)
        for old in self.folder.saved():
            if old != place:
                shutil.rmtree(old, ignore_errors=True)

    def lora_step(self) -> int | None:
        """Return the step of the LoRA that is here."""
        place = self.folder.latest()
        return int(place.name) if place else None

    def spend(self, size: int) -> None:
        """Count what has come; JobError once it is too much."""
        self.size += size
        if self.size > MAX_BYTES:
            raise too_much(self.service)


def too_much(service: RemoteService) -> JobError:
    """Return why a job is given up that brings more than any run would."""
    return JobError(
        f"{service.url} sends more for it than a run makes; fetch its LoRA with g2rpo remote fetch"
    )


def row_line(row: Any) -> bytes:
    """Return the line of a row of metrics; an empty row for what is none: lines keep their numbers."""
    kept = flat(row) if isinstance(row, dict) else {}
    if "step" in kept and not whole(kept["step"], MAX_STEP):
        del kept["step"]
    line = json.dumps(kept, allow_nan=False)
    return (line if len(line) < MAX_ROW else "{}").encode() + b"\n"


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and short texts of a row."""
    texts = {name: value for name, value in row.items() if isinstance(value, str) and len(value) <= MAX_TEXT}
    kept = {**texts, **numbers(row)}
    return {name: kept[name] for name in [name for name in row if name in kept][:MAX_FIELDS]}


def numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a float can hold of a table, by names that are not too long."""
    found = {}
    for name, value in row.items():
        if len(name) <= MAX_NAME and (value is None or isinstance(value, (int, float))):
            with suppress(OverflowError):
                float(value or 0)
                found[name] = value
    return finite(found)


def whole(value: Any, most: int) -> bool:
    """Return whether a value out of JSON is a whole number from 0 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
