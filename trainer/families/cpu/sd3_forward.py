"""diffusers' Stable Diffusion 3 transformer, taken apart for the forward of rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import SD3Transformer2DModel
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from comfy_g2rpo.speed.joint_forward import Affine, Block, Ends, Heads, JointForward, Modulation, Stream


def merged(transformer: SD3Transformer2DModel) -> JointForward:
    """Return the transformer's forward with its active adapters added to copies of the weights."""
    last = transformer.norm_out.linear
    ends = Ends(
        image=transformer.pos_embed,
        level=lambda sigma, pooled: transformer.time_text_embed(sigma * 1000, pooled),
        text=transformer.context_embedder,
        last=Modulation(last.weight, last.bias, (0,)),
        out=transformer.proj_out,
        side=transformer.config.patch_size,
    )
    return JointForward([block_of(block) for block in transformer.transformer_blocks], ends)


def affine(*layers: nn.Module) -> Affine:
    """Return linear layers, their adapters added where they have any, as one."""
    return Affine(*map(adapted, layers))


def adapted(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return a layer's weight with what its active adapters add to it, and its bias."""
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight, layer.bias
    base = layer.get_base_layer()
    names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n in layer.lora_A]
    return sum((layer.get_delta_weight(name) for name in names), base.weight), base.bias


def heads_of(layers: Sequence[nn.Module], norms: Sequence[nn.Module | None], heads: int) -> Heads:
    """Join the projections to q, k and v, or to k and v alone."""
    weights = None if norms[0] is None else [norm.weight for norm in norms]
    return Heads(affine(*layers), len(layers), weights, heads)


def stream_of(norm: nn.Module, heads: Heads, out: nn.Module | None, feed_forward: nn.Module | None) -> Stream:
    """Take one half of a block apart; without feed-forward layer it is the last block's text."""
    vectors = norm.linear.out_features // norm.linear.in_features
    scales = (0,) if feed_forward is None else range(1, vectors, 3)
    modulation = Modulation(norm.linear.weight, norm.linear.bias, scales)
    if feed_forward is None:
        return Stream(modulation, heads)
    layers = out, feed_forward.net[0].proj, feed_forward.net[2]
    return Stream(modulation, heads, [affine(layer) for layer in layers])


def block_of(block: JointTransformerBlock) -> Block:
    """Take a joint block apart."""
    attn, more, heads = block.attn, block.attn2, block.attn.heads
    image = heads_of((attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), heads)
    layers = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    norms = attn.norm_added_q, attn.norm_added_k
    drops = int(block.context_pre_only)
    words = heads_of(layers[drops:], norms[drops:], heads)
    streams = (
        stream_of(block.norm1, image, attn.to_out[0], block.ff),
        stream_of(block.norm1_context, words, attn.to_add_out, block.ff_context),
    )
    if more is None:
        return Block(*streams)
    own = heads_of((more.to_q, more.to_k, more.to_v), (more.norm_q, more.norm_k), heads)
    return Block(*streams, own, affine(more.to_out[0]))
