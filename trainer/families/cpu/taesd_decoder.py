"""diffusers' tiny autoencoder (TAESD), its decoder folded on a CPU."""

from __future__ import annotations

import copy

from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import nn

from comfy_g2rpo.speed.folded_decoder import FoldedDecoder, foldable


def folded_decoder(vae: nn.Module) -> FoldedDecoder | None:
    """Return a folded copy of the decoder, or None where not all of it is known.

    That of a decoder in 16 bit is in float32, which a processor decodes in less time, and more exactly.
    """
    if (
        not isinstance(vae, AutoencoderTiny)
        or vae.device.type != "cpu"
        or vae.config.act_fn != "relu"
        or vae.config.upsample_fn != "nearest"
        or vae.config.upsampling_scaling_factor != 2
    ):
        return None
    layers = vae.decoder.layers
    if vae.dtype.itemsize < 4:
        layers = copy.deepcopy(layers).float()
    return FoldedDecoder(layers) if foldable(layers, AutoencoderTinyBlock) else None
