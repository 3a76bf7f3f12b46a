"""From advantages to optimizer steps: the rows of a rollout, the gradient of an objective over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .objectives import OBJECTIVES, Values
from .objectives.policy_gradient import clipped_loss, cotangent, kl_scale, log_ratio
from .objectives.record_rows import Records, micro_batches
from .policy import Policy
from .recipes import Recipe
from .rollout import Rollout
from .speed.fitting_batch import Limit, limit_of

Watch = Callable[[Records, Values], None]
"""Takes rows with the velocities that they were compared with, and what the loss saw of them."""

__all__ = [
    "Records",
    "backward",
    "clip_gradients",
    "clipped_loss",
    "cotangent",
    "log_ratio",
    "micro_batches",
    "records",
    "snapshot",
    "step_weights",
    "update",
]


def step_weights(v_coef: Tensor, std: Tensor, mode: str) -> Tensor:
    """Return the weights of steps [N], mean 1: uniform, by their noise s (TempFlow-GRPO), by its variance
    (Flow-CPS), or balanced.

    s² makes the gradient that of −‖x′ − mean‖², the log-probability of arXiv 2509.05952 without its 1/2s².
    Balanced is s/|c|, which gives every step's gradient one scale.
    """
    balanced = torch.where(std > 0, std / v_coef.abs().clamp(min=1e-12), 0.0)
    raw = {"uniform": torch.ones_like(std), "std": std, "variance": std**2, "balanced": balanced}[mode]
    return raw / raw.mean().clamp(min=1e-12)


def records(
    rollout: Rollout,
    advantages: Sequence[Tensor],
    *,
    step_weight: str = "uniform",
    samples: bool = False,
    values: Sequence[Tensor] | None = None,
    every: bool = False,
) -> Records:
    """Collect the rows of a rollout with one table of advantages [K, G] per prompt.

    `samples` keeps every sample, with its value of as many tables `values`: those of an advantage, or where
    `every` is set, those of a value (not NaN).
    """
    plan, c = rollout.plan, rollout.coefficients
    row = {fork: i for i, fork in enumerate(plan.forks)}
    first = {plan.states[child].parent: child for child in plan.transitions}
    child = torch.tensor([first[fork] for fork in plan.forks])
    weights = step_weights(c.v_coef[child], c.std[child], step_weight)
    # The loss is the mean over the trained edges, of which deep groups of a branching tree have more.
    weights = weights / (len(plan.transitions) * len(advantages))
    direction = torch.zeros_like(rollout.x)
    values = advantages if values is None else values
    noise, kept = [], []
    for p, table in enumerate(advantages):
        for state in plan.transitions:
            edge = plan.states[state]
            value, fork = table[edge.group, edge.member].item(), row[edge.parent]
            worth = values[p][edge.group, edge.member].item()
            if math.isnan(worth) if every else value == 0:
                continue
            draw = rollout.noise(p, state)
            direction[p, fork] += value * draw
            if samples:
                noise.append(draw)
                kept.append((value, worth, edge.noise, p * len(row) + fork))
    device, prompts = rollout.x.device, len(advantages)
    made = Records(
        x=rollout.x.flatten(0, 1),
        direction=direction.flatten(0, 1),
        sigma=c.sigma[list(plan.forks)].repeat(prompts).to(device),
        v_coef=c.v_coef[child].repeat(prompts).to(device),
        std=c.std[child].repeat(prompts).to(device),
        weight=weights.repeat(prompts).to(device),
        step=torch.tensor([plan.states[f].index for f in plan.forks]).repeat(prompts).to(device),
        prompt=torch.arange(prompts).repeat_interleave(len(row)).to(device),
        dt=(c.sigma[child] - c.sigma[list(plan.forks)]).repeat(prompts).to(device),
    )
    if not samples:
        return made
    noise = torch.stack(noise) if noise else rollout.x.new_zeros(0, *rollout.x.shape[2:])
    advantage, value, draw, owner = torch.tensor(kept, dtype=torch.float64).reshape(-1, 4).T
    return dataclasses.replace(
        made,
        noise=noise,
        advantage=advantage.float().to(device),
        value=value.float().to(device),
        draw=draw.long().to(device),
        owner=owner.long().to(device),
    )


def backward(
    policy: Policy,
    made: Records,
    conds: Sequence[Any],
    recipe: Recipe,
    *,
    micro_batch: int = 32,
    check: Callable[[], None] | None = None,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    watch: Watch | None = None,
) -> Values:
    """Accumulate the gradient of the recipe's objective over all rows; return what its loss saw.

    An objective that compares with an older policy takes a row's `velocity` for it, or where rows have none
    (NaN) the present one. `watch` is told of every part. The KL adds β·mean‖v − v_ref‖²/D over the rows,
    scaled by its form, v_ref inside the context `reference`: without the adapter where it is not given.
    """
    objective, seen = OBJECTIVES[recipe.objective], []
    for part in micro_batches(made, micro_batch):
        cond = [conds[p] for p in part.prompt.tolist()]
        if check:
            check()
        if recipe.kl:
            # First: a reference may change the adapter's numbers, which the backward pass needs as they were.
            with torch.no_grad(), (reference or policy.reference)():
                anchored = policy.velocity(part.x, part.sigma, cond)
        velocity = policy.velocity(part.x, part.sigma, cond)
        if objective.compares:
            past = velocity.detach()
            if part.velocity is not None:
                past = torch.where(part.velocity.isnan(), past, part.velocity)
            part = dataclasses.replace(part, velocity=past)
        loss, values = objective.loss(velocity, part, recipe)
        if recipe.kl:
            distance = (velocity - anchored).square().flatten(1).mean(1)
            weighed = distance * kl_scale(part, recipe.kl_form)
            loss = loss + recipe.kl * weighed.sum() / len(made)
            values = {**values, "kl": distance}
        seen.append({name: value.detach() for name, value in values.items()})
        if watch:
            watch(part, seen[-1])
        loss.backward()
    return together(seen)


def together(seen: Sequence[Values]) -> Values:
    """Join the values of parts."""
    return {name: torch.cat([values[name] for values in seen]) for name in (seen[0] if seen else ())}


def snapshot(policy: Policy, made: Records, conds: Sequence[Any], *, micro_batch: int | Limit = 32) -> Tensor:
    """Return the old velocities [N, …], computed in training's own batches: the first ratio is exactly 1."""

    def velocity(rows: slice) -> Tensor:
        cond = [conds[p] for p in made.prompt[rows].tolist()]
        return policy.velocity(made.x[rows], made.sigma[rows], cond).detach()

    return limit_of(micro_batch).parts(velocity, len(made))


