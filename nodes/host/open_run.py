"""A run's folder as the blocks open it: begun, or continued by the same settings on the same MODEL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...comfy_g2rpo.files.one_writer import LOCK
from ...comfy_g2rpo.files.safe import RunError, spelt_out
from ...comfy_g2rpo.run.folder import RunFolder, is_run

IF_CHANGED = (NEW, CONTINUE, ASK) = ("new", "continue", "ask")
"""What a named run does when it is asked for with other settings."""
BEGUN = {"config.json", "metrics.jsonl", "images", "checkpoints", LOCK}


def open_run(
    place: Path, config: Mapping[str, Any], defaults: Mapping[str, Mapping[str, Any]] | None = None
) -> RunFolder:
    """Open the run at `place`, or begin it; raise RunError where other settings made it.

    A run without a finished step, such as one that ran out of memory, is begun anew by other settings.
    Earlier versions did not write down which patches the MODEL carried: a run of theirs takes those of now.
    """
    if not is_run(place):
        return RunFolder.create(place, config)
    now = config["config"]["model"]["patches"]
    try:
        run = RunFolder.reopen(place, config, {**(defaults or {}), "model": {"patches": now}})
    except RunError:
        if made_no_step(RunFolder(place)):
            return RunFolder.create(place, config, replace=True)
        raise
    if not says_patches(run):
        content = run.config()
        content["config"]["model"]["patches"] = now
        run.save_config(content)
    return run


def says_patches(run: RunFolder) -> bool:
    """Return whether a run's configuration tells which patches its MODEL carried."""
    return "patches" in spelt_out(spelt_out(run.config().get("config")).get("model"))


def made_no_step(run: RunFolder) -> bool:
    """Return whether a run holds no step, and nothing that somebody put there, such as votes."""
    if not {entry.name for entry in run.path.iterdir()} <= BEGUN:
        return False
    saved = {place.name for place in run.checkpoints.glob("*")}
    return saved <= {"000000"} and not any(row.get("step") for row in run.metrics())
