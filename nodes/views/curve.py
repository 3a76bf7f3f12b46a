"""The reward curve of a run as an IMAGE, from the rows of its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import (
    COLOURS,
    FAINT,
    INK,
    LINE,
    MARGIN,
    PALE,
    PAPER,
    SMALL,
    TITLE,
    WIDTH,
    change,
    number,
    to_tensor,
)
from .letters import fitted, length, wrapped
from .letters import write as write_pixels

FINER = 2  # drawn so many times larger and then reduced, because Pillow's lines have no soft edges
LEFT = 92  # pixels of the numbers beside a panel
SMOOTHING = 0.15  # weight of a new value in the moving average, as in the trainer's report
MAX_PANELS, PLOT, AXIS, LEGEND = 4, 330, 72, 33
LARGEST = 1e30  # beyond this a number is damage, not a reward

Row = Mapping[str, Any]
Series = tuple[np.ndarray, np.ndarray]
"""Steps and values."""


def reward_curve(rows: Sequence[Row], title: str = "Rewards", total_steps: int | None = None) -> Tensor:
    """Draw training rewards (thin and smoothed, ± one standard deviation) and held-out ones (dashed, 95 %
    interval): [1, H, 1024, 3].

    Rewards that stay in [0, 1] share a panel; every other one has a scale of its own. At most four panels and
    six rewards are drawn.
    """
    groups, dropped = panels(rows)
    caption = "Line: training, smoothed, with +/- one standard deviation. Dashed: held-out, 95 % interval."
    notes = [f"{dropped} more rewards are not shown."] if dropped else []
    if alarm := alarm_of(rows):
        notes += wrapped(alarm, SMALL, WIDTH - 2 * MARGIN, 2)
    top = MARGIN + 58 + LINE * (1 + len(notes))
    heights = [PLOT + AXIS + LEGEND * sum(len(kinds(rows, name)) for name in names) for names in groups]
    made = Image.new("RGB", (WIDTH * FINER, (top + sum(heights) + (0 if groups else 60)) * FINER), PAPER)
    pen = ImageDraw.Draw(made)
    write(pen, (MARGIN, MARGIN - 8), fitted(title, TITLE, WIDTH - 2 * MARGIN), INK, TITLE)
    write(pen, (MARGIN, MARGIN + 44), caption, PALE, SMALL)
    for line_number, note in enumerate(notes):
        alarming = alarm and line_number >= bool(dropped)
        place = (MARGIN, MARGIN + 44 + LINE * (1 + line_number))
        write(pen, place, note, COLOURS[1] if alarming else PALE, SMALL)
    if not groups:
        write(pen, (MARGIN, top), "No step has been measured yet.", PALE, SMALL)
    colours = iter(COLOURS)
    for names, height in zip(groups, heights, strict=True):
        draw_panel(made, pen, rows, {name: next(colours) for name in names}, top, total_steps)
        top += height
    return to_tensor(made.resize((WIDTH, made.height // FINER), Image.Resampling.BOX))


def alarm_of(rows: Sequence[Row]) -> str:
    """Return the alarm of the watch at the newest evaluation; blank if there is none."""
    looks = [row for row in rows if any(isinstance(key, str) and key.startswith("heldout/") for key in row)]
    text = looks[-1].get("alarm") if looks else None
    return f"Alarm at step {looks[-1].get('step')}: {text}" if isinstance(text, str) else ""


def column(rows: Sequence[Row], name: str) -> Series:
    """Return a metric's steps and values, where it was written and is a number."""

    def known(value: Any) -> bool:
        return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < LARGEST

    found = [(row["step"], row[name]) for row in rows if known(row.get("step")) and known(row.get(name))]
    steps, values = np.array(sorted(found, key=lambda pair: pair[0]), float).reshape(-1, 2).T
    return steps, values


def kinds(rows: Sequence[Row], name: str) -> list[str]:
    """List how a reward was measured: in training, on held-out prompts, or both."""
    return [kind for kind in ("reward", "heldout") if len(column(rows, f"{kind}/{name}/mean")[0])]


def panels(rows: Sequence[Row]) -> tuple[list[list[str]], int]:
    """Group the rewards that stay in [0, 1], every other one by itself; count those without room."""
    written = (
        key.split("/") for row in rows for key in row if isinstance(key, str) and key.endswith("/mean")
    )
    names = dict.fromkeys(key[1] for key in written if len(key) == 3 and key[0] in ("reward", "heldout"))
    values = {
        name: np.concatenate([column(rows, f"{kind}/{name}/mean")[1] for kind in ("reward", "heldout")])
        for name in names
    }
    values = {name: found for name, found in values.items() if len(found)}
    kept = dict(list(values.items())[: len(COLOURS)])
    shares = [name for name, found in kept.items() if found.min() >= 0 and found.max() <= 1]
    groups = ([shares] if shares else []) + [[name] for name in kept if name not in shares]
    shown = groups[:MAX_PANELS]
    return shown, len(values) - sum(map(len, shown))


