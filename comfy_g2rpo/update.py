"""From advantages to gradients: the exact on-policy cotangent, or the clipped ratio for several updates.

A stochastic step is x′ = mean(x, v) + sε with ∂mean/∂v = c. With a density that is averaged over the D
elements, ∇_v log p = cε/(sD), so the policy gradient of a whole group is one vector–Jacobian product with
−(c/(G·s·D))·Σ A_i ε_i. Against an older velocity the log-ratio is −(⟨ε, δ⟩ + ½⟨δ, δ⟩)/D with δ = c(v_old −
v)/s: exactly 0 at v = v_old, and no next latent has to be stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import Sigma, over, step
from .policy import Policy
from .recipes import Recipe
from .rollout import Rollout
from .speed.fitting_batch import Limit, limit_of


@dataclass(frozen=True)
class Records:
    """What travels from sampler to learner, one row per fork state."""

    x: Tensor  # [N, …]
    direction: Tensor  # [N, …], Σ A ε over the fork's samples
    sigma: Tensor  # [N]
    v_coef: Tensor  # [N], c
    std: Tensor  # [N], s
    weight: Tensor  # [N], step weight / (group size · groups · prompts)
    step: Tensor  # [N], schedule index
    prompt: Tensor  # [N], position in the rollout's prompts
    noise: Tensor | None = None  # [S, …], kept for the clipped objective alone
    advantage: Tensor | None = None  # [S]
    owner: Tensor | None = None  # [S], the row of each sample

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, rows: Tensor) -> Records:
        """Return some rows [n] (long) with their samples."""
        names = ("x", "direction", "sigma", "v_coef", "std", "weight", "step", "prompt")
        part = {name: getattr(self, name)[rows] for name in names}
        if self.owner is not None:
            place = torch.full((len(self),), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            kept = place[self.owner] >= 0
            part |= {"noise": self.noise[kept], "advantage": self.advantage[kept]}
            part["owner"] = place[self.owner[kept]]
        return Records(**part)


def step_weights(v_coef: Tensor, std: Tensor, mode: str) -> Tensor:
    """Return the weights of steps [N], mean 1: uniform, by their noise s (TempFlow-GRPO), or balanced.

    Balanced is s/|c|, which gives every step's gradient one scale.
    """
    balanced = torch.where(std > 0, std / v_coef.abs().clamp(min=1e-12), 0.0)
    raw = {"uniform": torch.ones_like(std), "std": std, "balanced": balanced}[mode]
    return raw / raw.mean().clamp(min=1e-12)


def records(
    rollout: Rollout, advantages: Sequence[Tensor], *, step_weight: str = "uniform", samples: bool = False
) -> Records:
    """Collect the rows of a rollout with one table of advantages [K, G] per prompt.

    `samples` keeps every sample for the clipped form.
    """
    plan, c = rollout.plan, rollout.coefficients
    groups, members, _ = plan.shape
    row = {fork: i for i, fork in enumerate(plan.forks)}
    first = {plan.states[child].parent: child for child in plan.transitions}
    child = torch.tensor([first[fork] for fork in plan.forks])
    weights = step_weights(c.v_coef[child], c.std[child], step_weight)
    weights = weights / (members * groups * len(advantages))
    direction = torch.zeros_like(rollout.x)
    noise, advantage, owner = [], [], []
    for p, table in enumerate(advantages):
        for state in plan.transitions:
            edge = plan.states[state]
            value, fork = table[edge.group, edge.member].item(), row[edge.parent]
            if value == 0:
                continue
            draw = rollout.noise(p, state)
            direction[p, fork] += value * draw
            if samples:
                noise.append(draw)
                advantage.append(value)
                owner.append(p * len(row) + fork)
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
    )
    if not samples:
        return made
    noise = torch.stack(noise) if noise else rollout.x.new_zeros(0, *rollout.x.shape[2:])
    return dataclasses.replace(
        made,
        noise=noise,
        advantage=torch.tensor(advantage, device=device),
        owner=torch.tensor(owner, dtype=torch.long, device=device),
    )


def cotangent(
    directions: Tensor,
    sigma: Sigma,
    sigma_next: Sigma,
    eta: float,
    group_size: int,
    kernel: str = "flow_sde",
    sigma_max: Sigma = 1 - 1e-6,
) -> Tensor:
    """Return −(c/(G·s·D))·d on the velocity, for directions d = Σ A_i ε_i [N, …]; 0 where s = 0.

    The on-policy gradient of the group's mean loss: equal to autograd of the clipped loss at ratio 1 (method
    of arXiv 2510.01982, algebra in this module's docstring).
    """
    sigma = torch.as_tensor(sigma, dtype=directions.dtype, device=directions.device)
    _, v_coef, std = step(kernel, sigma, sigma_next, eta, sigma_max)
    return _cotangent(directions, v_coef, std, torch.full_like(std, 1 / group_size))


def _cotangent(direction: Tensor, v_coef: Tensor, std: Tensor, weight: Tensor) -> Tensor:
    elements = direction[0].numel() if len(direction) else 1
    scale = torch.where(std > 0, -weight * v_coef / (std.clamp(min=1e-30) * elements), 0.0)
    return over(scale, direction) * direction


def log_ratio(velocity: Tensor, velocity_old: Tensor, made: Records) -> Tensor:
    """Return log p_new/p_old of each sample [S] from the velocities [N, …] of the rows."""
    scale = torch.where(made.std > 0, made.v_coef / made.std.clamp(min=1e-30), 0.0)
    delta = over(scale, velocity) * (velocity_old - velocity)
    square = delta.square().flatten(1).mean(1)
    return -((made.noise * delta[made.owner]).flatten(1).mean(1) + 0.5 * square[made.owner])


def clipped_loss(velocity: Tensor, velocity_old: Tensor, made: Records, clip: float) -> tuple[Tensor, Tensor]:
    """Return PPO's clipped loss Σ w·max(−Aρ, −A·clip(ρ, 1±c)) and the ratios ρ [S]."""
    ratio = log_ratio(velocity, velocity_old, made).exp()
    worse = torch.maximum(-made.advantage * ratio, -made.advantage * ratio.clamp(1 - clip, 1 + clip))
    return (made.weight[made.owner] * worse).sum(), ratio


