"""The sheet of pictures before and after training, as IMAGE [1, H, 1024, 3]: four pairs in a row.

Blue means up, orange down; signs say the same without colour. Where there are more pairs than fit, the
highest and the lowest changes are shown, and that is said.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import (
    BODY,
    CARD,
    DOWN,
    GAP,
    INK,
    LINE,
    MARGIN,
    PALE,
    PAPER,
    SMALL,
    UP,
    WIDTH,
    change,
    heading,
    number,
    picture,
    sheet,
    to_tensor,
)
from .letters import fitted, length, wrapped, write

ACROSS, MAX_ROWS, MAX_NAMES = 4, 2, 4
LABEL = 40  # pixels of the column that says which picture is which
WIDEST, TALLEST = 440, 1.4  # pixels of a picture's width; its height in widths
HIGHEST = 2 * WIDTH  # pixels of a sheet
PROMPT_LINES = 3


@dataclass(frozen=True)
class Pair:
    """One prompt and seed without and with the LoRA: pictures [H, W, C] and, by reward, the two scores."""

    prompt: str
    seed: int
    before: Tensor
    after: Tensor
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How the cells of a sheet are laid out, in pixels."""

    across: int
    rows: int
    side: int
    tall: int
    lines: int  # of the prompt, and of the noise where there are several
    noises: bool
    names: tuple[str, ...]

    @property
    def height(self) -> int:
        """Return the height of a row of cells."""
        return LINE * self.lines + 10 + 2 * (self.tall + 8) + 2 * LINE * len(self.names) + 24


