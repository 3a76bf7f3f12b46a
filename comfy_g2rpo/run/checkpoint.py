"""Checkpoints: what a bit-equal continuation needs, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from .. import lora
from ..curriculum.prompt_history import History
from ..files.safe import RunError, digest_of
from ..replay.old_forks import remembered
from ..replay.replay_file import read_forks, write_forks
from .folder import RunFolder, fitting, read_progress, write_state
from .optimizers import load_optimizer_tensors, optimizer_tensors, rate_schedule, swapped
from .setup import Learner, Setup, World, prompts_ahead
from .watch import best_step


def averaged(setup: Setup, learner: Learner) -> AbstractContextManager[None]:
    """Put the moving average, where there is one, in the adapter's place."""
    return swapped(setup.policy.parameters(), learner.average) if learner.average else nullcontext()


def save(setup: Setup, learner: Learner, folder: RunFolder, row: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint: a LoRA file and what a bit-equal continuation needs; the best one stays too.

    `row` are metrics that will be written once the checkpoint that they announce is there.
    """
    if not setup.world.speaks:
        return
    if folder.latest() is None or int(folder.latest().name) != learner.step:
        write_checkpoint(setup, learner, folder)
    rows = [*folder.metrics(), *([row] if row else [])]
    # Two at least: should the newest be damaged, there is the one before.
    keep_last = max(setup.pace.keep_checkpoints, 2) if setup.pace.keep_checkpoints else 0
    # Also where nothing was written: a kill may have come between the two.
    folder.prune(keep_last, best_step(rows, setup.trained, setup.measures))


def write_checkpoint(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Write a checkpoint of the step that was made last."""
    tensors = {
        f"parameter/{i}": p.detach() for i, p in enumerate(setup.policy.parameters())
    } | optimizer_tensors(learner.optimizer)
    for kind, values in (("average", learner.average), ("old", learner.old)):
        tensors |= {f"{kind}/{i}": value for i, value in enumerate(values)}
    for number, values in learner.versions.items():
        tensors |= {f"version/{number}/{i}": value for i, value in enumerate(values)}
    progress = {
        "step": learner.step,
        "forwards": learner.forwards,
        "seconds": learner.seconds,
        "cheap": learner.cheap,
    }
    if learner.versions:
        progress["versions"] = sorted(learner.versions)
    if learner.history != History():
        progress["history"] = learner.history.table(setup.prompts.train)
    metadata = {**setup.metadata, "g2rpo.step": str(learner.step)}

    def write(path: Any) -> None:
        with averaged(setup, learner):
            form = {"style": setup.style, "rename": setup.rename, "metadata": metadata}
            lora.write(path / "lora.safetensors", setup.policy.pairs(), setup.alpha, **form)
        if learner.forks:
            write_forks(path, learner.forks)
        write_state(path, tensors, progress)

    folder.save_checkpoint(learner.step, write)


def restore(setup: Setup, learner: Learner, folder: RunFolder) -> list[str]:
    """Bring everything back to the newest sound checkpoint, or to the start; return what is to be said."""
    remarks = folder.set_damaged_aside() if setup.world.speaks else []
    setup.world.wait()
    place = folder.latest()
    check_same(setup.world, place)
    if place is None:
        if setup.world.speaks:
            folder.truncate_metrics(0)
        return remarks
    tensors, progress = read_progress(place, ("forwards", "seconds"))
    targets = {"parameter": setup.policy.parameters(), "average": learner.average, "old": learner.old}
    found = {kind: fitting(tensors, kind, like, place) for kind, like in targets.items()}
    load_optimizer_tensors(learner.optimizer, tensors)
    with torch.no_grad():
        for kind, like in targets.items():
            for target, value in zip(like, found[kind], strict=True):
                target.copy_(value)
    learner.step, learner.forwards, learner.seconds = (
        progress["step"],
        progress["forwards"],
        progress["seconds"],
    )
    learner.schedule = rate_schedule(learner.optimizer, setup.recipe, setup.pace.steps, learner.step)
    planned = folder.config().get("config", {}).get("train", {}).get("steps", setup.pace.steps)
    falls = setup.recipe.lr_schedule != "constant" and learner.step < setup.pace.steps
    if falls and planned != setup.pace.steps:
        remarks = [*remarks, f"from here on the learning rate falls over {setup.pace.steps} steps"]
    if setup.recipe.replay:
        # Those of prompts that are not trained on any more are left out.
        found = read_forks(place, prompts_ahead(setup.prompts, setup.pace, setup.recipe))
        learner.forks = remembered(found, [], setup.recipe, learner.step)
    learner.cheap = progress.get("cheap", True) is not False
    if setup.explorer:
        kept = progress.get("versions")
        numbers = [n for n in kept if type(n) is int] if isinstance(kept, list) else []
        like = setup.policy.parameters()
        learner.versions = {n: fitting(tensors, f"version/{n}", like, place) for n in numbers}
    learner.history = History.of(progress.get("history"), setup.prompts.train, len(setup.rewards))
    if setup.world.speaks:
        folder.truncate_metrics(learner.step)
    return remarks


def check_same(world: World, place: Path | None) -> None:
    """Raise RunError unless every process has found the same checkpoint."""
    if world.count == 1:
        return
    own = [int(place.name), int(digest_of(place / "state.safetensors")[:12], 16)] if place else [0, 0]
    found = world.gather(torch.tensor([[own]], dtype=torch.float64))[0]
    if (found != found[0]).any():
        world.let_one_say()
        steps = ", ".join(f"{step:.0f}" for step in found[:, 0])
        raise RunError(
            f"the processes have found different checkpoints, of the steps {steps}; give all the same run "
            "folder, on a disk that they share"
        )
