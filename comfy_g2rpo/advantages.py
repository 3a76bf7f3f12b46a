"""From rewards to advantages: z-scores within the group, summed over rewards and granularities.

How several rewards become one before that is `rewards/mixing.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOOR = 1e-8


def group_ranks(rewards: Tensor) -> Tensor:
    """Rank the members of [R, K, G, L] from 1, the least; equal ones share their mean rank, NaN stays NaN."""
    one, other = rewards.unsqueeze(3), rewards.unsqueeze(2)
    rank = (one > other).sum(3) + 0.5 * ((one == other).sum(3) + 1)
    return torch.where(rewards.isnan(), torch.nan, rank)


def wide(rewards: Tensor) -> Tensor:
    """Return rewards as float32, or as float64 where their squares or sums would not fit float32."""
    return rewards.double() if rewards.abs().nan_to_num(0.0).gt(1e15).any() else rewards.float()


def moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased std over the members of [R, K, G, L], NaN left out: [R, K, 1, L] each."""
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


def least_spread(rewards: Tensor, floor: float = FLOOR, noise: Sequence[float] = ()) -> Tensor:
    """Return the std [R, K, 1, L] that members of [R, K, G, L] must exceed to teach.

    The greatest of the floor, the noise of each reward [R], and float32's rounding at the size of the scores.
    """
    size = rewards.abs().nan_to_num(0.0).amax(2, keepdim=True)
    own = torch.tensor([*noise] or 0.0, dtype=size.dtype, device=size.device).view(-1, 1, 1, 1)
    return torch.maximum(size * torch.finfo(torch.float32).eps, own.clamp(min=floor))


def global_std(rewards: Sequence[Tensor]) -> Tensor:
    """Return each reward's std over all prompts: [R, K, G, L] each → [R, 1, 1, 1] (arXiv 2505.05470)."""
    flat = wide(torch.cat([r.flatten(1) for r in rewards], 1))
    return moments(flat[:, None, :, None])[1]


def integrate(
    rewards: Tensor,
    weights: Sequence[float] | None = None,
    clamp: float = 5.0,
    floor: float = FLOOR,
    std: Tensor | None = None,
    noise: Sequence[float] = (),
) -> Tensor:
    """Return advantages [K, G] from rewards [R, K, G, L]: A = Σ_r w_r Σ_λ (r − mean)/(std + floor), clamped,
    re-centred over the group.

    G²RPO's multi-granularity integration (arXiv 2510.01982, eq. 13). NaN rewards are left out; a member with
    none left gets 0. A group whose std does not exceed `least_spread` gives no gradient. `std` [R, 1, 1, 1]
    replaces the group's own as the scale.
    """
    rewards = wide(rewards)
    if weights is None:
        weights = [1.0] * rewards.shape[0]
    if len(weights) != rewards.shape[0]:
        raise ValueError(
            f"weights has {len(weights)} entries for {rewards.shape[0]} rewards; give one per reward"
        )
    mean, own = moments(rewards)
    z = (rewards - mean) / ((own if std is None else std) + floor)
    z = torch.where((own <= least_spread(rewards, floor, noise)) | torch.isnan(rewards), 0.0, z)
    weight = torch.tensor(weights, dtype=z.dtype, device=z.device)
    advantage = torch.einsum("r,rkgl->kg", weight, z).clamp(-clamp, clamp)
    kept = (~torch.isnan(rewards)).any(3).any(0)
    centre = advantage.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return torch.where(kept, advantage - centre, 0.0).float()


def zero_std_share(rewards: Tensor, floor: float = FLOOR, noise: Sequence[float] = ()) -> float:
    """Return the share of the groups [R, K, ·, L] whose rewards are equal but for noise: none can teach."""
    std = moments(wide(rewards))[1]
    equal = std <= least_spread(wide(rewards), floor, noise)
    return equal.float().mean().item() if std.numel() else 0.0


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Spearman's correlation over the members of two rewards [R, K, G, L], as [R, K, L].

    Equal scores share their mean rank; members that either side could not judge are left out. NaN without any
    order, 0 with one that only one side sees.
    """
    unknown = one.isnan() | other.isnan()
    known = (~unknown).double()
    count = known.sum(2, keepdim=True).clamp_min(1)
    centred = []
    for scores in (one, other):
        rank = group_ranks(scores.masked_fill(unknown, torch.nan)).double().nan_to_num(0.0)
        centred.append(known * (rank - rank.sum(2, keepdim=True) / count))
    spread = [rank.square().sum(2) for rank in centred]
    ordered = torch.stack([s > 1e-9 for s in spread])
    correlation = (centred[0] * centred[1]).sum(2) / (spread[0] * spread[1]).sqrt().clamp_min(1e-9)
    return torch.where(ordered.all(0), correlation, torch.where(ordered.any(0), 0.0, torch.nan))


def rank_agreement(rewards: Tensor, noise: Sequence[float] = ()) -> Tensor:
    """Return how every granularity orders the members, against the first one: [R, K, G, L] → [L].

    The mean Spearman correlation; low values warn that a coarse completion misleads. Groups that tie
    throughout at any granularity are left out.
    """
    least = least_spread(rewards.float(), 0.0, noise)
    usable = (moments(rewards.float())[1] > least).all(3).squeeze(2)
    agreement = rank_correlation(rewards.float(), rewards[..., :1].float().expand_as(rewards)).float()
    return agreement[usable].mean(0) if usable.any() else agreement.new_full((rewards.shape[3],), torch.nan)
