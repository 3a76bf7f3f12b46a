"""The plot of a calibration: every step's strength by round, and what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from comfy_g2rpo.exploration.calibration import Round


def draw_rounds(rounds: Sequence[Round]) -> bytes:
    """Draw the strengths of every calibrated step over the rounds, the last ones, and their balance."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = sorted(rounds[-1].balance)
    figure = Figure(figsize=(13, 4.5), layout="constrained", dpi=110)
    left, middle, right = figure.subplots(1, 3)
    colours = [colormaps["viridis"](0.9 * i / max(len(steps) - 1, 1)) for i in range(len(steps))]
    for k, colour in zip(steps, colours, strict=True):
        etas = [rounds[0].etas[k], *(each.following[k] for each in rounds)]
        left.plot(range(len(etas)), etas, color=colour, linewidth=1.2, label=f"step {k}")
    left.set(xlabel="round", title="eta of every sampling step")
    left.legend(frameon=False, fontsize="small", ncols=1 + len(steps) // 9)
    middle.bar(steps, [rounds[-1].following[k] for k in steps], color=colours)
    middle.plot(steps, [rounds[0].etas[k] for k in steps], color="#767676", linestyle="--")
    middle.set(xlabel="sampling step", title="What it came to (dashed: before)")
    late = rounds[-max(len(rounds) // 4, 1) :]
    known = {k: [each.balance[k] for each in late if each.balance[k] == each.balance[k]] for k in steps}
    right.bar(steps, [sum(known[k]) / max(len(known[k]), 1) for k in steps], color=colours)
    right.axhline(0, color="#1a1a1a", linewidth=0.8)
    right.set(xlabel="sampling step", title="Better (above 0) or worse by the noise")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
