"""HPS v2.1: CLIP ViT-H/14, fine-tuned on the Human Preference Dataset v2 (Wu et al., arXiv 2306.09341).

    score = cos(picture, prompt)          `hpsv2.score`, github.com/tgxs002/HPSv2: no temperature, about 0.2
    to 0.35

Pictures: the authors' "light augmentation", which is not CLIP's: the long edge to 224, on numbers in [0, 1]
by torch's bicubic kernel, black bars to a square, CLIP's mean and deviation. Antialiased, as torchvision does
since 0.17 (before, it did not, and scores of large pictures differ). Prompts: 77 tokens, HTML entities
undone. By the authors' README only scores of one prompt compare.
"""

from collections.abc import Sequence
from html import unescape

import torch
from torch import Tensor

from .catalogue import KNOWN
from .clip import Clip, ModelReward, clip_from
from .preprocess import Pictures
from .safe_folder import Folder


class Hps(Clip):
    """CLIP that reads prompts as open_clip's tokenizer cleans them."""

    def read(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts [B]: unit norm, [B, D]."""
        return super().read([unescape(unescape(prompt)).strip() for prompt in prompts])


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load HPS v2.1 from its folder."""
    module, size = clip_from(folder, Hps)
    return ModelReward.of(KNOWN["hpsv2.1"], name, module, Pictures(size, fit="pad"), dtype, batch)
