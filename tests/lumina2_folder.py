"""A Lumina-Image 2.0 of diffusers' and transformers' own classes, random and too small to cost anything,
in a folder as it is published.
"""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from flux_folder import vae
from tokenizers.processors import TemplateProcessing
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

SCHEDULER = {"shift": 6.0, "use_dynamic_shifting": False}  # what the published folder says


def tokenizer() -> GemmaTokenizer:
    """Make a tokenizer that knows letters."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(chr(code) for code in range(33, 127))]
    words += [f"word{number}" for number in range(300 - len(words))]
    made = GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[])
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return made


def pipeline() -> Lumina2Pipeline:
    """Make a whole pipeline with random weights.

    Three heads of queries share one of keys and values, as published.
    """
    torch.manual_seed(0)
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    made = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae(),
        text_encoder=Gemma2Model(Gemma2Config(**text, head_dim=16, vocab_size=300)),
        tokenizer=tokenizer(),
        transformer=Lumina2Transformer2DModel(
            hidden_size=96,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=6,
            num_kv_heads=2,
            cap_feat_dim=32,
            axes_dim_rope=(8, 4, 4),
            axes_lens=(300, 64, 64),
            multiple_of=32,
        ),
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(folder: Path) -> Path:
    """Write a pipeline's folder."""
    pipeline().save_pretrained(folder)
    return folder
