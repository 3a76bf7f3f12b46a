"""Steps over kept pairs, in place of explore, score and update: epochs, each with every fork once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..objectives.pairs import least_loss, pair_weights
from ..objectives.record_rows import Records
from ..run.iteration import learn_from
from ..run.setup import Check, Learner, Setup
from ..speed.peak_memory import peak_memory
from ..update import snapshot
from .kept_pairs import ForkPairs


@dataclass(frozen=True)
class PairSteps:
    """What a run of pairs learns from, and its steps, each a function of (seed, step) alone."""

    kept: tuple[ForkPairs, ...]
    per_step: int
    seed: int = 0

    @property
    def prompts(self) -> tuple[str, ...]:
        """List the prompts, each once."""
        return tuple(dict.fromkeys(each.prompt for each in self.kept))

    @cached_property
    def sizes(self) -> list[list[ForkPairs]]:
        """Part the forks by the shape of their latents, of which a step has one."""
        found: dict[tuple[int, ...], list[ForkPairs]] = {}
        for each in self.kept:
            found.setdefault(tuple(each.forks.x.shape[1:]), []).append(each)
        return list(found.values())

    @property
    def steps_per_epoch(self) -> int:
        """Count the steps in which every fork comes once."""
        return sum(-(-len(some) // self.per_step) for some in self.sizes)

    @property
    def about(self) -> str:
        """Say what a step is, and how many make an epoch."""
        pairs = int(sum(each.wins.sum().item() for each in self.kept))
        return (
            f"up to {self.per_step} of {len(self.kept)} forks per step, {self.steps_per_epoch} steps to see "
            f"all {pairs} pairs once"
        )

    def batch(self, step: int) -> list[ForkPairs]:
        """Return the forks of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chance = random.Random(f"pairs {self.seed} {epoch}")
        parts = []
        for some in self.sizes:
            order = chance.sample(some, len(some))
            parts += [order[at : at + self.per_step] for at in range(0, len(order), self.per_step)]
        return chance.sample(parts, len(parts))[place]

    def __call__(self, setup: Setup, learner: Learner, check: Check) -> dict[str, float]:
        """Make a step; return its row of metrics. An exception leaves the last step's state."""
        begin, recipe, policy = time.perf_counter(), setup.recipe, setup.policy
        waited = setup.world.waited()
        batch = self.batch(learner.step)
        conds, made = policy.encode([each.prompt for each in batch]), rows_of(batch, policy.device)
        forwards = len(made)
        if recipe.pair_keep < 1:
            with torch.no_grad(), policy.training():
                velocity = snapshot(policy, made, conds, micro_batch=learner.limits.micro_batch)
            made, forwards = least_loss(velocity, made, recipe), 2 * forwards
        stats = learn_from(setup, learner, made, conds, check)
        learner.step += 1
        learner.forwards += forwards
        seconds = time.perf_counter() - begin
        learner.seconds += seconds
        own = seconds - (setup.world.waited() - waited)
        row: dict[str, float] = {"step": learner.step, **stats, "nfe": forwards, "time/update": own}
        row |= {f"memory/{name}": rows for name, rows in learner.limits.lowered().items()}
        return row | {"memory/peak": peak_memory(policy.device)}


def rows_of(batch: Sequence[ForkPairs], device: torch.device | str) -> Records:
    """Make a row of every fork; forks with fewer branches than others are filled up with none."""
    most = max(len(each.wins) for each in batch)
    x, velocity, sigma, v_coef, std, step = (
        torch.stack([getattr(each.forks, name)[each.row] for each in batch]).to(device)
        for name in ("x", "velocity", "sigma", "v_coef", "std", "step")
    )
    branches = x.new_zeros(len(batch), most, *x.shape[1:])
    wins = x.new_zeros(len(batch), most, most)
    scores = x.new_full((len(batch), most), torch.nan)
    for i, each in enumerate(batch):
        count = len(each.wins)
        branches[i, :count] = each.forks.draws(each.row).to(device)
        wins[i, :count, :count] = each.wins
        scores[i, :count] = each.scores
    return Records(
        x=x,
        sigma=sigma,
        v_coef=v_coef,
        std=std,
        weight=pair_weights(wins),
        step=step,
        prompt=torch.arange(len(batch), device=device),
        velocity=velocity,
        branches=branches,
        wins=wins,
        scores=scores,
    )
