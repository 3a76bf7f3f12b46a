"""A Qwen-Image-Edit of diffusers' and transformers' own classes, random and too small to cost anything, in
a folder as it is published.
"""

import json
from pathlib import Path

import native_files
import qwen_folder
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

MARKS = (*qwen_folder.MARKS, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
KINDS = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")


def tokenizer() -> Qwen2Tokenizer:
    """Make a tokenizer that knows bytes and pictures."""
    words = [*sorted(ByteLevel.alphabet()), *MARKS]
    return Qwen2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[],
        extra_special_tokens=list(MARKS[1:]),
    )


def text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """Make the language model with eyes."""
    config = native_files.qwen_vl().config
    config.text_config.vocab_size = len(tokenizer())
    for name, mark in (("vision_start", 3), ("vision_end", 4), ("image", 5), ("video", 6)):
        setattr(config, f"{name}_token_id", 256 + mark)
    return Qwen2_5_VLForConditionalGeneration(config)


def save(folder: Path, kind: str = KINDS[0]) -> Path:
    """Write a folder with an index as it is published.

    The 2511 of Plus looks at its picture as at one without noise.
    """
    torch.manual_seed(0)
    size = {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 128}
    plus = kind == KINDS[1]
    parts = {
        "scheduler": ("diffusers", FlowMatchEulerDiscreteScheduler(**qwen_folder.SCHEDULER)),
        "vae": ("diffusers", AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)),
        "text_encoder": ("transformers", text_encoder()),
        "tokenizer": ("transformers", tokenizer()),
        "transformer": ("diffusers", QwenImageTransformer2DModel(**size, zero_cond_t=plus)),
    }
    for name, (_, part) in parts.items():
        part.save_pretrained(folder / name)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    for part in (images, tokenizer()):
        part.save_pretrained(folder / "processor")
    index = {name: [library, type(part).__name__] for name, (library, part) in parts.items()}
    index |= {"_class_name": kind, "processor": ["transformers", "Qwen2VLProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
