"""A Z-Image of diffusers' and transformers' own classes, random and too small to cost anything, in a
folder as it is published.
"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from flux_folder import vae
from qwen_folder import tokenizer
from transformers import Qwen3Config, Qwen3Model

# What the published folder of Turbo says, and a scheduler that shifts by resolution.
SCHEDULERS = {
    "static": {"shift": 3.0, "use_dynamic_shifting": False},
    "dynamic": {"use_dynamic_shifting": True},
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def transformer() -> ZImageTransformer2DModel:
    """Make the transformer; its padding tokens are not zero, as they are not once it is trained."""
    made = ZImageTransformer2DModel(
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[512, 64, 64],
    )
    with torch.no_grad():
        made.x_pad_token.normal_()
        made.cap_pad_token.normal_()
    return made


def text_encoder() -> Qwen3Model:
    """Make the language model."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return Qwen3Model(
        Qwen3Config(
            **sizes, head_dim=16, vocab_size=260, bos_token_id=256, eos_token_id=258, pad_token_id=256
        )
    )


def pipeline(scheduler: str = "static") -> ZImagePipeline:
    """Make a whole pipeline with random weights."""
    torch.manual_seed(0)
    words = tokenizer()
    words.chat_template = TEMPLATE
    made = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[scheduler]),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=words,
        transformer=transformer(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(folder: Path, scheduler: str = "static") -> Path:
    """Write a pipeline's folder."""
    pipeline(scheduler).save_pretrained(folder)
    return folder
