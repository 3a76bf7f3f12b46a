"""From rewards to advantages: gates, the mix of several rewards, z-scores within the group, the sum over
granularities.

What holds of every mix: a reward that judges nobody of a group has no say in that group, nor one whose scores
there are all equal; the order of the members does not matter; the advantages of a group sum to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIXES = ("zscore", "sum", "minimum", "rank_product")
FLOOR = 1e-8
UNITLESS_FLOOR = 1e-5  # for the spread of mixed z-scores or ranks


def mixed(
    groups: Sequence[Tensor],
    weights: Sequence[float],
    mix: str = "zscore",
    gates: Sequence[float | None] = (),
    clamp: float = 5.0,
    floor: float = FLOOR,
    everywhere: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the advantages [K, G] of every prompt's rewards [R, K, G, L].

    `everywhere` lists the rewards of all prompts of all processes: their spread is then the scale, instead of
    each group's own.
    """
    scale = None if everywhere is None else global_std(everywhere)
    blended = [blend(rewards, weights, mix, gates, floor, scale) for rewards in groups]
    if everywhere is not None:
        scale = global_std([blend(rewards, weights, mix, gates, floor, scale) for rewards in everywhere])
    # Ranks and z-scores have no unit, as the floor has.
    floor = floor if mix in ("zscore", "sum") else UNITLESS_FLOOR
    weights = [weight for weight in weights if weight] if mix == "zscore" else [1.0]
    return [integrate(rewards, weights, clamp, floor, scale) for rewards in blended]


