"""What noise does to a model's images before any training: the gains of steps, the SDE against the ODE."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..advantages import moments
from ..curriculum.prompt_choice import in_turn
from ..kernels import step as kernel_step
from ..methods.recipe_options import Recipe
from ..plan import ROOT, Plan, singular
from ..recipes import build_plan, candidate_steps
from ..run.batch_limits import Limits
from ..run.iteration import draw
from ..run.scorer import Scorer, comparison_groups, roll_out_and_score
from ..run.setup import Setup
from ..trees.dense_chains import dense, probed
from .noise_gaps import step_gains

FULL_NOISE = {"cps": 1.0}
"""Strengths beyond which a kernel adds no more noise, but less again."""


class Exploring(NamedTuple):
    """How a reward takes a kernel's noise: the mean of SDE − ODE, half of its 95 % interval over prompts, and
    the mean spread of scores within a group.
    """

    gap: float
    width: float
    spread: float


def noisy_steps(recipe: Recipe, sigmas: Tensor) -> list[int]:
    """List the steps that a recipe may explore at, without those where its kernel adds no noise."""
    stds = {
        k: kernel_step(recipe.kernel, *sigmas[k : k + 2], 1.0, sigmas[1]).std for k in range(len(sigmas) - 1)
    }
    return [k for k in candidate_steps(recipe) if stds[k] > 0]


def probing_plan(recipe: Recipe, steps: Sequence[int], etas: Sequence[float]) -> Plan:
    """Plan a recipe's group with probes of both sides of every given step: chains that are stochastic on all
    of them where its images are, and branches of one step otherwise.
    """
    finish = recipe.granularities[0], recipe.terminal
    style = {"kernel": recipe.kernel, "eta": tuple(etas)}
    if recipe.tree == "independent" and recipe.pick == "every":
        shared = recipe.shared_start
        return dense(recipe.num_steps, steps, recipe.group_size, *finish, shared_start=shared, **style)
    plan = singular(recipe.num_steps, steps, recipe.group_size, finish[:1], terminal=recipe.terminal, **style)
    return probed(plan, {*plan.forks, *plan.transitions}, *finish)


def measured_gains(
    setup: Setup, steps: Sequence[int], etas: Sequence[float], number: int, check: Callable[[str], None]
) -> dict[int, Tensor]:
    """Roll out a round's prompts with these etas [T]; return the gains [n] of every step.

    Several rewards count alike; one of a weight below 0 is better where it falls.
    """
    plan = probing_plan(setup.recipe, steps, etas)
    gains = step_gains(plan, rolled_scores(setup, plan, number, check))
    signs = torch.tensor(setup.weights).sign().nan_to_num(0.0)[:, None]
    return {k: (signs * found)[signs.squeeze(1) != 0].flatten() for k, found in gains.items()}


def rolled_scores(setup: Setup, plan: Plan, number: int, check: Callable[[str], None]) -> Tensor:
    """Run a plan for the prompts and seeds of a training step; return the scores [R, P, images]."""
    (prompts, seeds), limits = draw(setup, in_turn(setup, number), number), Limits.of(setup.pace)

    def rolling() -> None:
        check("rollout")

    conds, groups = setup.policy.encode(prompts), comparison_groups(plan)
    images, decoded = len(plan.images), limits.decode_batch
    scorer = Scorer(
        setup.policy.decode, setup.rewards, prompts, images, decoded, check=rolling, groups=groups
    )
    how = conds, seeds, setup.shape, scorer, limits.slots, rolling
    roll_out_and_score(setup.policy, plan, setup.sigmas, *how)
    for reward in setup.rewards:
        reward.settle()
    return scorer.scores


def exploring(setup: Setup, kernel: str, eta: float, check: Callable[[str], None]) -> list[Exploring]:
    """Compare a recipe's images, drawn with a kernel at one strength, with those of the same start noises
    without any; one result per reward. Branches leave at every step that the recipe may explore at.
    """
    alone = {"etas": (), "granularities": (1,), "credit": "final", "anchor_image": False, "expand": 1.0}
    every = {"pick": "every"} if setup.recipe.tree == "singular" else {}
    recipe = dataclasses.replace(setup.recipe, kernel=kernel, eta=eta, **alone, **every)
    plan = build_plan(recipe, 0, setup.pace.seed)
    plan = probed(plan, [i for i, state in enumerate(plan.states) if state.parent == ROOT])
    scores = rolled_scores(setup, plan, 0, check)
    gaps = sde_minus_ode(plan, scores).double().nanmean(2)
    values = torch.stack([plan.values(part) for part in scores.unbind(1)], 1)
    spread = torch.stack([moments(part)[1].double() for part in values])
    found = []
    for gap, apart in zip(gaps, spread, strict=True):
        known = gap[~gap.isnan()]
        width = 1.96 * known.std().item() / len(known) ** 0.5 if len(known) > 1 else float("nan")
        found.append(Exploring(gap.nanmean().item(), width, apart.nanmean().item()))
    return found


def sde_minus_ode(plan: Plan, scores: Tensor) -> Tensor:
    """Subtract from each image's score that of its start's ODE, which a probe holds: [R, P, images] →
    [R, P, images that are not probes].
    """
    column = {image: i for i, image in enumerate(plan.images)}
    without = {leaf.of: column[leaf.state] for leaf in plan.leaves if leaf.of != ROOT}
    drawn, starts = [], []
    for leaf in plan.leaves:
        if leaf.of == ROOT:
            at = leaf.state
            while plan.states[at].parent != ROOT:
                at = plan.states[at].parent
            drawn.append(column[leaf.state])
            starts.append(without[at])
    return scores[:, :, drawn] - scores[:, :, starts]
