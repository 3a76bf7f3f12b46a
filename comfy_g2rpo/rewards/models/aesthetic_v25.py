"""Aesthetic Predictor v2.5: SigLIP so400m/14 at 384 and a head on its unit-norm pooled state; the prompt is
not read.

    score = head(pooled / |pooled|)       1 to 10, "5.5 and above is great"
    github.com/discus0434/aesthetic-predictor-v2-5

The repository, with the head's weights in it, is under AGPL-3.0; SigLIP is under Apache-2.0. This is a reader
of our own and takes nothing from that code, so using the weights changes nothing about this package's
licence; what you may do with the weights themselves, their licence says. Pictures: SiglipImageProcessor's
(both edges to 384 by PIL's bicubic kernel, to [−1, 1]).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .aesthetic import head_widths
from .catalogue import KNOWN
from .clip import Judge, ModelReward, mlp
from .preprocess import HALF, Pictures
from .safe_folder import WEIGHTS, Folder, fill, table


class AestheticV25(Judge):
    """SigLIP's picture tower and an aesthetic head."""

    reads_prompt = False

    def __init__(self, vision: dict[str, Any], widths: Sequence[int]) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        super().__init__()
        self.vision_model = SiglipVisionModel(SiglipVisionConfig(**vision))
        self.head = mlp(self.vision_model.config.hidden_size, widths)

    def see(self, pixels: Tensor) -> Tensor:
        """Read pictures [B, 3, size, size]: the pooled state, unit norm, [B, D]."""
        return normalize(self.vision_model(pixels).pooler_output.float(), dim=-1)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score states [B, D]: [B]."""
        return self.head(features).squeeze(-1)


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load the predictor from its folder."""
    config, place = folder.json("config.json"), folder.path / "config.json"
    vision, widths = table(config, "vision_config", place), head_widths(config)
    module = fill(lambda: AestheticV25(vision, widths), folder.file(WEIGHTS))
    pictures = Pictures(module.vision_model.config.image_size, "squash", HALF, HALF)
    return ModelReward.of(KNOWN["aesthetic_v2.5"], name, module, pictures, dtype, batch)
