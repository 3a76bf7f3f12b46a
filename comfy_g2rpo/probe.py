"""What an evaluation asks beside its scores: how far exploration noise flatters the reward, and how far the adapter has moved the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .limits import Limit
from .plan import Plan
from .policy import Policy, Trainee
from .recipes import Recipe, build_plan
from .rewards import Reward
from .rollout import Rollout
from .scoring import Scorer, roll_out_and_score

STEPS = 2  # branch steps that are looked at; one picture each
FORKS = 4  # states of a prompt at which velocities are compared


def exploring(recipe: Recipe) -> Plan:
    """Plan one picture of each kind that the recipe's rollouts judge: the same at every evaluation."""
    made = dataclasses.replace(recipe, group_size=1, starts=1, antithetic=False)
    if made.tree == "singular" and made.pick == "every":
        made = dataclasses.replace(made, pick="random", pick_size=STEPS)
    return build_plan(made)


def probe(
    policy: Trainee,
    judges: Sequence[Reward],
    prompts: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    sigmas: Tensor,
    shape: Sequence[int],
    slots: int,
    batch: int,
    check: Callable[[], None] | None = None,
) -> tuple[Tensor, float]:
    """Return scores [R, P] of pictures drawn as rollouts draw them, from the noises of `seeds` [P], and the velocity KL at their states."""
    plan, conds = exploring(recipe), policy.encode(prompts)
    scorer = Scorer(policy.decode, judges, prompts, len(plan.images), batch, check=check)
    rollout = roll_out_and_score(policy, plan, sigmas, conds, seeds, shape, scorer, slots, check)
    scores = torch.stack([plan.values(scorer.scores[:, p]).flatten(1).nanmean(1) for p in range(len(prompts))], 1)
    return scores, velocity_distance(policy, rollout, conds, slots, check)


@torch.no_grad()
def velocity_distance(policy: Policy, rollout: Rollout, conds: Sequence[Any], slots: int, check: Callable[[], None] | None = None) -> float:
    """Return the mean of ‖v − v_ref‖²/D over some states of a rollout, v_ref without the adapter: the velocity KL of the update."""
    count = len(rollout.plan.forks)
    chosen = sorted({round(i * (count - 1) / max(FORKS - 1, 1)) for i in range(FORKS)})
    sigma = rollout.coefficients.sigma[[rollout.plan.forks[f] for f in chosen]].repeat(len(conds)).to(rollout.x.device)
    x, velocity = rollout.x[:, chosen].flatten(0, 1), rollout.velocity[:, chosen].flatten(0, 1)
    cond = [one for one in conds for _ in chosen]

    def distances(part: slice) -> Tensor:
        if check:
            check()
        reference = policy.velocity(x[part], sigma[part], cond[part]).float()
        return (velocity[part] - reference).square().flatten(1).mean(1)

    with policy.reference(), policy.inference():
        return Limit(slots).parts(distances, len(x)).mean().item()
