"""The heat map that explains advantages, as IMAGE [1, H, 1024, 3].

Steps and branches count from 0, as everywhere in ComfyUI. Blue means up, orange down; signs and hatching say
the same without colour. What does not fit is left out and said so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import (
    BODY,
    INK,
    LINE,
    MARGIN,
    PALE,
    PAPER,
    SMALL,
    UNKNOWN,
    WIDTH,
    diverging,
    hatch,
    heading,
    ink_on,
    number,
    sheet,
    signed,
    stride_words,
    to_tensor,
)
from .letters import fitted, length, write

MAX_STEPS, MAX_LEVELS = 12, 6
MAX_BRANCHES, MAX_BLOCKS = 16, 3  # where every branch has rows of its own
LABELS = 204  # pixels of the column of row names

Cell = tuple[str, str, float]
"""What stands in a cell, what stands small beneath it, and its value; NaN for no value, ±inf for a tie."""


@dataclass(frozen=True)
class Table:
    """What a heat map shows of K branch steps, G branches and L granularities."""

    advantage: np.ndarray  # [K, G]
    z: np.ndarray  # [K, G, L] z-scores of the weighted rewards; NaN where an image was not judged
    tied: np.ndarray  # [K, L] whether all rewards of the group are equal
    spread: np.ndarray | None  # [K, L] standard deviation of the one reward; None if there are several
    steps: tuple[int, ...]  # [K] branch step
    sigmas: tuple[float, ...]  # [K] its noise level
    strides: tuple[int, ...]  # [L]


def heatmap(table: Table, per_branch: bool = False) -> Tensor:
    """Draw z-scores by granularity (rows) and branch step (columns).

    Summary: the z-score of each step's winner, the branch with the highest advantage. Positive: this
    granularity likes the winner too, and by how many standard deviations; negative: it was outvoted. Beneath
    it the rewards' standard deviation, which tells how much there was to decide. (A mean over branches would
    be zero by construction.) Per branch: a row per branch, for the advantage and each granularity.
    """
    columns = chosen(len(table.steps), MAX_STEPS)
    blocks = branch_blocks(table, columns) if per_branch else [("", winner_rows(table, columns))]
    cells = [cell for _, rows in blocks for _, row in rows for cell in row]
    values = [abs(value) for _, _, value in cells if math.isfinite(value)]
    limit = max(math.ceil(max(values, default=0) * 2 - 1e-6) / 2, 1.0)
    if per_branch:
        title = "Advantage of every branch, and where it comes from"
        captions = [
            "Framed: the winner of each step. Headings: steps that finish a picture after its branch."
        ]
        branches = table.advantage.shape[1]
        captions += left_out(branches, min(branches, MAX_BRANCHES), "branches")
    else:
        title = "How far the winner of each step stands out"
        captions = ["Rows: steps that finish a picture after its branch."]
        captions += ["Large: standard deviations above its group; negative: this row voted against it."]
        captions += ["Small: standard deviation of the rewards."] if table.spread is not None else []
    captions += left_out(len(table.steps), len(columns), "branch steps", ", evenly chosen")
    levels = min(len(table.strides), MAX_BLOCKS if per_branch else MAX_LEVELS)
    captions += left_out(len(table.strides), levels, "granularities")
    return to_tensor(draw_heatmap(table, columns, blocks, limit, title, captions))


def chosen(count: int, most: int) -> list[int]:
    """Choose at most so many of `count` places, evenly, both ends included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def left_out(count: int, shown: int, what: str, how: str = "") -> list[str]:
    """Return a caption where not everything is shown."""
    return [f"{shown} of {count} {what} are shown{how}."] if shown < count else []


def winner_rows(table: Table, columns: Sequence[int]) -> list[tuple[str, list[Cell]]]:
    """List a row of cells per granularity: the winner's z-score."""
    rows = []
    for level, stride in enumerate(table.strides[:MAX_LEVELS]):
        cells = []
        for k in columns:
            z = math.inf if table.tied[k, level] else float(table.z[k, table.advantage[k].argmax(), level])
            spread = "" if table.spread is None or math.isinf(z) else compact(float(table.spread[k, level]))
            cells.append((cell_text(z), spread, z))
        rows.append((stride_words(stride), cells))
    return rows


def branch_blocks(table: Table, columns: Sequence[int]) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """List a block of rows, one per branch, for the advantage and for every granularity."""
    branches = range(min(table.advantage.shape[1], MAX_BRANCHES))
    idle = table.tied.all(1)

    def block(values: np.ndarray, tied: np.ndarray) -> list[tuple[str, list[Cell]]]:
        found = [[math.inf if tied[k] else float(values[k, g]) for k in columns] for g in branches]
        return [
            (str(g), [(cell_text(z), "", z) for z in row]) for g, row in zip(branches, found, strict=True)
        ]

    levels = enumerate(table.strides[:MAX_BLOCKS])
    return [
        ("advantage: sum of the z-scores", block(table.advantage, idle)),
        *(
            (f"z-score, finished in {stride_words(s)}", block(table.z[:, :, i], table.tied[:, i]))
            for i, s in levels
        ),
    ]


def cell_text(value: float) -> str:
    """Write a cell's value."""
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "tie"
    return signed(value, 1 if abs(value) < 99.95 else 0)


