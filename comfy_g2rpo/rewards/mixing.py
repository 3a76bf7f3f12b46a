"""Several rewards as one: in a group that is compared, for ranking images, and for single images.

What holds of every mix in a group: a reward that judges nobody there has no say, nor one whose scores are all
equal but for its noise; the order of the members does not matter; the advantages of a group sum to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..advantages import FLOOR, global_std, group_ranks, integrate, least_spread, moments, wide
from ..options import MIXES
from .protocol import Reward, RewardError, score_all

UNITLESS_FLOOR = 1e-5  # for the spread of mixed z-scores or ranks
MAX_RANKED = 8192  # pictures of one group whose ranks are compared pair by pair


def mixed_advantages(
    groups: Sequence[Tensor],
    weights: Sequence[float],
    mix: str = "zscore",
    gates: Sequence[float | None] = (),
    clamp: float = 5.0,
    floor: float = FLOOR,
    everywhere: Sequence[Tensor] | None = None,
    noise: Sequence[float] = (),
) -> list[Tensor]:
    """Return the advantages [K, G] of every prompt's rewards [R, K, G, L].

    `noise` is each reward's own, in its units; blank is none. `everywhere` lists the rewards of all prompts
    of all processes: their spread is then the scale, instead of each group's own.
    """
    scale = None if everywhere is None else global_std(everywhere)
    blended = [blend(rewards, weights, mix, gates, floor, scale, noise) for rewards in groups]
    if everywhere is not None:
        every = [blend(rewards, weights, mix, gates, floor, scale, noise) for rewards in everywhere]
        scale = global_std(every)
    # Ranks and z-scores have no unit, as the floor has.
    floor = floor if mix in ("zscore", "sum") else UNITLESS_FLOOR
    # Any other mix has left out what is noise.
    left = used(weights, noise) if mix == "zscore" else ()
    weights = used(weights, weights) if mix == "zscore" else [1.0]
    return [integrate(rewards, weights, clamp, floor, scale, left) for rewards in blended]


def used(weights: Sequence[float], of: Sequence[float]) -> list[float]:
    """Choose what belongs to the rewards that have a weight; nothing from nothing."""
    return [one for weight, one in zip(weights, of, strict=True) if weight] if of else []


def blend(
    rewards: Tensor,
    weights: Sequence[float],
    mix: str,
    gates: Sequence[float | None] = (),
    floor: float = FLOOR,
    std: Tensor | None = None,
    noise: Sequence[float] = (),
) -> Tensor:
    """Mix rewards [R, K, G, L] into one score [1, K, G, L] that is compared within its group.

        zscore         leave them apart: `integrate` sums w · z
        sum            Σ w r, in the rewards' own units
        minimum        min w z: as good as the worst of its z-scores
        rank_product   (Π rank^|w|)^(1/Σ|w|) of the ranks 1 … G, the best last; equal scores share their mean
        rank, w < 0 turns the order

    A member that lacks a score of a reward that judges others of its group is left out (NaN), but in
    `zscore`, where what it has counts. A weight of 0 leaves its reward's gate alone.
    """
    if mix not in MIXES:
        raise ValueError(f"mix is {mix!r}; choose one of: {', '.join(MIXES)}")
    if len(weights) != len(rewards) or len(gates) not in (0, len(rewards)):
        raise ValueError(
            f"weights has {len(weights)} and gates {len(gates)} entries for {len(rewards)} rewards; "
            "give one per reward"
        )
    if not any(weights):
        raise ValueError("weights are all 0; give at least one reward a weight")
    rewards = apply_gates(wide(rewards), weights, gates, floor, std, noise)
    kept = [index for index, weight in enumerate(weights) if weight]
    rewards, std = rewards[kept], None if std is None else std[kept]
    if mix == "zscore":
        return rewards
    weight = torch.tensor(
        [weights[index] for index in kept], dtype=rewards.dtype, device=rewards.device
    ).view(-1, 1, 1, 1)
    judges = ~rewards.isnan().all(2, keepdim=True)
    complete = (~rewards.isnan() | ~judges).all(0) & judges.any(0)
    # In float64, so that what is equal in exact arithmetic stays equal: the z-score of rounding would be
    # noise at full strength.
    rewards, weight = torch.where(complete, rewards, torch.nan).double(), weight.double()
    mean, own = moments(rewards)
    differs = own > least_spread(rewards, floor, used(weights, noise))
    if mix == "sum":
        score = torch.where(judges, weight * torch.where(differs, rewards, mean), 0.0).sum(0)
    elif mix == "minimum":
        z = weight * (rewards - mean) / ((own if std is None else std) + floor)
        least = torch.where(differs, z, torch.inf).amin(0)
        score = torch.where(least.isinf(), 0.0, least)
    else:
        share = weight.abs() * differs
        share = share / share.sum(0).clamp(min=torch.finfo(share.dtype).tiny)
        score = torch.where(share > 0, share * group_ranks(weight.sign() * rewards).log(), 0.0).sum(0).exp()
    return wide(torch.where(complete, score, torch.nan))[None]


def raw_values(
    rewards: Tensor,
    weights: Sequence[float],
    gates: Sequence[float | None] = (),
    floor: float = FLOOR,
    noise: Sequence[float] = (),
) -> Tensor:
    """Return one value [K, G] in the rewards' own units of [R, K, G, L]: Σ w r, averaged over Λ.

    As `blend` has a sum. A granularity that judges nobody of a group has no say; a member that lacks the
    score of another one is left out (NaN).
    """
    summed = blend(rewards, weights, "sum", gates, floor, None, noise)[0]
    judged = ~summed.isnan().all(1, keepdim=True)
    return torch.where(judged, summed, 0.0).sum(-1) / judged.sum(-1)


def apply_gates(
    rewards: Tensor,
    weights: Sequence[float],
    gates: Sequence[float | None],
    floor: float = FLOOR,
    std: Tensor | None = None,
    noise: Sequence[float] = (),
) -> Tensor:
    """Make members on the wrong side of a gate the worst of their group in every reward: [R, K, G, L] to the
    same shape.

    The wrong side is below; for a negative weight, above. Such a member gets one standard deviation less than
    the worst that passes, so that whatever else it scored neither counts nor shifts the others; where none
    passes, all are equal and teach nothing. A member that a gate cannot judge, though it judges others of the
    group, is left out (NaN).
    """
    closed = [index for index, gate in enumerate(gates) if gate is not None]
    if not closed:
        return rewards
    sign = torch.tensor(
        [-1.0 if weight < 0 else 1.0 for weight in weights], dtype=rewards.dtype, device=rewards.device
    ).view(-1, 1, 1, 1)
    limit = torch.tensor([gates[index] for index in closed], dtype=rewards.dtype, device=rewards.device).view(
        -1, 1, 1, 1
    )
    judged = rewards[closed]
    failed = (sign[closed] * judged < sign[closed] * limit).any(0)
    unknown = (judged.isnan() & ~judged.isnan().all(2, keepdim=True)).any(0) & ~failed
    passing = torch.where(failed | unknown, torch.nan, sign * rewards)
    mean, spread = moments(passing)
    least = least_spread(passing, floor, noise)
    passing = torch.where((spread > least) | passing.isnan(), passing, mean)
    # Where those that pass are equal, any distance above the noise will do: the z-score knows but one.
    unit = torch.ones_like(spread) if std is None else torch.where(std > floor, std, 1.0)
    step = torch.where(spread > least, spread, torch.maximum(unit, 2 * passing.shape[2] ** 0.5 * least))
    worst = torch.where(passing.isnan(), torch.inf, passing).amin(2, keepdim=True) - step
    # A reward that judges none of those that pass has no say.
    anyone = (~failed & ~unknown).any(1, keepdim=True)
    worst = torch.where(
        worst.isinf(), torch.where(anyone | rewards.isnan().all(2, keepdim=True), torch.nan, 0.0), worst
    )
    return sign * torch.where(failed, worst, passing)


@dataclass(frozen=True)
class MixedReward(Reward):
    """Judge by the weighted sum, or the minimum, of several rewards in their own units; NaN where one cannot
    judge, or a gate fails.

    For one picture at a time. Z-scores, ranks and what a gate does in training need a group to compare with:
    `blend`.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    mode: str = "sum"
    gates: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        mix(torch.zeros(len(self.rewards), 0), self.weights, self.mode, self.gates)

    @property
    def name(self) -> str:
        """Name the parts and their weights."""
        parts = [
            f"{weight:g} {reward.name}" for weight, reward in zip(self.weights, self.rewards, strict=True)
        ]
        return f"min({', '.join(parts)})" if self.mode == "minimum" else " + ".join(parts)

    @property
    def licence(self) -> str:
        """Name the licences of the parts."""
        return ", ".join(sorted({reward.licence for reward in self.rewards}))

    @property
    def compares_across_prompts(self) -> bool:
        """Return whether every part's score means the same for every prompt."""
        return all(reward.compares_across_prompts for reward in self.rewards)

    @property
    def depends_on_batch(self) -> bool:
        """Return whether any part's score may differ by its batch."""
        return any(reward.depends_on_batch for reward in self.rewards)

    def noise(self) -> float:
        """Add up the noise of the parts."""
        return sum(abs(w) * reward.noise() for w, reward in zip(self.weights, self.rewards, strict=True) if w)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        return mix(score_all(self.rewards, images, prompts), self.weights, self.mode, self.gates)


