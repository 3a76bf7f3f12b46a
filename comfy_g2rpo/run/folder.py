"""The run folder: one layout for the command line, the graph blocks, the page and the tests.

    config.json                     what was asked for
    metrics.jsonl                   line 1 names the schema, then one row per step (docs/metrics.md)
    images/<step>/                  index.json (prompt, seed, scores of each) and 000.png …: the same prompts
    and seeds at every step;
                                    of a clip some frames side by side, and all of them in 000.webp;
                                    of an edit the picture that it starts from in 000-start.png
    checkpoints/<step>/             lora.safetensors, state.safetensors, state.json
    summary.json                    what came out

Everything but the metrics is written beside its place and moved there whole, so an interruption at any moment
leaves a readable folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.one_writer import LOCK
from ..files.safe import (
    LEFTOVER,
    FileError,
    RunError,
    digest_of,
    finite,
    folder_on_disk,
    on_disk,
    open_file,
    read_header,
    read_json,
    read_table,
    read_tensors,
    sound,
    spelt_out,
    sweep,
    write_bytes,
    write_json,
    write_tensors,
    writing,
)
from ..files.save_pictures import save_picture, save_start
from ..methods.recipe_options import FIELDS

SCHEMA = "g2rpo-metrics/1"
LENGTH = ("steps", "minutes", "eval_every", "checkpoint_every", "keep_checkpoints")
WATCHING = (
    "watch",
    "patience",
    "min_fall",
    "min_diversity",
    "max_dropped",
    "preview_width",
    "preview_height",
)
ASKING = ("timeout", "retries", "concurrency", "batch", "device")
AT_ONCE = ("slots", "prompts_at_once", "decode_batch", "micro_batch")
FITTING = ("block_swap", "gradient_checkpointing", "text_encoders", "rewards_in_turn")
MAY_CHANGE = {
    "train": LENGTH + WATCHING + AT_ONCE,
    "rewards": ASKING,
    "heldout_rewards": ASKING,
    "memory": FITTING,
}
"""Fields that may change on resume: they change what is learned by no more than rounding."""
UNREAD = ("out", "report", "search", "prior")  # sections that training does not read
PREVIEW = "preview"
CHECKPOINT_FILES = ("lora.safetensors", "state.safetensors", "state.json")


def write_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint's state: tensors as safetensors, the rest as JSON."""
    write_tensors(folder / "state.safetensors", tensors)
    sums = {file.name: digest_of(file) for file in sorted(folder.iterdir())}
    sums["state.json"] = digest_of_table(meta)
    write_json(folder / "state.json", {**meta, "sha256": sums})


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_state` wrote."""
    return read_tensors(folder / "state.safetensors")[0], read_table(folder / "state.json")


def damage(place: Path) -> str:
    """Name the file of a checkpoint that is not as it was written; nothing where all are.

    Checkpoints of an earlier version hold no sums; of those only what can be read is known.
    """
    try:
        meta = read_table(place / "state.json")
    except FileError:
        return "state.json"
    sums = meta.pop("sha256", {})
    if sums and sums.get("state.json") != digest_of_table(meta):
        return "state.json"
    for name in (*CHECKPOINT_FILES[:2], *(name for name in sums if name not in CHECKPOINT_FILES)):
        try:
            read_header(place / name)
            sound_file = not sums or digest_of(place / name) == sums.get(name)
        except (OSError, FileError):
            sound_file = False
        if not sound_file:
            return name
    return ""


def digest_of_table(meta: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a table as JSON has it, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(finite(meta), sort_keys=True).encode()).hexdigest()


def read_progress(folder: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's state, and check its step and the named counts."""
    tensors, meta = read_state(folder)
    counts = [meta.get(name) for name in ("step", *names)]
    if counts[0] != int(folder.name) or not all(
        type(count) in (int, float) and 0 <= count < math.inf for count in counts
    ):
        raise RunError(
            f"{folder / 'state.json'} is damaged: it is no progress of step {int(folder.name)}; remove "
            "this checkpoint"
        )
    return tensors, meta


def fitting(tensors: Mapping[str, Tensor], kind: str, like: Sequence[Tensor], place: Path) -> list[Tensor]:
    """Take the finite tensors <kind>/0, <kind>/1 … with the shapes of `like`, else raise RunError."""
    found = [tensors.get(f"{kind}/{i}") for i in range(len(like))]
    if not all(
        value is not None and value.shape == target.shape and sound(value)
        for value, target in zip(found, like, strict=True)
    ):
        raise RunError(
            f"{place} does not fit this adapter, or is damaged; resume with the run's own "
            "configuration, or remove this checkpoint"
        )
    return found


@dataclass(frozen=True)
class Sample:
    """One picture of the fixed prompts and seeds; image: [H, W, 3] in [0, 1] (None once it lies on disk),
    scores by reward.

    Of a clip: image [F, H, W, 3] of 8-bit levels; the picture at `path` has `frames` of it side by side. Of
    an edit: `start` is the file of the picture that it starts from.
    """

    prompt: str
    seed: int
    scores: dict[str, float]
    image: Tensor | None = None
    path: Path | None = None
    frames: int = 1
    start: Path | None = None


@dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path
    _rows: dict[tuple[int, ...], list[dict[str, Any]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The rows of metrics by the state of their file: what was read, or written, is not read again."""

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], replace: bool = False) -> RunFolder:
        """Start a run in a new or empty folder; `replace` removes a former run there, and nothing else."""
        check_place(path, replace)
        run = cls(Path(path))
        sweep(run.path)
        if is_run(run.path):
            # By these two it is known as a run, or as the beginning of one: whoever is killed can go on.
            found = run.path.iterdir()
            for path in sorted(found, key=lambda at: (at.name == "config.json", at.name == "metrics.jsonl")):
                with writing(path):
                    if path.name != LOCK:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(run.config_file, config)
        write_bytes(run.metrics_file, (json.dumps({"schema": SCHEMA}) + "\n").encode())
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run; a last line that an interruption tore off is dropped."""
        run = cls(Path(path))
        if not is_run(run.path):
            raise RunError(
                f"{run.path} holds no run; check the path (a run has config.json and metrics.jsonl)"
            )
        content = run.metrics_file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_bytes(run.metrics_file, whole)
        sweep(run.path)
        return run

    @classmethod
    def reopen(
        cls,
        path: Path,
        config: Mapping[str, Any],
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        moved: Collection[str] = (),
    ) -> RunFolder:
        """Open a run and see that the same configuration made it; only length and pace may differ.

        `defaults`, by section and field, stand for fields that the run does not hold because an earlier
        version made it. Fields in `moved` name files that lie elsewhere now.
        """
        run = cls.open(path)
        for name, before, value in run.differences(config, defaults, moved):
            was = f"{path} was made with {name} = {before!a:.80}, not {value!a:.80}"
            raise RunError(f"{was}; continue with that, or start another run")
        return run

    def differences(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Mapping[str, Any]] | None = None,
        moved: Collection[str] = (),
    ) -> Iterator[tuple[str, Any, Any]]:
        """Name the fields that a run was made with otherwise and that may not change: field, then, now."""
        saved = self.config().get("config")
        if not isinstance(saved, dict):
            raise RunError(
                f"{self.config_file} is damaged (no configuration); restore it or start another run"
            )
        for section, values in finite(config["config"]).items():
            new, old = spelt_out(values), spelt_out(saved.get(section, {}))
            known = (defaults or {}).get(section, {})
            for key in new | old if isinstance(values, list) else new:
                value, field = new.get(key), key.rpartition(".")[2]
                before = old[key] if key in old else known.get(field)
                if section == "method" and before is None and value is not None and key in FIELDS:
                    # Left to the method, whose name may mean another thing now.
                    before = spelt_out(self.config().get("recipe")).get(key, FIELDS[key].default)
                name = f"{section}.{key}".strip(".")
                free = section in UNREAD or name in moved or field in MAY_CHANGE.get(section, ())
                if value != before and not free:
                    yield name, before, value

    @property
    def config_file(self) -> Path:
        """Return where the configuration lies."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """Return where the metrics lie."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """Return where the summary lies."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Return where the checkpoints lie."""
        return self.path / "checkpoints"

    def config(self) -> dict[str, Any]:
        """Read what was asked for."""
        return read_table(self.config_file)

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Write what is asked for now."""
        write_json(self.config_file, config)

    def summary(self) -> dict[str, Any]:
        """Read what came out; empty while the run is unfinished."""
        return read_table(self.summary_file) if self.summary_file.exists() else {}

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write what came out."""
        write_json(self.summary_file, summary)

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add one row of metrics."""
        row = finite(metrics)
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with writing(self.metrics_file), open(self.metrics_file, "ab") as file:
            known = self._rows.pop(file_state(file.fileno()), None)
            file.write(line.encode())
            on_disk(file)
            if known is not None:
                known.append(row)
                self._rows[file_state(file.fileno())] = known

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics; their file is read again only where it has changed."""
        state = file_state(self.metrics_file)
        if state not in self._rows:
            self._rows.clear()
            self._rows[state] = self._read_metrics()
        return [*self._rows[state]]

    def _read_metrics(self) -> list[dict[str, Any]]:
        """Read the rows of metrics from their file."""
        rows = []
        for number, line in enumerate(self.metrics_file.read_bytes().split(b"\n")[1:-1], start=2):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunError(
                    f"{self.metrics_file} is damaged in line {number}; remove that line"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
                raise RunError(
                    f"{self.metrics_file} holds no row of metrics in line {number}; remove that line"
                )
            rows.append(row)
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after a step, which a resumed run will write again."""
        kept = [json.dumps(row, ensure_ascii=False) for row in self.metrics() if row.get("step", 0) <= step]
        write_bytes(
            self.metrics_file,
            ("\n".join([json.dumps({"schema": SCHEMA}), *kept]) + "\n").encode(errors="replace"),
        )

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder, and move it into place."""
        place = self.checkpoints / f"{step:06d}"
        with writing(place):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            filling = Path(tempfile.mkdtemp(dir=self.checkpoints, prefix=".filling-"))
            try:
                os.chmod(filling, 0o755)
                write(filling)
                if place.exists():
                    os.replace(place, filling.with_name(f".replaced-{step}"))
                os.replace(filling, place)
                folder_on_disk(self.checkpoints)
            finally:
                shutil.rmtree(filling, ignore_errors=True)
                shutil.rmtree(filling.with_name(f".replaced-{step}"), ignore_errors=True)
        return place

    def prune(self, keep_last: int, keep: int | None = None) -> None:
        """Remove all checkpoints but the last `keep_last` and that of the step `keep`; with 0, none."""
        for old in self.saved()[:-keep_last] if keep_last else []:
            if int(old.name) != keep:
                # Renamed first: what an interruption leaves of it is swept, and no checkpoint.
                gone = old.with_name(f".replaced-{old.name}")
                with writing(old):
                    os.replace(old, gone)
                    shutil.rmtree(gone)

    def saved(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        numbered = [
            path for path in self.checkpoints.glob("[0-9]*") if re.fullmatch("[0-9]{6,12}", path.name)
        ]
        found = [path for path in numbered if all((path / name).is_file() for name in CHECKPOINT_FILES)]
        return sorted(found, key=lambda path: int(path.name))

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return self.saved()[-1] if self.saved() else None

    def set_damaged_aside(self) -> list[str]:
        """Move the newest checkpoints that are damaged out of the way; return a remark about each.

        Without a sound one nothing is moved, and RunError says so: what is left is the user's to decide on.
        """
        remarks: list[str] = []
        damaged: dict[Path, str] = {}
        for place in reversed(self.saved()):
            if not (name := damage(place)):
                break
            damaged[place] = name
        if damaged and len(damaged) == len(self.saved()):
            newest, name = next(iter(damaged.items()))
            raise RunError(
                f"{self.path}: checkpoint {newest.name} is damaged ({name}), and none before it is sound; "
                "bring it back from a copy, start over (--replace) or choose another folder"
            )
        for place, name in damaged.items():
            aside = place.with_name(f"damaged-{place.name}")
            with writing(aside):
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(place, aside)
            going = f"continuing from step {int(self.saved()[-1].name)}"
            remarks.append(f"checkpoint {place.name} is damaged ({name}) and was set aside; {going}")
        return remarks

    def outcome(self) -> Path | None:
        """Return the checkpoint that a finished run recommends, or the newest."""
        newest, summary = self.latest(), self.summary()
        if newest is None or summary.get("steps") != int(newest.name):
            return newest
        return next((place for place in self.saved() if int(place.name) == summary.get("lora_step")), newest)

    def save_samples(self, step: int, samples: Iterable[Sample], kind: str = "") -> None:
        """Write a step's images and their index; a kind, such as PREVIEW, has a folder of its own."""
        folder, index = self.path / "images" / f"{step:06d}" / kind, []
        for i, sample in enumerate(samples):
            row = {
                "file": f"{i:03d}.png",
                "prompt": sample.prompt,
                "seed": sample.seed,
                "scores": sample.scores,
            }
            row |= save_picture(folder / f"{i:03d}.png", sample.image)
            index.append(
                row | (save_start(folder / f"{i:03d}-start.png", sample.start) if sample.start else {})
            )
        write_json(folder / "index.json", index)

    def samples(self, step: int, kind: str = "") -> list[Sample]:
        """Read the index of a step's pictures; FileError where it is missing or damaged."""
        folder = self.path / "images" / f"{step:06d}" / kind
        rows = read_json(folder / "index.json")
        try:
            if not isinstance(rows, list):
                raise TypeError
            return [indexed(folder, row) for row in rows]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{folder / 'index.json'} is damaged: it lists no pictures") from error

    def sampled_steps(self, kind: str = "") -> list[int]:
        """List the steps that have pictures."""
        indices = [path / kind / "index.json" for path in (self.path / "images").glob("[0-9]*")]
        return sorted(
            int(index.relative_to(self.path / "images").parts[0]) for index in indices if index.is_file()
        )


def indexed(folder: Path, row: Mapping[str, Any]) -> Sample:
    """Read a row of a step's index; pictures lie beside it, whatever it says."""
    picture, start = Path(row["file"]).name, Path(row["start"]).name if "start" in row else None
    scores = {str(name): score for name, score in row["scores"].items()}
    return Sample(
        str(row["prompt"]),
        int(row["seed"]),
        scores,
        path=folder / picture,
        frames=int(row.get("frames", 1)),
        start=folder / start if start else None,
    )


def file_state(file: Path | int) -> tuple[int, ...]:
    """Return what changes where a file does; the file by its path or handle."""
    state = os.stat(file)
    return state.st_ino, state.st_size, state.st_mtime_ns


def check_place(path: Path, replace: bool = False) -> None:
    """Refuse a place where no run may start: another run unless replaced, or what is no run."""
    path = Path(path)
    if is_run(path):
        if not replace:
            raise RunError(
                f"{path} already holds a run; continue it (g2rpo resume), start over (--replace) or choose "
                "another folder (--out)"
            )
    elif path.exists() and not is_beginning(path):
        raise RunError(f"{path} exists and is not a run of this program; choose another folder (--out)")


def is_beginning(path: Path) -> bool:
    """Return whether a folder holds nothing, or no more than a run that was broken off while it began."""
    if not path.is_dir():
        return False
    names = {each.name for each in path.iterdir() if each.name != LOCK and not LEFTOVER.fullmatch(each.name)}
    if names != {"config.json"}:
        return not names
    try:
        return {"config", "recipe"} <= read_table(path / "config.json").keys()
    except FileError:
        return False


def is_run(path: Path) -> bool:
    """Return whether a folder is a run of this program, by its schema line."""
    try:
        with open_file(path / "metrics.jsonl") as file:
            first = json.loads(file.readline(4096))
        return (path / "config.json").is_file() and isinstance(first, dict) and first.get("schema") == SCHEMA
    except (OSError, ValueError, RecursionError):
        return False
