"""Plans that begin more branches than they finish: judged on the way, those that differ most go on.

Two judges. `prediction` is Pro-GRPO's expand and prune (arXiv 2512.15347): the picture that a branch's
velocity predicts in one step, x̂₀ = x − σv, after given shares of its way. `coarsest` is successive halving
over granularities: the branch's completion at the largest stride, whose common states the finer ones share.
Either way a group's advantages come from the final pictures of its finished members alone.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..objectives.record_rows import Records
from ..plan import ROOT, Leaf, Plan, State

Alive = Sequence[Sequence[int]]
"""By block (what is compared: a start's branch step, or all trajectories) the members that go on."""


@dataclass(frozen=True)
class PrunedPlan(Plan):
    """A plan in stages: after all but the last one the members of a block are judged, and `sizes` go on."""

    members: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """The leaves of every member of every block, by level: granularities, then predictions."""
    judges: tuple[int, ...] = ()
    """The level that each stage is judged by; the levels of the last stage are the `finals`."""
    sizes: tuple[int, ...] = ()
    finals: tuple[int, ...] = ()

    @cached_property
    def everybody(self) -> tuple[tuple[int, ...], ...]:
        """List all members of every block."""
        return tuple(tuple(range(len(block))) for block in self.members)

    def leaves_of(self, stage: int, alive: Alive) -> list[int]:
        """List the finished states that a stage makes for the members that are left."""
        levels = (self.judges[stage],) if stage < len(self.judges) else self.finals
        blocks = zip(self.members, alive, strict=True)
        return [
            self.leaves[block[m][level]].state for block, left in blocks for m in left for level in levels
        ]

    def above(self, states: Iterable[int], done: Collection[int] = ()) -> set[int]:
        """Return the states and their ancestors, but for those that are done."""
        found: set[int] = set()
        for state in states:
            while state != ROOT and state not in found and state not in done:
                found.add(state)
                state = self.states[state].parent
        return found

    @cached_property
    def run_states(self) -> frozenset[int]:
        """Return the states that run if the first members of every block are the ones that go on.

        Members are alike, so whoever goes on, as many states run.
        """
        found = self.above(self.leaves_of(0, self.everybody))
        for stage, size in enumerate(self.sizes, start=1):
            alive = [left[:size] for left in self.everybody]
            found |= self.above(self.leaves_of(stage, alive), found)
        return frozenset(found)

    @cached_property
    def forwards(self) -> int:
        """Count the velocity evaluations of all stages."""
        return sum(bool(self.children[state]) for state in self.run_states)

    @property
    def pictures(self) -> int:
        """Count the pictures that are decoded and judged in all stages."""
        return sum(not self.children[state] for state in self.run_states)

    @property
    def rows(self) -> int:
        """Count the states at which an update differentiates."""
        table = self.finished([left[: self.sizes[-1]] for left in self.everybody])
        return len({self.states[i].parent for i in self.transitions if table[self.place(i)]})

    def place(self, state: int) -> tuple[int, int]:
        """Return the group and the member of a trained edge."""
        return self.states[state].group, self.states[state].member

    def final_values(self, scores: Tensor) -> Tensor:
        """Give each trained edge the scores of its final pictures: [R, images] → [R, K, G, finals]."""
        return self.values(scores)[..., list(self.finals)]

    def finished(self, alive: Alive) -> Tensor:
        """Mark the members that were finished in the table of advantages: bool [K, G]."""
        table = torch.zeros(self.shape[:2], dtype=torch.bool)
        for state in self.above(self.leaves_of(len(self.judges), alive)):
            if self.states[state].trained:
                table[self.place(state)] = True
        return table

    def images_of(self, states: Iterable[int]) -> list[int]:
        """Return the positions of finished states among the images, in order."""
        wanted = set(states)
        return [i for i, state in enumerate(self.images) if state in wanted]


def pruned(plan: Plan, strides: Sequence[int], finish: int, by: str, shares: Sequence[float]) -> PrunedPlan:
    """Make a plan of more branches than `finish` one that finishes so many of every block.

    Its leaves must be laid out as `singular` and `independent` do: all of a member, one per stride, together.
    `by` is "coarsest" or "prediction", `shares` of a branch's way are made when predictions are judged.
    The published sizes between the first and the last check are not known; here they shrink by one factor.
    """
    levels, group = len(strides), plan.shape[1]
    units = [tuple(range(at, at + levels)) for at in range(0, len(plan.leaves), levels)]
    coarse = max(range(levels), key=lambda level: strides[level])
    finals: Sequence[int] = range(levels)
    if by == "coarsest":
        judges, finals = (coarse,), [level for level in finals if level != coarse]
    else:
        judges = tuple(range(levels, levels + len(shares)))
        plan, units = with_predictions(plan, units, coarse, shares)
    count = len(judges)
    sizes = tuple(round(finish * (group / finish) ** (1 - i / count)) for i in range(1, count + 1))
    blocks = tuple(tuple(units[at : at + group]) for at in range(0, len(units), group))
    made = (plan.num_steps, plan.states, plan.leaves)
    return PrunedPlan(*made, members=blocks, judges=judges, sizes=sizes, finals=tuple(finals))


def with_predictions(
    plan: Plan, units: Sequence[tuple[int, ...]], level: int, shares: Sequence[float]
) -> tuple[Plan, list[tuple[int, ...]]]:
    """Add to each member, after each share of the way that it goes alone, a leaf of the predicted picture."""
    states, leaves, units = list(plan.states), list(plan.leaves), list(units)
    ways = [way_to(plan, plan.leaves[unit[level]].state) for unit in units]
    beneath = Counter(state for way in ways for state in way)
    end = plan.num_steps
    known = {state.parent: i for i, state in enumerate(states) if state == State(end, state.parent)}
    first_level = 1 + max(leaf.granularity for leaf in leaves)
    for i, way in enumerate(ways):
        own = [state for state in way[:-1] if beneath[state] == 1]
        start = states[own[0]].index
        for position, share in enumerate(sorted(shares)):
            goal = start + share * (end - start) + 1e-9
            at = max(state for state in own if states[state].index <= goal)
            if at not in known:
                known[at] = len(states)
                states.append(State(end, at))
            units[i] += (len(leaves),)
            leaves.append(Leaf(known[at], first_level + position))
    return dataclasses.replace(plan, states=tuple(states), leaves=tuple(leaves)), units


def way_to(plan: Plan, state: int) -> list[int]:
    """List the states on the way to a state, from the root on."""
    way = [state]
    while plan.states[way[0]].parent != ROOT:
        way.insert(0, plan.states[way[0]].parent)
    return way


def widest(scores: Sequence[float], count: int) -> list[int]:
    """Choose the `count` members whose scores have the largest variance, in order of their numbers.

    Pro-GRPO's optimal variance filtering (arXiv 2512.15347): the best subset is made of some of the least and
    some of the greatest, so that count + 1 subsets are compared. Of equal ones the more balanced is taken.
    """
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    values = torch.tensor([scores[i] for i in order], dtype=torch.float64)
    values = values - values.mean()
    chosen = [(*range(low), *range(len(order) - count + low, len(order))) for low in range(count + 1)]
    spread = [values[list(part)].var(unbiased=False).item() for part in chosen]
    least = max(spread) - 1e-9 * values.square().mean().item()
    equal = [part for part, each in zip(chosen, spread, strict=True) if each >= least]
    return sorted(order[i] for i in equal[(len(equal) - 1) // 2])


def finished_rows(made: Records, plan: PrunedPlan, finished: Sequence[Tensor]) -> Records:
    """Keep the rows of states that a finished member leaves, weighted by the members that were finished.

    `finished` holds a table bool [K, G] per prompt. The objective is then the published mean over survivors.
    """
    leaving = {
        fork: [plan.place(i) for i in plan.children[fork] if i in plan.transitions] for fork in plan.forks
    }
    kept = [any(table[place] for place in leaving[fork]) for table in finished for fork in plan.forks]
    rows = torch.tensor(kept, device=made.x.device).nonzero().flatten()
    part = made.rows(rows)
    return dataclasses.replace(part, weight=part.weight * (plan.shape[1] / plan.sizes[-1]))
