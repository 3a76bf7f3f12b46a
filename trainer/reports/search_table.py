"""What searches found: a row for each as CSV, and a table of means beside the first method's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from comfy_g2rpo.files.csv_table import csv_bytes
from comfy_g2rpo.files.safe import write_bytes
from comfy_g2rpo.run.evaluation import interval

COLUMNS = ("prompt", "seed", "method", "budget", "forwards", "scored", "seconds", "picture", "from")


@dataclass(frozen=True)
class Row:
    """What one search found, and what it spent."""

    prompt: str
    seed: int
    method: str
    budget: int
    forwards: int
    scored: int
    seconds: float
    picture: str
    name: str
    """Where the image comes from, such as a branch."""
    scores: dict[str, float]
    """The image's, by every reward."""

    @property
    def cells(self) -> list[object]:
        """Return the row as it is written."""
        spent = (self.forwards, self.scored, round(self.seconds, 3))
        return [self.prompt, self.seed, self.method, self.budget, *spent, self.picture, self.name]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write one row per search."""
    names = list(rows[0].scores)
    found = [[*row.cells, *(row.scores[name] for name in names)] for row in rows]
    write_bytes(path, csv_bytes([*COLUMNS, *names], found))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines: per budget and method the mean scores, the gain over the first method, and the price.

    Gains are paired by prompt and seed; ± is half of a 95 % interval.
    """
    names = list(rows[0].scores)
    wide = max(26, *(len(name) + 2 for name in names))
    by = {(row.budget, row.method): {} for row in rows}
    for row in rows:
        by[row.budget, row.method][row.prompt, row.seed] = row
    first = rows[0].method
    head = f"{'budget':>8}  {'method':<16}" + "".join(f"{name:>{wide}}" for name in names)
    yield f"{head}{'forwards':>10}{'images':>8}{'seconds':>9}"
    for (budget, method), found in by.items():
        line = f"{budget:>8}  {method:<16}"
        for name in names:
            mean = average([row.scores[name] for row in found.values()])
            base = by.get((budget, first), {})
            pairs = [(found[key].scores[name], base[key].scores[name]) for key in found if key in base]
            line += f"{score_cell(mean, [a - b for a, b in pairs] if method != first else []):>{wide}}"
        spent = [average([getattr(row, part) for row in found.values()]) for part in ("forwards", "scored")]
        seconds = average([row.seconds for row in found.values()])
        yield f"{line}{spent[0]:>10.0f}{spent[1]:>8.0f}{seconds:>9.2f}"
    count = len({(row.prompt, row.seed) for row in rows})
    yield f"means over {count} prompts and seeds; in brackets: gained over {first}, ± half of a 95 % interval"


def average(values: Sequence[float]) -> float:
    """Return the mean of what is known."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def score_cell(mean: float, gains: Sequence[float]) -> str:
    """Write a mean score, and the gain beside it."""
    if not gains:
        return f"{mean:.3f}"
    gain, width = interval(torch.tensor(gains, dtype=torch.float64))
    unsure = "" if math.isnan(width) else f" ± {width:.3f}"
    return f"{mean:.3f} ({gain:+.3f}{unsure})"
