"""Tiny models of every family, by diffusers' own classes, and random LoRAs on all their layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from comfy_g2rpo.lora.key_names import FAMILIES
from g2rpo_trainer.lora.ask_diffusers import pipeline_name

HEAD = {"attention_head_dim": 64, "num_attention_heads": 2}
TEXT = {"joint_attention_dim": 32}


@dataclass(frozen=True)
class Tiny:
    """A class of diffusers and how it is made small."""

    cls: str
    config: Mapping[str, Any]

    def make(self, device: str = "meta") -> nn.Module:
        """Make the model; on the meta device it has names and shapes alone."""
        torch.manual_seed(0)
        with torch.device(device):
            return getattr(diffusers, self.cls)(**self.config).eval()


TINY = {
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {
            **HEAD,
            **TEXT,
            "num_layers": 2,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        {
            **TEXT,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "num_layers": 2,
            "num_single_layers": 2,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
        },
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        {
            **TEXT,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "num_layers": 2,
            "num_single_layers": 2,
        },
    ),
    "qwen_image": Tiny(
        "QwenImageTransformer2DModel",
        {**TEXT, "attention_head_dim": 128, "num_attention_heads": 1, "num_layers": 2},
    ),
    "wan": Tiny(
        "WanTransformer3DModel",
        {
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "text_dim": 32,
            "ffn_dim": 96,
            "image_dim": 1280,
            "added_kv_proj_dim": 64,
        },
    ),
    "z_image": Tiny(
        "ZImageTransformer2DModel",
        {"n_layers": 2, "n_refiner_layers": 2, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32},
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "num_layers": 2,
            "num_refiner_layers": 2,
            "hidden_size": 144,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "cap_feat_dim": 32,
            "axes_dim_rope": (16, 16, 16),
        },
    ),
}
RANK, ALPHA = 3, 5.0
PREFIXES = (
    "diffusion_model.",
    "transformer.",
    "base_model.model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "",
)


def layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that can carry a LoRA."""
    kinds = nn.Linear | nn.Conv2d | nn.Conv3d
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    }


def random_pairs(
    shapes: Mapping[str, tuple[int, ...]], rank: int = RANK, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw a LoRA on weights of the given shapes."""
    noise = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, *shape[1:], generator=noise) / 8,
            torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=noise) / 8,
        )
        for name, shape in shapes.items()
    }


def deltas(pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float = ALPHA / RANK) -> dict[str, Tensor]:
    """Compute the changes of weights."""
    return {
        name: scale * (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        for name, (down, up) in pairs.items()
    }


def change(model: nn.Module) -> dict[str, Tensor]:
    """Return what loaded adapters change."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in layers.items()}


def pipeline_of(name: str, transformer: nn.Module) -> diffusers.DiffusionPipeline:
    """Make a pipeline of a transformer alone."""
    cls = getattr(diffusers, pipeline_name(FAMILIES[name]))
    parts = {
        part: None
        for part, value in signature(cls.__init__).parameters.items()
        if part != "self" and value.default is value.empty
    }
    return cls(
        **parts | {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}
    )