def before_after(
    pairs: Sequence[Pair],
    title: str = "Before and after",
    names: tuple[str, str] = ("base", "tuned"),
    weights: Mapping[str, float] | None = None,
    drawn: int = 0,
) -> Tensor:
    """Draw a cell per pair: its prompt, without the LoRA, below it with it, then scores and changes.

    Of more pairs than fit into a sheet twice as tall as wide, the highest and the lowest changes are shown:
    the rewards' changes by their `weights` (1 if not given), each in its own spread. `drawn` counts all pairs
    there were, if that is more.
    """
    rewards = score_names(pairs)
    judged = {name: [p.scores[name] for p in pairs if name in p.scores] for name in rewards}
    captions = [gain_line(name, scores) for name, scores in judged.items()]
    layout = layout_of(pairs, heading([*captions, ""]))
    chosen = choose(pairs, layout.across * layout.rows, weights or {})
    if len(chosen) < len(pairs):
        shown = f"{(len(chosen) + 1) // 2} highest changes, then {len(chosen) // 2} lowest"
        more = max(len(pairs), drawn) - len(chosen)
        captions.append(f"Shown: {shown}; {more} more pairs are not shown.")
    top, rows = heading(captions), max(math.ceil(len(chosen) / layout.across), 1)
    made, pen = sheet(top + (rows * layout.height if chosen else 60), title, captions)
    if not chosen:
        write(pen, (MARGIN, top), "There is no picture.", PALE, BODY)
    for at, i in enumerate(chosen):
        left = MARGIN + LABEL + at % layout.across * (layout.side + GAP)
        corner = (left, top + at // layout.across * layout.height)
        draw_pair(made, pen, corner, pairs[i], layout)
        if at % layout.across == 0:
            draw_labels(made, corner[1], names, layout)
    return to_tensor(made)


def layout_of(pairs: Sequence[Pair], top: int) -> Layout:
    """Choose the size and the number of the cells below a heading of `top` pixels."""
    across = min(max(len(pairs), 1), ACROSS)
    side = min((WIDTH - 2 * MARGIN - LABEL - (across - 1) * GAP) // across, WIDEST)
    highest = max((pair.before.shape[0] / pair.before.shape[1] for pair in pairs), default=1.0)
    heads = 1
    for prompt in {pair.prompt for pair in pairs}:
        if heads < PROMPT_LINES:
            heads = max(heads, len(wrapped(prompt, SMALL, side, PROMPT_LINES)))
    noises = len({pair.seed for pair in pairs}) > 1
    tall = max(round(side * min(highest, TALLEST)), 60)
    one = Layout(across, 1, side, tall, heads + noises, noises, tuple(score_names(pairs)))
    fitting = max((HIGHEST - top) // one.height, 1)
    return dataclasses.replace(one, rows=min(math.ceil(len(pairs) / across), fitting, MAX_ROWS))


def choose(pairs: Sequence[Pair], most: int, weights: Mapping[str, float]) -> list[int]:
    """Return all pairs in their order, or of more than `most` the highest changes and then the lowest.

    A prompt comes a second time only where there are too few of them.
    """
    if len(pairs) <= most:
        return list(range(len(pairs)))
    falling = np.argsort(-changes_of(pairs, weights), kind="stable").tolist()
    seen: set[str] = set()
    high = ends(pairs, falling, (most + 1) // 2, seen)
    low = ends(pairs, [i for i in reversed(falling) if i not in high], most // 2, seen)
    return [i for part in (high, low) for i in falling if i in part]


def ends(pairs: Sequence[Pair], order: Sequence[int], count: int, seen: set[str]) -> set[int]:
    """Take the first pairs of an order whose prompts are not seen yet, and then any first ones."""
    found: list[int] = []
    for i in order:
        if len(found) < count and pairs[i].prompt not in seen:
            found.append(i)
            seen.add(pairs[i].prompt)
    others = [i for i in order if i not in found]
    return {*found, *others[: count - len(found)]}


def changes_of(pairs: Sequence[Pair], weights: Mapping[str, float]) -> np.ndarray:
    """Sum every pair's changes, each reward's in standard deviations and by its weight: [pairs]."""
    changes = np.zeros(len(pairs))
    for name in dict.fromkeys(name for pair in pairs for name in pair.scores):
        both = [pair.scores.get(name, (math.nan, math.nan)) for pair in pairs]
        moved = np.array([after - before for before, after in both])
        known = np.isfinite(moved)
        spread = moved[known].std() if known.any() else 0.0
        if spread > 0:
            changes += np.where(known, moved, 0.0) / spread * weights.get(name, 1.0)
    return changes


def score_names(pairs: Sequence[Pair]) -> list[str]:
    """List the rewards that pairs are scored by, as many as are shown."""
    return list(dict.fromkeys(name for pair in pairs for name in pair.scores))[:MAX_NAMES]


def gain_line(name: str, scores: Sequence[tuple[float, float]]) -> str:
    """Describe all changes of a reward in one sentence."""
    judged = [(old, new) for old, new in scores if math.isfinite(old) and math.isfinite(new)]
    if not judged:
        return f"{name}: not judged"
    old, new = np.mean(judged, axis=0)
    better = sum(after > before for before, after in judged)
    gain = f"mean {number(old)} -> {number(new)} ({change(old, new)})"
    return f"{name}: {gain}, better in {better} of {len(judged)}"


def draw_pair(
    made: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], pair: Pair, layout: Layout
) -> None:
    """Draw one pair: its prompt, the two pictures one above the other, and its scores."""
    (left, y), side, tall = corner, layout.side, layout.tall
    for line in wrapped(pair.prompt, SMALL, side, PROMPT_LINES):
        write(pen, (left, y), line, INK, SMALL)
        y += LINE
    if layout.noises:
        write(pen, (left, y), f"noise {pair.seed}", PALE, SMALL)
    y = corner[1] + LINE * layout.lines + 10
    for image in (pair.before, pair.after):
        pen.rectangle((left, y, left + side - 1, y + tall - 1), CARD)
        shown = picture(image, side, tall)
        made.paste(shown, (left + (side - shown.width) // 2, y + (tall - shown.height) // 2))
        y += tall + 8
    for name in layout.names:
        old, new = pair.scores.get(name, (math.nan, math.nan))
        text, colour = delta(old, new)
        write(pen, (left + side, y), text, colour, SMALL, "ra")
        write(pen, (left, y), fitted(name, SMALL, side - length(text, SMALL) - 10), PALE, SMALL)
        if math.isfinite(old) or math.isfinite(new):
            write(pen, (left, y + LINE), f"{number(old)} -> {number(new)}", PALE, SMALL)
        y += 2 * LINE


def draw_labels(made: Image.Image, top: int, names: tuple[str, str], layout: Layout) -> None:
    """Write beside a row of cells, upwards, which pictures stand there."""
    y = top + LINE * layout.lines + 10
    for name in names:
        label = Image.new("RGB", (layout.tall, LABEL - 8), PAPER)
        place = (layout.tall / 2, (LABEL - 8) / 2)
        write(ImageDraw.Draw(label), place, fitted(name, BODY, layout.tall), PALE, BODY, "mm")
        made.paste(label.transpose(Image.Transpose.ROTATE_90), (MARGIN, y))
        y += layout.tall + 8


def delta(old: float, new: float) -> tuple[str, str]:
    """Describe a score's change and choose its colour."""
    if not (math.isfinite(old) and math.isfinite(new)):
        return "not judged", PALE
    text = change(old, new)
    return text, {"+": UP, "-": DOWN}.get(text[0], PALE)
