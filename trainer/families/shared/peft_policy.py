"""What policies over a diffusers pipeline share: a peft LoRA on the transformer, prompts encoded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from comfy_g2rpo import lora
from comfy_g2rpo.lora.convert import renamed
from comfy_g2rpo.lora.key_names import Family
from comfy_g2rpo.prompts import image_of
from comfy_g2rpo.rollout import seeded_noise

from ...lora.lora_files import for_transformer
from ...model.prompt_cache import PromptCache
from ..cpu.taesd_decoder import TinyDecoder, foldable

KEPT = 64
"""Prompts whose features stay on the device where the disk has them, too."""


class Adapted:
    """A pipeline whose transformer carries a LoRA.

    A family adds `_forward` or `velocity`, `latent_shape`, targets, `encode_one`.
    """

    decodes_while_rolling = True
    lora_style = "diffusers"
    blocks: str  # pattern of the modules that targets lie in, such as r"transformer_blocks\.\d+"
    attention: Sequence[str]  # targets in a block
    feed_forward: Sequence[str]  # further targets
    cond: Callable[..., Any]  # named tuple of a prompt's features
    blank: str | None = None  # the text that classifier-free guidance moves away from
    guidance: float
    names: Family | None = None  # where LoRA files have other module names than diffusers
    cache: PromptCache | None = None
    load_text_encoders: Callable[[], Mapping[str, nn.Module]] | None = None
    """Loads the pipeline's text encoders when the first prompt is encoded; None where they are there."""
    _encoders_taken = False
    packed = False
    """Whether weights of the transformer are kept in few bits, or in the computer's memory, and made when
    they are used.
    """

    def __init__(self, pipeline: Any, autocast: torch.dtype | None = None) -> None:
        self.pipeline, self.autocast = pipeline, autocast
        self.transformer: Any = pipeline.transformer.requires_grad_(False).eval()
        self.vae: Any = pipeline.vae.requires_grad_(False).eval()
        # Looked up once: diffusers walks through every module for them.
        self.device, self.dtype, self.vae_dtype = (
            pipeline.device,
            pipeline.transformer.dtype,
            pipeline.vae.dtype,
        )
        if all(weight.dim() < 5 for weight in self.vae.parameters()):
            self.vae.to(memory_format=torch.channels_last)  # a video decoder's weights have no such format
        self._folded = TinyDecoder(self.vae.decoder) if foldable(self.vae) else None
        self.layers: dict[str, nn.Module] = {}
        self._prompts: dict[str, Any] = {}

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v like x [B, C, …, h, w] in float32, with classifier-free guidance where it is above 1."""
        if self.guidance <= 1:
            return self._forward(x, sigma, cond)
        blank = self.encode([self.blank]) * len(cond)
        given, without = self._forward(torch.cat([x, x]), sigma.repeat(2), [*cond, *blank]).chunk(2)
        return without + self.guidance * (given - without)

    def _forward(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return the model's own prediction, v like x [B, C, …, h, w] in float32."""
        raise NotImplementedError

    def encode_one(self, prompt: str) -> Any:
        """Run the text encoders on one prompt: a named tuple of tensors without batch dimension."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Any]:
        """Return text features, computed once per prompt."""
        return [self._encoded(prompt) for prompt in prompts]

    def key(self, prompt: str) -> str:
        """Return what a prompt's features are kept under.

        A prompt with a picture is refused where the model takes none.
        """
        if image_of(prompt):
            remedy = "remove that column, or choose FLUX.1 Kontext or Qwen-Image-Edit"
            raise ValueError(
                f"prompts: {prompt[:60]!a} has an image to start from, but this model takes none; {remedy}"
            )
        return prompt

    def _encoded(self, prompt: str) -> Any:
        key = self.key(prompt)
        if key in self._prompts:
            return self._prompts[key]
        if self.cache and (known := self.cache.get(key)):
            found = self.cond(**{name: tensor.to(self.device) for name, tensor in known.items()})
        else:
            self.take_text_encoders()
            found = self.encode_one(prompt)
            if self.cache:
                self.cache.put(key, found._asdict())
        if self.cache and len(self._prompts) >= KEPT:
            # The disk has them all; the device keeps the latest.
            del self._prompts[next(iter(self._prompts))]
        self._prompts[key] = found
        return found

    def take_text_encoders(self) -> None:
        """Load the text encoders where they are not there yet."""
        if self.load_text_encoders and not self._encoders_taken:
            for name, module in self.load_text_encoders().items():
                setattr(self.pipeline, name, module.requires_grad_(False).eval().to(self.device))
            self._encoders_taken = True

    def drop_text_encoders(self) -> None:
        """Free the text encoders' memory once every prompt has been encoded."""
        if self.blank is not None and self.guidance > 1:
            self.encode([self.blank])
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)
        self._encoders_taken = False

    def add_lora(self, rank: int, alpha: float, seed: int, feed_forward: bool = False) -> None:
        """Put a fresh adapter on the attention projections (and the feed-forward ones): A seeded as N(0,
        1/3n), B zero.
        """
        self.attach_lora(rank, alpha, feed_forward)
        with torch.no_grad():
            for name, (down, up) in self.pairs().items():
                down.copy_(seeded_noise(down.shape, "lora", seed, name) / math.sqrt(3 * down.shape[1]))
                up.zero_()
        for parameter in self.parameters():
            # The adapter learns in float32 whatever the weights beneath are kept in.
            parameter.data = parameter.data.float()

    def attach_lora(self, rank: int, alpha: float, feed_forward: bool) -> None:
        """Put an adapter on the projections whose numbers nobody has set yet."""
        targets = (*self.attention, *(self.feed_forward if feed_forward else ()))
        pattern = rf"{self.blocks}\.({'|'.join(target.replace('.', chr(92) + '.') for target in targets)})"
        self.transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, init_lora_weights=False)
        )
        self.find_layers()

    def moved(self, device: torch.device) -> None:
        """Take note that the model is on a device now, and bring along what has been made of it."""
        self.device = device
        self._folded = TinyDecoder(self.vae.decoder) if foldable(self.vae) else None
        self._prompts = {
            key: self.cond(*(tensor.to(device) for tensor in found)) for key, found in self._prompts.items()
        }

    def load_lora(self, path: Path) -> None:
        """Put the adapter of a file of any form on the model, to draw with.

        A file that does not fit is refused.
        """
        pairs = for_transformer(path, self.transformer)
        state = {
            f"transformer.{name}.lora_{part}.weight": pair[i]
            for name, pair in pairs.items()
            for i, part in enumerate("AB")
        }
        self.transformer.load_lora_adapter(state)
        self.find_layers()

    def rename(self, pairs: lora.Pairs) -> lora.Pairs:
        """Give modules the names that they have in LoRA files."""
        return renamed(self.names, pairs, "native") if self.names else pairs

    def find_layers(self) -> None:
        """Take note of the layers that carry an adapter, whoever put it there: those that `reference`
        switches off.
        """
        self.layers = {
            name: module
            for name, module in self.transformer.named_modules()
            if hasattr(module, "get_delta_weight")
        }

    def pairs(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the adapter's (A, B) by module name."""
        return {
            name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            for name, layer in self.layers.items()
        }

    def parameters(self) -> list[nn.Parameter]:
        """List the adapter's parameters: A, B of every module in order."""
        return [parameter for pair in self.pairs().values() for parameter in pair]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch the adapter off."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    def inference(self) -> AbstractContextManager[None]:
        """Evaluate without gradients."""
        return torch.no_grad()

    def training(self) -> AbstractContextManager[None]:
        """Do nothing: the velocity is differentiable as it is."""
        return nullcontext()

    @contextmanager
    def completing(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Evaluate completions inside the context: by the transformer's own blocks, under autocast to
        `dtype` where it is given.
        """
        kept, self.autocast = self.autocast, dtype or self.autocast
        try:
            yield
        finally:
            self.autocast = kept

    def casting(self) -> AbstractContextManager[Any]:
        """Run the transformer in the precision of `autocast` where it is set."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def pipeline_sigmas(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels [T+1] that the pipeline's scheduler sets where no shift by resolution is
        asked for.
        """
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return scheduler.sigmas.float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, H, W, 3] in [0, 1], float32 and contiguous."""
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.shift_factor or 0.0)
        raw = raw.to(self.vae_dtype, memory_format=torch.channels_last)
        images = self._folded(raw) if self._folded else self.vae.decode(raw, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def cells(width: int, height: int, scale: int, patch: int) -> tuple[int, int]:
    """Return (h, w) of the latent of a picture; `scale` pixels are a cell, `patch` cells a token's side."""
    factor = scale * patch
    if width % factor or height % factor:
        raise ValueError(
            f"model.width and model.height are {width}×{height}; both must be multiples of {factor}"
        )
    return height // scale, width // scale
