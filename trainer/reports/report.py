"""Images of a run, from its folder alone: curves.png, before_after.png and preview.png."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from comfy_g2rpo.exploration.noise_gaps import gap_lines
from comfy_g2rpo.files.picture_files import PictureError, looked_at
from comfy_g2rpo.files.safe import FileError, write_bytes
from comfy_g2rpo.run.folder import PREVIEW, RunFolder, Sample

from .time_shares import PHASES

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: told apart by colour-blind eyes
MEASURES = {"pixels": "pixels", "embed": "the reward model"}
"""What pictures are compared by, in words."""
SMOOTHING = 0.15  # weight of a new value in the moving average
ROUNDING = (
    1e-10  # a distance below it is rounding, and would stretch a logarithmic axis over many empty decades
)
TILE, GAP, MARGIN = 192, 8, 24
LINE, LINES = 22, 3  # of a prompt: height in pixels, and how many at most
INK, PALE, PAPER, BETTER, WORSE = "#1a1a1a", "#767676", "#ffffff", "#00704f", "#b34700"

Row = Mapping[str, Any]


def write_report(run: RunFolder, say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Draw whatever the run folder holds and return the files.

    Say in a line each what exploration has cost, where that was measured, and what cannot be drawn.
    """
    written = []
    rows = run.metrics()
    for line in gap_lines(rows):
        say(line)
    if rows:
        curves(rows, run.path / "curves.png")
        written.append(run.path / "curves.png")
    for kind, name in (("", "before_after.png"), (PREVIEW, "preview.png")):
        steps = run.sampled_steps(kind)
        if len(steps) < 2:
            continue
        ends = steps[0], steps[-1]
        try:
            before_after(*(run.samples(step, kind) for step in ends), run.path / name, steps=ends)
        except (FileError, PictureError) as error:
            say(f"{name} is not drawn: {error}")
        else:
            written.append(run.path / name)
    return written


def curves(rows: Sequence[Row], path: Path) -> None:
    """Draw rewards over steps, raw and smoothed, with held-out ones; beneath, the optimizer and time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    groups = reward_groups(rows)
    figure = Figure(figsize=(max(12, 5 * len(groups)), 9), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
    if groups:
        draw_rewards(top, groups, rows)
    left, middle, right = bottom.subplots(1, 3)
    draw_optimizer(left, rows)
    draw_diversity(middle, rows)
    draw_time(right, rows)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # savefig would draw it twice
    write_bytes(path, buffer.getvalue())


def reward_groups(rows: Sequence[Row]) -> list[list[str]]:
    """Put rewards that lie in [0, 1] on one scale together; every other one gets a panel to itself."""
    means = [
        name
        for row in rows
        for name in row
        if name.startswith(("reward/", "heldout/")) and name.endswith("/mean")
    ]
    names = dict.fromkeys(name.split("/")[1] for name in means)
    values = {
        name: np.concatenate([column(rows, f"{kind}/{name}/mean")[1] for kind in ("reward", "heldout")])
        for name in names
    }
    shares = [name for name, found in values.items() if len(found) and found.min() >= 0 and found.max() <= 1]
    others = [[name] for name, found in values.items() if len(found) and name not in shares]
    return ([shares] if shares else []) + others


def draw_rewards(figure: Any, groups: Sequence[Sequence[str]], rows: Sequence[Row]) -> None:
    """Draw the training and held-out rewards of every group in a panel."""
    title = "Training reward (line, ± standard deviation) and held-out reward (markers, 95 % interval)"
    alarms = [row for row in rows if row.get("alarm")]
    if alarms:
        title += "\n" + fill(f"Alarm (dotted) at step {alarms[0]['step']}: {alarms[0]['alarm']}", 110)
    figure.suptitle(title, color=WORSE if alarms else INK)
    colours = iter(COLOURS * sum(map(len, groups)))
    for axes, names in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for name in names:
            colour = next(colours)
            draw_training(axes, rows, name, colour)
            draw_heldout(axes, rows, name, colour)
        for row in alarms[:1]:
            axes.axvline(row["step"], color=WORSE, linestyle=":", linewidth=1.5)
        axes.set(xlabel="step", ylabel=", ".join(names))
        legend_below(axes)


def column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Take a metric's (steps, values), where it was written."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None and "step" in row]
    return tuple(np.array(found, float).reshape(-1, 2).T)


def smooth(values: np.ndarray) -> np.ndarray:
    """Average exponentially, without the pull of the start."""

    def fading_sum(series: np.ndarray) -> np.ndarray:
        return np.array([*accumulate(series.tolist(), lambda total, value: (1 - SMOOTHING) * total + value)])

    return fading_sum(values) / fading_sum(np.ones(len(values)))


def draw_training(axes: Any, rows: Sequence[Row], name: str, colour: str) -> None:
    """Draw a training reward: steps pale, trend strong, a band of one standard deviation."""
    steps, means = column(rows, f"reward/{name}/mean")
    if not len(steps):
        return
    trend = smooth(means)
    axes.plot(steps, means, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, trend, color=colour, linewidth=2, label=f"{name}, training")
    at, std = column(rows, f"reward/{name}/std")
    if len(at) == len(steps):
        axes.fill_between(
            steps, trend - smooth(std), trend + smooth(std), color=colour, alpha=0.08, linewidth=0
        )


def draw_heldout(axes: Any, rows: Sequence[Row], name: str, colour: str) -> None:
    """Draw a held-out reward with its confidence interval."""
    steps, means = column(rows, f"heldout/{name}/mean")
    if not len(steps):
        return
    at, width = column(rows, f"heldout/{name}/ci95")
    errors = width if len(at) == len(steps) else None
    style = {
        "color": colour,
        "linestyle": "--",
        "marker": "o",
        "markersize": 5,
        "capsize": 3,
        "linewidth": 1.5,
    }
    axes.errorbar(steps, means, errors, label=f"{name}, held-out {means[0]:.3f} → {means[-1]:.3f}", **style)


def draw_optimizer(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the gradient's norm and the distance from the model without adapter."""
    lines = {
        "grad_norm": "size of the gradient (norm)",
        "kl/velocity": "change of the model (KL)",
        "kl/heldout": "change of the model, held-out (KL)",
    }
    for (name, label), colour in zip(lines.items(), COLOURS, strict=False):
        steps, values = column(rows, name)
        shown = values > ROUNDING
        if shown.any():
            axes.plot(steps[shown], values[shown], color=colour, linewidth=1.2, label=label)
            axes.set_yscale("log")
    axes.set(xlabel="step", title="How much the model changes")
    legend_below(axes)


