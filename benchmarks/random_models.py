"""Models of published architectures with random weights: at their real size for a GPU, shrunk for a CPU.

Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from comfy_g2rpo.rollout import seeded_noise
from g2rpo_trainer.families import flux, qwen_image, sd3, z_image

CONFIGS = Path(__file__).resolve().parent.parent / "trainer/families/facts"
SMALL_VAE = {"block_out_channels": [8] * 4, "layers_per_block": 1, "norm_num_groups": 4}
SMALL_SIDE, SMALL_TOKENS = 128, 8


@dataclass(frozen=True)
class Architecture:
    """A transformer at its published size and shrunk, with what else makes it a policy."""

    config: str  # of trainer/families/facts: scheduler and VAE
    policy: Callable[..., Any]
    cond: Callable[..., Any]
    pipeline: str
    transformer: str
    real: dict[str, Any]
    small: dict[str, Any]
    tokens: int  # of a prompt
    widths: tuple[str, ...]  # the names of the sizes of a prompt's features, those of the tokens first
    small_vae: dict[str, Any] = field(default_factory=lambda: SMALL_VAE)
    vae: str = "AutoencoderKL"
    settings: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES = {
    # https://huggingface.co/black-forest-labs/FLUX.1-dev, transformer/config.json: 12 B parameters.
    "flux": Architecture(
        config="flux_dev",
        policy=flux.Flux,
        cond=flux.Cond,
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        real={
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        small={
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "axes_dims_rope": (8, 12, 12),
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
        },
        tokens=512,
        widths=("joint_attention_dim", "pooled_projection_dim"),
        settings={"guidance": 3.5},
    ),
    # https://huggingface.co/stabilityai/stable-diffusion-3.5-medium: 2.2 B.
    "sd35_medium": Architecture(
        config="sd3",
        policy=sd3.SD3,
        cond=sd3.Cond,
        pipeline="StableDiffusion3Pipeline",
        transformer="SD3Transformer2DModel",
        real={
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
            "in_channels": 16,
            "out_channels": 16,
        },
        small={
            "sample_size": 16,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_projection_dim": 64,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            "in_channels": 16,
            "out_channels": 16,
        },
        tokens=333,
        widths=("joint_attention_dim", "pooled_projection_dim"),
    ),
    # https://huggingface.co/Qwen/Qwen-Image: 20 B, diffusers' defaults.
    "qwen_image": Architecture(
        config="qwen_image",
        policy=qwen_image.QwenImage,
        cond=qwen_image.Cond,
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        real={
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
        small={
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 12, 12),
        },
        tokens=128,
        widths=("joint_attention_dim",),
        vae="AutoencoderKLQwenImage",
        small_vae={"base_dim": 8, "num_res_blocks": 1},
        settings={"guidance": 1.0},
    ),
    # https://huggingface.co/Tongyi-MAI/Z-Image: 6 B, diffusers' defaults.
    "z_image": Architecture(
        config="z_image",
        policy=z_image.ZImage,
        cond=z_image.Cond,
        pipeline="ZImagePipeline",
        transformer="ZImageTransformer2DModel",
        real={
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
        },
        small={
            "dim": 64,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12],
            "axes_lens": [512, 64, 64],
        },
        tokens=128,
        widths=("cap_feat_dim",),
    ),
}


@contextmanager
def made_in(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make modules at once where and as they are to be, so that twelve billion weights never stand in
    float32.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def random_policy(name: str, device: torch.device, dtype: torch.dtype, small: bool) -> Any:
    """Make a policy of an architecture with untrained weights and a fresh adapter, as its recipe has one
    (rank 64; shrunk 4).
    """
    kind = ARCHITECTURES[name]
    published = json.loads((CONFIGS / f"{kind.config}.json").read_text(encoding="utf-8"))
    pipeline_type = getattr(diffusers, kind.pipeline)
    torch.manual_seed(0)
    with made_in(device, dtype):
        transformer = getattr(diffusers, kind.transformer)(**(kind.small if small else kind.real))
        vae_type = getattr(diffusers, kind.vae)
        vae = vae_type.from_config({**published["vae"]["config"], **(kind.small_vae if small else {})})
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(published["scheduler"])
    parts = {"scheduler": scheduler, "vae": vae.to(dtype), "transformer": transformer.to(dtype)}
    texts = [
        part
        for part in pipeline_type._get_signature_keys(pipeline_type)[0]
        if part.startswith(("text_encoder", "tokenizer"))
    ]
    policy = kind.policy(
        pipeline_type(**parts, **dict.fromkeys(texts)),
        autocast=None if dtype == torch.float32 else dtype,
        **kind.settings,
    )
    policy.add_lora(*((4, 8) if small else (64, 128)), seed=0)
    if not small:
        policy.transformer.enable_gradient_checkpointing()
    return policy


def random_conds(name: str, device: torch.device, small: bool, prompts: int = 1) -> list[Any]:
    """Make text features out of noise."""
    kind = ARCHITECTURES[name]
    sizes: Sequence[int] = [(kind.small if small else kind.real)[width] for width in kind.widths]
    tokens = SMALL_TOKENS if small else kind.tokens
    shapes = [(tokens, sizes[0]), *((size,) for size in sizes[1:])]
    return [
        kind.cond(*(seeded_noise(shape, "text", p, i).to(device) for i, shape in enumerate(shapes)))
        for p in range(prompts)
    ]
