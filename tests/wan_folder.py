"""A Wan of diffusers' and transformers' own classes, random and too small to cost anything, in a folder as
it is published.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from flux_folder import t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel

# What the published folders say: Wan 2.1, and the 5B of 2.2 whose VAE halves the picture once more.
SCHEDULER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
KINDS = {
    "2.1": (16, {"base_dim": 8, "num_res_blocks": 1}),
    "2.2 5B": (
        48,
        {
            "base_dim": 8,
            "decoder_base_dim": 8,
            "num_res_blocks": 1,
            "z_dim": 48,
            "latents_mean": [0.01 * channel for channel in range(48)],
            "latents_std": [1 + 0.01 * channel for channel in range(48)],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
        },
    ),
}


def transformer(channels: int = 16) -> WanTransformer3DModel:
    """Make the transformer."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=channels,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
    )


def pipeline(kind: str = "2.1", second: bool = False) -> WanPipeline:
    """Make a whole pipeline with random weights.

    With a `second` transformer for the low noise levels as in 2.2 A14B.
    """
    torch.manual_seed(0)
    channels, vae = KINDS[kind]
    made = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        vae=AutoencoderKLWan(**vae),
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
        transformer=transformer(channels),
        transformer_2=transformer(channels) if second else None,
        boundary_ratio=0.875 if second else None,
        expand_timesteps=kind == "2.2 5B",
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(folder: Path, kind: str = "2.1", second: bool = False) -> Path:
    """Write a pipeline's folder."""
    pipeline(kind, second).save_pretrained(folder)
    return folder
