"""Core's Stable Diffusion 3 on a CPU, taken apart for the forward of rollouts, where nothing else is on it.

Core's own forward does more than a rollout needs: it computes again what a prompt and a noise level
determine. What is not exactly core's, or what others have put on a MODEL, keeps core's way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_base
import comfy.ops
import torch
from torch import Tensor, nn

from ...comfy_g2rpo.speed.joint_forward import (
    PACKED,
    ROOM,
    Affine,
    Block,
    Ends,
    Heads,
    JointForward,
    Modulation,
    Stream,
)
from .autograd import pytorch_attention
from .conditioning import ENTRY_LOCAL, PLAIN_OPTIONS, PLAIN_TRANSFORMER_OPTIONS, Conds
from .merged_weights import Delta

OPERATIONS = (comfy.ops.disable_weight_init, comfy.ops.manual_cast)
LINEAR, NORM, PATCH = (
    tuple(getattr(made, name) for made in OPERATIONS) for name in ("Linear", "LayerNorm", "Conv2d")
)
MODULES = (
    *("OpenAISignatureMMDITWrapper", "PatchEmbed", "TimestepEmbedder", "VectorEmbedder", "JointBlock"),
    *("DismantledBlock", "SelfAttention", "RMSNorm", "Mlp", "FinalLayer"),
)
KNOWN = {
    *(*LINEAR, *NORM, *PATCH, *(getattr(mmdit, name, None) for name in MODULES)),
    *(nn.ModuleList, nn.Sequential, nn.SiLU, nn.GELU, nn.Dropout, nn.Identity),
}
ON_LAYERS = ("_forward_hooks", "_forward_pre_hooks", "weight_function", "bias_function")


class Features(NamedTuple):
    """One prompt's conditioning, as the model gets it."""

    tokens: Tensor  # [M, J]
    pooled: Tensor  # [P]


def features_of(entries: list[dict[str, Any]]) -> Features | None:
    """Return the features in one kind of conditioning, or None where there is more to it."""
    if len(entries) != 1 or ENTRY_LOCAL & set(entries[0]):
        return None
    conds = entries[0]["model_conds"]
    if set(conds) != {"c_crossattn", "y"}:
        return None
    tokens, pooled = (conds[name].cond for name in ("c_crossattn", "y"))
    if tokens.ndim != 3 or pooled.ndim != 2:
        return None
    return Features(tokens[0].float(), pooled[0].float())


class SD3Rollout:
    """The guider's velocity by the forward of rollouts, with the LoRA as it was when this was made."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Module], deltas: Mapping[str, Delta]) -> None:
        self.side = model.model.diffusion_model.patch_size
        added = {layers[name]: delta for name, delta in deltas.items() if delta.active}
        self.parts = taken_apart(model.model, added)
        self.forwards: dict[torch.Size, JointForward] = {}  # by the shape of a prompt's tokens
        self.features: dict[int, tuple[Conds, dict[str, Features | None]]] = {}

    def velocity(self, x: Tensor, sigma: Tensor, rows: list[Conds], guidance: float) -> Tensor | None:
        """Return v [B, C, H, W], or None where a row's conditioning is not plain."""
        if x.ndim != 4 or x.shape[-1] % self.side or x.shape[-2] % self.side:
            return None
        given = [self._features(row) for row in rows]
        wanted = [known.get("positive") for known in given]
        avoided = [known.get("negative") for known in given] if guidance != 1 else []
        if None in wanted or None in avoided:
            return None
        if not avoided:
            return self._forward(x, sigma, wanted)
        made = self._forward(x.repeat(2, 1, 1, 1), sigma.repeat(2), [*wanted, *avoided])
        towards, away = made.chunk(2)
        return away + guidance * (towards - away)

    def _forward(self, x: Tensor, sigma: Tensor, features: list[Features]) -> Tensor:
        groups: dict[torch.Size, list[int]] = {}
        for i, one in enumerate(features):
            groups.setdefault(one.tokens.shape, []).append(i)
        made = torch.empty_like(x)
        for shape, group in groups.items():
            forward = self.forwards.setdefault(shape, JointForward(*self.parts))
            if len(groups) == 1:
                return forward(x, sigma, features)
            made[group] = forward(x[group], sigma[group], [features[i] for i in group])
        return made

    def _features(self, row: Conds) -> dict[str, Features | None]:
        if id(row) not in self.features:
            self.features[id(row)] = (row, {kind: features_of(entries) for kind, entries in row.items()})
        return self.features[id(row)][1]


