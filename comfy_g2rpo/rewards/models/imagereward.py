"""ImageReward 1.0: BLIP's picture and text encoders and a head, trained on rankings by experts (Xu et al.,
arXiv 2304.05977).

    score = (head(text state at [CLS], crossed with the picture) − 0.16717…) / 1.03334…
    github.com/THUDM/ImageReward

Standardised over the authors' data, about −2 to 2, and only scores of one prompt compare. Pictures: OpenAI
CLIP's own transform (short edge to 224 by PIL's bicubic kernel, the middle as torchvision rounds it).
Prompts: BERT's uncased tokens, always padded to 35; the text state is read at [CLS], as the authors do, not
at BLIP's [ENC].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .catalogue import KNOWN
from .clip import Judge, ModelReward, mlp
from .preprocess import Pictures
from .safe_folder import WEIGHTS, Folder, check_tokenizer, fill, read_tokenizer, table

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35


class ImageReward(Judge):
    """BLIP with the head of ImageReward."""

    trunks = ("vision_model", "text_encoder")

    def __init__(self, vision: dict[str, Any], text: dict[str, Any], tokenizer: Any) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision_model = BlipVisionModel(BlipVisionConfig(**vision))
        self.text_encoder = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.head = mlp(self.text_encoder.config.hidden_size)
        self.tokenizer = tokenizer

    def see(self, pixels: Tensor) -> Tensor:
        """Read pictures [B, 3, size, size]: the states of all patches, [B, N, D]."""
        return self.vision_model(pixels).last_hidden_state

    def judge(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score patches [B, N, D] by prompts [B]: [B]."""
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        seen = torch.ones(features.shape[:2], dtype=torch.long, device=self.device)
        crossed = self.text_encoder(
            text.input_ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=features,
            encoder_attention_mask=seen,
        )
        return (self.head(crossed.last_hidden_state[:, 0].float()).squeeze(-1) - MEAN) / STD

    def embed(self, features: Tensor) -> Tensor:
        """Return the picture's own state as unit-norm features [B, D]."""
        return normalize(features[:, 0].float(), dim=-1)


def load(folder: Folder, name: str, dtype: torch.dtype, batch: int) -> ModelReward:
    """Load ImageReward from its folder."""
    from transformers import BertTokenizerFast

    config, place = folder.json("config.json"), folder.path / "config.json"
    vision, text = table(config, "vision_config", place), table(config, "text_config", place)
    tokenizer = read_tokenizer(folder, BertTokenizerFast, ["vocab.txt"])
    module = fill(lambda: ImageReward(vision, text, tokenizer), folder.file(WEIGHTS))
    check_tokenizer(tokenizer, module.text_encoder.config, TOKENS, place)
    return ModelReward.of(
        KNOWN["imagereward"],
        name,
        module,
        Pictures(module.vision_model.config.image_size, rounds=True),
        dtype,
        batch,
    )
