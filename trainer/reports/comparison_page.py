"""The before/after report as one HTML file: no script, nothing from elsewhere, images inside."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from comfy_g2rpo.files.picture_files import PictureError, read

from .comparison import Change, Comparison, Pair, to_show

SIDE, QUALITY = 320, 85  # of the pictures in the page
BAR, BAR_HEIGHT = 260, 26  # pixels of an interval's drawing
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --pale: #666; --paper: #fff; --line: #d9d9d9;
  --up: #0072b2; --down: #c04f00 }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --pale: #aaa; --paper: #1b1b1b; --line: #444;
  --up: #56b4e9; --down: #e69f00 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.5rem } p, td, th { overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% } td, th { padding: .4rem .6rem;
  border-bottom: 1px solid var(--line); text-align: right }
td:first-child, th:first-child { text-align: left }
.pale { color: var(--pale); font-size: .85rem } .up { color: var(--up) } .down { color: var(--down) }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; margin: 1.5rem 0 }
  .pair p { grid-column: 1 / 3; margin: 0 }
figure { margin: 0 } img { max-width: 100%; image-rendering: auto } svg { vertical-align: middle }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(comparison: Comparison, most: int) -> str:
    """Write the whole page."""
    changes = comparison.changes
    first = changes[0].reward if changes else ""
    shown = to_show(comparison.pairs, first, most)
    title = f"{comparison.before} → {comparison.after}"
    notes = "".join(f'<p class="pale">{escape(note)}</p>' for note in comparison.notes)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta '
        f'http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head><body>'
    )
    body = (
        f'<h1>{escape(comparison.before)} <span class="pale">→</span> '
        f"{escape(comparison.after)}</h1>{notes}{table(changes)}"
    )
    count = (
        f"{len(shown)} of {len(comparison.pairs)}" if len(shown) < len(comparison.pairs) else str(len(shown))
    )
    order = f", from the greatest gain of {escape(first)} to the greatest loss" if first else ""
    pictures = (
        f"<h2>Pictures</h2><p class='pale'>{count} pairs{order}. Left: {escape(comparison.before)}; right: "
        f"{escape(comparison.after)}.</p>{''.join(map(pair, shown))}"
    )
    return f"{head}{body}{pictures if shown else ''}</body></html>\n"


def table(changes: Sequence[Change]) -> str:
    """Write a row per reward, with a drawing of the interval of its gain."""
    rows = "".join(row(each) for each in changes)
    said = (
        "Gain and win rate with 95 % intervals: paired bootstrap over prompts (over pictures that have "
        "none), 9999 draws. A win is a higher score after than before, a tie half a win. An interval that "
        "holds 0 (or 50 %) may be chance. The bar shows the gain; the line is 0."
    )
    heads = "".join(
        f"<th>{name}</th>" for name in ("reward", "before", "after", "gain", "", "win rate", "prompts")
    )
    return f"<table><tr>{heads}</tr>{rows}</table><p class='pale'>{said}</p>"


def row(each: Change) -> str:
    """Write a reward's row."""
    low, high = each.gain_interval
    kind = "up" if low > 0 else "down" if high < 0 else "pale"
    share = (
        f"{percent(each.win_rate)}<br><span class='pale'>{percent(each.win_interval[0])} to "
        f"{percent(each.win_interval[1])}</span>"
    )
    gain = (
        f"<span class='{kind}'>{number(each.gain, True)}</span><br><span class='pale'>{number(low, True)} "
        f"to {number(high, True)}</span>"
    )
    cells = (number(each.before), number(each.after), gain, bar(each), share, str(each.count))
    return f"<tr><td>{escape(each.reward)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def bar(each: Change) -> str:
    """Draw the interval of a gain beside zero."""
    low, high = each.gain_interval
    if not all(map(math.isfinite, (low, high, each.gain))):
        return ""
    reach = max(abs(low), abs(high), abs(each.gain)) or 1.0
    left, middle, right = (BAR / 2 * (1 + 0.94 * value / reach) for value in (low, each.gain, high))
    colour = "var(--up)" if low > 0 else "var(--down)" if high < 0 else "var(--pale)"
    zero, line = f"M{BAR / 2} 0V{BAR_HEIGHT}", f"M{left:.1f} {BAR_HEIGHT / 2}H{right:.1f}"
    label = f"gain {number(each.gain, True)}, from {number(low, True)} to {number(high, True)}"
    return (
        f'<svg width="{BAR}" height="{BAR_HEIGHT}" role="img" aria-label="{label}">'
        f'<path d="{zero}" stroke="var(--pale)"/><path d="{line}" stroke="{colour}" stroke-width="4"/>'
        f'<circle cx="{middle:.1f}" cy="{BAR_HEIGHT / 2}" r="5" fill="{colour}"/></svg>'
    )


def pair(each: Pair) -> str:
    """Write a pair of pictures with what is known of them."""
    said = [
        f"<b>{escape(each.prompt)}</b>" if each.prompt else "",
        f'<span class="pale">{escape(each.label)}</span>',
    ]
    for name, (before, after) in each.scores.items():
        # What shows no change is not coloured as one.
        alike = number(before) == number(after)
        kind = "pale" if alike else "up" if after > before else "down" if after < before else "pale"
        said.append(
            f"<span class='{kind}'>{escape(name)} {number(before)} → {number(after)} "
            f"({number(after - before, True)})</span>"
        )
    figures = "".join(
        f"<figure>{picture(path, what)}</figure>"
        for path, what in ((each.before, "before"), (each.after, "after"))
    )
    return f"<div class='pair'><p>{' · '.join(filter(None, said))}</p>{figures}</div>"


def picture(path: Path | None, what: str) -> str:
    """Embed a picture, made small; one that cannot be read is named."""
    if path is None:
        return ""
    try:
        pixels = (read(path).numpy() * 255).round().astype(np.uint8)
    except PictureError as error:
        return f'<p class="pale">{escape(str(error))}</p>'
    small = Image.fromarray(pixels)
    small.thumbnail((SIDE, SIDE))
    if max(small.size) < SIDE // 2:
        # Pictures of tiny models are shown pixel by pixel.
        scale = SIDE // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.NEAREST)
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    data = b64encode(buffer.getvalue()).decode()
    return (
        f'<img width="{small.width}" height="{small.height}" alt="{what}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def number(value: float, signed: bool = False) -> str:
    """Write a number with four digits."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if signed else f"{value:.4g}"


def percent(value: float) -> str:
    """Write a share."""
    return "–" if not math.isfinite(value) else f"{value:.0%}"