def is_plain(model: Any, options: dict[str, Any]) -> bool:
    """Return whether a loaded MODEL is core's Stable Diffusion 3 and nothing else runs with it.

    Patches of weights are no matter: core has put them into the weights.
    """
    inner, transformer = model.model, options.get("transformer_options", {})
    if type(inner) is not comfy.model_base.SD3 or set(options) - PLAIN_OPTIONS:
        return False
    others = [*transformer.get("wrappers", {}).values(), *transformer.get("callbacks", {}).values()]
    override = transformer.get("optimized_attention_override", pytorch_attention)
    return (
        not any(made for group in others for made in group.values())
        and override is pytorch_attention  # ours, while training
        and not set(transformer) - PLAIN_TRANSFORMER_OPTIONS
        and not set(model.object_patches) - {"model_sampling"}
        and not (model.hook_patches or model.injections)
        and _is_cores_own(inner.diffusion_model)
    )


def _is_cores_own(network: Any) -> bool:
    """Return whether a network consists of core's own layers, as they were made."""
    modules = list(network.modules())
    if type(network) is not mmdit.OpenAISignatureMMDITWrapper or {type(m) for m in modules} - KNOWN:
        return False
    if any(getattr(m, name, ()) for m in modules for name in ON_LAYERS):
        return False
    halves = [half for block in network.joint_blocks for half in (block.context_block, block.x_block)]
    return (
        not any("forward" in vars(m) for m in modules)
        and network.context_processor is None
        and not network.register_length
        and network.y_embedder is not None
        and network.out_channels == network.in_channels
        and type(network.x_embedder.norm) is nn.Identity
        and not any(half.scale_mod_only or type(half.norm1) not in NORM for half in halves)
        and all(type(half.attn.ln_q) in (nn.Identity, mmdit.RMSNorm) for half in halves)
        and all(m.approximate == "tanh" for m in modules if type(m) is nn.GELU)
    )


def is_exact(network: nn.Module) -> bool:
    """Return whether all numbers of a network are plain float32 on the CPU."""
    return all(
        type(part) in (Tensor, nn.Parameter) and part.dtype == torch.float32 and part.device.type == "cpu"
        for part in (*network.parameters(), *network.buffers())
    )


def copies(network: nn.Module, layers: Mapping[str, nn.Module]) -> int:
    """Return the bytes of copied weights, with the LoRA added or laid out for oneDNN, and of what is kept."""
    added = sum(layer.weight.numel() for layer in layers.values())
    laid_out = [m.weight.numel() for m in network.joint_blocks.modules() if type(m) in LINEAR]
    return 4 * (added + sum(count for count in laid_out if count <= PACKED)) + ROOM


def taken_apart(inner: Any, added: Mapping[nn.Module, Delta]) -> tuple[list[Block], Ends]:
    """Return core's model as a JointForward takes it, the LoRA's parts added to copies of the weights."""
    network: Any = inner.diffusion_model
    positions: dict[tuple[int, ...], Tensor] = {}

    def image(x: Tensor) -> Tensor:
        size = tuple(x.shape[-2:])
        if size not in positions:
            positions[size] = network.cropped_pos_embed(size, device=x.device).to(x.dtype)
        return network.x_embedder(x) + positions[size]

    def level(sigma: Tensor, pooled: Tensor) -> Tensor:
        steps = inner.model_sampling.timestep(sigma).float()
        return network.t_embedder(steps, dtype=pooled.dtype) + network.y_embedder(pooled)

    def numbers(layer: Any) -> tuple[Tensor, Tensor | None]:
        return added[layer].added(layer.weight) if layer in added else layer.weight, layer.bias

    def affine(layer: Any) -> Affine:
        return Affine(numbers(layer))

    def heads(attention: Any, skipped: int = 0) -> Heads:
        weight, bias = numbers(attention.qkv)
        first = skipped * (len(weight) // 3)
        norms = [attention.ln_q, attention.ln_k][skipped:]
        weights = None if type(norms[0]) is nn.Identity else [norm.weight for norm in norms]
        project = Affine((weight[first:], None if bias is None else bias[first:]))
        return Heads(project, 3 - skipped, weights, attention.num_heads)

    def stream(half: Any) -> Stream:
        linear = half.adaLN_modulation[1]
        parts = linear.weight.shape[0] // linear.weight.shape[1]
        modulation = Modulation(linear.weight, linear.bias, range(1, parts, 3))
        if half.pre_only:
            return Stream(modulation, heads(half.attn, skipped=1))
        layers = half.attn.proj, half.mlp.fc1, half.mlp.fc2
        return Stream(modulation, heads(half.attn), [affine(layer) for layer in layers])

    def block(joint: Any) -> Block:
        half = joint.x_block
        more = (heads(half.attn2), affine(half.attn2.proj)) if half.x_block_self_attn else ()
        return Block(stream(half), stream(joint.context_block), *more)

    last = network.final_layer.adaLN_modulation[1]
    ends = Ends(
        image=image,
        level=level,
        text=network.context_embedder,
        last=Modulation(last.weight, last.bias, (1,)),
        out=network.final_layer.linear,
        side=network.patch_size,
    )
    return [block(joint) for joint in network.joint_blocks], ends