def draw_diversity(axes: Any, rows: Sequence[Row]) -> None:
    """Draw how unlike images are, against the first value: in rollouts and on held-out prompts."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("diversity/"))
    measures = {name.split("/")[1] for name in names if name.count("/") > 1}
    for name, colour in zip(names, COLOURS * len(names), strict=False):
        steps, values = column(rows, name)
        if len(steps) and values[0] > 0:
            trend = smooth(values) if name == "diversity/group" else values
            label = diversity_label(name, len(measures) > 1)
            axes.plot(steps, trend / values[0], color=colour, linewidth=1.2, label=label)
    axes.set(xlabel="step", title="How different pictures are (1: as at first)")
    axes.set_ylim(0, 1.05 * max(axes.get_ylim()[1], 1))
    legend_below(axes)


def diversity_label(name: str, several: bool) -> str:
    """Say what a diversity metric compares, and by what where there are `several` measures."""
    _, *measure, of = name.split("/")
    if not measure:
        return "of one prompt, in training"
    by = f", by {MEASURES.get(measure[0], measure[0])}" if several else ""
    return f"{'of one held-out prompt' if of == 'group' else 'of different held-out prompts'}{by}"


def legend_below(axes: Any) -> None:
    """Explain the lines of a panel beneath it, where the words cover none of them."""
    from matplotlib.transforms import ScaledTranslation

    handles, labels = axes.get_legend_handles_labels()
    if handles:
        under_the_axis = axes.transAxes + ScaledTranslation(0, -0.55, axes.figure.dpi_scale_trans)
        place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "bbox_transform": under_the_axis}
        axes.legend(handles, labels, frameon=False, fontsize="small", borderaxespad=0, **place)


def draw_time(axes: Any, rows: Sequence[Row]) -> None:
    """Draw the seconds of a step by phase, stacked."""
    series = {phase: column(rows, f"time/{phase}") for phase in PHASES}
    series = {phase: values for phase, values in series.items() if len(values[0])}
    axes.set(xlabel="step", title="Seconds per step")
    if len({len(steps) for steps, _ in series.values()}) == 1:
        steps = next(iter(series.values()))[0]
        layers = [smooth(values) for _, values in series.values()]
        axes.stackplot(
            steps, layers, labels=[PHASES[phase] for phase in series], colors=COLOURS, alpha=0.8, linewidth=0
        )
        legend_below(axes)


def before_after(
    before: Sequence[Sample], after: Sequence[Sample], path: Path, steps: tuple[int, int]
) -> None:
    """Draw a block per prompt: seeds side by side, without the adapter above, with it below."""
    pairs: dict[str, list[tuple[Sample, Sample]]] = {}
    matching = {(sample.prompt, sample.seed): sample for sample in after}
    for old in before:
        if new := matching.get((old.prompt, old.seed)):
            pairs.setdefault(old.prompt, []).append((old, new))
    if not pairs:
        return
    blocks = [draw_block(prompt, couples) for prompt, couples in pairs.items()]
    across = 2 if len(blocks) > 1 else 1
    width, height = max(block.width for block in blocks), max(block.height for block in blocks)
    down = -(-len(blocks) // across)
    caption = (
        "Held-out prompts, evenly spaced over the list, and their start noises: fixed before the run, the "
        "same above and below."
    )
    written = MARGIN + round(font(14).getlength(caption))
    sheet = Image.new(
        "RGB",
        (MARGIN + max(across * (width + MARGIN), written), down * (height + MARGIN) + 3 * MARGIN + 20),
        PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (MARGIN, MARGIN // 2), f"Before training (step {steps[0]}) and after (step {steps[1]})", INK, font(22)
    )
    pen.text((MARGIN, MARGIN // 2 + 30), caption, PALE, font(14))
    for i, block in enumerate(blocks):
        # Beside a longer prompt the pictures stand at the same height.
        top = 3 * MARGIN + 10 + i // across * (height + MARGIN) + height - block.height
        sheet.paste(block, (MARGIN + i % across * (width + MARGIN), top))
    buffer = BytesIO()
    sheet.save(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def draw_block(prompt: str, couples: Sequence[tuple[Sample, Sample]]) -> Image.Image:
    """Draw one prompt's pairs; where it starts from a picture, that stands before them."""
    label, start = 64, couples[0][0].start
    names = list(couples[0][1].scores)
    lines = 18 * len(names)
    across = max(1 if sample.frames == 1 else sample.frames / 2 for couple in couples for sample in couple)
    across = round(TILE * across)
    first = label + (TILE + GAP if start else 0)
    width = first + len(couples) * (across + GAP)
    title = wrapped(prompt, width - label)
    head = 8 + LINE * len(title)
    block = Image.new("RGB", (width, head + 2 * (TILE + GAP) + lines), PAPER)
    pen = ImageDraw.Draw(block)
    for row, text in enumerate(title):
        pen.text((label, LINE * row), text, INK, font(18))
    for row, word in enumerate(("before", "after")):
        pen.text((0, head + row * (TILE + GAP) + TILE // 2 - 10), word, PALE, font(16))
    if start:
        block.paste(tile(start), (label, head))
        pen.text((label, head + TILE + GAP), "starts from", PALE, font(14))
    for i, couple in enumerate(couples):
        left = first + i * (across + GAP)
        for row, sample in enumerate(couple):
            block.paste(tile(sample.path, sample.frames), (left, head + row * (TILE + GAP)))
        for line, name in enumerate(names):
            text, colour = gain(name, couple[0].scores.get(name), couple[1].scores.get(name))
            pen.text((left, head + 2 * (TILE + GAP) - 2 + 18 * line), text, colour, font(14))
    return block


def gain(name: str, old: float | None, new: float | None) -> tuple[str, str]:
    """Word a score's change and choose its colour: pale where the words show none."""
    if old is None or new is None:
        return f"{name}: not judged", PALE
    shown = f"{old:.2f}", f"{new:.2f}"
    colour = PALE if shown[0] == shown[1] else BETTER if new > old else WORSE
    return f"{name} {shown[0]} → {shown[1]}", colour


def tile(path: Path, frames: int = 1) -> Image.Image:
    """Load an image at a tile's size, a clip's frames at half; small ones keep their pixels.

    PictureError where there is no picture.
    """
    picture = looked_at(path, lambda image: image.convert("RGB"))
    scale = (
        TILE / max(picture.size) if frames == 1 else TILE / max(2 * picture.width / frames, picture.height)
    )
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def wrapped(text: str, width: float) -> list[str]:
    """Break a prompt into at most LINES lines of a width in pixels; what is left over is cut."""
    pen, lines = font(18), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or pen.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < LINES:
            lines.append(word)
        else:
            lines[-1] = longer
            break
    return [shortened(line, width, pen) for line in lines]


def shortened(text: str, width: float, pen: ImageFont.FreeTypeFont) -> str:
    """Cut a line to a width in pixels."""
    if pen.getlength(text) <= width:
        return text
    while text and pen.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that matplotlib brings, so that every machine draws the same."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
