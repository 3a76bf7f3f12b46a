"""The sheet of pictures from best to worst, as IMAGE [1, H, 1024, 3].

Blue means up, orange down; dashes say the same without colour. Of more pictures than fit, those at both ends
are shown, and what lies between is said.
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
    CARD,
    DOWN,
    FAINT,
    GAP,
    INK,
    LINE,
    MARGIN,
    PALE,
    SMALL,
    UP,
    WIDTH,
    dashed,
    heading,
    number,
    picture,
    sheet,
    signed,
    to_tensor,
)
from .letters import fitted, length, write

MAX_TILES = 10  # in two rows; of more, the best and the worst five
LARGEST, TALLEST = 440, 1.4  # pixels of a tile's width; its height in widths
BETWEEN = 52  # pixels of the line between the best and the worst


@dataclass(frozen=True)
class Tile:
    """One picture [H, W, C] of a ranked sheet, if it was decoded, and what is said about it."""

    picture: Tensor | None
    score: float
    advantage: float | None = None
    lines: tuple[str, ...] = ()


def ranked_grid(tiles: Sequence[Tile], title: str = "Best to worst") -> Tensor:
    """Draw pictures from the best score to the worst, those without a score last.

    Training pushes a picture in a solid blue frame up, one in a dashed orange frame down. Of more than ten
    pictures the best and the worst five that have a score are shown.
    """
    scores = np.array([tile.score for tile in tiles], float)
    order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    judged = int((~np.isnan(scores)).sum())
    places, half = list(range(len(order))), 0
    if len(places) > MAX_TILES:
        half = MAX_TILES // 2 if judged > MAX_TILES else 0
        places = [*range(half), *range(judged - half, judged)] if half else places[:MAX_TILES]
    taught = any(tile.advantage is not None for tile in tiles)
    captions = ["Solid frame: training pushes it up. Dashed frame: it pushes it down."] if taught else []
    captions += counted(len(places), len(order), judged)
    across, side, tall = measures([tiles[i] for i in order[places]])
    lines = 1 + taught + max((len(tiles[i].lines) for i in order[places]), default=0)
    down, top = tall + LINE * lines + 26, heading(captions)
    rows = max(math.ceil(len(places) / across), 1)
    made, pen = sheet(top + down * rows + (BETWEEN if half else 0), title, captions)
    if not places:
        write(pen, (MARGIN, top), "There is no picture.", PALE, BODY)
    for at, place in enumerate(places):
        lower = BETWEEN if half and at >= half else 0
        corner = (MARGIN + at % across * (side + GAP), top + lower + at // across * down)
        draw_tile(made, pen, corner, (side, tall), tiles[order[place]], place + 1)
    if half:
        middle = judged - 2 * half
        high, low = (number(scores[order[place]]) for place in (half, judged - half - 1))
        ends = f"from {high} to {low}" if middle > 1 else f"with {high}"
        draw_between(pen, top + down + BETWEEN // 2 - 10, f"{middle} in between, {ends}")
    return to_tensor(made)


def counted(shown: int, count: int, judged: int) -> list[str]:
    """Say how many pictures there are, where not all are shown or not all have a score."""
    said = []
    if shown < count:
        ends = f"The {shown // 2} best and the {shown // 2} worst of {judged}"
        said.append(f"{ends} with a score." if judged > MAX_TILES else f"{shown} of {count} are shown.")
    return [*said, f"{count - judged} could not be judged."] if judged < count else said


def measures(tiles: Sequence[Tile]) -> tuple[int, int, int]:
    """Choose how many tiles stand side by side, how wide and how tall they are."""
    across = len(tiles) if len(tiles) <= 5 else math.ceil(len(tiles) / 2)
    across = max(across, 1)
    side = min((WIDTH - 2 * MARGIN - (across - 1) * GAP) // across, LARGEST)
    shapes = [tile.picture.shape for tile in tiles if tile.picture is not None]
    highest = max((shape[0] / shape[1] for shape in shapes), default=1.0)
    return across, side, max(round(side * min(highest, TALLEST)), 90)


def draw_between(pen: ImageDraw.ImageDraw, middle: int, text: str) -> None:
    """Write what lies between the best and the worst on a line from edge to edge."""
    half = length(text, SMALL) / 2 + 16
    for left, right in ((MARGIN, WIDTH / 2 - half), (WIDTH / 2 + half, WIDTH - MARGIN)):
        pen.line((left, middle, right, middle), FAINT, 2)
    write(pen, (WIDTH / 2, middle), text, PALE, SMALL, "mm")


def draw_tile(
    made: Image.Image,
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    size: tuple[int, int],
    tile: Tile,
    rank: int,
) -> None:
    """Draw one picture with its frame, rank, score, advantage and whatever else there is to say."""
    (left, top), (side, tall), frame = corner, size, 7
    box = (left, top, left + side - 1, top + tall - 1)
    pen.rectangle(box, CARD)
    if tile.picture is None:
        write(pen, (left + side // 2, top + tall // 2), "no picture", PALE, SMALL, "mm")
    else:
        shown = picture(tile.picture, side - 2 * frame - 4, tall - 2 * frame - 4)
        made.paste(shown, (left + (side - shown.width) // 2, top + (tall - shown.height) // 2))
    advantage = tile.advantage if tile.advantage is not None and math.isfinite(tile.advantage) else 0.0
    if advantage > 0:
        pen.rectangle(box, None, UP, frame)
    elif advantage < 0:
        dashed(pen, box, DOWN, frame)
    else:
        pen.rectangle(box, None, FAINT, 2)
    y = top + tall + 6
    write(pen, (left, y), f"{rank}.", PALE, BODY)
    write(pen, (left + length(f"{rank}.", BODY) + 10, y), number(tile.score), INK, BODY)
    y += LINE + 3
    if tile.advantage is not None:
        colour = UP if advantage > 0 else DOWN if advantage < 0 else PALE
        write(pen, (left, y), fitted(f"advantage {signed(advantage)}", SMALL, side), colour, SMALL)
        y += LINE
    for line in tile.lines:
        write(pen, (left, y), fitted(line, SMALL, side), PALE, SMALL)
        y += LINE