def mix(
    scores: Tensor, weights: Sequence[float], mode: str = "sum", gates: Sequence[float | None] = ()
) -> Tensor:
    """Mix scores [R, …] by weights [R] into their sum, or the minimum of those with a weight: […].

    NaN where a score is missing or lies on the wrong side of its gate: below it or, for a negative weight,
    above.
    """
    if mode not in ("sum", "minimum"):
        raise RewardError(
            f"mix is {mode[:40]!a}; single pictures can be judged by sum or minimum, the others need a "
            "group to compare with"
        )
    weight = torch.tensor(weights, dtype=torch.float32)
    if len(weight) != len(scores):
        raise RewardError(f"weights has {len(weight)} entries for {len(scores)} rewards; give one per reward")
    if not weight.isfinite().all() or not weight.any():
        raise RewardError(
            f"weights {list(weights)} must be finite and not all zero; give one number per reward"
        )
    if len(gates) not in (0, len(scores)):
        raise RewardError(
            f"gates has {len(gates)} entries for {len(scores)} rewards; give one per reward, or none"
        )
    if mode == "minimum":
        used = weight != 0
        mixed = (weight.view(-1, *[1] * (scores.ndim - 1)) * scores)[used].amin(0)
    else:
        mixed = torch.einsum("r,r...->...", weight, scores)
    for row, each, gate in zip(scores, weights, gates or [None] * len(scores), strict=True):
        if gate is not None:
            mixed = torch.where((row > gate if each < 0 else row < gate) | row.isnan(), torch.nan, mixed)
    return mixed


