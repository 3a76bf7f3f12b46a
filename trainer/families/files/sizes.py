"""What a model's configuration says of its size, read off the shapes of its weights; the rest of a
configuration is shipped.

Heads are of the size that the published models have. Names are those of diffusers and transformers.
"""

from __future__ import annotations

from typing import Any

from .single_file import Held


def channels_of_noise(held: Held, taken: int, made: int) -> int:
    """Return the channels that a model takes, and refuse one that takes others than it makes."""
    if taken != made:
        what = f"its first layer takes {taken} channels, its last makes {made}"
        raise ValueError(
            f"{held.field} {held.path}: {what}: a variant that fills in, edits or starts from a "
            "picture; give the text-to-image model"
        )
    return taken


def kl_vae(held: Held) -> dict[str, Any]:
    """Describe an autoencoder of latent diffusion's kind."""
    stages = held.count("encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [held.size(f"encoder.down_blocks.{stage}.resnets.0.conv1.weight")[0] for stage in range(stages)]
    decoding = [
        held.size(f"decoder.up_blocks.{stage}.resnets.0.conv1.weight")[0] for stage in reversed(range(stages))
    ]
    own = (
        {} if decoding == widths else {"decoder_block_out_channels": decoding}
    )  # FLUX.2 has one with a small decoder
    return {
        **own,
        "latent_channels": held.size("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "layers_per_block": held.count("encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "use_quant_conv": held.has("quant_conv.weight"),
        "use_post_quant_conv": held.has("post_quant_conv.weight"),
    }


def wan_vae(held: Held, residual: bool) -> dict[str, Any]:
    """Describe the autoencoder of Wan or Qwen-Image; that of Wan 2.2 is `residual`."""
    found = {
        "base_dim": held.size("encoder.conv_in.weight")[0],
        "z_dim": held.size("post_quant_conv.weight")[0],
    }
    blocks = (
        "encoder.down_blocks.0.resnets.{}.conv1.weight" if residual else "encoder.down_blocks.{}.conv1.weight"
    )
    found["num_res_blocks"] = held.count(blocks)
    if residual:
        found["decoder_base_dim"] = held.size("decoder.conv_in.weight")[0] // 4
    return found


def clip(held: Held) -> dict[str, Any]:
    """Describe a CLIP text encoder."""
    words, width = held.size("embeddings.token_embedding.weight")
    return {
        "hidden_size": width,
        "projection_dim": width,
        "vocab_size": words,
        "max_position_embeddings": held.size("embeddings.position_embedding.weight")[0],
        "intermediate_size": held.size("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": held.count("encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": width // 64,
    }


def t5(held: Held) -> dict[str, Any]:
    """Describe the encoder of a T5 or UMT5."""
    words, width = held.size("shared.weight")
    buckets, heads = held.size("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    return {
        "d_model": width,
        "d_kv": held.size("encoder.block.0.layer.0.SelfAttention.q.weight")[0] // heads,
        "d_ff": held.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": held.count("encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "vocab_size": words,
    }


def gemma2(held: Held) -> dict[str, Any]:
    """Describe a Gemma 2."""
    return qwen(held, head=256)


def qwen(held: Held, head: int = 128) -> dict[str, Any]:
    """Describe a Qwen language model, with Qwen2.5-VL's vision tower; `head` where no norm tells it."""
    words, width = held.size("embed_tokens.weight")
    own = (
        {"head_dim": held.size("layers.0.self_attn.q_norm.weight")[0]}
        if held.has("layers.0.self_attn.q_norm.weight")
        else {}
    )
    head = own.get("head_dim", head)
    found: dict[str, Any] = {
        **own,
        "hidden_size": width,
        "vocab_size": words,
        "intermediate_size": held.size("layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": held.count("layers.{}.self_attn.q_proj.weight"),
        "num_attention_heads": held.size("layers.0.self_attn.q_proj.weight")[0] // head,
        "num_key_value_heads": held.size("layers.0.self_attn.k_proj.weight")[0] // head,
    }
    if held.has("visual.patch_embed.proj.weight"):
        seen = held.size("visual.patch_embed.proj.weight")[0]
        found["vision_config"] = {
            "depth": held.count("visual.blocks.{}.attn.qkv.weight"),
            "hidden_size": seen,
            "intermediate_size": held.size("visual.blocks.0.mlp.gate_proj.weight")[0],
            "num_heads": seen // 80,
            "out_hidden_size": held.size("visual.merger.mlp.2.weight")[0],
        }
    return found


TEXT = {
    "clip_l": clip,
    "clip_g": clip,
    "t5xxl": t5,
    "umt5xxl": t5,
    "qwen2_5_vl": qwen,
    "qwen3": qwen,
    "gemma2": gemma2,
}
