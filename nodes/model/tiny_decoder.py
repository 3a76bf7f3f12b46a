"""Core's tiny autoencoder (TAESD), its decoder folded where it decodes on a CPU."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import torch
from comfy.taesd.taesd import TAESD, Block, Clamp, Decoder
from torch import Tensor, nn

from ...comfy_g2rpo.speed.folded_decoder import FoldedDecoder, foldable
from .core_sd3 import ON_LAYERS

TOLERANCE = 1e-3  # of a value in [0, 1]; a 256th is what a picture shows


class TinyDecoder:
    """The pictures that core's VAE would decode, by fewer products."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.network = vae, vae.first_stage_model
        self.folded = FoldedDecoder(list(self.network.taesd_decoder)[1:])

    def is_exact(self, latents: Tensor) -> bool:
        """Return whether one of the latents becomes what core makes of it: later cores may differ."""
        own = self.vae.decode(latents[:1])
        try:
            made = self(latents[:1])
        except (AttributeError, RuntimeError, TypeError, ValueError):
            logging.warning("G²RPO: pictures are decoded by core's own decoder", exc_info=True)
            return False
        return made.shape == own.shape and bool((made - own).abs().max() < TOLERANCE)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] of the wire to images [B, H, W, 3] in [0, 1]."""
        network = self.network
        made = self.folded((latents - network.vae_shift) * network.vae_scale)
        return self.vae.process_output(made).movedim(1, -1).contiguous()


def tiny_decoder(vae: Any) -> TinyDecoder | None:
    """Return the folded decoder of core's VAE, or None where it is another one, or others are on it."""
    network = getattr(vae, "first_stage_model", None)
    if type(network) is not TAESD or vae.patcher.patches or vae.patcher.object_patches:
        return None
    decoder = network.taesd_decoder
    plain = type(decoder) in (Decoder, nn.Sequential) and type(decoder[0]) is Clamp
    if not plain or vae.device.type != "cpu" or vae.vae_dtype != torch.float32:
        return None
    layers = list(decoder)[1:]
    if any(getattr(layer, "pool", None) is not None for layer in layers) or not foldable(layers, Block):
        return None
    modules = list(network.modules())
    touched = any(getattr(module, name, ()) for module in modules for name in ON_LAYERS)
    touched = touched or any("forward" in vars(module) for module in modules)
    return None if touched else TinyDecoder(vae)


def fits(vae: Any, latents: Tensor) -> bool:
    """Return whether core would decode all of a batch [B, C, h, w] at once."""
    free = comfy.model_management.get_free_memory(vae.device)
    return vae.memory_used_decode(latents.shape, vae.vae_dtype) * len(latents) <= free
