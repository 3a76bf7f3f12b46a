"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from comfy_g2rpo.run.loop import Watcher
from comfy_g2rpo.run.summary import best_lines

from ..commands.answers import answer

SPARKS = "▁▂▃▄▅▆▇█"
PHASES = {"rollout": "cyan", "decode": "green", "reward": "yellow", "update": "magenta"}
BAR = 24
GO_ON = "to go on: g2rpo resume RUN --set train.watch=warn"


class Progress(Watcher, Protocol):
    """The loop tells; a display shows."""

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of a run that is resumed, before it starts."""

    def close(self) -> None:
        """Give the terminal back, however the run ended."""


class Silent:
    """Show nothing."""

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take former rows."""

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Take a row."""

    def note(self, text: str) -> None:
        """Take a remark."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End."""

    def close(self) -> None:
        """Give the terminal back."""


class JsonLines(Silent):
    """Print a line of JSON per row, for other programs; remarks go to the error output."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Print a row."""
        answer(metrics)

    def note(self, text: str) -> None:
        """Say a remark."""
        print(text, file=sys.stderr)


def for_terminal(quiet: bool = False) -> Progress:
    """Choose a display: none, live, or one line per step where nobody can watch."""
    if quiet:
        return Silent()
    return LiveDisplay() if sys.stdout.isatty() else Lines()


class History:
    """The rows so far and what can be said about them."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total, self.first, self.began = total_steps, first_step, time.monotonic()
        self.step = first_step
        self.series: dict[str, list[float]] = {}
        self.latest: dict[str, Any] = {}

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the scores of former rows, so that all is compared with the untrained model; not their times,
        which may be another machine's.
        """
        for row in rows:
            self.keep({name: row[name] for name in row if name.startswith(("reward/", "heldout/"))})

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Keep a row."""
        self.step = int(metrics.get("step", self.step))
        if self.step == self.first:
            # The untrained model was measured: steps begin now, and only they tell how long steps take.
            self.began = time.monotonic()
        if any(name.startswith("heldout/") for name in metrics):
            self.latest.pop("alarm", None)
        self.latest.update(metrics)
        self.keep(metrics)

    def keep(self, metrics: Mapping[str, Any]) -> None:
        """Add a row's numbers to their series."""
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and value == value:
                self.series.setdefault(name, []).append(float(value))

    def names(self, kind: str) -> list[str]:
        """List the rewards of a kind ("reward", "heldout") that have a mean."""
        return [
            name.split("/")[1]
            for name in self.series
            if name.startswith(f"{kind}/") and name.endswith("/mean")
        ]

    def eta(self) -> float:
        """Estimate the seconds that are left."""
        done = self.step - self.first
        return (time.monotonic() - self.began) / done * (self.total - self.step) if done > 0 else float("nan")

    def recent(self, name: str, count: int = 5) -> float:
        """Average the last few values, because single steps are noisy."""
        values = self.series.get(name, [])[-count:]
        return sum(values) / len(values) if values else float("nan")

    def split(self) -> dict[str, float]:
        """Share out the time by phase."""
        seconds = {phase: sum(self.series.get(f"time/{phase}", [])) for phase in PHASES}
        return {phase: value / (sum(seconds.values()) or 1) for phase, value in seconds.items()}


