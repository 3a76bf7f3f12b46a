"""How much a reward model's scores differ where nothing differs: what no advantage may be made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

PROMPT = "a photo of a cat"
VARIANTS = 8
BATCHES = (1, 3)  # beside all at once: kernels differ by the batch's size


def measured(score: Callable[[Tensor, Sequence[str]], Tensor], side: int) -> float:
    """Return the largest distance between scores of pictures that no eye can tell apart.

    Two pictures of `side` pixels, a flat and a varied one, are judged in variants that differ by one level of
    8 bits in one pixel, in batches of several sizes. So the dtype, the size of the scores and the place in a
    batch are all in it. 0 where nothing can be judged.
    """
    pictures = variants(side)
    both = pictures.transpose(0, 1).flatten(0, 1)  # the two alternate
    found = [score(both, [PROMPT] * len(both)).view(VARIANTS, 2).T]
    for size in BATCHES:
        found.append(torch.stack([score(picture[:size], [PROMPT] * size) for picture in pictures]))
    scores = torch.cat(found, 1).double()
    spread = scores.amax(1) - scores.amin(1)
    return spread.nan_to_num(0.0).max().item()


def variants(side: int) -> Tensor:
    """Draw both pictures, from a seed of their own: [2, VARIANTS, side, side, 3] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    varied = interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    levels = torch.stack([torch.full((side, side, 3), 128.0), (varied[0].movedim(0, 2) * 254).round()])
    made = levels[:, None].repeat(1, VARIANTS, 1, 1, 1)
    for i in range(1, VARIANTS):
        row, column = torch.randint(side, (2,), generator=generator).tolist()
        made[:, i, row, column] += 1
    return made / 255
