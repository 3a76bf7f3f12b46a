"""What follows a run beside the display: curves.png while the run goes on, and trackers, through accelerate.

None of them may break a run: what fails is said once and left out from then on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from accelerate import Accelerator

from comfy_g2rpo.files.safe import FileError, read_table, write_json
from comfy_g2rpo.run.folder import RunFolder

from .progress import Progress
from .report import curves

if TYPE_CHECKING:
    from ..config.reading import Config


PAUSE = 10.0
"""Seconds from one drawing of curves.png to the next: a drawing takes half a second or more."""


SENT = "trackers.json"
"""What trackers know of a run, in its folder."""


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
    """Sends the numbers of every row to one of accelerate's trackers.

    Each row once: a run that is resumed writes the rows behind its checkpoint again, and they are the same.
    TensorBoard can take them back; of the others trackers.json in the run folder knows what they have.
    """

    def __init__(self, inner: Progress, name: str, folder: RunFolder, config: Config, cpu: bool) -> None:
        super().__init__(inner)
        self.name, self.folder, self.config, self.cpu = name, folder, config, cpu
        self.host: Accelerator | None = None
        self.local = name == "tensorboard"
        self.notes = folder.path / SENT
        self.sent = {"id": uuid4().hex[:8], "step": 0, "look": -1}
        """Its name of the run, and the steps whose row, and whose evaluation, it had last."""

    def begin(self, first_step: int) -> None:
        """Open the tracker: TensorBoard's files lie in the run folder, which holds the settings anyway."""
        place, called = str(self.folder.path), self.folder.path.name
        former = self.known().get(self.name)
        self.sent |= former if isinstance(former, dict) and former.keys() == self.sent.keys() else {}
        own = self.sent["id"]
        given = {
            # What an interrupted run wrote behind its checkpoint is written again.
            "tensorboard": {"purge_step": first_step + 1},
            "trackio": {"name": f"{called}-{own}", "resume": "allow"},
            "wandb": {"name": called, "dir": place, "id": own, "resume": "allow"},
        }
        local = self.local
        project = self.name if local else self.config.report.project
        settings = None if local else flat(self.config.model_dump(mode="json"))
        host = Accelerator(cpu=self.cpu, log_with=self.name, project_dir=place)
        host.init_trackers(project, config=settings, init_kwargs={self.name: given[self.name]})
        if not host.trackers:
            old = f"accelerate {version('accelerate')} does not know it, or not find it"
            raise ValueError(f"{old}; pip install --upgrade accelerate {self.name}")
        self.host = host
        for metrics in () if self.local else self.folder.metrics():
            self.row(metrics)  # what a former process has not come to

    def row(self, metrics: Mapping[str, Any]) -> None:
        """Send the numbers of a row, unless they have been sent before."""
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        step, kind = numbers.pop("step"), "step" if "nfe" in metrics else "look"
        if self.host and (self.local or step > self.sent[kind]):
            self.host.log(numbers, step=step)
            self.sent[kind] = step
            if not self.local:
                write_json(self.notes, self.known() | {self.name: self.sent})

    def known(self) -> dict[str, Any]:
        """Read what the trackers of this run have; nothing where that is damaged."""
        try:
            return read_table(self.notes)
        except FileError:
            return {}

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
