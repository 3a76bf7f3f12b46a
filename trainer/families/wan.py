"""Wan 2.1 and 2.2 5B (Alibaba): single images, which are videos of one frame, and short videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import WanPipeline
from torch import Tensor
from torch.nn.functional import pad

from comfy_g2rpo.lora.key_names import WAN

from .files import diffusers_folder
from .files.single_file import Held
from .files.sizes import channels_of_noise
from .shared.peft_policy import PeftPolicy, cells
from .shared.video_vae import decode_frames

if TYPE_CHECKING:
    from typing import Self

    from ..config.sections import ModelSection

ALMOST_ONE = 1 - 2e-6


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # UMT5: [L, text_dim], without the zeros that the model sees behind them


class Wan(PeftPolicy):
    """A policy and decoder over a WanPipeline. Latents are [B, C, h, w], of clips [B, C, f, …]."""

    pipeline_class = WanPipeline
    guidance, max_sequence_length = 5.0, 512
    reads = "Wan reads its prompts by UMT5"
    optional = ("transformer_2",)
    makes_clips = True
    layout = (
        (r"blocks\.(\d+)\.attn1\.norm_([qk])\.weight", r"blocks.\1.self_attn.norm_\2.weight"),
        (r"blocks\.(\d+)\.attn2\.norm_([qk])\.weight", r"blocks.\1.cross_attn.norm_\2.weight"),
        (r"blocks\.(\d+)\.norm2\.(weight|bias)", r"blocks.\1.norm3.\2"),
        (r"blocks\.(\d+)\.scale_shift_table", r"blocks.\1.modulation"),
        (r"scale_shift_table", "head.modulation"),
    )
    cond = Cond
    blank = ""
    comfyui_shift = 8.0
    # ComfyUI knows the native names alone; diffusers reads these files, too.
    lora_style, names = "native", WAN
    blocks, attention = r"blocks\.\d+(\.attn[12])?", ("to_q", "to_k", "to_v", "to_out.0")
    feed_forward = ("ffn.net.0.proj", "ffn.net.2")

    def __init__(
        self,
        pipeline: WanPipeline,
        *,
        guidance: float | None = None,
        max_sequence_length: int | None = None,
        autocast: torch.dtype | None = None,
        frames: int = 1,
    ) -> None:
        super().__init__(
            pipeline, guidance=guidance, max_sequence_length=max_sequence_length, autocast=autocast
        )
        if (frames - 1) % pipeline.vae_scale_factor_temporal:
            near = (frames - 1) // pipeline.vae_scale_factor_temporal * pipeline.vae_scale_factor_temporal + 1
            raise ValueError(
                f"model.frames is {frames}; it must be 1, or 1 more than a multiple of 4: set it to {near}"
            )
        self.frames = frames

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        # The model has no mask: it attends to zeros up to the full length, and has learnt to.
        tokens = torch.stack(
            [pad(c.tokens, (0, 0, 0, self.max_sequence_length - len(c.tokens))) for c in cond]
        )
        with self.casting():
            velocity = self.transformer(
                hidden_states=video(x).to(self.dtype),
                timestep=sigma.float() * 1000,
                encoder_hidden_states=tokens.to(self.dtype),
                return_dict=False,
            )[0]
        return velocity.reshape(x.shape).float()

    @classmethod
    def load(cls, section: ModelSection, path: Path | None, device: torch.device | str) -> Self:
        """Load the model of a configuration's section; 2.2 A14B, of two transformers, is refused."""
        if path and path.is_dir():
            parts = diffusers_folder.components(path, WanPipeline.__name__)
            if parts.get("transformer_2", [None, None])[1]:
                remedy = "cannot be trained here; take Wan 2.1 or Wan 2.2 TI2V 5B"
                raise ValueError(f"model.path {path}: a Wan of two transformers (2.2 A14B) {remedy}")
        return super().load(section, path, device)

    @classmethod
    def of(cls, section: ModelSection, pipeline: Any) -> Self:
        """Make the policy of a pipeline that is there, for images or for clips."""
        return cls(
            pipeline,
            guidance=section.guidance,
            max_sequence_length=section.max_sequence_length,
            autocast=torch.bfloat16 if section.dtype == "bf16" else None,
            frames=section.frames,
        )

    @classmethod
    def facts(cls, family: str, config: Mapping[str, Any], folder: Path | None) -> str:
        """Name the facts of 2.1 or of 2.2 5B, whose latents have more channels."""
        return "wan_5b" if config.get("in_channels") == 48 else family

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a Wan: 2.1 of 1.3B or 14B, or 2.2 of 5B."""
        width, channels = held.size("patch_embedding.weight")[:2]
        return {
            "num_layers": held.count("blocks.{}.attn1.to_q.weight"),
            "num_attention_heads": width // 128,
            "in_channels": channels_of_noise(held, channels, held.size("proj_out.weight")[0] // 4),
            "out_channels": channels,
            "text_dim": held.size("condition_embedder.text_embedder.linear_1.weight")[1],
            "freq_dim": held.size("condition_embedder.time_embedder.linear_1.weight")[1],
            "ffn_dim": held.size("blocks.0.ffn.net.0.proj.weight")[0],
        }

    def encode_one(self, prompt: str) -> Cond:
        """Run UMT5 on one prompt."""
        tokens, _ = self.pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return Cond(tokens[0, : int(tokens[0].any(-1).sum())].clone())

    def decode(self, latents: Tensor) -> Tensor:
        """Decode to images [B, H, W, 3] or clips [B, F, H, W, 3] in [0, 1], float32, contiguous."""
        frames = decode_frames(self.vae, video(latents), self.vae_dtype)
        return (frames if latents.ndim == 5 else frames[:, 0]).contiguous()

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return (C, h, w) of a picture, (C, f, h, w) of a clip, of the given size in pixels."""
        config, along = (
            self.transformer.config,
            (self.frames - 1) // self.pipeline.vae_scale_factor_temporal + 1,
        )
        size = cells(width, height, self.pipeline.vae_scale_factor_spatial, config.patch_size[-1])
        return config.in_channels, *((along,) if self.frames > 1 else ()), *size

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return WanPipeline's noise levels [T+1], from 1 and not from a millionth below."""
        sigmas = super().pipeline_sigmas(num_steps, shape)
        return torch.where(sigmas > ALMOST_ONE, 1.0, sigmas)


def video(x: Tensor) -> Tensor:
    """Give latents of pictures [B, C, h, w] their one frame; those of clips [B, C, f, h, w] have theirs."""
    return x if x.ndim == 5 else x[:, :, None]


POLICY = Wan
