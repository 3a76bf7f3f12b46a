"""A Qwen-Image of diffusers' and transformers' own classes, random and too small to cost anything, in a
folder as it is published.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What the published folder says.
SCHEDULER = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}


def tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer that knows bytes."""
    words = [*sorted(ByteLevel.alphabet()), *MARKS]
    return Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        extra_special_tokens=list(MARKS[1:]),
    )


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Make the language model, and the vision tower that it brings."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    marks = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config={**text, **marks, "rope_parameters": rope, "vocab_size": 260}, vision_config=vision
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def pipeline() -> QwenImagePipeline:
    """Make a whole pipeline with random weights."""
    torch.manual_seed(0)
    made = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
        ),
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(folder: Path) -> Path:
    """Write a pipeline's folder."""
    pipeline().save_pretrained(folder)
    return folder
