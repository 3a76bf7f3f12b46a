"""Old forks among the rows of an update: joined to the new ones, watched, and the new ones kept in their
turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..methods.recipe_options import Recipe
from ..objectives.record_rows import Records
from ..rollout import seeded_noise, stream
from .old_forks import Chosen, Fork, choose, remembered

NUMBERS = ("sigma", "v_coef", "std", "weight", "dt", "step")
Gather = Callable[[Tensor], Tensor]
"""Stacks [1, n, …] of all processes over n."""


@dataclass(frozen=True)
class Share:
    """A process's place among `count` of them, and how these find together."""

    index: int
    count: int
    gather: Gather


@dataclass
class Batch:
    """The rows of an update, the first `new` of them new, and what was seen of them, by row number."""

    rows: Records
    conds: list[Any]
    new: int
    chosen: list[Chosen] = field(default_factory=list)
    past: dict[int, Tensor] = field(default_factory=dict)
    pulls: dict[int, float] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)

    def compare(self, past: Tensor) -> None:
        """Give the new rows the velocities [N, …] that they are compared with; old rows keep theirs."""
        given = self.rows.velocity
        kept = past if given is None else torch.cat([past, given[len(past) :]])
        self.rows = dataclasses.replace(self.rows, velocity=kept)

    def see(self, part: Records, values: dict[str, Tensor]) -> None:
        """Note the velocities that new rows were compared with, and the ratios ρ [S] of old ones."""
        zero = part.x.new_zeros(len(part))
        ratio = values["ratio"].to(zero.dtype)
        pulls = zero.index_add(0, part.owner, part.advantage.abs() * ratio).tolist()
        sums = zero.index_add(0, part.owner, ratio)
        means = (sums / zero.index_add(0, part.owner, torch.ones_like(ratio)).clamp(min=1)).tolist()
        for i, number in enumerate(part.number.tolist()):
            if number < self.new:
                self.past[number] = part.velocity[i].float().cpu().clone()
            else:
                self.pulls[number], self.ratios[number] = pulls[i], means[i]


def with_old(
    made: Records,
    conds: Sequence[Any],
    forks: Sequence[Fork],
    recipe: Recipe,
    share: Share,
    seed: int,
    encode: Callable[[Sequence[str]], list[Any]],
) -> Batch:
    """Join the old forks that an update takes, this process's share of them, to its new rows.

    All rows of all processes count alike: weights are brought to a mean over them. Only forks of the new
    ones' shape are taken, and of their steps where each step is an update of its own.
    """
    numbers = torch.arange(len(made), device=made.x.device)
    steps = set(made.step.tolist()) if recipe.update == "per_step" else None
    places = [
        place
        for place, fork in enumerate(forks)
        if fork.x.shape == made.x.shape[1:] and (steps is None or fork.step in steps)
    ]
    fresh = len(made) * share.count
    every = choose(forks, places, recipe.replay * fresh, recipe.replay_by, seed)
    mine = every[share.index :: share.count]
    if not every:
        return Batch(dataclasses.replace(made, number=numbers), list(conds), len(made))
    unit = share.count / (fresh + len(every))
    made = dataclasses.replace(made, weight=made.weight * len(made) * unit)
    if mine:
        old = [forks[chosen.place] for chosen in mine]
        texts = list(dict.fromkeys(fork.prompt for fork in old))
        rows = rows_of(old, [unit * chosen.factor for chosen in mine], texts, len(conds), made)
        made, conds = joined(made, rows), [*conds, *encode(texts)]
    numbers = torch.arange(len(made), device=made.x.device)
    return Batch(dataclasses.replace(made, number=numbers), list(conds), len(made) - len(mine), mine)


def rows_of(
    old: Sequence[Fork], units: Sequence[float], texts: Sequence[str], first: int, like: Records
) -> Records:
    """Return old forks as rows, their weights multiplied by `units`; text i stands at `first` + i among the
    prompts.

    Noise stays on the CPU.
    """
    device = like.x.device
    x = torch.stack([fork.x for fork in old]).to(device)
    members = torch.cat([fork.members for fork in old], 1)
    owner = torch.repeat_interleave(torch.tensor([fork.members.shape[1] for fork in old]))
    draws = [
        (old[row].seed, int(draw)) for row, draw in zip(owner.tolist(), members[2].tolist(), strict=True)
    ]
    noise = [
        seeded_noise(x.shape[1:], "rollout", seed, abs(draw)) * (1 if draw > 0 else -1)
        for seed, draw in draws
    ]
    numbers = torch.tensor([[getattr(fork, name) for name in NUMBERS] for fork in old], dtype=torch.float64).T
    sigma, v_coef, std, weight, dt, step = numbers
    return Records(
        x=x,
        sigma=sigma.float().to(device),
        v_coef=v_coef.float().to(device),
        std=std.float().to(device),
        weight=(weight * torch.tensor(units, dtype=torch.float64)).float().to(device),
        step=step.long().to(device),
        prompt=torch.tensor([first + texts.index(fork.prompt) for fork in old], device=device),
        dt=dt.float().to(device),
        velocity=torch.stack([fork.velocity for fork in old]).to(device),
        noise=torch.stack(noise),
        advantage=members[0].float().to(device),
        value=members[1].float().to(device),
        draw=members[2].long().to(device),
        owner=owner.to(device),
    )


