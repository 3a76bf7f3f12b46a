"""A whole run, for command line and graph alike: train, evaluate, save, stop, resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from ..curriculum.prompt_choice import choice_cost
from ..files.safe import FileError
from ..recipes import build_plan
from .checkpoint import averaged, save
from .evaluation import Evaluation, evaluate
from .folder import RunFolder
from .iteration import iterate
from .setup import Check, Learner, Setup
from .summary import alarm_at, first_look, summarise
from .watch import Seen, best_step, blind_spots, evaluated, forewarnings, sign_row, signs


class Watcher(Protocol):
    """Who is told what happens."""

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin at `first_step`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Take the row of a step, as it goes into the run folder."""

    def note(self, text: str) -> None:
        """Take a remark."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End, with the summary."""


def learn(
    setup: Setup,
    learner: Learner,
    folder: RunFolder,
    watcher: Watcher,
    check: Check,
    stops: tuple[type[BaseException], ...],
) -> None:
    """Run up to the budget of steps or minutes; one of `stops` leaves a checkpoint and goes on up."""
    pace, plan = (
        setup.pace,
        build_plan(setup.recipe, coarsest=setup.speed.tail_stride if learner.cheap else 1),
    )
    count, (more, seen) = pace.prompts_per_step, choice_cost(setup.recipe)
    cost = f"{count * (plan.forwards + more)} forwards and {count * (plan.pictures + seen)} pictures per step"
    watcher.start(pace.steps, learner.step, setup.stored.about if setup.stored else cost)
    judges = [judge.name for judge in setup.judges]
    for note in (
        *setup.prompts.notes,
        # A step over what is stored takes forks, of which a prompt may have many.
        *forewarnings(
            dataclasses.replace(pace, prompts_per_step=1) if setup.stored else pace,
            setup.prompts,
            setup.rewards,
            setup.judges,
        ),
        *blind_spots(pace, len(setup.prompts.heldout), judges, setup.trained, setup.measures),
    ):
        watcher.note(note)
    if done := nothing_left(setup, learner):
        watcher.note(done)
    try:
        if learner.step == 0 or (due(pace.eval_every, learner.step) and learner.step < pace.steps):
            # A run that was stopped while it looked looks again.
            look(setup, learner, folder, watcher, check)
        halted = halt(setup, learner, folder, watcher)
        while learner.step < pace.steps and not halted and not out_of_time(setup, learner):
            waited = setup.world.waited()
            row = (setup.stored or iterate)(setup, learner, check)
            try:
                row |= setup.world.waiting(waited)
            finally:
                # The step is made, also where another process ends the run now.
                if setup.world.speaks:
                    folder.append(row)
                watcher.step(row)
            tell(setup, learner, row, watcher)
            if due(pace.eval_every, learner.step) and learner.step < pace.steps:
                look(setup, learner, folder, watcher, check)
                halted = halt(setup, learner, folder, watcher)
            if due(pace.checkpoint_every, learner.step):
                save(setup, learner, folder)
    except stops:
        if learner.step:
            save(setup, learner, folder)
        raise
    save(setup, learner, folder)


def nothing_left(setup: Setup, learner: Learner) -> str:
    """Say that the budget of steps or minutes is spent; nothing where it is not."""
    made, steps = learner.step, setup.pace.steps
    if made > steps:
        return f"nothing left to do: {made} steps are made, and steps is {steps}; a longer run needs more"
    spent = "" if made == steps else ", and its time is used"
    if spent and not out_of_time(setup, learner):
        return ""
    limit = "minutes" if spent else "steps"
    return (
        f"nothing left to do: {made} of {steps} steps are made{spent}; raise {limit} to make the run longer"
    )