def blend(
    rewards: Tensor,
    weights: Sequence[float],
    mix: str,
    gates: Sequence[float | None] = (),
    floor: float = FLOOR,
    std: Tensor | None = None,
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
    rewards = gated(rewards.float(), weights, gates, floor, std)
    used = [index for index, weight in enumerate(weights) if weight]
    rewards, std = rewards[used], None if std is None else std[used]
    if mix == "zscore":
        return rewards
    weight = torch.tensor(
        [weights[index] for index in used], dtype=rewards.dtype, device=rewards.device
    ).view(-1, 1, 1, 1)
    judges = ~rewards.isnan().all(2, keepdim=True)
    complete = (~rewards.isnan() | ~judges).all(0) & judges.any(0)
    # In float64, so that what is equal in exact arithmetic stays equal: the z-score of rounding would be
    # noise at full strength.
    rewards, weight = torch.where(complete, rewards, torch.nan).double(), weight.double()
    mean, own = moments(rewards)
    if mix == "sum":
        score = torch.where(judges, weight * rewards, 0.0).sum(0)
    elif mix == "minimum":
        z = weight * (rewards - mean) / ((own if std is None else std) + floor)
        least = torch.where(own > floor, z, torch.inf).amin(0)
        score = torch.where(least.isinf(), 0.0, least)
    else:
        share = weight.abs() * (own > floor)
        share = share / share.sum(0).clamp(min=torch.finfo(share.dtype).tiny)
        score = torch.where(share > 0, share * group_ranks(weight.sign() * rewards).log(), 0.0).sum(0).exp()
    return torch.where(complete, score, torch.nan).float()[None]


def gated(
    rewards: Tensor,
    weights: Sequence[float],
    gates: Sequence[float | None],
    floor: float = FLOOR,
    std: Tensor | None = None,
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
    spread = moments(passing)[1]
    # Where those that pass are equal, any distance will do: the z-score knows but one.
    step = torch.where(
        spread > floor, spread, torch.ones_like(spread) if std is None else torch.where(std > floor, std, 1.0)
    )
    worst = torch.where(passing.isnan(), torch.inf, passing).amin(2, keepdim=True) - step
    # A reward that judges none of those that pass has no say.
    anyone = (~failed & ~unknown).any(1, keepdim=True)
    worst = torch.where(
        worst.isinf(), torch.where(anyone | rewards.isnan().all(2, keepdim=True), torch.nan, 0.0), worst
    )
    return sign * torch.where(failed, worst, passing)


def group_ranks(rewards: Tensor) -> Tensor:
    """Rank the members of [R, K, G, L] from 1, the least; equal ones share their mean rank, NaN stays NaN."""
    one, other = rewards.unsqueeze(3), rewards.unsqueeze(2)
    rank = (one > other).sum(3) + 0.5 * ((one == other).sum(3) + 1)
    return torch.where(rewards.isnan(), torch.nan, rank)


def moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased std over the members of [R, K, G, L] as [R, K, 1, L].

    NaN does not count, fewer than two have std 0.
    """
    valid = ~torch.isnan(rewards)
    count = valid.sum(2, keepdim=True)
    # Seen from one of them, equal rewards have a spread of exactly 0, which rounding would blow up to a
    # z-score otherwise.
    base = torch.where(
        valid.any(2, keepdim=True), torch.where(valid, rewards, torch.inf).amin(2, keepdim=True), 0.0
    )
    above = torch.where(valid, rewards - base, 0.0)
    mean = above.sum(2, keepdim=True) / count.clamp(min=1)
    spread = torch.where(valid, above - mean, 0.0).square().sum(2, keepdim=True)
    return base + mean, (spread / (count - 1).clamp(min=1)).sqrt()


def global_std(rewards: Sequence[Tensor]) -> Tensor:
    """Return each reward's std over all prompts and members: a list of [R, K, G, L] → [R, 1, 1, 1]
    (Flow-GRPO, arXiv 2505.05470).
    """
    flat = torch.cat([r.flatten(1) for r in rewards], 1)
    return moments(flat[:, None, :, None])[1]


def integrate(
    rewards: Tensor,
    weights: Sequence[float] | None = None,
    clamp: float = 5.0,
    floor: float = FLOOR,
    std: Tensor | None = None,
) -> Tensor:
    """Return advantages [K, G] from rewards [R, K, G, L]: A = Σ_r w_r Σ_λ (r − mean)/(std + floor), clamped,
    re-centred over the group.

    G²RPO's multi-granularity integration (arXiv 2510.01982, eq. 13). NaN rewards are left out; a member with
    none left gets 0. A group whose std does not exceed the floor gives no gradient. `std` [R, 1, 1, 1]
    replaces the group's own as the scale.
    """
    rewards = rewards.float()
    if weights is None:
        weights = [1.0] * rewards.shape[0]
    if len(weights) != rewards.shape[0]:
        raise ValueError(
            f"weights has {len(weights)} entries for {rewards.shape[0]} rewards; give one per reward"
        )
    mean, own = moments(rewards)
    z = (rewards - mean) / ((own if std is None else std) + floor)
    z = torch.where((own <= floor) | torch.isnan(rewards), 0.0, z)
    weight = torch.tensor(weights, dtype=z.dtype, device=z.device)
    advantage = torch.einsum("r,rkgl->kg", weight, z).clamp(-clamp, clamp)
    kept = (~torch.isnan(rewards)).any(3).any(0)
    centre = advantage.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return torch.where(kept, advantage - centre, 0.0)


def zero_std_share(rewards: Tensor, floor: float = FLOOR) -> float:
    """Return the share of the groups [R, K, ·, L] that cannot teach anything, because all their rewards
    are equal.
    """
    std = moments(rewards.float())[1]
    return (std <= floor).float().mean().item() if std.numel() else 0.0


def rank_agreement(rewards: Tensor) -> Tensor:
    """Return the mean Spearman correlation between every granularity's order of the members and the first
    one's: [R, K, G, L] → [L].

    Low values warn that a coarse completion misleads. Equal rewards share their mean rank; groups that tie
    throughout are left out.
    """
    r = rewards.float()
    ranks = (r.unsqueeze(3) > r.unsqueeze(2)).sum(3) + 0.5 * (r.unsqueeze(3) == r.unsqueeze(2)).sum(3)
    ranks = ranks - ranks.mean(2, keepdim=True)
    ranks = ranks / ranks.norm(dim=2, keepdim=True).clamp(min=1e-12)
    usable = (moments(rewards.float())[1] > 0).all(3).squeeze(2)
    agreement = (ranks * ranks[..., :1]).sum(2)
    return agreement[usable].mean(0) if usable.any() else agreement.new_full((rewards.shape[3],), torch.nan)
