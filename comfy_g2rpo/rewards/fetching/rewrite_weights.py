"""From the layouts in which reward models were published to the one that `comfy_g2rpo.rewards` reads: renamed
tensors, split projections.

Takes and returns plain tables of tensors; what a layout holds beyond the model (masks, position numbers,
unused projections) is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]

BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.([0-9]+)\.(.+)")
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OPEN_CLIP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
OPEN_CLIP_TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}

VIT_BLOCK = re.compile(
    r"blip\.visual_encoder\.blocks\.([0-9]+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
VIT_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
VIT = {
    "blip.visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "blip.visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "blip.visual_encoder.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "blip.visual_encoder.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "blip.visual_encoder.norm.weight": "vision_model.post_layernorm.weight",
    "blip.visual_encoder.norm.bias": "vision_model.post_layernorm.bias",
}


def open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """Rename open_clip's CLIP to transformers' CLIPModel, fused projections split, the last transposed."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in OPEN_CLIP:
            found[OPEN_CLIP[key]] = tensor
        elif key in OPEN_CLIP_TURNED:
            found[OPEN_CLIP_TURNED[key]] = tensor.T
        elif block := BLOCK.fullmatch(key):
            tower = "vision_model" if block[1] else "text_model"
            found |= _open_clip_block(f"{tower}.encoder.layers.{block[2]}", block[3], tensor)
    return found


def _open_clip_block(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Rename one tensor of a transformer block."""
    module, _, part = name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        part = name.removeprefix("attn.in_proj_")
        return {
            f"{layer}.self_attn.{letter}_proj.{part}": third
            for letter, third in zip("qkv", tensor.chunk(3), strict=True)
        }
    return {f"{layer}.{BLOCK_NAMES[module]}.{part}": tensor} if module in BLOCK_NAMES else {}


def imagereward(tensors: Tensors) -> dict[str, Tensor]:
    """Rename ImageReward.pt to transformers' BLIP encoders and a head."""
    found = {new: tensors[old] for old, new in VIT.items() if old in tensors}
    for key, tensor in tensors.items():
        if block := VIT_BLOCK.fullmatch(key):
            found[
                f"vision_model.encoder.layers.{block[1]}.{VIT_NAMES.get(block[2], block[2])}.{block[3]}"
            ] = tensor
        elif key.startswith("blip.text_encoder.") and not key.endswith("position_ids"):
            found[key.removeprefix("blip.")] = tensor
    return found | head({key: tensor for key, tensor in tensors.items() if key.startswith("mlp.layers.")})


def head(tensors: Tensors) -> dict[str, Tensor]:
    """Number linear layers through, whatever lay between: head.0.weight, head.0.bias, head.1.weight …"""
    names = {key.rpartition(".")[0] for key in tensors}
    order = {
        name: place
        for place, name in enumerate(sorted(names, key=lambda name: int(re.sub(r"\D", "", name) or 0)))
    }
    return {
        f"head.{order[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": tensor
        for key, tensor in tensors.items()
    }


def tower(tensors: Tensors, prefixes: Iterable[str]) -> dict[str, Tensor]:
    """Take some modules of a model in transformers' layout, and leave the rest."""
    return {
        key: value
        for key, value in tensors.items()
        if key.startswith(tuple(prefixes)) and not key.endswith("position_ids")
    }


def ready(tensors: Tensors) -> dict[str, Tensor]:
    """Lay tensors out for a safetensors file, each in memory of its own, in its precision."""
    return {
        key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