def ranking_scores(
    scores: Tensor,
    weights: Sequence[float],
    mix: str = "zscore",
    gates: Sequence[float | None] = (),
    groups: Sequence[str] | None = None,
) -> Tensor:
    """Return one score [N] per picture of scores [R, N]; pictures of one name in `groups` are compared with
    one another, else all are.

    A single reward without a gate keeps its own units, and so does `sum`; the other mixes are relative to the
    pictures given. NaN where a reward cannot judge a picture though it judges others of the group.
    """
    if not all(map(math.isfinite, weights)):
        raise RewardError(f"weights {list(weights)} must be finite; give one number per reward")
    if len(scores) == 1 and not any(gate is not None for gate in gates):
        return weights[0] * scores[0]
    names = [""] * scores.shape[1] if groups is None else list(groups)
    made = torch.full((scores.shape[1],), math.nan)
    for name in dict.fromkeys(names):
        members = (
            [i for i, other in enumerate(names) if other == name]
            if groups is not None
            else list(range(len(names)))
        )
        if mix == "rank_product" and len(members) > MAX_RANKED:
            raise RewardError(
                f"mix is rank_product for {len(members)} pictures; at most {MAX_RANKED} are ranked, "
                "choose zscore or give fewer"
            )
        made[members] = mix_group(scores[:, members], weights, mix, gates)
    return made


def mix_group(scores: Tensor, weights: Sequence[float], mix: str, gates: Sequence[float | None]) -> Tensor:
    """Mix the scores [R, n] of one group: [n]."""
    blended = blend(scores[:, None, :, None], weights, mix, gates)
    if mix != "zscore":
        return blended[0, 0, :, 0]
    weight = torch.tensor([w for w in weights if w], dtype=blended.dtype).view(-1, 1, 1, 1)
    mean, std = moments(blended)
    judges = ~blended.isnan().all(2, keepdim=True)
    complete = (~blended.isnan() | ~judges).all(0) & judges.any(0)
    z = torch.where(judges & (std > least_spread(blended)), (blended - mean) / (std + FLOOR), 0.0)
    return torch.where(complete, (weight * z).sum(0), torch.nan)[0, :, 0]