def micro_batches(made: Records, size: int) -> Iterator[Records]:
    """Split into parts of at most `size` rows."""
    for rows in torch.arange(len(made), device=made.x.device).split(size):
        yield made.rows(rows)


def backward(
    policy: Policy,
    made: Records,
    conds: Sequence[Any],
    recipe: Recipe,
    *,
    micro_batch: int = 32,
    old: Tensor | None = None,
    check: Callable[[], None] | None = None,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
) -> dict[str, float]:
    """Accumulate the gradient of one objective over all rows; return sums that explain the update.

    `old` [N, …] are the velocities of `snapshot`, which the clipped form needs. The velocity KL adds
    β·mean‖v − v_ref‖²/D over the rows, v_ref inside the context `reference`: without the adapter where it is
    not given.
    """
    stats = {"kl": 0.0, "clipped": 0.0, "ratio": 0.0, "ratio_deviation": 0.0}
    for i, part in enumerate(micro_batches(made, micro_batch)):
        cond = [conds[p] for p in part.prompt.tolist()]
        if check:
            check()
        if recipe.kl:
            # First: a reference may change the adapter's numbers, which the backward pass needs as they were.
            with torch.no_grad(), (reference or policy.reference)():
                anchored = policy.velocity(part.x, part.sigma, cond)
        velocity = policy.velocity(part.x, part.sigma, cond)
        if recipe.objective == "clip":
            before = old[i * micro_batch : (i + 1) * micro_batch]
            loss, ratio = clipped_loss(velocity, before, part, recipe.clip)
            deviation = (ratio.detach() - 1).abs()
            stats["clipped"] += (deviation > recipe.clip).sum().item()
            stats["ratio"] += ratio.detach().sum().item()
            stats["ratio_deviation"] = max(stats["ratio_deviation"], *deviation.tolist(), 0.0)
        else:
            loss = (velocity * _cotangent(part.direction, part.v_coef, part.std, part.weight)).sum()
        if recipe.kl:
            distance = (velocity - anchored).square().flatten(1).mean(1).sum() / len(made)
            loss = loss + recipe.kl * distance
            stats["kl"] += distance.item()
        loss.backward()
    return stats


