"""A FLUX.1 of diffusers' and transformers' own classes, random and too small to cost anything, in a folder
as it is published.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TINY = Path(__file__).parent.parent / "models/tiny"
TOKENS = 24
# What the published folders say; dev is shifted by resolution, schnell not at all.
SCHEDULERS = {
    "dev": {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False},
}


def transformer(kind: str = "dev") -> FluxTransformer2DModel:
    """Make the transformer: two double and two single blocks of one head, the smallest that ComfyUI can
    load.
    """
    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=kind == "dev",
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Make a tokenizer that knows letters."""
    letters = [chr(code) for code in range(33, 127)]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -3.0) for letter in ["▁", *letters])]
    return T5TokenizerFast(
        vocab=[*words, *((f"word{number}", -5.0) for number in range(300 - len(words)))], extra_ids=0
    )


def vae() -> AutoencoderKL:
    """Make a VAE with FLUX.1's scales, which other families use too."""
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8] * 4,
    }
    return AutoencoderKL(
        **blocks,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def pipeline(kind: str = "dev") -> FluxPipeline:
    """Make a whole pipeline with random weights."""
    torch.manual_seed(0)
    clip_tokens = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    clip = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
    }
    marks = {
        "bos_token_id": clip_tokens.bos_token_id,
        "eos_token_id": clip_tokens.eos_token_id,
        "pad_token_id": clip_tokens.pad_token_id,
    }
    made = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind]),
        vae=vae(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**clip, **marks, vocab_size=len(clip_tokens))),
        tokenizer=clip_tokens,
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer(kind),
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(folder: Path, kind: str = "dev", shard: str = "10GB") -> Path:
    """Write a pipeline's folder."""
    pipeline(kind).save_pretrained(folder, max_shard_size=shard)
    return folder


# The published single file by name: where its weights stand in diffusers' model. Several names: their rows
# one after the other.
DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj": ["attn.to_out.0"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "img_mod.lin": ["norm1.linear"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj": ["attn.to_add_out"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "txt_mod.lin": ["norm1_context.linear"],
}
SINGLE = {
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "modulation.lin": ["norm.linear"],
}
WHOLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
}


def published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name a transformer's weights as its published single file does."""
    made = {}
    for leaf in ("weight", "bias"):
        made |= {
            f"{name}.{leaf}": weights[f"{theirs}.{leaf}"]
            for name, theirs in WHOLE.items()
            if f"{theirs}.{leaf}" in weights
        }
        shift_last = weights[f"norm_out.linear.{leaf}"]
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat(shift_last.chunk(2)[::-1])
        for kind, theirs, names in (
            ("double_blocks", "transformer_blocks", DOUBLE),
            ("single_blocks", "single_transformer_blocks", SINGLE),
        ):
            for block in range(2):
                for name, parts in names.items():
                    rows = [weights[f"{theirs}.{block}.{part}.{leaf}"] for part in parts]
                    made[f"{kind}.{block}.{name}.{leaf}"] = torch.cat(rows)
    for name, theirs in NORMS.items():
        made |= {name.format(block): weights[theirs.format(block)] for block in range(2)}
    return made


def kontext(folder: Path) -> Path:
    """Write the folder of a Kontext: dev's parts, in the pipeline that edits."""
    FluxKontextPipeline(**pipeline().components).save_pretrained(folder)
    return folder