def tell(setup: Setup, learner: Learner, row: Mapping[str, Any], watcher: Watcher) -> None:
    """Tell the watcher what became of memory and of cheap completions in the iteration that made a row."""
    if news := learner.limits.news():
        watcher.note(f"step {row['step']}: {news}")
    while setup.velocity and setup.velocity.notes:
        watcher.note(setup.velocity.notes.pop(0))
    if row.get("guard/on") == 0:
        much = (
            f"rank rewards as exact ones do to {row['guard/rank']:.3f} only, and speed.guard_rank asks for "
            f"{setup.speed.guard_rank:g}"
        )
        watcher.note(
            f"step {row['step']}: cheap completions {much}; they are switched off, and this step was "
            "rolled out exactly"
        )


def look(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check) -> None:
    """Evaluate on held-out prompts, unless this step has been; keep scores, images, the best LoRA."""
    world = setup.world
    if not setup.prompts.heldout or world.told(world.speaks and looked(folder, learner.step)):
        return
    recipe = None if setup.pace.watch == "off" else setup.recipe
    with averaged(setup, learner):
        evaluation = evaluate(
            setup.policy,
            setup.judges,
            setup.prompts.heldout,
            learner.limits.within(setup.pace),
            setup.sigmas,
            setup.shape,
            partial(check, "evaluate"),
            recipe=recipe,
            preview=setup.preview,
            preview_sigmas=setup.preview_sigmas,
            world=world,
        )
    if not world.speaks:
        return
    evaluation.save(folder, learner.step)
    row = {"step": learner.step} | evaluation.metrics()
    if recipe:
        try:
            row |= notice(setup, folder, evaluation)
        except FileError as error:
            watcher.note(f"step {learner.step}: the watch cannot compare with former evaluations: {error}")
    if best_step([*folder.metrics(), row], setup.trained, setup.measures) == learner.step:
        # First: a row without its checkpoint would never bring it about again.
        save(setup, learner, folder, row)
    folder.append(row)
    watcher.step(row)
    if text := row.get("alarm") or row.get("sign"):
        watcher.note(f"{'ALARM' if 'alarm' in row else 'watch'}, step {learner.step}: {text}")


def notice(setup: Setup, folder: RunFolder, now: Evaluation) -> dict[str, Any]:
    """Compare an evaluation with those in the run folder; return what the watch adds to its row."""
    rows = folder.metrics()
    looks = evaluated(rows)
    if not looks:
        return {}
    first = first_look(rows)
    best = best_step(rows, setup.trained, setup.measures) or first
    base = Evaluation.read(folder, first)
    if (base.names, base.prompts) != (now.names, now.prompts):
        return {}
    seen = Seen(
        base,
        base if best == first else Evaluation.read(folder, best),
        now,
        best,
        setup.trained,
        setup.pace,
        rows,
        setup.measures,
    )
    return sign_row(signs(seen), looks[-1], setup.pace.patience)


def halt(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher) -> bool:
    """Say, in every process alike, whether the evaluation of this step raised an alarm that stops the run."""
    alarm = setup.world.speaks and setup.pace.watch == "stop" and alarm_at(folder.metrics(), learner.step)
    if not setup.world.told(bool(alarm)):
        return False
    watcher.note(f"stopped by the watch at step {learner.step}; watch = warn goes on")
    return True


def looked(folder: RunFolder, step: int) -> bool:
    """Return whether a step has its row of held-out metrics."""
    return any(row.get("step") == step for row in evaluated(folder.metrics()))


def finish(
    setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check, name: str
) -> dict[str, Any]:
    """Evaluate the outcome and write the summary of a run by the recipe `name`."""
    look(setup, learner, folder, watcher, check)
    setup.world.wait()
    if not setup.world.speaks:
        return {}
    summary, notes = summarise(setup, learner, folder, name)
    for note in notes:
        watcher.note(note)
    folder.save_summary(summary)
    return summary


def due(every: int, step: int) -> bool:
    """Return whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


def out_of_time(setup: Setup, learner: Learner) -> bool:
    """Return, in every process alike, whether the budget of training minutes is spent."""
    minutes = setup.pace.minutes
    return minutes is not None and setup.world.told(learner.seconds >= 60 * minutes)
