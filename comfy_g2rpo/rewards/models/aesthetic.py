"""LAION's aesthetic predictors: OpenAI's CLIP ViT-L/14 and a head on its unit-norm picture embedding; the
prompt is not read.

    score = head(picture / |picture|)     1 to 10
    linear  one layer             github.com/LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear
    mlp     five layers           github.com/christophschuhmann/improved-aesthetic-predictor,
    sac+logos+ava1-l14-linearMSE

Pictures: OpenAI CLIP's own transform (short edge to 224 by PIL's bicubic kernel, the middle as torchvision
rounds it). On a GPU the originals run CLIP in half precision; here the projection and the head are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..protocol import RewardError
from .catalogue import KNOWN
from .clip import Judge, ModelReward, mlp
from .preprocess import Pictures
from .safe_folder import WEIGHTS, Folder, fill, table


class Aesthetic(Judge):
    """CLIP's picture tower and an aesthetic head."""

    reads_prompt = False

    def __init__(self, vision: dict[str, Any], width: int, widths: Sequence[int]) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(**vision)
        self.vision_model = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.head = mlp(width, widths)

    def see(self, pixels: Tensor) -> Tensor:
        """Embed pictures [B, 3, size, size]: unit norm, [B, D]."""
        return normalize(self.visual_projection(self.vision_model(pixels).pooler_output.float()), dim=-1)

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score embeddings [B, D]: [B]."""
        return self.head(features).squeeze(-1)


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load either predictor from its folder."""
    config, place = folder.json("config.json"), folder.path / "config.json"
    vision, widths = table(config, "vision_config", place), head_widths(config)
    width = table({"config": config}, "config", place).get("projection_dim", 768)
    module = fill(lambda: Aesthetic(vision, width, widths), folder.file(WEIGHTS))
    known = KNOWN["aesthetic_linear" if len(widths) == 1 else "aesthetic"]
    return ModelReward.of(
        known, name, module, Pictures(module.vision_model.config.image_size, rounds=True), dtype, batch
    )


def head_widths(config: dict[str, Any]) -> list[int]:
    """Return the widths of the head's layers from its configuration; the last one is 1."""
    widths = config.get("head", [])
    if not (
        isinstance(widths, list)
        and 1 <= len(widths) <= 8
        and all(type(each) is int and 1 <= each <= 8192 for each in widths)
    ):
        raise RewardError(
            f"config.json: head is {str(widths)[:80]!a}; it lists the widths of one to eight layers"
        )
    return widths
