"""Win rates inside a group: images are held against others in both orders, as models favour a place."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .cache import digest
from .openai import ChatReward
from .sent_pictures import levels

OPPONENTS = 8  # at most, of each picture; a pair costs two questions


@dataclass(frozen=True)
class PairwiseReward(ChatReward):
    """Score by win rate; needs all pictures of a prompt in one call."""

    compares_across_prompts: bool = False
    needs_group: bool = True
    opponents: int = OPPONENTS

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3], each prompt a group: [B], NaN without enough comparisons."""
        scores = torch.full((len(images),), torch.nan)
        pictures = levels(images)
        for prompt in dict.fromkeys(prompts):
            places = [i for i, other in enumerate(prompts) if other == prompt]
            scores[places] = self.rates([pictures[i] for i in places], prompts[places[0]])
        return scores

    def rates(self, pictures: Sequence[np.ndarray], prompt: str) -> Tensor:
        """Compare the pictures of one group: win rates [n]."""
        names = [digest(picture) for picture in pictures]
        pairs = draw_pairs(names, self.opponents)
        # Equal pictures are not asked about: they win one half.
        different = [(i, j) for i, j in pairs if names[i] != names[j]]
        ordered = [order for i, j in different for order in ((i, j), (j, i))]
        keys = {order: self.chat.key([pictures[i] for i in order], prompt) for order in ordered}
        found = self.chat.ask({key: ([pictures[i] for i in order], prompt) for order, key in keys.items()})
        first_wins = {order: found[key] for order, key in keys.items() if key in found}
        first_wins |= {order: 0.5 for i, j in pairs if names[i] == names[j] for order in ((i, j), (j, i))}
        return win_rates(len(pictures), pairs, first_wins)


def draw_pairs(names: Sequence[str], opponents: int) -> list[tuple[int, int]]:
    """Pair n images: all with all, or with `opponents` others each, drawn by the images' names."""
    count = len(names)
    if count - 1 <= opponents:
        return [(i, j) for i in range(count) for j in range(i + 1, count)]
    ring = list(range(count))
    random.Random(" ".join(names)).shuffle(ring)
    # Neighbours on a ring up to a distance: connected, and the same number for everyone.
    return [
        (ring[i], ring[(i + step) % count]) for step in range(1, opponents // 2 + 1) for i in range(count)
    ]


def win_rates(
    count: int, pairs: Sequence[tuple[int, int]], first_wins: Mapping[tuple[int, int], float]
) -> Tensor:
    """Average P(first wins) over orders, then over an image's pairs: [n], NaN below half of them."""
    won, asked = [[] for _ in range(count)], [0] * count
    for i, j in pairs:
        asked[i] += 1
        asked[j] += 1
        if (i, j) in first_wins and (j, i) in first_wins:
            share = (first_wins[i, j] + 1 - first_wins[j, i]) / 2
            won[i].append(share)
            won[j].append(1 - share)
    sound = [len(shares) > 0 and 2 * len(shares) >= asked[i] for i, shares in enumerate(won)]
    return torch.tensor(
        [sum(shares) / len(shares) if sound[i] else math.nan for i, shares in enumerate(won)],
        dtype=torch.float32,
    )