def smooth(values: np.ndarray) -> np.ndarray:
    """Average exponentially, without the pull of the start."""
    made, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = (1 - SMOOTHING) * total + value, (1 - SMOOTHING) * weight + 1
        made[i] = total / weight
    return made


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Choose round numbers in [low, high], about `most` of them."""
    span = max(high - low, 1e-12)
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(math.ceil(step), 1)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Frame:
    """Where a panel's numbers lie on the sheet."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], box: tuple[int, int, int, int]
    ) -> None:
        self.x, self.y, self.box = x, y, box

    def across(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Place steps, in pixels."""
        left, _, right, _ = self.box
        return left + (np.asarray(values, float) - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)

    def down(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Place rewards, in pixels."""
        _, top, _, bottom = self.box
        share = (np.asarray(values, float) - self.y[0]) / (self.y[1] - self.y[0])
        return np.clip(bottom - share * (bottom - top), top, bottom)

    def points(self, steps: np.ndarray, values: np.ndarray) -> list[tuple[float, float]]:
        """Place a line's points."""
        places = self.across(steps) * FINER, self.down(values) * FINER
        return list(zip(*(each.tolist() for each in places), strict=True))


def draw_panel(
    made: Image.Image,
    pen: ImageDraw.ImageDraw,
    rows: Sequence[Row],
    colours: Mapping[str, str],
    top: int,
    total_steps: int | None,
) -> None:
    """Draw the legend, the axes and the curves of some rewards on one scale."""
    for name, colour in colours.items():
        for kind in kinds(rows, name):
            draw_legend(pen, top, name, kind, column(rows, f"{kind}/{name}/mean")[1], colour)
            top += LEGEND
    low, high = extent(rows, list(colours))
    steps = np.concatenate(
        [column(rows, f"{kind}/{name}/mean")[0] for name in colours for kind in ("reward", "heldout")]
    )
    first, last = steps.min(), max(steps.max(), total_steps or 0)
    frame = Frame(
        (first, last) if last > first else (first - 1, first + 1),
        (low, high),
        (MARGIN + LEFT, top + 10, WIDTH - MARGIN - 8, top + PLOT),
    )
    draw_axes(pen, frame)
    for name, colour in colours.items():
        draw_band(made, frame, rows, name, colour)
    for draw in (draw_training, draw_heldout):
        for name, colour in colours.items():
            draw(pen, frame, rows, name, colour)


def extent(rows: Sequence[Row], names: Sequence[str]) -> tuple[float, float]:
    """Choose the scale: all lines, bands and intervals with a little air, inside [0, 1] for shares."""
    means, edges = [], []
    for name in names:
        for kind, width in (("reward", "std"), ("heldout", "ci95")):
            at, values = column(rows, f"{kind}/{name}/mean")
            around, widths = column(rows, f"{kind}/{name}/{width}")
            means += [*values]
            if len(at) and np.array_equal(at, around):
                centre = smooth(values) if kind == "reward" else values
                edges += [*(centre - widths), *(centre + widths)]
    shares = min(means) >= 0 and max(means) <= 1
    low, high = min(means + edges), max(means + edges)
    air = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    low, high = low - air, high + air
    return (max(low, 0.0), min(high, 1.0)) if shares else (low, high)


def draw_axes(pen: ImageDraw.ImageDraw, frame: Frame) -> None:
    """Draw grid, ticks and the name of the x axis."""
    left, top, right, bottom = frame.box
    for value in ticks(*frame.y, 5):
        y = float(frame.down([value])[0])
        line(pen, [(left, y), (right, y)], FAINT, 1)
        write(pen, (left - 10, y), f"{value:.6g}" if value else "0", PALE, SMALL, "rm")
    for value in ticks(*frame.x, 8, whole=True):
        x = float(frame.across([value])[0])
        line(pen, [(x, bottom), (x, bottom + 6)], INK, 1)
        write(pen, (x, bottom + 22), f"{value:.0f}", PALE, SMALL, "mm")
    line(pen, [(left, top), (left, bottom), (right, bottom)], INK, 1)
    write(pen, ((left + right) / 2, bottom + 48), "step", PALE, SMALL, "mm")


def draw_band(made: Image.Image, frame: Frame, rows: Sequence[Row], name: str, colour: str) -> None:
    """Shade one standard deviation around the trend."""
    steps, means = column(rows, f"reward/{name}/mean")
    at, std = column(rows, f"reward/{name}/std")
    if len(steps) < 2 or not np.array_equal(steps, at):
        return
    trend, width = smooth(means), smooth(np.abs(std))
    veil = Image.new("L", made.size, 0)
    lower, upper = frame.points(steps, trend - width), frame.points(steps, trend + width)
    ImageDraw.Draw(veil).polygon(lower + upper[::-1], 44)
    made.paste(colour, (0, 0), veil)


def draw_training(
    pen: ImageDraw.ImageDraw, frame: Frame, rows: Sequence[Row], name: str, colour: str
) -> None:
    """Draw every step thin and pale, the trend strong."""
    steps, means = column(rows, f"reward/{name}/mean")
    if len(steps) == 1:
        draw_marker(pen, frame.points(steps, means)[0], colour)
    if len(steps) > 1:
        pen.line(frame.points(steps, means), paler(colour), FINER, joint="curve")
        pen.line(frame.points(steps, smooth(means)), colour, 3 * FINER, joint="curve")


def draw_heldout(pen: ImageDraw.ImageDraw, frame: Frame, rows: Sequence[Row], name: str, colour: str) -> None:
    """Draw markers, a dashed line between them, and intervals."""
    steps, means = column(rows, f"heldout/{name}/mean")
    at, widths = column(rows, f"heldout/{name}/ci95")
    places = frame.points(steps, means)
    for start, end in pairwise(places):
        dash(pen, start, end, colour)
    if np.array_equal(steps, at):
        lows, highs = frame.points(steps, means - widths), frame.points(steps, means + widths)
        for (x, low), (_, high) in zip(lows, highs, strict=True):
            pen.line((x, low, x, high), colour, FINER + 1)
            for y in (low, high):
                pen.line((x - 5 * FINER, y, x + 5 * FINER, y), colour, FINER + 1)
    for place in places:
        draw_marker(pen, place, colour)


def draw_legend(
    pen: ImageDraw.ImageDraw, top: int, name: str, kind: str, values: np.ndarray, colour: str
) -> None:
    """Draw a key, what it stands for, and where it began and stands now."""
    y = (top + LEGEND / 2) * FINER
    left, right = (MARGIN + LEFT) * FINER, (MARGIN + LEFT + 62) * FINER
    if kind == "reward":
        pen.line((left, y, right, y), colour, 3 * FINER)
        text = f"{name}, training"
    else:
        dash(pen, (left, y), (right, y), colour)
        draw_marker(pen, ((left + right) / 2, y), colour)
        text = f"{name}, held-out"
    trend = smooth(values) if kind == "reward" else values
    first, last = float(trend[0]), float(trend[-1])
    ends = f"{number(first)} -> {number(last)} ({change(first, last)})"
    at = WIDTH - MARGIN - 8 - length(ends, SMALL)
    write(
        pen,
        (MARGIN + LEFT + 76, top + LEGEND / 2),
        fitted(text, SMALL, at - MARGIN - LEFT - 96),
        INK,
        SMALL,
        "lm",
    )
    write(pen, (at, top + LEGEND / 2), ends, PALE, SMALL, "lm")


def draw_marker(pen: ImageDraw.ImageDraw, place: tuple[float, float], colour: str) -> None:
    """Draw a dot with a rim of paper."""
    x, y = place
    for radius, fill in ((7 * FINER, PAPER), (5 * FINER, colour)):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


def dash(pen: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw a dashed line."""
    (x, y), far = start, math.dist(start, end)
    if far == 0:
        return
    along, across = (end[0] - x) / far, (end[1] - y) / far
    for begin in np.arange(0, far, 18 * FINER):
        stop = min(begin + 11 * FINER, far)
        ends = (x + begin * along, y + begin * across, x + stop * along, y + stop * across)
        pen.line(ends, colour, 2 * FINER + 1)


def line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
    """Draw a line given in pixels of the finished sheet."""
    pen.line([(x * FINER, y * FINER) for x, y in points], colour, width * FINER)


def write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: str,
    size: int,
    anchor: str | None = None,
) -> None:
    """Write a text at a place given in pixels of the finished sheet."""
    write_pixels(pen, (place[0] * FINER, place[1] * FINER), text, colour, size * FINER, anchor)


def paler(colour: str) -> tuple[int, ...]:
    """Mix a colour with the paper."""
    return tuple((int(colour[i : i + 2], 16) + int(PAPER[i : i + 2], 16)) // 2 for i in (1, 3, 5))