def with_past(policy: Policy, made: Records, conds: Sequence[Any], micro_batch: int | Limit) -> Records:
    """Give the rows without a velocity of their own (NaN) the present policy's."""
    if made.velocity is None:
        return dataclasses.replace(made, velocity=snapshot(policy, made, conds, micro_batch=micro_batch))
    past = made.velocity.clone()
    if len(new := past.flatten(1)[:, 0].isnan().nonzero().flatten()):
        past[new] = snapshot(policy, made.rows(new), conds, micro_batch=micro_batch)
    return dataclasses.replace(made, velocity=past)


def update(
    policy: Policy,
    made: Records,
    conds: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    micro_batch: int | Limit = 32,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
    check: Callable[[], None] | None = None,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    watch: Watch | None = None,
) -> dict[str, float]:
    """Take one optimizer step per rollout or per branch step, `epochs` times over; return the metrics.

    `reduce` averages gradients over processes in place; `check` is called before every forward and may raise;
    `reference` and `watch` are as in `backward`, the latter in the first epoch. A step whose gradient is not
    finite is skipped and counted. Where memory runs out, `micro_batch` is halved and the step begun again.
    """
    limit, objective = limit_of(micro_batch), OBJECTIVES[recipe.objective]
    parts = by_step(made) if recipe.update == "per_step" else [made]
    if objective.compares and (recipe.epochs > 1 or len(parts) > 1):
        # Else the only optimizer step is taken at the rollout's own policy: the velocity is its own past.
        parts = [with_past(policy, part, conds, limit) for part in parts]

    def gradient(part: Records, watch: Watch | None) -> Values:
        optimizer.zero_grad(set_to_none=True)
        how = {"micro_batch": limit.rows, "check": check, "reference": reference, "watch": watch}
        return backward(policy, part, conds, recipe, **how)

    found, norms = [], []
    for epoch in range(recipe.epochs):
        for part in parts:
            work = partial(gradient, part, None if epoch else watch)
            found.append(limit.until(work, len(part)))
            norms.append(clip_gradients(policy.parameters(), recipe.max_grad_norm, reduce))
            if math.isfinite(norms[-1]):
                optimizer.step()
    # Nobody looks at them again, and the next rollout needs the room.
    optimizer.zero_grad(set_to_none=True)
    metrics = {"grad_norm": sum(norms) / len(norms), "lr": optimizer.param_groups[0]["lr"]}
    metrics["skipped"] = float(sum(not math.isfinite(norm) for norm in norms))
    values = together(found)
    if recipe.kl:
        metrics["kl/velocity"] = values["kl"].double().mean().item()
    return metrics | (objective.metrics(values, recipe) if objective.metrics else {})


def by_step(made: Records) -> list[Records]:
    """Split rows by their branch step, each part weighted as if it were the whole."""
    parts = [made.rows((made.step == k).nonzero().flatten()) for k in made.step.unique().tolist()]
    return [dataclasses.replace(part, weight=part.weight * len(parts)) for part in parts]


def clip_gradients(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    reduce: Callable[[Sequence[Tensor]], None] | None = None,
) -> float:
    """Average gradients over processes, scale them down to `max_norm`, and return the norm they had."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if reduce:
        reduce(gradients)
    return nn.utils.clip_grad_norm_(parameters, max_norm).item()
