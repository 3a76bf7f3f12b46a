"""Qwen-Image (Alibaba): packed latents, texts of any length, guidance that keeps tokens' norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from .files.single_file import Held
from .files.sizes import channels_of_noise
from .flux import pack, unpack
from .shared.peft_policy import PeftPolicy, cells
from .shared.video_vae import decode_frames

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")


class Cond(NamedTuple):
    """One prompt's text features."""

    tokens: Tensor  # [L, joint_attention_dim], as many as the prompt has


class QwenImage(PeftPolicy):
    """A policy and decoder over a QwenImagePipeline. Latents are [B, 16, h, w], packed inside."""

    pipeline_class = QwenImagePipeline
    guidance, max_sequence_length = 4.0, 512
    reads = "Qwen-Image reads its prompts by a language model"
    fills_text = False
    cond = Cond
    blank: str | None = " "  # the negative prompt of the model's own examples
    # ComfyUI samples it by ModelSamplingFlux with a shift of 1.15 at any size.
    comfyui_shift = math.exp(1.15)
    # ComfyUI and diffusers share the module names, but diffusers reads a file that has alphas only in the
    # native form.
    lora_style = "native"
    blocks, attention, feed_forward = r"transformer_blocks\.\d+(\.attn)?", ATTENTION, FEED_FORWARD

    def set_up(self) -> None:
        """Look at the pipeline, and refuse settings that the model does not take."""
        self._sigma: Tensor | None = None
        self.transformer.time_text_embed.register_forward_pre_hook(self._keep_exact)

    def _keep_exact(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give the embedding the exact noise level, which the model would round to 16 bit."""
        if self._sigma is None:
            return given
        # Edit 2511 asks a second time, for a picture without noise.
        return (
            self._sigma if len(given[0]) == len(self._sigma) else torch.cat([self._sigma, 0 * self._sigma]),
            *given[1:],
        )

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Tensor:
        """Return v [B, C, h, w] in float32; guidance keeps the norm of every token's prediction."""
        if self.guidance > 1:
            return self.guide(*self.both(x, sigma, cond))
        height, width = x.shape[2] // 2, x.shape[3] // 2
        return unpack(self._forward(pack(x), sigma, cond, height, width), height, width)

    def both(self, x: Tensor, sigma: Tensor, cond: Sequence[Cond]) -> Sequence[Tensor]:
        """Return the predictions with the prompts and with the negative one, each like x."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        twice = [*cond, *self.without(cond)]
        made = self._forward(pack(x).repeat(2, 1, 1), sigma.repeat(2), twice, height, width)
        return unpack(made, height, width).chunk(2)

    def guide(self, given: Tensor, without: Tensor) -> Tensor:
        """Return the guided velocity, every token of which is as long as the prediction's."""
        height, width = given.shape[2] // 2, given.shape[3] // 2
        own, guided = pack(given), pack(super().guide(given, without))
        kept = guided * (own.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpack(kept, height, width)

    def without(self, cond: Sequence[Cond]) -> list[Cond]:
        """Return what guidance moves away from, row by row."""
        return self.encode([self.blank]) * len(cond)

    def seen(
        self, tokens: Tensor, cond: Sequence[Cond], height: int, width: int
    ) -> tuple[Tensor, list[tuple[int, int, int]]]:
        """Return the tokens [B, n, 4C] that the model sees, the latents' first, and parts' (1, h, w)."""
        return tokens, [(1, height, width)]

    def _forward(
        self, tokens: Tensor, sigma: Tensor, cond: Sequence[Cond], height: int, width: int
    ) -> Tensor:
        """Run the transformer on packed latents [B, h·w, 4C] and padded texts."""
        seen, shapes = self.seen(tokens, cond, height, width)
        text, mask = padded([c.tokens for c in cond])
        self._sigma = sigma.float()
        try:
            with self.casting():
                velocity = self.transformer(
                    hidden_states=seen.to(self.dtype),
                    timestep=sigma,
                    encoder_hidden_states=text.to(self.dtype),
                    encoder_hidden_states_mask=mask,
                    img_shapes=[shapes] * len(tokens),
                    return_dict=False,
                )[0]
        finally:
            self._sigma = None
        return velocity[:, : tokens.shape[1]].float()

    @staticmethod
    def sizes(held: Held) -> dict[str, Any]:
        """Describe a Qwen-Image."""
        width, channels = held.size("img_in.weight")
        return {
            "num_layers": held.count("transformer_blocks.{}.attn.to_q.weight"),
            "num_attention_heads": width // 128,
            "in_channels": channels_of_noise(held, channels, held.size("proj_out.weight")[0]),
            "out_channels": channels // 4,
            "joint_attention_dim": held.size("txt_in.weight")[1],
        }

    def encode_one(self, prompt: str) -> Cond:
        """Run Qwen2.5-VL on one prompt in the model's own template, whose beginning is cut off again."""
        tokens, _ = self.pipeline.encode_prompt(
            prompt, self.device, max_sequence_length=self.max_sequence_length
        )
        return Cond(tokens[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, H, W, 3] in [0, 1], float32 and contiguous."""
        return decode_frames(self.vae, latents[:, :, None], self.vae_dtype)[:, 0].contiguous()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """Return (C, h, w) of a picture of the given size in pixels."""
        return self.transformer.config.in_channels // 4, *cells(
            width, height, self.pipeline.vae_scale_factor, 2
        )

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return noise levels [T+1] shifted by the tokens and stretched to the scheduler's last one."""
        return self.shifted_sigmas(num_steps, shape[-2] * shape[-1] // 4)


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack texts [L, D] with zeros behind; the mask [B, L] marks real tokens, None where all are."""
    lengths = [len(text) for text in texts]
    stacked = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    if min(lengths) == max(lengths):
        return stacked, None
    return stacked, (torch.arange(stacked.shape[1]) < torch.tensor(lengths)[:, None]).to(stacked.device)


POLICY = QwenImage
