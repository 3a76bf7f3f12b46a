"""From rewards to advantages: z-scores within the group, summed over granularities and rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased std over the members of [R, K, G, L] as [R, K, 1, L]; NaN does not count, fewer than two have std 0."""
    valid = ~torch.isnan(rewards)
    count = valid.sum(2, keepdim=True)
    # Seen from one of them, equal rewards have a spread of exactly 0, which rounding would blow up to a z-score otherwise.
    base = torch.where(valid.any(2, keepdim=True), torch.where(valid, rewards, torch.inf).amin(2, keepdim=True), 0.0)
    above = torch.where(valid, rewards - base, 0.0)
    mean = above.sum(2, keepdim=True) / count.clamp(min=1)
    spread = torch.where(valid, above - mean, 0.0).square().sum(2, keepdim=True)
    return base + mean, (spread / (count - 1).clamp(min=1)).sqrt()


def global_std(rewards: Sequence[Tensor]) -> Tensor:
    """Return each reward's std over all prompts and members: a list of [R, K, G, L] → [R, 1, 1, 1] (Flow-GRPO, arXiv 2505.05470)."""
    flat = torch.cat([r.flatten(1) for r in rewards], 1)
    return moments(flat[:, None, :, None])[1]


def integrate(
    rewards: Tensor, weights: Sequence[float] | None = None, clamp: float = 5.0, floor: float = 1e-8, std: Tensor | None = None
) -> Tensor:
    """Return advantages [K, G] from rewards [R, K, G, L]: A = Σ_r w_r Σ_λ (r − mean)/(std + floor), clamped, re-centred over the group.

    G²RPO's multi-granularity integration (arXiv 2510.01982, eq. 13). NaN rewards are left out; a member with none left gets 0. A group
    whose std does not exceed the floor gives no gradient. `std` [R, 1, 1, 1] replaces the group's own as the scale.
    """
    rewards = rewards.float()
    if weights is None:
        weights = [1.0] * rewards.shape[0]
    if len(weights) != rewards.shape[0]:
        raise ValueError(f"weights has {len(weights)} entries for {rewards.shape[0]} rewards; give one per reward")
    mean, own = moments(rewards)
    z = (rewards - mean) / ((own if std is None else std) + floor)
    z = torch.where((own <= floor) | torch.isnan(rewards), 0.0, z)
    weight = torch.tensor(weights, dtype=z.dtype, device=z.device)
    advantage = torch.einsum("r,rkgl->kg", weight, z).clamp(-clamp, clamp)
    kept = (~torch.isnan(rewards)).any(3).any(0)
    centre = advantage.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return torch.where(kept, advantage - centre, 0.0)


def zero_std_share(rewards: Tensor, floor: float = 1e-8) -> float:
    """Return the share of the groups [R, K, ·, L] that cannot teach anything, because all their rewards are equal."""
    std = moments(rewards.float())[1]
    return (std <= floor).float().mean().item() if std.numel() else 0.0


def rank_agreement(rewards: Tensor) -> Tensor:
    """Return the mean Spearman correlation between every granularity's order of the members and the first one's: [R, K, G, L] → [L].

    Low values warn that a coarse completion misleads. Equal rewards share their mean rank; groups that tie throughout are left out.
    """
    r = rewards.float()
    ranks = (r.unsqueeze(3) > r.unsqueeze(2)).sum(3) + 0.5 * (r.unsqueeze(3) == r.unsqueeze(2)).sum(3)
    ranks = ranks - ranks.mean(2, keepdim=True)
    ranks = ranks / ranks.norm(dim=2, keepdim=True).clamp(min=1e-12)
    usable = (moments(rewards.float())[1] > 0).all(3).squeeze(2)
    agreement = (ranks * ranks[..., :1]).sum(2)
    return agreement[usable].mean(0) if usable.any() else agreement.new_full((rewards.shape[3],), torch.nan)
