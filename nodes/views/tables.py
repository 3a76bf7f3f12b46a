"""Pictures that explain scores and advantages, as IMAGE [1, H, 1024, 3]: heat map, grid, before and after.

Steps, branches and images count from 0, as everywhere in ComfyUI. Blue means up, vermilion down; signs,
dashes and hatching say the same without colour. What does not fit is left out and said so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import (
    BODY,
    DOWN,
    FAINT,
    GAP,
    INK,
    MARGIN,
    PALE,
    PAPER,
    SMALL,
    UP,
    WIDTH,
    dashed,
    diverging,
    fitted,
    hatch,
    heading,
    ink_on,
    length,
    number,
    picture,
    sheet,
    signed,
    to_tensor,
    wrapped,
    write,
)

MAX_STEPS, MAX_BRANCHES, MAX_LEVELS = 12, 24, 6
MAX_TILES, TILES_ACROSS = 40, 5
MAX_PROMPTS, MAX_SEEDS, SEEDS_ACROSS, MAX_NAMES = 8, 8, 4, 4
LABELS = 150  # pixels of the column of row names

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


@dataclass(frozen=True)
class Tile:
    """One picture [H, W, C] of a ranked grid, if it was decoded, and what is said about it."""

    picture: Tensor | None
    score: float
    advantage: float | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """One prompt and seed without and with the LoRA: pictures [H, W, C] and, by reward, the two scores."""

    prompt: str
    seed: int
    before: Tensor
    after: Tensor
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)


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
        captions = ["Framed: the winner of each step. A stride is the granularity of a completion."]
        branches = table.advantage.shape[1]
        captions += left_out(branches, min(branches, MAX_BRANCHES), "branches")
    else:
        title = "How far the winner of each step stands out"
        captions = ["Large: standard deviations above its group; negative: this stride voted against it."]
        captions += ["Small: standard deviation of the rewards."] if table.spread is not None else []
    captions += left_out(len(table.steps), len(columns), "branch steps", ", evenly chosen")
    captions += left_out(len(table.strides), min(len(table.strides), MAX_LEVELS), "granularities")
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
        rows.append((f"stride {stride}", cells))
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

    levels = enumerate(table.strides[:MAX_LEVELS])
    return [
        ("advantage: sum of the z-scores", block(table.advantage, idle)),
        *((f"z-score at stride {s}", block(table.z[:, :, i], table.tied[:, i])) for i, s in levels),
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
    row_height, block_gap = (40, 50) if per_branch else (92, 0)
    left, y = MARGIN + LABELS, heading(captions)
    body = sum(block_gap + row_height * len(rows) for _, rows in blocks)
    made, pen = sheet(y + body + 112 + 130, title, captions)
    across = min((WIDTH - 2 * MARGIN - LABELS) // max(len(columns), 1), 220)
    widest = [cell[0] for _, rows in blocks for _, cells in rows for cell in cells]
    sizes = (26 if per_branch else 34, BODY, SMALL)
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
    names = ["-" if table.tied[k].all() else f"br. {w}" for k, w in zip(columns, winners, strict=True)]
    axes = {
        "branch step": [str(table.steps[k]) for k in columns],
        "sigma": [f"{table.sigmas[k]:.2f}" for k in columns],
        "winner": names,
    }
    for line, (name, texts) in enumerate(axes.items()):
        draw_axis(pen, (left, y + 20 + 34 * line), across, name, texts)
    draw_colour_bar(made, pen, y + 128, limit)
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
        pen.rectangle((middle[0] - width, middle[1] - 13, middle[0] + width, middle[1] + 13), PAPER)
        write(pen, middle, text, INK, SMALL, "mm")
        return
    colour = diverging(value / limit) if math.isfinite(value) else (217, 217, 217)
    pen.rectangle(box, colour)
    width = right - left - 4
    write(pen, (middle[0], middle[1] - (14 if small else 0)), text, ink_on(colour), size, "mm")
    if small:
        fine = SMALL if length(small, SMALL) <= width else 18
        write(pen, (middle[0], middle[1] + 22), fitted(small, fine, width), ink_on(colour), fine, "mm")


def draw_colour_bar(made: Image.Image, pen: ImageDraw.ImageDraw, top: int, limit: float) -> None:
    """Draw the scale from -limit to +limit, and what hatching means."""
    left, right = MARGIN + LABELS, WIDTH - MARGIN - 330
    for x in range(left, right):
        pen.line((x, top, x, top + 26), diverging(2 * (x - left) / (right - 1 - left) - 1))
    for i, value in enumerate((-limit, -limit / 2, 0.0, limit / 2, limit)):
        x = left + round(i * (right - 1 - left) / 4)
        pen.line((x, top + 26, x, top + 34), INK, 2)
        write(pen, (x, top + 50), "0" if value == 0 else f"{value:+.3g}", INK, SMALL, "mm")
    write(pen, (left - 14, top + 13), "colour", PALE, BODY, "rm")
    unit = "standard deviations from the group's mean"
    write(pen, ((left + right) // 2, top + 78), unit, PALE, SMALL, "mm")
    made.paste(hatch(44, 28), (right + 36, top - 1))
    write(pen, (right + 90, top + 13), "tie: all rewards equal,", INK, SMALL, "lm")
    write(pen, (right + 90, top + 39), "teaches nothing", INK, SMALL, "lm")


def ranked_grid(tiles: Sequence[Tile], title: str = "Best to worst") -> Tensor:
    """Draw pictures from the best score to the worst, those without a score last.

    Training pushes a picture in a solid blue frame up, one in a dashed vermilion frame down.
    Of more than 40 pictures the best and the worst 20 are shown.
    """
    scores = np.array([tile.score for tile in tiles], float)
    order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    places = list(range(len(order)))
    taught = any(tile.advantage is not None for tile in tiles)
    captions = ["Solid frame: training pushes it up. Dashed frame: it pushes it down."] if taught else []
    if len(places) > MAX_TILES:
        half = MAX_TILES // 2
        captions.append(f"The best {half} and the worst {half} of {len(places)}; the others lie in between.")
        places = places[:half] + places[-half:]
    across = min(max(len(places), 1), TILES_ACROSS)
    side = min((WIDTH - 2 * MARGIN - (across - 1) * GAP) // across, 330)
    lines = 1 + taught + max((len(tiles[i].lines) for i in order[places]), default=0)
    shapes = [tiles[i].picture.shape for i in order[places] if tiles[i].picture is not None]
    tall = round(side * min(max((shape[0] / shape[1] for shape in shapes), default=1.0), 1.0))
    tall = max(tall, 90)
    down = tall + 26 * lines + 30
    top = heading(captions)
    made, pen = sheet(top + down * max(math.ceil(len(places) / across), 1) + 8, title, captions)
    if not places:
        write(pen, (MARGIN, top), "There is no picture.", PALE, BODY)
    for at, place in enumerate(places):
        corner = (MARGIN + at % across * (side + GAP), top + at // across * down)
        draw_tile(made, pen, corner, (side, tall), tiles[order[place]], place + 1)
    return to_tensor(made)


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
    pen.rectangle(box, "#f0f0f0")
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
    y += 30
    if tile.advantage is not None:
        text = f"adv. {signed(advantage)}"
        write(pen, (left, y), text, UP if advantage > 0 else DOWN if advantage < 0 else PALE, SMALL)
        y += 26
    for line in tile.lines:
        write(pen, (left, y), fitted(line, SMALL, side), PALE)
        y += 26


def before_after(
    pairs: Sequence[Pair], title: str = "Before and after", names: tuple[str, str] = ("base", "tuned")
) -> Tensor:
    """Draw a block per prompt: its seeds without the LoRA, below them with it, then scores and changes."""
    prompts: dict[str, list[Pair]] = {}
    for pair in pairs:
        prompts.setdefault(pair.prompt, []).append(pair)
    shown = {prompt: group[:MAX_SEEDS] for prompt, group in list(prompts.items())[:MAX_PROMPTS]}
    count = sum(map(len, shown.values()))
    judged = {name: [p.scores[name] for p in pairs if name in p.scores] for name in score_names(pairs)}
    captions = [gain_line(name, scores) for name, scores in judged.items()]
    captions += left_out(len(pairs), count, "pairs")
    across = min(max((len(group) for group in shown.values()), default=1), SEEDS_ACROSS)
    side = min((WIDTH - 2 * MARGIN - 86 - (across - 1) * GAP) // across, 360)
    blocks = [draw_block(prompt, group, side, across, names) for prompt, group in shown.items()]
    top = heading(captions)
    body = sum(block.height + 22 for block in blocks) if blocks else 60
    made, pen = sheet(top + body, title, captions)
    if not blocks:
        write(pen, (MARGIN, top), "There is no picture.", PALE, BODY)
    for block in blocks:
        made.paste(block, (MARGIN, top))
        top += block.height + 22
    return to_tensor(made)


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


def change(old: float, new: float) -> str:
    """Write a difference with its sign."""
    text = number(new - old)
    return text if text.startswith("-") or not float(text) else f"+{text}"


def draw_block(
    prompt: str, group: Sequence[Pair], side: int, across: int, names: tuple[str, str]
) -> Image.Image:
    """Draw one prompt's pairs, in several bands if they do not fit side by side."""
    heads = wrapped(prompt, BODY, WIDTH - 2 * MARGIN, 2)
    scores, labels = score_names(group), 86
    band = 2 * (side + 8) + 52 * len(scores) + 14
    top = 30 * len(heads) + 10
    made = Image.new("RGB", (WIDTH - 2 * MARGIN, top + band * math.ceil(len(group) / across)), PAPER)
    pen = ImageDraw.Draw(made)
    for i, line in enumerate(heads):
        write(pen, (0, 30 * i), line, INK, BODY)
    for at, pair in enumerate(group):
        left, y = labels + at % across * (side + GAP), top + at // across * band
        for row, (name, image) in enumerate(zip(names, (pair.before, pair.after), strict=True)):
            if at % across == 0:
                middle = y + row * (side + 8) + side // 2
                write(pen, (0, middle), fitted(name, BODY, labels - 8), PALE, BODY, "lm")
            tile = picture(image, side, side)
            made.paste(tile, (left, y + row * (side + 8)))
        y += 2 * (side + 8)
        for name in scores:
            old, new = pair.scores.get(name, (math.nan, math.nan))
            write(pen, (left, y), fitted(name, SMALL, side), PALE)
            text, colour = delta(old, new)
            write(pen, (left, y + 24), fitted(text, SMALL, side), colour, SMALL)
            y += 52
    return made


def delta(old: float, new: float) -> tuple[str, str]:
    """Describe a score's change and choose its colour."""
    if not (math.isfinite(old) and math.isfinite(new)):
        return "not judged", PALE
    text = change(old, new)
    return f"{number(old)} -> {number(new)}  {text}", {"+": UP, "-": DOWN}.get(text[0], PALE)
