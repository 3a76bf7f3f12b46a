"""How different images are: distances for the watch, and diversity shaping (SetPO)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..advantages import integrate

SIDE = 8  # pixels are compared on pictures reduced to this many on a side: what is drawn, not its texture

Describe = Callable[[Tensor], Tensor]
"""Images [B, H, W, 3] → features [B, D], at distances from 0 to 1 (pixels) or 2 (embed)."""


def pixel_features(images: Tensor, side: int = SIDE) -> Tensor:
    """Reduce images [B, H, W, 3] to side × side means, over √D: [B, D]; distance is then RMS difference."""
    small = F.adaptive_avg_pool2d(images.movedim(-1, 1).float(), side).flatten(1)
    return small / small.shape[1] ** 0.5


def distances(features: Tensor) -> Tensor:
    """Return the Euclidean distances of features [..., N, D]: [..., N, N], NaN where a feature is."""
    # Not the matrix form: its rounding gives equal pictures a distance.
    return torch.cdist(features.float(), features.float(), compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(features: Tensor) -> Tensor:
    """Return the mean distance over the pairs of [..., N, D]: [...], NaN members left out."""
    apart = distances(features)
    pairs = ~apart.isnan() & ~torch.eye(apart.shape[-1], dtype=torch.bool, device=apart.device)
    count = pairs.sum((-2, -1))
    return torch.where(
        count > 0, torch.where(pairs, apart, 0.0).sum((-2, -1)) / count.clamp(min=1), torch.nan
    )


def spread(features: Tensor) -> dict[str, Tensor]:
    """Return how far images [P, N, D] lie from their prompt's ("group" [P]) and others' ("set" [P])."""
    prompts, noises = features.shape[:2]
    # Two prompts' pictures of the same noise are compared, so that the price grows with N and not with N².
    apart = distances(features.movedim(1, 0))
    others = ~torch.eye(prompts, dtype=torch.bool, device=features.device)
    found = {"set": torch.where(others, apart, torch.nan).nanmean((0, 2))} if prompts > 1 else {}
    return found | ({"group": mean_distance(features)} if noises > 1 else {})


def marginals(features: Tensor) -> Tensor:
    """Return what each member of groups [..., G, D] adds to its group's kernel diversity, F(S) − F(S∖i):
    [..., G]; NaN where a feature is.

    SetPO (arXiv 2602.01062): a set's diversity is F = mean_i g(mean_j k(i, j)) over the other members j with
    a symmetric kernel k in [0, 1] and a decreasing g, and a member's credit is its leave-one-out marginal.
    Here k = exp(−d²/2h²) with h the group's mean distance, so that the features' scale does not matter and a
    far outlier counts as unlike and no more, and g(u) = 1 − u. One picture has diversity 0.
    """
    apart = distances(features)
    valid = ~apart.diagonal(dim1=-2, dim2=-1).isnan()
    pair = (
        valid.unsqueeze(-1)
        & valid.unsqueeze(-2)
        & ~torch.eye(apart.shape[-1], dtype=torch.bool, device=apart.device)
    )
    width = mean_distance(features)[..., None, None]
    unlike = torch.where(pair & (width > 0), 1 - torch.exp(-0.5 * (apart / width).square()), 0.0)
    count = valid.sum(-1, keepdim=True)
    own = unlike.sum(-1)
    whole = own.sum(-1, keepdim=True)
    with_all = whole / (count * (count - 1)).clamp(min=1)
    without = (whole - 2 * own) / ((count - 1) * (count - 2)).clamp(min=1)
    return torch.where(valid, with_all - torch.where(count > 2, without, 0.0), torch.nan)


def shaping(features: Tensor, rewards: Tensor, weight: float, clamp: float = 5.0) -> Tensor:
    """Return what diversity adds to the advantages [K, G]: λ·z of the marginals of features [K, G, L, D],
    summed over L and centred.

    Rewards [R, K, G, L] say which pictures were judged: one that none could judge gets no credit for being
    unusual. The paper centres the marginals in the group; here they are divided by their standard deviation
    too, as rewards are, so that λ = 1 pulls as hard as one reward of weight 1 at any group size.
    """
    judged = ~rewards.isnan().all(0)
    found = marginals(torch.where(judged[..., None], features, torch.nan).movedim(2, 1)).movedim(1, 2)
    # Rounding alone must not rank pictures that are equal.
    return integrate(found[None], [weight], clamp, 1e-6)


def measure(embed: Describe | None, wanted: str) -> str:
    """Return what shaping goes by, "embed" or "pixels"; "auto" is embed where a reward has one."""
    if wanted == "embed" and embed is None:
        raise ValueError(
            "diversity_by is embed, but no reward that is trained on has an embedding; choose pixels or auto"
        )
    return "embed" if embed is not None and wanted != "pixels" else "pixels"


def describe(images: Tensor, embed: Describe | None) -> dict[str, Tensor]:
    """Describe images [B, H, W, 3] by every measure at hand: [B, D] each on the CPU, NaN if broken."""
    found = {"pixels": pixel_features(images).cpu()}
    if embed is not None:
        whole = ~images.flatten(1).isnan().any(1)
        made = embed(torch.where(whole[:, None, None, None], images, 0.0)).float()
        found["embed"] = torch.where(whole[:, None], made, torch.nan).cpu()
    return found