def joined(made: Records, old: Records) -> Records:
    """Lay old rows behind new ones, which have no velocity of their own yet (NaN)."""
    made = dataclasses.replace(made, velocity=torch.full_like(made.x, torch.nan), noise=made.noise.cpu())
    old = dataclasses.replace(old, owner=old.owner + len(made))
    names = [each.name for each in dataclasses.fields(Records) if getattr(old, each.name) is not None]
    return Records(**{name: torch.cat([getattr(made, name), getattr(old, name)]) for name in names})


def forks_of(
    made: Records, batch: Batch, share: Share, prompts: Sequence[str], seeds: Sequence[int], step: int
) -> list[Fork]:
    """Return the new rows of all processes as forks of the run's step, in the order of the step's prompts.

    `made` are the new rows as `records` made them; `prompts` and `seeds` those of all processes. Rows without
    an advantage, or with a velocity that is not finite, teach nothing and are left out.
    """
    rows, members = len(made), max(torch.bincount(made.owner, minlength=len(made)).tolist())
    (most,) = share.gather(torch.full((1, 1, 1), float(members))).amax((0, 1)).tolist()
    table = torch.full((rows, 3, int(most)), torch.nan, dtype=torch.float64)
    for row in range(rows):
        own = (made.owner == row).cpu()
        for i, name in enumerate(("advantage", "value", "draw")):
            table[row, i, : int(own.sum())] = getattr(made, name).cpu()[own].double()
    columns = torch.stack([getattr(made, name).double().cpu() for name in NUMBERS], 1)
    columns[:, NUMBERS.index("weight")] *= rows
    places = made.prompt.cpu() * share.count + share.index
    columns = torch.cat([columns, places.double()[:, None]], 1)
    past = torch.stack([batch.past[row] for row in range(rows)])
    x, past, table, columns = (
        share.gather(each[None])[0].cpu() for each in (made.x.float(), past, table, columns)
    )
    order = columns[:, -1].argsort(stable=True).tolist()
    found = []
    for row in order:
        *numbers, place = columns[row].tolist()
        own = table[row][:, ~table[row, 2].isnan()]
        pull = own[0].abs().sum().item()
        if pull and past[row].isfinite().all() and x[row].isfinite().all():
            given = dict(zip(NUMBERS, numbers, strict=True)) | {"step": int(numbers[-1])}
            named = {"prompt": prompts[int(place)], "seed": seeds[int(place)], "made": step, "pull": pull}
            found.append(Fork(x[row].clone(), past[row].clone(), own.clone(), **given, **named))
    return found


def after(
    forks: Sequence[Fork], new: Sequence[Fork], batch: Batch, recipe: Recipe, share: Share, step: int
) -> list[Fork]:
    """Return the forks that are kept after an update, with the pulls that any process saw of old ones."""
    seen = torch.full((1, recipe.replay * batch.new, 2), -1.0, dtype=torch.float64)
    for i, chosen in enumerate(batch.chosen):
        seen[0, i] = torch.tensor([chosen.place, batch.pulls[batch.new + i]], dtype=torch.float64)
    told = list(forks)
    for place, pull in share.gather(seen)[0].tolist():
        if place >= 0:
            told[int(place)] = dataclasses.replace(told[int(place)], pull=pull)
    return remembered(told, new, recipe, step)


def metrics_of(batch: Batch, forks: Sequence[Fork], kept: Sequence[Fork], step: int) -> dict[str, float]:
    """Say how many old forks an update took, how old, and how far the policy has moved since; and what is
    kept.
    """
    row = {"replay/rows": float(len(batch.chosen)), "replay/size": float(len(kept))}
    if batch.chosen:
        ages = [step - forks[chosen.place].made for chosen in batch.chosen]
        row["replay/age"] = sum(ages) / len(ages)
        row["replay/ratio"] = sum(batch.ratios.values()) / len(batch.ratios)
    return row


def seed_of(seed: int, step: int) -> int:
    """Return the seed of a step's choice."""
    return stream("replay", seed, step)
