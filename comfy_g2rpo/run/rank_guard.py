"""Cheaper completions behind a guard: what they are, and whether they still put a group's pictures in the
order of the exact ones.

A cheap completion may change a reward as long as it does not change who is better than whom. Every so many
iterations a share of the groups is completed exactly, too, from the same noises; where the order of the
rewards differs too much, the cheap path is switched off for the rest of the run, and the iteration that
showed it is rolled out exactly.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..advantages import rank_correlation
from ..plan import ROOT, Plan, State
from ..recipes import Recipe, build_plan
from ..rewards import Reward
from ..rollout import Rollout
from ..speed.cheap_completions import Speed
from ..speed.step_cache import Shortcut, Velocity
from .scorer import Scorer, leaf_group

Roll = Callable[[Plan, Sequence[int], Sequence[Reward], Shortcut | None], tuple[Scorer, Rollout]]
"""Roll out a plan for the prompts at the given places, judged by the given rewards."""


class Guarded(NamedTuple):
    """An iteration's plan, scores and states, whether cheap completions go on, and what was measured."""

    plan: Plan
    scorer: Scorer
    rollout: Rollout
    cheap: bool
    metrics: dict[str, float]


def check(speed: Speed, rewards: Sequence[Reward], prompts_at_once: int = 0) -> None:
    """Raise ValueError unless some reward can judge the guard's pictures, which are single ones of all
    prompts.
    """
    if speed.on and prompts_at_once:
        raise ValueError(
            f"train.prompts_at_once is {prompts_at_once}, but the guard of speed looks at a step's prompts "
            "together; leave the section speed out, or set train.prompts_at_once to 0 and leave --ray out"
        )
    if speed.on and all(reward.needs_group for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ValueError(
            f"speed: its guard cannot ask {names}, which judge whole groups only; leave the section "
            "out, or add a reward"
        )


def roll_out_guarded(
    roll: Roll,
    recipe: Recipe,
    speed: Speed,
    velocity: Velocity | None,
    cheap: bool,
    step: int,
    seed: int,
    prompts: int,
    rewards: Sequence[Reward],
    gather: Callable[[Tensor], Tensor] = lambda found: found,
) -> Guarded:
    """Roll out iteration `step` (from 0): by cheap completions while these are on, measured where it is time.

    `velocity` stands in for the policy's own in completions, where there is something to make it faster.
    `gather` stacks [1, 1, 2] over processes along its second dimension. The metrics are guard/rank (mean
    Spearman correlation over rewards, groups and granularities), guard/on (0 where the cheap path ends here)
    and guard/nfe (forwards that measuring and doing it again took).
    """
    places, exact = range(prompts), build_plan(recipe, step, seed)
    if not (speed.on and cheap):
        return Guarded(exact, *roll(exact, places, rewards, None), cheap, {})
    plan = build_plan(recipe, step, seed, speed.tail_stride)
    scorer, rollout = roll(plan, places, rewards, Shortcut(velocity, speed.cache))
    if step % speed.guard_every:
        return Guarded(plan, scorer, rollout, cheap, {})
    judges = [r for r, reward in enumerate(rewards) if not reward.needs_group]
    part, some = sample(exact, prompts, speed.guard_share, random.Random(f"guard {seed} {step}"))
    judged, measured = roll(part, some, [rewards[r] for r in judges], None)
    found, gain = [], recipe.credit == "gain"
    for place, p in enumerate(some):
        # By all levels: an excerpt does not know which are final, and what a rollout left out is NaN.
        true, cheaply = judged.scores[:, place], scorer.scores[judges, p]
        true = part.gains(true) if gain else part.values(true)
        cheaply = (plan.gains(cheaply) if gain else plan.values(cheaply))[:, : true.shape[1]]
        found.append(rank_correlation(cheaply, true).flatten())
    ranks = torch.cat(found)
    ranks = ranks[~ranks.isnan()]
    total, count = (
        gather(torch.tensor([[[ranks.sum().item(), float(len(ranks))]]])).flatten(0, 1).sum(0).tolist()
    )
    # Groups without any order have nothing to lose.
    rank = total / count if count else 1.0
    cheap = rank >= speed.guard_rank
    spent = measured.nfe if cheap else measured.nfe + rollout.nfe
    if not cheap:
        plan, (scorer, rollout) = exact, roll(exact, places, rewards, None)
    return Guarded(
        plan, scorer, rollout, cheap, {"guard/rank": rank, "guard/on": float(cheap), "guard/nfe": spent}
    )


def sample(plan: Plan, prompts: int, share: float, rng: random.Random) -> tuple[Plan, list[int]]:
    """Choose a share of the groups, at least one: branch steps of every prompt, or whole prompts."""
    units = sorted({leaf_group(plan, leaf) for leaf in plan.leaves} - {-1})
    if len(units) > 1:
        chosen = rng.sample(units, max(round(share * len(units)), 1))
        return excerpt(plan, chosen), list(range(prompts))
    return excerpt(plan, units), sorted(rng.sample(range(prompts), max(round(share * prompts), 1)))


def excerpt(plan: Plan, groups: Collection[int]) -> Plan:
    """Return the plan of the leaves below the given groups, and of the probes of the states that those leave;
    noises and group numbers stay.
    """
    leaves = [leaf for leaf in plan.leaves if leaf_group(plan, leaf) in groups]
    kept: set[int] = set()
    for leaf in leaves:
        at = leaf.state
        while at != ROOT and at not in kept:
            kept.add(at)
            at = plan.states[at].parent
    number = {old: new for new, old in enumerate(sorted(kept))} | {ROOT: ROOT}
    states: list[State] = [
        dataclasses.replace(plan.states[old], parent=number[plan.states[old].parent]) for old in sorted(kept)
    ]
    return Plan(
        plan.num_steps,
        tuple(states),
        tuple(dataclasses.replace(leaf, state=number[leaf.state], of=number[leaf.of]) for leaf in leaves),
    )
