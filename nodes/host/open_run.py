"""A run's folder as the blocks open it: begun, continued, or, under other settings, the next one of its name.

Refusals are told in the words of the blocks: which widget, and what to do; never by paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from ...comfy_g2rpo.blocks.run_names import RUN_ID
from ...comfy_g2rpo.files.one_writer import LOCK
from ...comfy_g2rpo.files.safe import FileError, RunError, spelt_out
from ...comfy_g2rpo.files.spool import NAME, Spool
from ...comfy_g2rpo.run.folder import RunFolder, is_run
from .changed_settings import Change, changes_of, told, widgets_of
from .comfyui import run_place
from .routes import runs_root
from .write_job import SPOOL

IF_CHANGED = (NEW, CONTINUE, ASK) = ("new", "continue", "ask")
"""What a named run does when it is asked for with other settings."""
BEGUN = {"config.json", "metrics.jsonl", "images", "checkpoints", LOCK}
MAX_CHANGES = 1000  # that a run keeps
HEADLESS = {
    "; make room or choose another folder (--out)": "; make room on the disk",
    "choose another folder (--out)": "give another name",
    ", start over (--replace) or choose another folder": ", or give another name in run",
    "or choose another folder": "or give another name in run",
    "; resume with the run's own configuration, or": "; give another name in run, or",
    "resume with the run's own configuration": "give another name in run",
    "start a new run": "give another name in run",
    "start another run": "give another name in run",
}
"""What the command line advises, and what a block does instead."""


@dataclass(frozen=True)
class Wanted:
    """A run that is asked for: its name, the content of its config.json, and what tells its settings apart.

    `defaults`, by section and field, stand for what runs of earlier versions do not hold; `sources` name the
    widget of a field that comes from another one, such as a preset.
    """

    name: str
    config: Mapping[str, Any]
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def changes(self, run: RunFolder) -> list[Change]:
        """List what a run was made with otherwise.

        Earlier versions did not write down which patches the MODEL carried: their runs take those of now.
        """
        patches = {"patches": self.config["config"]["model"]["patches"]}
        return changes_of(run, self.config, {**self.defaults, "model": patches}, self.sources)


@dataclass(frozen=True)
class Choice:
    """The run that is opened, what to say about that, and the settings under which it was made otherwise."""

    name: str
    remark: str = ""
    changes: tuple[Change, ...] = ()


def choose_run(wanted: Wanted, if_changed: str) -> Choice:
    """Choose the run: the named one, or by `if_changed` the first of its numbers that has these settings.

    Raises ValueError where the named run has others, and no number or no continuation is wanted.
    """
    name = wanted.name
    with plain_errors(name):
        refuse_handed_over(name)
        changes = made_otherwise(wanted, name)
        if not changes:
            return Choice(name)
        if if_changed == CONTINUE:
            if fixed := [change for change in changes if not change.goes_on]:
                raise ValueError(refusal(name, fixed, "cannot go on with other settings of this kind"))
            return Choice(name, f"run {name} goes on with other settings: {told(changes)}", tuple(changes))
        if if_changed != NEW:
            raise ValueError(refusal(name, changes, "was made with other settings"))
        number = numbered(wanted)
        refuse_handed_over(number)
        goes_on = "goes on" if is_run(run_place(number)) else "starts"
        return Choice(number, f"run {number} {goes_on}, because {name} has other settings: {told(changes)}")


def refuse_handed_over(name: str) -> None:
    """Refuse the name of a training that a worker has, or will take: both would write into one folder."""
    spool = Spool(runs_root() / SPOOL)
    if NAME.fullmatch(name) and name in spool.ids() and spool.ended(name) is None:
        raise ValueError(f"run: {name} is handed over to a worker (Submit Training); give another name")


def made_otherwise(wanted: Wanted, name: str) -> list[Change]:
    """List the changes that keep a run from going on; none where it is new, or may be begun anew.

    A run without a finished step, such as one that ran out of memory, is begun anew by other settings.
    """
    place = run_place(name)
    if not is_run(place):
        return []
    run = RunFolder(place)
    changes = wanted.changes(run)
    return [] if changes and made_no_step(run) else changes


def numbered(wanted: Wanted) -> str:
    """Return the first of name-2, name-3 … that has the settings, or the first that is free."""
    pattern = re.compile(re.escape(wanted.name) + r"-([2-9]|[1-9][0-9]{1,4})")
    with os.scandir(runs_root()) as entries:
        taken = {int(found[1]) for entry in entries if (found := pattern.fullmatch(entry.name))}
    for number in sorted(taken):
        name = f"{wanted.name}-{number}"
        # One that is damaged is not the one that is looked for.
        with suppress(FileError):
            if is_run(run_place(name)) and not made_otherwise(wanted, name):
                return name
    name = f"{wanted.name}-{next(number for number in range(2, len(taken) + 3) if number not in taken)}"
    if not RUN_ID.fullmatch(name):
        raise ValueError(
            f"run: its settings have changed, and {wanted.name} is too long to number; shorten it"
        )
    return name


def refusal(name: str, changes: Sequence[Change], why: str) -> str:
    """Say what differs, and the two ways out."""
    return f"run: {name} {why} ({told(changes)}); give another name, or put back {widgets_of(changes)}"


def open_run(wanted: Wanted, accepted: Sequence[Change] = ()) -> RunFolder:
    """Open the run, or begin it; raise ValueError where it was made with other settings than the accepted.

    To be called by its one writer.
    """
    place = run_place(wanted.name)
    with plain_errors(wanted.name):
        if not is_run(place):
            return RunFolder.create(place, wanted.config)
        run = RunFolder.open(place)
        changes = wanted.changes(run)
        if changes and made_no_step(run):
            return RunFolder.create(place, wanted.config, replace=True)
        known = {change.field for change in accepted}
        if others := [change for change in changes if change.field not in known]:
            raise ValueError(refusal(wanted.name, others, "was made with other settings"))
        if not says_patches(run):
            content = run.config()
            content["config"]["model"]["patches"] = wanted.config["config"]["model"]["patches"]
            run.save_config(content)
        return run


def note_changes(run: RunFolder, wanted: Wanted, changes: Sequence[Change], step: int) -> None:
    """Write the settings of now into a run that goes on under them, and what they were up to this step."""
    former = run.config().get("changed")
    history = former[-MAX_CHANGES:] if isinstance(former, list) else []
    history.append({"step": step, "settings": {change.field: change.text for change in changes}})
    run.save_config({**wanted.config, "changed": history})


@contextmanager
def plain_errors(name: str) -> Iterator[None]:
    """Turn an error about a run's files into a ValueError that tells them without their path."""
    try:
        yield
    except FileError as error:
        words, place = str(error), str(run_place(name))
        if not isinstance(error, RunError) and place not in words:
            raise
        words = words.replace(place + os.sep, "").replace(place, name)
        for theirs, ours in HEADLESS.items():
            words = words.replace(theirs, ours)
        begun = "run: " if words.startswith(name) else f"run: {name}: "
        raise ValueError(begun + words) from error


def says_patches(run: RunFolder) -> bool:
    """Return whether a run's configuration tells which patches its MODEL carried."""
    return "patches" in spelt_out(spelt_out(run.config().get("config")).get("model"))


def made_no_step(run: RunFolder) -> bool:
    """Return whether a run holds no step, and nothing that somebody put there, such as votes."""
    if not {entry.name for entry in run.path.iterdir()} <= BEGUN:
        return False
    saved = {place.name for place in run.checkpoints.glob("*")}
    return saved <= {"000000"} and not any(row.get("step") for row in run.metrics())