def snapshot(policy: Policy, made: Records, conds: Sequence[Any], *, micro_batch: int | Limit = 32) -> Tensor:
    """Return the old velocities [N, …], computed in training's own batches: the first ratio is exactly 1."""

    def velocity(rows: slice) -> Tensor:
        cond = [conds[p] for p in made.prompt[rows].tolist()]
        return policy.velocity(made.x[rows], made.sigma[rows], cond).detach()

    return limit_of(micro_batch).parts(velocity, len(made))


def update(
    policy: Policy,
    made: Records,
    conds: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    *,
    micro_batch: int | Limit = 32,
    reduce: Callable[[Tensor], Tensor] | None = None,
    check: Callable[[], None] | None = None,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
) -> dict[str, float]:
    """Take one optimizer step per rollout or per branch step, `epochs` times over; return the metrics.

    `reduce` averages a gradient over processes; `check` is called before every forward and may raise;
    `reference` is as in `backward`. A step whose gradient is not finite is skipped and counted. Where memory
    runs out, `micro_batch` is halved and the step begun again.
    """
    limit, clips = limit_of(micro_batch), recipe.objective == "clip"
    parts = by_step(made) if recipe.update == "per_step" else [made]
    old = [snapshot(policy, part, conds, micro_batch=limit) if clips else None for part in parts]

    def gradient(part: Records, before: Tensor | None) -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        how = {"micro_batch": limit.rows, "old": before, "check": check, "reference": reference}
        return backward(policy, part, conds, recipe, **how)

    found, norms = [], []
    for _ in range(recipe.epochs):
        for part, before in zip(parts, old, strict=True):
            found.append(limit.until(partial(gradient, part, before), len(part)))
            norms.append(clip_gradients(policy.parameters(), recipe.max_grad_norm, reduce))
            if math.isfinite(norms[-1]):
                optimizer.step()
    # Nobody looks at them again, and the next rollout needs the room.
    optimizer.zero_grad(set_to_none=True)
    metrics = {"grad_norm": sum(norms) / len(norms), "lr": optimizer.param_groups[0]["lr"]}
    metrics["skipped"] = float(sum(not math.isfinite(norm) for norm in norms))
    if recipe.kl:
        metrics["kl/velocity"] = sum(stats["kl"] for stats in found) / len(norms)
    if samples := len(made.advantage) * recipe.epochs if clips else 0:
        metrics["ratio/mean"] = sum(stats["ratio"] for stats in found) / samples
        metrics["ratio/max_deviation"] = max(stats["ratio_deviation"] for stats in found)
        metrics["clip_share"] = sum(stats["clipped"] for stats in found) / samples
    return metrics


def by_step(made: Records) -> list[Records]:
    """Split rows by their branch step, each part weighted as if it were the whole."""
    parts = [made.rows((made.step == k).nonzero().flatten()) for k in made.step.unique().tolist()]
    return [dataclasses.replace(part, weight=part.weight * len(parts)) for part in parts]


def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float, reduce: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Average gradients over processes, scale them down to `max_norm`, and return the norm they had."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if reduce:
            parameter.grad = reduce(parameter.grad)
    return nn.utils.clip_grad_norm_(parameters, max_norm).item()
