"""diffusers' tiny autoencoder (TAESD), its decoder folded on a CPU."""

from __future__ import annotations

from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from comfy_g2rpo.speed.folded_decoder import FoldedDecoder, foldable


def folded_decoder(vae: nn.Module) -> FoldedDecoder | None:
    """Return a folded copy of the decoder, or None where not all of it is known."""
    if (
        not isinstance(vae, AutoencoderTiny)
        or vae.config.act_fn != "relu"
        or vae.config.upsample_fn != "nearest"
        or vae.config.upsampling_scaling_factor != 2
        or not foldable(layers := list(vae.decoder.layers), AutoencoderTinyBlock)
    ):
        return None
    return FoldedDecoder(layers)
