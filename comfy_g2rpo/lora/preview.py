"""The picture beside a LoRA file: `<name>.preview.png`, as ComfyUI's model library and Lora-Manager show it.

It is the evaluation sample that the run's own rewards score best, drawn with the LoRA on. A picture of the
user's own is never replaced, and gets none beside it: programs would show either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files.picture_files import PictureError, read, texts
from ..files.safe import FileError, finite, write_bytes
from ..run.folder import RunFolder, Sample, is_run

SUFFIX = ".preview.png"
MARK = "g2rpo_preview"  # the text chunk by which a picture of ours is known
MAX_BYTES = 300_000
SIDES = (512, 448, 384, 320, 256)  # of the longer side, in pixels; a card shows about 300
LEAST = 300
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif", ".mp4", ".webm")
"""Endings, after the name or after `<name>.preview`, of what those programs show of a file."""


def save_preview(file: Path, run: RunFolder, step: int) -> str:
    """Write a picture of a run beside the LoRA file of a step; return why there is none, or nothing.

    The LoRA is what counts: no picture that cannot be read or written stops anything.
    """
    place = file.with_name(file.stem + SUFFIX)
    try:
        own = [path.name for path in shown_of(file) if path != place or MARK not in texts(path)]
        if own:
            return f"{own[0]} is kept as the picture of {file.name}"
        sample = best_sample(run, step)
        if sample is None:
            return f"{file.name} gets no picture: its run has no held-out prompts"
        content = picture_bytes(sample, {"run": run.path.name, "step": step})
        if not place.is_file() or place.read_bytes() != content:
            write_bytes(place, content)
    except (FileError, PictureError, OSError) as error:
        return f"{file.name} gets no picture: {error}"
    return ""


def shown_of(file: Path) -> list[Path]:
    """List what stands beside a file and is shown as its picture."""
    known = {f"{file.stem}{middle}{ending}".lower() for middle in ("", ".preview") for ending in PICTURES}
    return sorted(path for path in file.parent.iterdir() if path.name.lower() in known)


def run_of(file: Path) -> tuple[RunFolder, int] | None:
    """Return the run, and the step, whose checkpoint a file is; None where it lies elsewhere."""
    place = file.absolute().parent
    if place.parent.name != "checkpoints" or not place.name.isdecimal() or not is_run(place.parent.parent):
        return None
    return RunFolder(place.parent.parent), int(place.name)


def best_sample(run: RunFolder, step: int) -> Sample | None:
    """Return the evaluation sample of a step, or of the last evaluation before it, that scores best."""
    steps = [each for each in run.sampled_steps() if each <= step]
    samples = [sample for sample in run.samples(steps[-1]) if sample.path] if steps else []
    values = standing(samples, weights_of(run))
    return samples[values.index(max(values))] if samples else None


def weights_of(run: RunFolder) -> dict[str, float]:
    """Return the trained rewards' weights by name, as far as the configuration tells them."""
    settings = run.config().get("config")
    rows = settings.get("rewards") if isinstance(settings, dict) else None
    known = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(row.get("name")): row.get("weight") or 0.0 for row in known}


def standing(samples: Sequence[Sample], weights: Mapping[str, float]) -> list[float]:
    """Return by how many standard deviations each sample stands out, summed over rewards by their weights.

    Rewards of other names than the configuration's count alike; a sample without a score stands last.
    """
    names = sorted({name for sample in samples for name in sample.scores})
    known = {name: weights.get(name, 0.0) for name in names}
    if not any(known.values()):
        known = dict.fromkeys(names, 1.0)
    totals = [0.0] * len(samples)
    for name, weight in known.items():
        scores = np.array([[sample.scores.get(name)] for sample in samples], np.float64)[:, 0]
        spread = np.nanstd(scores) if not np.isnan(scores).all() else 0.0
        parts = (scores - np.nanmean(scores)) / spread if spread > 0 else scores * 0
        totals = [total + weight * part for total, part in zip(totals, parts.tolist(), strict=True)]
    return [-math.inf if math.isnan(total) else total for total in totals]


def picture_bytes(sample: Sample, note: Mapping[str, object]) -> bytes:
    """Return a sample as a PNG of at most MAX_BYTES; of a clip the frame in the middle.

    Raise PictureError where its file cannot be read.
    """
    picture = read(sample.path)
    width = picture.shape[1] // max(sample.frames, 1)
    frame = picture[:, sample.frames // 2 * width :][:, :width]
    image = Image.fromarray((frame.numpy() * 255).round().astype(np.uint8))
    chunks = PngInfo()
    told = {**note, "prompt": sample.prompt, "seed": sample.seed, "scores": sample.scores}
    chunks.add_text(MARK, json.dumps(finite(told)))
    content = b""
    for side in SIDES:
        file = BytesIO()
        resized(image, side).save(file, "PNG", pnginfo=chunks, optimize=True)
        content = file.getvalue()
        if len(content) <= MAX_BYTES:
            break
    return content


def resized(image: Image.Image, side: int) -> Image.Image:
    """Return an image whose longer side is at most `side`; small ones are enlarged without blur."""
    longer = max(image.size)
    if longer < LEAST:
        times = math.ceil(LEAST / longer)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    scale = min(side / longer, 1)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)