def compact(value: float) -> str:
    """Write a spread with two digits."""
    return f"{value:.2g}" if 1e-3 <= value < 1e3 else number(value)


def draw_heatmap(
    table: Table,
    columns: Sequence[int],
    blocks: Sequence[tuple[str, list[tuple[str, list[Cell]]]]],
    limit: float,
    title: str,
    captions: list[str],
) -> Image.Image:
    """Lay the blocks out, with the axes beneath them and the colour bar at the foot."""
    per_branch = len(blocks) > 1
    row_height, block_gap = (40, 54) if per_branch else (92, 0)
    left, y = MARGIN + LABELS, heading(captions)
    body = sum(block_gap + row_height * len(rows) for _, rows in blocks)
    made, pen = sheet(y + body + 120 + 134, title, captions)
    across = min((WIDTH - 2 * MARGIN - LABELS) // max(len(columns), 1), 220)
    widest = [cell[0] for _, rows in blocks for _, cells in rows for cell in cells]
    sizes = (28 if per_branch else 36, BODY, SMALL)
    size = next((s for s in sizes if all(length(text, s) <= across - 7 for text in widest)), 18)
    winners = [int(table.advantage[k].argmax()) for k in columns]
    for at, (name, rows) in enumerate(blocks):
        if block_gap:
            write(pen, (MARGIN, y + block_gap - 10), name, INK, BODY, "ls")
        y += block_gap
        for label, cells in rows:
            word = fitted(f"branch {label}" if per_branch else label, BODY, LABELS - 14)
            write(pen, (left - 14, y + row_height // 2), word, INK, BODY, "rm")
            for i, cell in enumerate(cells):
                box = (left + i * across, y, left + (i + 1) * across - 3, y + row_height - 3)
                draw_cell(made, pen, box, cell, limit, size)
                if per_branch and at == 0 and label == str(winners[i]) and math.isfinite(cell[2]):
                    pen.rectangle(box, None, INK, 4)
            y += row_height
    names = ["-" if table.tied[k].all() else str(w) for k, w in zip(columns, winners, strict=True)]
    axes = {
        "branch step": [str(table.steps[k]) for k in columns],
        "sigma": [f"{table.sigmas[k]:.2f}" for k in columns],
        "winning branch": names,
    }
    for line, (name, texts) in enumerate(axes.items()):
        draw_axis(pen, (left, y + 22 + 36 * line), across, name, texts)
    draw_colour_bar(made, pen, y + 138, limit)
    return made


def draw_axis(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], across: int, name: str, texts: Sequence[str]
) -> None:
    """Write a line of texts, one under each column, and its name to the left of them."""
    left, y = place
    write(pen, (left - 14, y), name, PALE, BODY, "rm")
    for i, text in enumerate(texts):
        size = BODY if length(text, BODY) <= across - 6 else SMALL
        write(pen, (left + i * across + across // 2, y), fitted(text, size, across), INK, size, "mm")


def draw_cell(
    made: Image.Image,
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    cell: Cell,
    limit: float,
    size: int,
) -> None:
    """Fill a cell: colour and number, hatching for a tie, grey where there is nothing."""
    text, small, value = cell
    left, top, right, bottom = box
    middle = ((left + right) // 2, (top + bottom) // 2)
    if math.isinf(value):
        made.paste(hatch(right - left + 1, bottom - top + 1), (left, top))
        width = length(text, SMALL) / 2 + 5
        pen.rectangle((middle[0] - width, middle[1] - 14, middle[0] + width, middle[1] + 14), PAPER)
        write(pen, middle, text, INK, SMALL, "mm")
        return
    colour = diverging(value / limit) if math.isfinite(value) else UNKNOWN
    pen.rectangle(box, colour)
    width = right - left - 4
    write(pen, (middle[0], middle[1] - (14 if small else 0)), text, ink_on(colour), size, "mm")
    if small:
        fine = SMALL if length(small, SMALL) <= width else 18
        write(pen, (middle[0], middle[1] + 22), fitted(small, fine, width), ink_on(colour), fine, "mm")


def draw_colour_bar(made: Image.Image, pen: ImageDraw.ImageDraw, top: int, limit: float) -> None:
    """Draw the scale from -limit to +limit, and what hatching means."""
    left, right = MARGIN + LABELS, WIDTH - MARGIN - 352
    for x in range(left, right):
        pen.line((x, top, x, top + 26), diverging(2 * (x - left) / (right - 1 - left) - 1))
    for i, value in enumerate((-limit, -limit / 2, 0.0, limit / 2, limit)):
        x = left + round(i * (right - 1 - left) / 4)
        pen.line((x, top + 26, x, top + 34), INK, 2)
        write(pen, (x, top + 50), "0" if value == 0 else f"{value:+.3g}", INK, SMALL, "mm")
    write(pen, (left - 14, top + 13), "colour", PALE, BODY, "rm")
    unit = "standard deviations from the group's mean"
    write(pen, ((left + right) // 2, top + 80), unit, PALE, SMALL, "mm")
    made.paste(hatch(44, 28), (right + 36, top - 1))
    write(pen, (right + 90, top + 13), "tie: all rewards equal,", INK, SMALL, "lm")
    write(pen, (right + 90, top + 13 + LINE), "teaches nothing", INK, SMALL, "lm")
