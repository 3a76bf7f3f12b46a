"""CLIPScore: the cosine of a picture and its prompt, by any CLIP in transformers' layout (Hessel et al.,
arXiv 2104.08718).

    score = 100 · cos(picture, prompt)

The paper's own form is 2.5 · max(cos, 0), torchmetrics' is this one cut off at 0; here nothing is cut off, so
that there is a slope everywhere. Pictures: as the folder's preprocessor_config.json says (OpenAI's: short
edge, the middle; DFN5B: squashed to a square), by PIL. Prompts: 77 tokens.
"""

from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..protocol import RewardError
from .catalogue import KNOWN
from .clip import Clip, ModelReward, clip_from
from .preprocess import CLIP_MEAN, CLIP_STD, Pictures, three
from .safe_folder import Folder

KERNELS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)


class PercentClip(Clip):
    """CLIP whose cosines are in hundredths."""

    def scale(self) -> Tensor:
        """Return what the cosine is multiplied by."""
        return torch.full((), 100.0, device=self.device)


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load a CLIP from its folder."""
    module, size = clip_from(folder, PercentClip)
    known = (
        KNOWN["clipscore"] if name == "clipscore" else replace(KNOWN["clipscore"], licence=licence_of(folder))
    )
    return ModelReward.of(
        known, name, module, preprocessor(folder.json("preprocessor_config.json"), size), dtype, batch
    )


def licence_of(folder: Folder) -> str:
    """Return the licence that a CLIP of one's own was added with."""
    licence = folder.json("reward.json").get("licence")
    return (
        " ".join(licence.split())[:80]
        if isinstance(licence, str) and licence.strip()
        else "that of its weights"
    )


def preprocessor(config: dict[str, Any], size: int) -> Pictures:
    """Read transformers' preprocessor_config.json for a model of pictures of this size."""
    edge = config.get("size", size)
    squash = isinstance(edge, dict) and "height" in edge
    asked = {edge} if isinstance(edge, int) else set(edge.values()) if isinstance(edge, dict) else set()
    if asked != {size}:
        raise RewardError(
            f"preprocessor_config.json: size is {str(edge)[:80]!a}, but the model sees {size}; take "
            "the model's own file"
        )
    kernel = config.get("resample", int(Image.Resampling.BICUBIC))
    if kernel not in [int(known) for known in KERNELS]:
        raise RewardError(
            f"preprocessor_config.json: resample is {str(kernel)[:40]!a}; known are bilinear 2, "
            "bicubic 3 and Lanczos 1"
        )
    mean, std = (
        three(config.get("image_mean", CLIP_MEAN), "image_mean"),
        three(config.get("image_std", CLIP_STD), "image_std"),
    )
    return Pictures(size, "squash" if squash else "crop", mean, std, kernel)
