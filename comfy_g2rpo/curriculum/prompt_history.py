"""What a run remembers of its prompts: the spread of each one's last group, and a running baseline.

AdaGRPO (arXiv 2606.06828; formulas as in its published code) keeps the moving mean and variance of the
scores. It trains on prompts that the model is neither good nor bad at, those nearest to the mean, and adds an
advantage against this baseline to the one within the group. Drawing prompts by their spread is our own.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..advantages import FLOOR, least_spread, moments, wide
from ..methods.recipe_options import Recipe
from ..prompts import PromptCursor, identity
from ..rewards import Reward
from ..rollout import stream

LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class History:
    """A run's memory of prompts and scores; every change makes a new one."""

    spread: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """By a prompt's place in the list, the standard deviation of its last group by each reward."""
    mean: tuple[float, ...] = ()
    """Of each reward; empty before any score."""
    variance: tuple[float, ...] = ()

    def with_spreads(self, places: Sequence[int], spreads: Tensor) -> History:
        """Take in the spreads [R, P] of the last groups of prompts."""
        new = {place: tuple(column) for place, column in zip(places, spreads.T.tolist(), strict=True)}
        return dataclasses.replace(self, spread={**self.spread, **new})

    def with_scores(self, scores: Tensor, decay: float) -> History:
        """Move mean and variance by scores [R, …], NaN left out: m ← a·m + (1 − a)·mean, the first as it is.

        The variance is that of the scores themselves, not of an estimate from them (divided by n).
        """
        moved = []
        for r, row in enumerate(scores.double().flatten(1)):
            known = row[~row.isnan()]
            before = (self.mean[r], self.variance[r]) if self.mean else (0.0, 0.0)
            now = (known.mean().item(), known.var(unbiased=False).item()) if len(known) else before
            share = decay if self.mean else 0.0
            moved.append([share * old + (1 - share) * new for old, new in zip(before, now, strict=True)])
        mean, variance = zip(*moved, strict=True)
        return dataclasses.replace(self, mean=mean, variance=variance)

    def above(self, scores: Tensor) -> Tensor:
        """Return (r − mean)/(std + floor) of scores [R, …] by the baseline, float64."""
        shape = (-1, *[1] * (scores.ndim - 1))
        mean = torch.tensor(self.mean, dtype=torch.float64).view(shape)
        std = torch.tensor(self.variance, dtype=torch.float64).clamp(min=LEAST_VARIANCE).sqrt().view(shape)
        return (scores.double() - mean) / (std + FLOOR)

    def table(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Return what a checkpoint holds; spreads belong to this list of prompts."""
        spread = [[place, *values] for place, values in sorted(self.spread.items())]
        return {"prompts": digest(prompts), "spread": spread, "mean": self.mean, "variance": self.variance}

    @classmethod
    def of(cls, table: Any, prompts: Sequence[str], rewards: int) -> History:
        """Read `table`'s outcome again; what belongs to other prompts, or to other rewards, is left out."""
        found = table if isinstance(table, Mapping) else {}
        mean, variance = (numbers(found.get(name), rewards) for name in ("mean", "variance"))
        rows = found.get("spread") if found.get("prompts") == digest(prompts) else []
        spread = {}
        for row in rows if isinstance(rows, list) else []:
            values = numbers(row[1:] if isinstance(row, list) else None, rewards)
            if values and row[0] in range(len(prompts)):
                spread[row[0]] = values
        return cls(spread, mean, variance) if mean and variance else cls(spread)


def check_baseline(recipe: Recipe, rewards: Sequence[Reward]) -> None:
    """Raise ValueError unless some reward has scores that can be compared with those of other prompts."""
    wanted = "prompt_choice is curriculum" if recipe.prompt_choice == "curriculum" else ""
    wanted = wanted or ("global_advantage is above 0" if recipe.global_advantage else "")
    if wanted and all(reward.needs_group for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ValueError(f"{wanted}, but {names} judges whole groups only; turn it off, or add a reward")


def numbers(value: Any, count: int) -> tuple[float, ...]:
    """Return a list of so many finite numbers as a tuple; an empty one where it is something else."""
    sound = isinstance(value, (list, tuple)) and len(value) == count
    return tuple(value) if sound and all(type(x) in (int, float) and math.isfinite(x) for x in value) else ()


def digest(prompts: Sequence[str]) -> str:
    """Return what tells one list of prompts from another."""
    return f"{stream(*(part for prompt in prompts for part in identity(prompt))):x}"


def spreads(groups: Sequence[Tensor], noise: Sequence[float] = ()) -> Tensor:
    """Return the standard deviation [R, P] of the groups [R, K, G, L] of every prompt, mean over K and L.

    A group whose scores differ by no more than their noise has none.
    """
    found = []
    for rewards in groups:
        rewards = wide(rewards)
        std = moments(rewards)[1]
        std = torch.where(std > least_spread(rewards, noise=noise), std, 0.0)
        found.append(std.double().flatten(1).mean(1))
    return torch.stack(found, 1)


def by_signal(cursor: PromptCursor, step: int, history: History, weights: Sequence[float]) -> list[int]:
    """Choose the places of a step's prompts: every second one in turn, the others by their spread.

    The latter are drawn, among prompts seen before and not in this step yet, with probability in proportion
    to Σ |w_r| · spread_r / (mean spread_r of those seen), or alike where none has any. So in 2N draws each of
    N prompts comes at least once. The choice depends on (seed, step, history) alone; before anything is seen
    all come in turn.
    """
    seen = sorted(history.spread)
    table = torch.tensor([history.spread[place] for place in seen], dtype=torch.float64)
    if not seen:
        return cursor.places(step)
    share = table / table.mean(0).clamp(min=1e-300)
    worths = (share * torch.tensor(weights, dtype=torch.float64).abs()).sum(1).tolist()
    draws = range(step * cursor.per_step, (step + 1) * cursor.per_step)
    chosen = [cursor.place(draw // 2) for draw in draws if draw % 2 == 0]
    for draw in (draw for draw in draws if draw % 2):
        left = [row for row, place in enumerate(seen) if place not in chosen]
        if not left:
            chosen.append(cursor.place(draw // 2))
            continue
        worth, rng = [worths[row] for row in left], random.Random(f"signal {cursor.seed} {draw}")
        chosen.append(seen[rng.choices(left, worth)[0] if any(worth) else rng.choice(left)])
    return chosen


def nearest(history: History, scores: Tensor, weights: Sequence[float]) -> list[int]:
    """Choose of each row of candidates' scores [R, P, C] the one nearest to the baseline: [P] numbers.

    The published argmin |score − mean|; several rewards are weighed in standard deviations. A candidate that
    a reward with a weight could not judge comes last.
    """
    used = [r for r, weight in enumerate(weights) if weight]
    weight = torch.tensor([weights[r] for r in used], dtype=torch.float64).view(-1, 1, 1)
    away = (weight * history.above(scores)[used]).sum(0).abs()
    return torch.where(away.isnan(), torch.inf, away).argmin(1).tolist()


def global_advantages(
    history: History,
    rewards: Tensor,
    weights: Sequence[float],
    clamp: float = 5.0,
    floor: float = FLOOR,
    noise: Sequence[float] = (),
) -> Tensor:
    """Return advantages [K, G] of rewards [R, K, G, L] against the running baseline, summed over R and L.

    AdaGRPO's cross-level advantage: z by the baseline's mean and std; those above 0 are divided by their sum
    and those below by theirs, so that both sides of a group pull equally; where all lie on one side, z minus
    its mean. Members without a score get 0, as all do in groups without any spread, and each group sums to 0.
    """
    missing = rewards.isnan()
    z = torch.where(missing, 0.0, history.above(rewards))
    up, down = (side.sum(2, keepdim=True) for side in (z.clamp(min=0), -z.clamp(max=0)))
    count = (~missing).sum(2, keepdim=True).clamp(min=1)
    centred = z - z.sum(2, keepdim=True) / count
    one_sided = torch.minimum(up, down) < 1e-6
    z = torch.where(one_sided, centred, torch.where(z > 0, z / up, z / down)).clamp(-clamp, clamp)
    spread = moments(wide(rewards))[1] > least_spread(wide(rewards), floor, noise)
    z = torch.where(missing | ~spread, 0.0, z)
    advantage = torch.einsum("r,rkgl->kg", torch.tensor(weights, dtype=torch.float64), z)
    kept = (~missing).any(3).any(0)
    centre = advantage.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return torch.where(kept, advantage - centre, 0.0).float()
