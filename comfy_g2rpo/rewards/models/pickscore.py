"""PickScore v1: CLIP ViT-H/14, fine-tuned on choices of Pick-a-Pic's users (Kirstain et al., arXiv
2305.01569).

    score = exp(logit_scale) · cos(picture, prompt)          the authors' model card,
    github.com/yuvalkirstain/PickScore

The temperature is near 100, scores lie about 18 to 24; flow_grpo divides them by 26 to come near 1. Pictures:
CLIPImageProcessor's (short edge to 224 by PIL's bicubic kernel, the middle, CLIP's mean and deviation);
prompts: 77 tokens. It was trained on pairs of one prompt.
"""

import torch

from .catalogue import KNOWN
from .clip import ModelReward, ScaledClip, clip_from
from .preprocess import Pictures
from .safe_folder import Folder


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load PickScore from its folder."""
    module, size = clip_from(folder, ScaledClip)
    return ModelReward.of(KNOWN["pickscore"], name, module, Pictures(size), dtype, batch)