class Lines:
    """Print one line per step."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.history = History(0, 0)
        self.former: Sequence[Mapping[str, Any]] = ()

    def recall(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the rows of a run that is resumed."""
        self.former = rows

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Print what is about to run."""
        self.history = History(total_steps, first_step)
        self.history.recall(self.former)
        self.note(plan_line)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Print the row's rewards."""
        history = self.history
        history.add(metrics)
        words = [f"step {history.step}/{history.total}"]
        for kind in ("reward", "heldout"):
            keys = {name: f"{kind}/{name}/mean" for name in history.names(kind)}
            words += [f"{kind} {name} {metrics[key]:.3f}" for name, key in keys.items() if _has(metrics, key)]
        self.note("  ".join([*words, f"{clock(history.eta())} left"]))

    def note(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print what came out."""
        for line in outcome(summary):
            self.note(line)

    def close(self) -> None:
        """Give the terminal back."""


class LiveDisplay(Lines):
    """Keep one panel up to date."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self.live = Live(console=self.console, refresh_per_second=4, transient=False)

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Open the panel."""
        super().start(total_steps, first_step, plan_line)
        self.live.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Redraw."""
        self.history.add(metrics)
        self.live.update(panel(self.history))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the panel and print what came out."""
        self.live.stop()
        super().finish(summary)

    def close(self) -> None:
        """Give the terminal back."""
        self.live.stop()


def panel(history: History) -> Group:
    """Lay out the state of a run."""
    filled = round(BAR * history.step / max(history.total, 1))
    head = Text.assemble(("━" * filled, "bold green"), ("━" * (BAR - filled), "grey37"))
    head.append(f"  step {history.step}/{history.total}   {clock(history.eta())} left")
    table = Table.grid(padding=(0, 2))
    for name in history.names("reward"):
        key = f"reward/{name}/mean"
        start = history.series[key][0]
        table.add_row(
            "reward", name, f"{start:.3f} → {history.recent(key):.3f}", sparkline(history.series[key])
        )
    for name in history.names("heldout"):
        values = history.series[f"heldout/{name}/mean"]
        table.add_row(
            "held-out",
            name,
            f"{values[0]:.3f} → {values[-1]:.3f}",
            f"{values[-1] - values[0]:+.3f}",
            style="bold",
        )
    if alarm := history.latest.get("alarm"):
        table.add_row("alarm", "", str(alarm), "", style="bold red")
    bar = Text("time  ")
    for phase, share in history.split().items():
        bar.append("█" * round(BAR * share), PHASES[phase])
    for phase, share in history.split().items():
        bar.append(f"  {phase} {share:.0%}", PHASES[phase])
    return Group(head, table, bar)


def sparkline(values: Sequence[float], width: int = 32) -> str:
    """Draw a series in one line of at most `width` characters, neighbours averaged."""
    if not values:
        return ""
    size = min(width, len(values))
    edges = [round(i * len(values) / size) for i in range(size + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(SPARKS[round((value - low) / (high - low or 1) * (len(SPARKS) - 1))] for value in means)


def clock(seconds: float) -> str:
    """Write a duration."""
    if seconds != seconds:
        return "–:––"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def outcome(summary: Mapping[str, Any]) -> list[str]:
    """Say in a few lines what came out of a run."""
    lines = []
    for kind, label in (("reward", "training reward"), ("heldout", "held-out")):
        before, after = summary.get(f"{kind}_before") or {}, summary.get(f"{kind}_after") or {}
        for name in after:
            if _has(before, name) and _has(after, name):
                lines.append(
                    f"{label} {name}: {before[name]:.3f} → {after[name]:.3f} "
                    f"({after[name] - before[name]:+.3f})"
                )
    return lines + best_lines(summary) + watched(summary) + spent(summary)


def watched(summary: Mapping[str, Any]) -> list[str]:
    """Return what the watch saw and which LoRA to use."""
    alarms, sign, best = summary.get("alarms") or [], summary.get("sign"), summary.get("best_step")
    lines = [f"alarm at step {alarm['step']}: {alarm['text']}" for alarm in alarms[-1:]]
    if sign and sign not in {alarm["text"] for alarm in alarms}:
        lines.append(f"seen at the end: {sign}")
    if summary.get("stopped_by") == "watch":
        untrained = "no step beat the untrained model: its LoRA does nothing"
        what = f"the LoRA is that of step {best}, the best by held-out rewards" if best else untrained
        lines.append(f"stopped by the watch; {what}; {GO_ON}")
    return lines


def spent(summary: Mapping[str, Any]) -> list[str]:
    """Return what a run has cost."""
    if "seconds" not in summary:
        return []
    return [
        (
            f"{clock(summary['seconds'])} for {summary.get('steps', '?')} steps, "
            f"{summary.get('forwards', '?')} forwards"
        )
    ]


def _has(values: Mapping[str, Any], name: str) -> bool:
    """Return whether a number stands there."""
    return isinstance(values.get(name), (int, float))
