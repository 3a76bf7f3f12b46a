"""What an objective learns from: one row per state at which the model is differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PER_SAMPLE = ("noise", "advantage", "value", "draw", "owner")
"""Fields with an entry per sample; the others have one per row."""


@dataclass(frozen=True, kw_only=True)
class Records:
    """What travels from sampler to learner: one row per fork state, or per image and noise level."""

    x: Tensor  # [N, …]
    direction: Tensor | None = None  # [N, …], Σ A ε over the fork's samples
    target: Tensor | None = None  # [N, …], ε − x₀ of an image that was brought back to a noise level
    sigma: Tensor  # [N]
    v_coef: Tensor  # [N], c
    std: Tensor  # [N], s
    weight: Tensor  # [N], step weight / (trained edges of a tree · prompts)
    step: Tensor  # [N], schedule index
    prompt: Tensor  # [N], position in the rollout's prompts
    dt: Tensor | None = None  # [N], Δ = σ′ − σ
    velocity: Tensor | None = None  # [N, …], of the policy to compare with; NaN: the present one
    number: Tensor | None = None  # [N], which row of an update it is, where somebody asks afterwards
    noise: Tensor | None = None  # [S, …], for objectives that look at every sample; may lie on the CPU
    advantage: Tensor | None = None  # [S]
    value: Tensor | None = None  # [S], the rewards in their own units
    draw: Tensor | None = None  # [S], the noise's number in its plan, mirrored below 0
    owner: Tensor | None = None  # [S], the row of each sample
    branches: Tensor | None = None  # [N, G, …], the noises of a fork's branches, for pairs
    wins: Tensor | None = None  # [N, G, G], how often one branch was preferred to another
    scores: Tensor | None = None  # [N, G], where rewards preferred; NaN where people did

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, rows: Tensor) -> Records:
        """Return some rows [n] (long) with their samples."""
        place = torch.full((len(self),), -1, device=self.x.device)
        place[rows] = torch.arange(len(rows), device=self.x.device)
        kept = None if self.owner is None else place[self.owner] >= 0
        part: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            found = getattr(self, field.name)
            if found is not None:
                chosen = kept if field.name in PER_SAMPLE else rows
                part[field.name] = found[chosen.to(found.device)]
        if kept is not None:
            part["owner"] = place[part["owner"]]
        return Records(**part)


def micro_batches(made: Records, size: int) -> Iterator[Records]:
    """Split into parts of at most `size` rows."""
    for rows in torch.arange(len(made), device=made.x.device).split(size):
        yield made.rows(rows)
