"""The price of a run, before it runs: forwards and images, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from comfy_g2rpo.curriculum.prompt_choice import choice_cost
from comfy_g2rpo.objectives import OBJECTIVES
from comfy_g2rpo.recipes import build_plan
from comfy_g2rpo.run.evaluation import price

from ..config.file_checks import read_prompts
from ..config.reading import Config, make_pace, make_recipe

COUNTED_PLANS = 20


@dataclass(frozen=True)
class Counts:
    """What a run does; an average where iterations differ."""

    prompts: int
    heldout: int
    steps: int
    group_forwards: float
    group_images: float
    group_trained: float
    evaluations: int
    evaluation_forwards: int
    evaluation_images: int
    passes: int = 1
    """Passes of the update at each state: one, or a snapshot's and one per epoch."""
    again: int = 0
    """Those of old forks among them."""
    snapshots: int = 0
    """Those of a snapshot among them, which are forwards alone."""

    def update_operations(self, both: float, forward: float) -> float:
        """Return the operations of a group's update, of those of a whole pass and of its forward."""
        rows = self.group_trained / self.passes
        return rows * ((self.passes - self.snapshots) * both + self.snapshots * forward)

    @property
    def step_forwards(self) -> float:
        """Forwards of a step's rollout."""
        return self.prompts * self.group_forwards

    @property
    def forwards(self) -> float:
        """Forwards of the whole run, those of evaluations among them."""
        return self.steps * self.step_forwards + self.evaluations * self.evaluation_forwards

    @property
    def images(self) -> float:
        """Pictures of the whole run."""
        return self.steps * self.prompts * self.group_images + self.evaluations * self.evaluation_images


@dataclass(frozen=True)
class Cost:
    """Seconds of a start, a step, an evaluation and an end of a run, on a device."""

    device: str
    start: float
    step: float
    look: float
    end: float
    peak: int
    left_out: str
    """Rewards that were not asked, and so are not in the time."""
    at: float
    """When it was measured, in seconds since 1970."""

    def run(self, counts: Counts, minutes: float | None = None) -> float:
        """Estimate the seconds of a run; its steps end after `minutes`."""
        steps = counts.steps * self.step
        if minutes is not None:
            steps = min(steps, 60 * minutes)
        return self.start + steps + counts.evaluations * self.look + self.end


def count(config: Config) -> Counts:
    """Count what a configuration does."""
    recipe, train = make_recipe(config), config.train
    # What learns from stored forks rolls nothing out: its prompts per step are forks, each with one pass.
    counted = 0 if OBJECTIVES[recipe.objective].stored else min(train.steps, COUNTED_PLANS)
    plans = [
        build_plan(recipe, iteration, train.seed, config.speed.tail_stride) for iteration in range(counted)
    ]
    held = len(read_prompts(config).heldout)
    forwards, pictures = choice_cost(recipe)
    looks = price(recipe, make_pace(config), held, preview=bool(train.preview_width))
    between = (train.steps - 1) // train.eval_every if train.eval_every else 0
    # All branches of a fork share its forward and backward; several optimizer steps by the clipped form first
    # take a snapshot of the old velocities.
    several = recipe.epochs > 1 or recipe.update == "per_step" or bool(recipe.old_decay)
    # Old forks have theirs, and take a pass per epoch.
    again = recipe.epochs * recipe.replay
    snapshots = int(OBJECTIVES[recipe.objective].compares and several)
    passes = recipe.epochs + snapshots + again
    trained = [passes * plan.rows for plan in plans] or [passes]
    return Counts(
        prompts=train.prompts_per_step,
        heldout=held,
        steps=train.steps,
        group_forwards=forwards + sum(plan.forwards for plan in plans) / len(trained),
        group_images=pictures + sum(plan.pictures for plan in plans) / len(trained),
        group_trained=sum(trained) / len(trained),
        evaluations=(2 + between) if held else 0,
        evaluation_forwards=sum(forwards for forwards, _ in looks.values()),
        evaluation_images=sum(images for _, images in looks.values()),
        passes=passes,
        again=again,
        snapshots=snapshots,
    )


def rows_of(counts: Counts) -> list[tuple[str, str]]:
    """Lay out what is counted for reading."""
    looks = f"{counts.heldout} held-out prompts, {counts.evaluation_images:,} pictures each"
    return [
        ("steps", f"{counts.steps}"),
        ("forwards per prompt group", f"{counts.group_forwards:,.0f}"),
        ("pictures per prompt group", f"{counts.group_images:,.0f}"),
        ("forwards per step", f"{counts.step_forwards:,.0f}  ({counts.prompts} prompts)"),
        ("pictures per step", f"{counts.prompts * counts.group_images:,.0f}"),
        ("forward + backward passes per step", f"{counts.prompts * counts.group_trained:,.0f}"),
        ("evaluations", f"{counts.evaluations}  ({looks})"),
        ("forwards in all", f"{counts.forwards:,.0f}"),
        ("pictures in all", f"{counts.images:,.0f}"),
    ]


def laid_out(rows: Sequence[tuple[str, str]]) -> str:
    """Write rows below one another."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
