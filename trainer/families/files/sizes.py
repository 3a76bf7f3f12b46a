"""What a model's configuration says of its size, read off the shapes of its weights; the rest of a
configuration is shipped.

Heads are of the size that the published models have. Names are those of diffusers and transformers.
"""

from __future__ import annotations

import math
from typing import Any

from .single_file import Held


def from_noise(held: Held, taken: int, made: int) -> int:
    """Return the channels that a model takes, which must be those that it makes: others need a picture, a
    mask or a control.
    """
    if taken != made:
        what = f"its first layer takes {taken} channels, its last makes {made}"
        raise ValueError(
            f"{held.field} {held.path}: {what}: a variant that fills in, edits or starts from a "
            "picture; give the text-to-image model"
        )
    return taken


def sd3(held: Held) -> dict[str, Any]:
    """Describe a Stable Diffusion 3 or 3.5: medium or large, with or without dual attention."""
    width, table = held.size("context_embedder.weight")[0], held.size("pos_embed.pos_embed")[1]
    layers = held.count("transformer_blocks.{}.attn.to_q.weight")
    dual = [block for block in range(layers) if held.has(f"transformer_blocks.{block}.attn2.to_q.weight")]
    return {
        "num_layers": layers,
        "num_attention_heads": width // 64,
        "caption_projection_dim": width,
        "in_channels": from_noise(
            held, held.size("pos_embed.proj.weight")[1], held.size("proj_out.weight")[0] // 4
        ),
        "joint_attention_dim": held.size("context_embedder.weight")[1],
        "pooled_projection_dim": held.size("time_text_embed.text_embedder.linear_1.weight")[1],
        "pos_embed_max_size": math.isqrt(table),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if held.has("transformer_blocks.0.attn.norm_q.weight") else None,
    }


def flux(held: Held) -> dict[str, Any]:
    """Describe a FLUX.1; dev has an input for guidance, schnell has none."""
    width, channels = held.size("x_embedder.weight")
    return {
        "num_layers": held.count("transformer_blocks.{}.attn.to_q.weight"),
        "num_single_layers": held.count("single_transformer_blocks.{}.attn.to_q.weight"),
        "num_attention_heads": width // 128,
        "in_channels": from_noise(held, channels, held.size("proj_out.weight")[0]),
        "joint_attention_dim": held.size("context_embedder.weight")[1],
        "pooled_projection_dim": held.size("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": held.has("time_text_embed.guidance_embedder.linear_1.weight"),
    }


def flux2(held: Held) -> dict[str, Any]:
    """Describe a FLUX.2; dev has an input for guidance, klein has none."""
    width, channels = held.size("x_embedder.weight")
    return {
        "num_layers": held.count("transformer_blocks.{}.attn.to_q.weight"),
        "num_single_layers": held.count("single_transformer_blocks.{}.attn.to_out.weight"),
        "num_attention_heads": width // 128,
        "in_channels": from_noise(held, channels, held.size("proj_out.weight")[0]),
        "joint_attention_dim": held.size("context_embedder.weight")[1],
        "guidance_embeds": held.has("time_guidance_embed.guidance_embedder.linear_1.weight"),
    }


def qwen_image(held: Held) -> dict[str, Any]:
    """Describe a Qwen-Image."""
    width, channels = held.size("img_in.weight")
    return {
        "num_layers": held.count("transformer_blocks.{}.attn.to_q.weight"),
        "num_attention_heads": width // 128,
        "in_channels": from_noise(held, channels, held.size("proj_out.weight")[0]),
        "out_channels": channels // 4,
        "joint_attention_dim": held.size("txt_in.weight")[1],
    }


def wan(held: Held) -> dict[str, Any]:
    """Describe a Wan: 2.1 of 1.3B or 14B, or 2.2 of 5B."""
    width, channels = held.size("patch_embedding.weight")[:2]
    return {
        "num_layers": held.count("blocks.{}.attn1.to_q.weight"),
        "num_attention_heads": width // 128,
        "in_channels": from_noise(held, channels, held.size("proj_out.weight")[0] // 4),
        "out_channels": channels,
        "text_dim": held.size("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": held.size("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": held.size("blocks.0.ffn.net.0.proj.weight")[0],
    }


def z_image(held: Held) -> dict[str, Any]:
    """Describe a Z-Image."""
    width, patch = held.size("all_x_embedder.2-1.weight")
    heads = width // held.size("layers.0.attention.norm_q.weight")[0]
    return {
        "dim": width,
        "in_channels": patch // 4,
        "n_layers": held.count("layers.{}.attention.to_q.weight"),
        "n_refiner_layers": held.count("noise_refiner.{}.attention.to_q.weight"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "cap_feat_dim": held.size("cap_embedder.1.weight")[1],
    }


def lumina2(held: Held) -> dict[str, Any]:
    """Describe a Lumina-Image 2.0."""
    width, patch = held.size("x_embedder.weight")
    head = held.size("layers.0.attn.norm_q.weight")[0]
    return {
        "hidden_size": width,
        "in_channels": from_noise(held, patch, held.size("norm_out.linear_2.weight")[0]) // 4,
        "num_layers": held.count("layers.{}.attn.to_q.weight"),
        "num_refiner_layers": held.count("noise_refiner.{}.attn.to_q.weight"),
        "num_attention_heads": width // head,
        "num_kv_heads": held.size("layers.0.attn.to_k.weight")[0] // head,
        "cap_feat_dim": held.size("time_caption_embed.caption_embedder.1.weight")[1],
    }


TRANSFORMERS = {
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "qwen_image": qwen_image,
    "wan": wan,
    "z_image": z_image,
    "lumina2": lumina2,
}


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
    """Describe a Qwen language model, with the tower that sees for Qwen2.5-VL.

    Heads are of the size `head` where no norm tells it.
    """
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
