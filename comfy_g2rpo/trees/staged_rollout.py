"""Rollouts in stages: what is finished is chosen on the way, and no state is evaluated twice.

A stage runs the states that it adds. Evaluated states whose children may come in a later stage are kept with
their velocity; a child is then computed from its parent as ever, for its noise is drawn again from the seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from ..plan import ROOT
from ..policy import Trainee
from ..rollout import Edge, Rollout
from ..run.scorer import Scorer, roll_out_and_score
from ..speed.fitting_batch import Limit
from ..speed.fitting_rollout import FittingFrontier
from ..speed.step_cache import Shortcut
from .pruned import Alive, PrunedPlan, widest

Judge = Callable[[Tensor], Tensor]
"""Makes one score [n] of the rewards [R, 1, n, 1] of n pictures that are compared."""


@dataclass(frozen=True)
class PrunedRollout(Rollout):
    """A rollout, and what was finished of it."""

    finished: tuple[Tensor, ...] = ()
    """Per prompt, the members that were: bool [K, G]."""
    images: tuple[tuple[int, ...], ...] = ()
    """Per prompt, the positions of their final pictures; as many for every prompt."""


@dataclass
class Stage:
    """What a part of a rollout runs, what it may begin with, and what it leaves for the next."""

    wanted: list[set[int]]
    """By prompt."""
    known: dict[Edge, Any] = field(default_factory=dict)
    left: dict[Edge, Any] = field(default_factory=dict)
    forks: tuple[Tensor, Tensor] | None = None


class StagedFrontier(FittingFrontier):
    """Runs the wanted states alone, from those that an earlier stage left."""

    def __init__(self, *given: Any, stage: Stage, shortcut: Shortcut | None = None) -> None:
        self.stage = stage
        super().__init__(*given, shortcut=shortcut)
        # The forks of earlier stages stay beside those that come.
        stage.forks = stage.forks or (self.fork_x, self.fork_v)
        self.fork_x, self.fork_v = stage.forks
        for edge, value in stage.known.items():
            self.known[edge], self.waiting[edge] = value, len(self.plan.children[edge[1]])
        for p, state in stage.known:
            for child in self.plan.children[state]:
                self.open(p, child)

    def open(self, p: int, state: int) -> None:
        """Queue the edge to a state of this stage."""
        if state in self.stage.wanted[p]:
            super().open(p, state)
        else:
            self.release([(p, self.plan.states[state].parent)])

    def release(self, parents: list[Edge]) -> None:
        """Forget what nothing of this stage waits for any more, but leave what the next one may need."""
        values = [(edge, self.known[edge]) for edge in parents if edge[1] != ROOT]
        super().release(parents)
        for (p, state), value in values:
            later = any(child not in self.stage.wanted[p] for child in self.plan.children[state])
            if later and (p, state) not in self.known:
                # Copies of their own do not hold the whole batch.
                self.stage.left[p, state] = type(value)(
                    *(None if part is None else part.clone() for part in value)
                )


def roll_out_pruned(
    policy: Trainee,
    plan: PrunedPlan,
    sigmas: Tensor,
    conds: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    scorer: Scorer,
    slots: int | Limit,
    check: Callable[[], None] | None = None,
    shortcut: Shortcut | None = None,
    *,
    judge: Judge,
) -> PrunedRollout:
    """Run and score a plan stage by stage; after each, `judge` says who goes on.

    The scorer ends with the final pictures of those that were finished, and NaN for all others. A picture
    that no reward could judge on the way counts as an average one.
    """
    where = (policy, plan, sigmas, conds, seeds, shape, scorer, slots, check, shortcut)
    alive: list[Alive] = [plan.everybody for _ in seeds]
    done: list[set[int]] = [set() for _ in seeds]
    stage, nfe = Stage([]), 0
    for number in range(len(plan.sizes) + 1):
        leaves = [plan.leaves_of(number, left) for left in alive]
        wanted = [plan.above(states, before) for states, before in zip(leaves, done, strict=True)]
        needed = {
            edge: value for edge, value in (stage.known | stage.left).items() if needs(plan, edge, wanted)
        }
        stage = Stage(wanted, needed, forks=stage.forks)
        if any(wanted):
            coming = [(p, image) for p, states in enumerate(wanted) for image in plan.images_of(states)]
            scorer.expect(coming)
            rollout = roll_out_and_score(*where, frontier=partial(StagedFrontier, stage=stage))
            nfe += rollout.nfe
        done = [before | states for before, states in zip(done, wanted, strict=True)]
        if number < len(plan.sizes):
            alive = [
                survivors(plan, number, left, scorer.scores[:, p], judge) for p, left in enumerate(alive)
            ]
    images = tuple(tuple(plan.images_of(states)) for states in leaves)
    scorer.blank([(p, image) for p, kept in enumerate(images) for image in kept])
    parts = {each.name: getattr(rollout, each.name) for each in dataclasses.fields(Rollout)}
    return PrunedRollout(**parts | {"nfe": nfe}, finished=tuple(map(plan.finished, alive)), images=images)


def needs(plan: PrunedPlan, edge: Edge, wanted: Sequence[set[int]]) -> bool:
    """Return whether a stage wants a child of a state."""
    p, state = edge
    return any(child in wanted[p] for child in plan.children[state])


def survivors(plan: PrunedPlan, stage: int, alive: Alive, scores: Tensor, judge: Judge) -> list[list[int]]:
    """Choose by scores [R, images] who goes on after a stage, in each block."""
    column = {state: i for i, state in enumerate(plan.images)}
    kept = []
    for block, left in zip(plan.members, alive, strict=True):
        images = [column[plan.leaves[block[m][plan.judges[stage]]].state] for m in left]
        worth = judge(scores[:, None, images, None]).nan_to_num(0.0).tolist()
        kept.append([left[i] for i in widest(worth, plan.sizes[stage])])
    return kept
