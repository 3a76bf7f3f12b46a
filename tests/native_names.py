"""The names that published files give the weights of diffusers' models, written out by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Replace parts of a name, one pair after the other."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def renamed(weights: Weights, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace parts of names, one pair after the other."""
    return {replaced(name, pairs): value for name, value in weights.items()}


def fused(weights: Weights, groups: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Put the rows of several modules into one; a group's names stand for any prefix."""
    made = dict(weights)
    for name in weights:
        for whole, parts in groups.items():
            for leaf in ("weight", "bias"):
                if name.endswith(f".{parts[0]}.{leaf}"):
                    prefix = name.removesuffix(f"{parts[0]}.{leaf}")
                    made[f"{prefix}{whole}.{leaf}"] = torch.cat(
                        [made.pop(f"{prefix}{part}.{leaf}") for part in parts]
                    )
    return made


def swapped(weights: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """Let shift and scale of a modulation change places."""
    for leaf in ("weight", "bias"):
        weights[f"{module}.{leaf}"] = torch.cat(weights[f"{module}.{leaf}"].chunk(2)[::-1])
    return weights


def sd3(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Stability's files do."""
    groups = {
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "context.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    names = (
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("transformer_blocks.", "joint_blocks."),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("norm1_context.linear", "context_block.adaLN_modulation.1"),
        (".context.attn.qkv", ".context_block.attn.qkv"),
        (".attn.to_add_out", ".context_block.attn.proj"),
        (".attn.norm_added_q", ".context_block.attn.ln_q"),
        (".attn.norm_added_k", ".context_block.attn.ln_k"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
    )
    made = renamed(fused(weights, groups), names)
    for old, new in (("qkv", "qkv"), ("to_out.0", "proj"), ("norm_q", "ln_q"), ("norm_k", "ln_k")):
        pattern, ours = rf"^(joint_blocks\.\d+)\.(attn2?)\.{old}\.", rf"\1.x_block.\2.{new}."
        made = {re.sub(pattern, ours, name): value for name, value in made.items()}
    made = {re.sub(r"^proj_out", "final_layer.linear", name): value for name, value in made.items()}
    made = swapped(made, "final_layer.adaLN_modulation.1")
    return swapped(made, "joint_blocks.1.context_block.adaLN_modulation.1")


def wan(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Wan's own files do."""
    names = (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".o."),
        (".norm2.", ".norm3."),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        (".scale_shift_table", ".modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out", "head.head"),
    )
    return renamed(weights, names)


def z_image(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Tongyi's own files do."""
    names = (
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
        (".attention.norm_q", ".attention.q_norm"),
        (".attention.norm_k", ".attention.k_norm"),
        (".attention.to_out.0", ".attention.out"),
    )
    groups = {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}
    norm = torch.ones(weights["x_pad_token"].shape[-1])
    return {**renamed(fused(weights, groups), names), "norm_final.weight": norm}


def lumina2(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Alpha-VLLM's own files do."""
    names = (
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"),
        ("time_caption_embed.caption_embedder", "cap_embedder"),
        ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("feed_forward.linear_", "feed_forward.w"),
        (".ffn_norm1.", ".ffn_norm_first."),
        ("norm1.linear", "adaLN_modulation.1"),
        (".norm1.norm.", ".attention_norm1."),
        (".norm1.", ".attention_norm1."),
        (".norm2.", ".attention_norm2."),
        (".ffn_norm_first.", ".ffn_norm1."),
        (".attn.norm_q.", ".attention.q_norm."),
        (".attn.norm_k.", ".attention.k_norm."),
        (".attn.to_out.0.", ".attention.out."),
        (".attn.qkv.", ".attention.qkv."),
    )
    return renamed(fused(weights, {"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}), names)


def kl(weights: Weights) -> dict[str, Tensor]:
    """Name an autoencoder's weights as latent diffusion does, whose attention is made of convolutions."""
    pairs = (("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"))
    pairs += ((".resnets.", ".block."), (".downsamplers.0", ".downsample"), (".upsamplers.0", ".upsample"))
    pairs += (
        ("conv_norm_out", "norm_out"),
        ("conv_shortcut", "nin_shortcut"),
        ("mid_block.attentions.0", "mid.attn_1"),
    )
    made = {}
    for name, value in renamed(weights, pairs).items():
        name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
        name = re.sub(r"decoder\.up_blocks\.(\d)", lambda found: f"decoder.up.{3 - int(found[1])}", name)
        if ".attn_1." in name:
            name = re.sub(r"\.to_([qkv])\.", r".\1.", name).replace("to_out.0", "proj_out")
            name = name.replace("group_norm", "norm")
            value = value[:, :, None, None] if value.dim() == 2 else value
        made[name] = value
    return made


def flux2_vae(weights: Weights) -> dict[str, Tensor]:
    """Name an autoencoder's weights as the FLUX.2 file does."""
    pairs = (("post_quant_conv", "decoder.post_conv"), ("quant_conv", "encoder.quant_conv"))
    return renamed(kl(weights), (*pairs, ("post_conv", "post_quant_conv")))


MIDDLE = (("mid_block.resnets.0", "middle.0"), ("mid_block.attentions.0", "middle.1"))
MIDDLE += (("mid_block.resnets.1", "middle.2"),)
RESIDUAL = (("norm1.", "residual.0."), ("conv1.", "residual.2."), ("norm2.", "residual.3."))
RESIDUAL += (("conv2.", "residual.6."), ("conv_shortcut", "shortcut"))


def wan_vae(weights: Weights, nested: bool) -> dict[str, Tensor]:
    """Name an autoencoder's weights as Wan does: with one residual block per stage of the encoder, two of
    the decoder.
    """
    made = {}
    for name, value in weights.items():
        if nested:
            name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"downsamples.\1.downsamples.\2", name)
            name = re.sub(r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.1", name)
            name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", r"upsamples.\1.upsamples.\2", name)
            name = re.sub(r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.2", name)
        name = name.replace("encoder.down_blocks", "encoder.downsamples").replace("upsamplers.0", "resnets.2")
        place = r"up_blocks\.(\d)\.resnets\.(\d)"
        name = re.sub(place, lambda found: f"upsamples.{3 * int(found[1]) + int(found[2])}", name)
        name = replaced(name, MIDDLE)
        if name.startswith(("quant_conv", "post_quant_conv")):
            name = replaced(name, (("post_quant_conv", "conv2"), ("quant_conv", "conv1")))
        elif name.split(".")[1] in ("downsamples", "upsamples") or ".middle.0" in name or ".middle.2" in name:
            name = replaced(name, RESIDUAL)
        else:
            name = replaced(name, (("conv_in", "conv1"), ("norm_out", "head.0"), ("conv_out", "head.2")))
        made[name] = value
    return made


def clip(weights: Weights) -> dict[str, Tensor]:
    """Name a CLIP's weights as ComfyUI's files do; versions of transformers differ in the prefix."""
    bare = {name.removeprefix("text_model."): value for name, value in weights.items()}
    return {
        name if name == "text_projection.weight" else f"text_model.{name}": value
        for name, value in bare.items()
    }


def t5(weights: Weights) -> dict[str, Tensor]:
    """Name a T5's weights as ComfyUI's files do: the embedding stands once."""
    return {name: value for name, value in weights.items() if name != "encoder.embed_tokens.weight"}


def qwen(weights: Weights) -> dict[str, Tensor]:
    """Name a Qwen's weights as ComfyUI's files do."""
    made = renamed(weights, (("model.language_model.", "model."), ("model.visual.", "visual.")))
    return {
        name if name.startswith(("model.", "visual.", "lm_head.")) else f"model.{name}": value
        for name, value in made.items()
    }


def wan_21_vae(weights: Weights) -> dict[str, Tensor]:
    """Name the weights of Wan 2.1's autoencoder, which Qwen-Image has, too."""
    return wan_vae(weights, nested=False)


def wan_22_vae(weights: Weights) -> dict[str, Tensor]:
    """Name the weights of the autoencoder of Wan 2.2 5B."""
    return wan_vae(weights, nested=True)


def same(weights: Weights) -> dict[str, Tensor]:
    """Keep names as they are."""
    return dict(weights)
