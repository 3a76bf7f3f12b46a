"""What follows a run beside the display: curves.png while the run goes on, and trackers, through accelerate.

None of them may break a run: what fails is said once and left out from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from comfy_g2rpo.run.folder import RunFolder

from .progress import Progress
from .report import curves

if TYPE_CHECKING:
    from ..config.reading import Config


PAUSE = 10.0
"""Seconds from one drawing of curves.png to the next: a drawing takes half a second or more."""


class Listener:
    """Passes on what the loop tells, and does something of its own with rows of metrics."""

    name: str

    def __init__(self, inner: Progress) -> None:
        self.inner, self.well = inner, True

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin."""
        self.inner.start(total_steps, first_step, plan_line)
        self.attempt(lambda: self.begin(first_step))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Take a row."""
        self.inner.step(metrics)
        self.attempt(lambda: self.row(metrics))

    def note(self, text: str) -> None:
        """Take a remark."""
        self.inner.note(text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End, with the summary."""
        self.inner.finish(summary)

    def close(self) -> None:
        """End, however the run ended."""
        self.attempt(self.end)

    def attempt(self, work: Callable[[], None]) -> None:
        """Do something that may fail; the first failure is said, and ends it."""
        if not self.well:
            return
        try:
            work()
        except Exception as error:
            self.well = False
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.inner.note(f"{self.name} has failed and is left out from here on: {reason}")

    def begin(self, first_step: int) -> None:
        """Do what comes before the first row."""

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Do something with a row."""

    def end(self) -> None:
        """Do what comes after the last row."""


class LiveCurves(Listener):
    """Draws curves.png anew at evaluations; where a run has none on its way, every so many steps.

    Never sooner than PAUSE after the run's start and the last drawing: quick runs are drawn at their end.
    """

    name = "curves.png"

    def __init__(self, inner: Progress, folder: RunFolder, every: int) -> None:
        super().__init__(inner)
        self.folder, self.every, self.total = folder, every, 0
        self.drawn = time.monotonic()

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin."""
        self.total = total_steps
        super().start(total_steps, first_step, plan_line)

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Draw, unless there is nothing to see yet, or the end is there and draws everything anyway."""
        step, looked = metrics["step"], any(name.startswith("heldout/") for name in metrics)
        due = looked or (self.every and step % self.every == 0)
        if 0 < step < self.total and due and time.monotonic() - self.drawn >= PAUSE:
            curves(self.folder.metrics(), self.folder.path / "curves.png")
            self.drawn = time.monotonic()


class Tracker(Listener):
    """Sends the numbers of every row to one of accelerate's trackers."""

    def __init__(self, inner: Progress, name: str, folder: RunFolder, config: Config, cpu: bool) -> None:
        super().__init__(inner)
        self.name, self.folder, self.config, self.cpu = name, folder, config, cpu
        self.host: Accelerator | None = None

    def begin(self, first_step: int) -> None:
        """Open the tracker: TensorBoard's files lie in the run folder, which holds the settings anyway."""
        place = str(self.folder.path)
        given = {
            # What an interrupted run wrote behind its checkpoint is written again.
            "tensorboard": {"purge_step": first_step + 1},
            "trackio": {"name": self.folder.path.name},
            "wandb": {"name": self.folder.path.name, "dir": place},
        }
        local = self.name == "tensorboard"
        project = self.name if local else self.config.report.project
        settings = None if local else flat(self.config.model_dump(mode="json"))
        host = Accelerator(cpu=self.cpu, log_with=self.name, project_dir=place)
        host.init_trackers(project, config=settings, init_kwargs={self.name: given[self.name]})
        if not host.trackers:
            raise ValueError("accelerate does not find its package")
        self.host = host

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Send the numbers."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        step = numbers.pop("step")
        if self.host:
            self.host.log(numbers, step=step)

    def end(self) -> None:
        """Close the tracker, but not the processes' group, as accelerate's own end would."""
        for tracker in self.host.trackers if self.host else ():
            tracker.finish()


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of nested sections under dotted names, lists as text."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = str(value) if isinstance(value, (list, tuple)) else value
    return found


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError with the command that installs a tracker's package, where it is missing."""
    for name in names:
        found = find_spec(name)
        # A folder of that name in the current one, such as wandb leaves, is no package.
        if found is None or found.origin is None:
            raise ValueError(
                f"report.trackers has {name}, which is not installed; install it with: pip install {name}"
            )


@contextmanager
def listening(progress: Progress, config: Config, folder: RunFolder, cpu: bool) -> Iterator[Progress]:
    """Let curves.png and the configuration's trackers follow a run, and close them however it ends."""
    looks = (config.prompts.heldout or config.prompts.heldout_share) and config.train.eval_every
    listeners: list[Listener] = [LiveCurves(progress, folder, 0 if looks else config.train.checkpoint_every)]
    for name in config.report.trackers:
        listeners.append(Tracker(listeners[-1], name, folder, config, cpu))
    try:
        yield listeners[-1]
    finally:
        for listener in reversed(listeners):
            listener.close()
