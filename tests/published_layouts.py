"""open_clip's CLIP and ImageReward, written out from their published layouts alone: what a conversion is
checked against.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

Weights = Mapping[str, Tensor]


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension."""
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def dense(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Apply one linear layer."""
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """Attend: q [B, N, D], k and v [B, M, D]; the mask is added to the logits."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def open_clip_blocks(
    weights: Weights, prefix: str, x: Tensor, heads: int, mask: Tensor | float = 0.0
) -> Tensor:
    """Run the residual blocks of one of open_clip's towers."""
    for i in range(sum(key.startswith(prefix) and key.endswith("ln_1.weight") for key in weights)):
        name = f"{prefix}.resblocks.{i}"
        seen = norm(weights, f"{name}.ln_1", x, 1e-5)
        q, k, v = linear(
            seen, weights[f"{name}.attn.in_proj_weight"], weights[f"{name}.attn.in_proj_bias"]
        ).chunk(3, -1)
        x = x + dense(weights, f"{name}.attn.out_proj", attend(q, k, v, heads, mask))
        x = x + dense(
            weights,
            f"{name}.mlp.c_proj",
            gelu(dense(weights, f"{name}.mlp.c_fc", norm(weights, f"{name}.ln_2", x, 1e-5))),
        )
    return x


def open_clip_image(weights: Weights, pixels: Tensor, heads: int) -> Tensor:
    """Embed pictures [B, 3, H, W]: unit norm, [B, D]."""
    kernel = weights["visual.conv1.weight"]
    patches = torch.nn.functional.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = weights["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = norm(
        weights,
        "visual.ln_pre",
        torch.cat([first, patches], 1) + weights["visual.positional_embedding"],
        1e-5,
    )
    x = open_clip_blocks(weights, "visual.transformer", x, heads)
    embedded = norm(weights, "visual.ln_post", x[:, 0], 1e-5) @ weights["visual.proj"]
    return embedded / embedded.norm(dim=-1, keepdim=True)


def open_clip_text(weights: Weights, tokens: Tensor, heads: int) -> Tensor:
    """Embed texts of tokens [B, N], padded with 0 after the end of the text: unit norm, [B, D]."""
    count = tokens.shape[1]
    future = torch.full((count, count), -math.inf).triu(1)
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][:count]
    x = norm(weights, "ln_final", open_clip_blocks(weights, "transformer", x, heads, future), 1e-5)
    embedded = x[torch.arange(len(x)), tokens.argmax(-1)] @ weights["text_projection"]
    return embedded / embedded.norm(dim=-1, keepdim=True)


def imagereward(
    weights: Weights, pixels: Tensor, tokens: Tensor, mask: Tensor, heads: int, text_heads: int
) -> Tensor:
    """Score pictures [B, 3, H, W] by tokens [B, 35] and their mask: [B], standardised as published."""
    seen = imagereward_image(weights, pixels, heads)
    x = imagereward_text(weights, tokens, mask, seen, text_heads)[:, 0]
    for place in (0, 2, 4, 6, 7):
        x = dense(weights, f"mlp.layers.{place}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def imagereward_image(weights: Weights, pixels: Tensor, heads: int) -> Tensor:
    """Run BLIP's ViT: states of all patches [B, N, D]."""
    vit = "blip.visual_encoder"
    kernel = weights[f"{vit}.patch_embed.proj.weight"]
    patches = torch.nn.functional.conv2d(
        pixels, kernel, weights[f"{vit}.patch_embed.proj.bias"], stride=kernel.shape[-1]
    )
    x = torch.cat(
        [weights[f"{vit}.cls_token"].expand(len(pixels), 1, -1), patches.flatten(2).transpose(1, 2)], 1
    )
    x = x + weights[f"{vit}.pos_embed"]
    for i in range(sum(key.startswith(vit) and key.endswith("norm1.weight") for key in weights)):
        q, k, v = dense(
            weights, f"{vit}.blocks.{i}.attn.qkv", norm(weights, f"{vit}.blocks.{i}.norm1", x, 1e-6)
        ).chunk(3, -1)
        x = x + dense(weights, f"{vit}.blocks.{i}.attn.proj", attend(q, k, v, heads))
        hidden = gelu(
            dense(weights, f"{vit}.blocks.{i}.mlp.fc1", norm(weights, f"{vit}.blocks.{i}.norm2", x, 1e-6))
        )
        x = x + dense(weights, f"{vit}.blocks.{i}.mlp.fc2", hidden)
    return norm(weights, f"{vit}.norm", x, 1e-6)


def imagereward_text(weights: Weights, tokens: Tensor, mask: Tensor, seen: Tensor, heads: int) -> Tensor:
    """Run BLIP's BERT over tokens [B, N], crossed with the picture [B, M, D]: states [B, N, D]."""
    bert = "blip.text_encoder"
    x = weights[f"{bert}.embeddings.word_embeddings.weight"][tokens]
    x = x + weights[f"{bert}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = norm(weights, f"{bert}.embeddings.LayerNorm", x, 1e-12)
    hidden = torch.zeros(mask.shape).masked_fill(mask == 0, -10000.0)[:, None, None]
    for i in range(
        sum(key.startswith(bert) and key.endswith("intermediate.dense.weight") for key in weights)
    ):
        layer = f"{bert}.encoder.layer.{i}"
        for attention, source, bias in (("attention", None, hidden), ("crossattention", seen, 0.0)):
            name, read = f"{layer}.{attention}", x if source is None else source
            q = dense(weights, f"{name}.self.query", x)
            k, v = (dense(weights, f"{name}.self.{part}", read) for part in ("key", "value"))
            crossed = dense(weights, f"{name}.output.dense", attend(q, k, v, heads, bias))
            x = norm(weights, f"{name}.output.LayerNorm", crossed + x, 1e-12)
        widened = dense(
            weights, f"{layer}.output.dense", gelu(dense(weights, f"{layer}.intermediate.dense", x))
        )
        x = norm(weights, f"{layer}.output.LayerNorm", widened + x, 1e-12)
    return x
