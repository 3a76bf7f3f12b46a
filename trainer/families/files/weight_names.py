"""Where a weight that diffusers or transformers asks for stands in files as ComfyUI keeps them: rules over
names, as data.

What `comfy_g2rpo/lora/key_names.py` knows is not repeated: here are the norms and tables of transformers, the
VAEs, the text encoders. Sources: the published files' keys; `loaders/single_file_utils.py` of diffusers;
`comfy/ldm` and `comfy/sd.py` of ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

Rules = Sequence[tuple[str, str]]
"""Pairs of a pattern for the whole of diffusers' name and the name that a file has for it."""

UNUSED = re.compile(
    r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant|num_batches_tracked|position_ids|logit_scale)|spiece_model|tekken_model|__index_timestep_zero__|"
    r"norm_final\.weight|lm_head\.weight|text_projection\.weight|shared\.weight|encoder\.embed_tokens\.weight"
)
"""What files hold beside a model's weights, or twice: no reason to refuse one."""

LDM_VAE: Rules = (
    (r"(encoder\.down)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"\1.\2.block.\3.\4"),
    (r"(encoder\.down)_blocks\.(\d+)\.downsamplers\.0\.(.+)", r"\1.\2.downsample.\3"),
    (r"(decoder\.up)_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"\1.\2.block.\3.\4"),
    (r"(decoder\.up)_blocks\.(\d+)\.upsamplers\.0\.(.+)", r"\1.\2.upsample.\3"),
    (r"(.+\.mid)_block\.resnets\.0\.(.+)", r"\1.block_1.\2"),
    (r"(.+\.mid)_block\.resnets\.1\.(.+)", r"\1.block_2.\2"),
    (r"(.+\.mid)_block\.attentions\.0\.group_norm\.(.+)", r"\1.attn_1.norm.\2"),
    (r"(.+\.mid)_block\.attentions\.0\.to_([qkv])\.(.+)", r"\1.attn_1.\2.\3"),
    (r"(.+\.mid)_block\.attentions\.0\.to_out\.0\.(.+)", r"\1.attn_1.proj_out.\2"),
    (r"(.+)\.conv_norm_out\.(.+)", r"\1.norm_out.\2"),
    (r"quant_conv\.(.+)", r"encoder.quant_conv.\1"),  # FLUX.2
    (r"post_quant_conv\.(.+)", r"decoder.post_quant_conv.\1"),
)
WAN_VAE: Rules = (
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(.+)", r"encoder.downsamples.\1.downsamples.\2.\3"),
    (r"encoder\.down_blocks\.(\d+)\.downsampler\.(.+)", r"encoder.downsamples.\1.downsamples.{last}.\2"),
    (r"encoder\.down_blocks\.(\d+)\.(.+)", r"encoder.downsamples.\1.\2"),
    (r"decoder\.up_blocks\.(\d+)\.upsampler\.(.+)", r"decoder.upsamples.\1.upsamples.{last}.\2"),
    (r"(.+)\.mid_block\.attentions\.0\.(.+)", r"\1.middle.1.\2"),
    (r"(.+)\.mid_block\.resnets\.0\.(.+)", r"\1.middle.0.\2"),
    (r"(.+)\.mid_block\.resnets\.1\.(.+)", r"\1.middle.2.\2"),
    (r"(.+)\.norm_out\.gamma", r"\1.head.0.gamma"),
    (r"(.+)\.conv_out\.(.+)", r"\1.head.2.\2"),
    (r"(.+)\.conv_in\.(.+)", r"\1.conv1.\2"),
    (r"quant_conv\.(.+)", r"conv1.\1"),
    (r"post_quant_conv\.(.+)", r"conv2.\1"),
)
WAN_RESNET = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
TEXT_WRAPPERS = ("transformer.", "model.", "language_model.", "text_model.")

Layout = Callable[[str], Iterable[str]]
"""Lists the names that a file may have for one of diffusers' or transformers'."""


def by_rules(rules: Rules) -> Layout:
    """Make a layout of rules; names without one are the same on both sides."""

    def layout(name: str) -> Iterator[str]:
        yield name
        for pattern, other in rules:
            if found := re.fullmatch(pattern, name):
                yield found.expand(other)

    return layout


def ldm_vae(blocks: int) -> Layout:
    """Make latent diffusion's layout of an autoencoder, whose decoder counts `blocks` from the end."""

    def layout(name: str) -> Iterator[str]:
        yield name
        other = next(
            (found.expand(other) for pattern, other in LDM_VAE if (found := re.fullmatch(pattern, name))),
            name,
        )
        other = re.sub(r"(?<=^decoder\.up\.)\d+", lambda found: str(blocks - 1 - int(found[0])), other)
        yield other.replace(".conv_shortcut.", ".nin_shortcut.")

    return layout


def wan_vae(resnets: int, nested: bool) -> Layout:
    """Make the layout of Wan's autoencoder, with so many residual blocks a stage; 2.2's is `nested`."""

    def layout(name: str) -> Iterator[str]:
        yield name
        head, _, leaf = name.rpartition(".")
        block, _, part = head.rpartition(".")
        if part in WAN_RESNET and ("_block" in block):
            name = f"{block}.{WAN_RESNET[part]}.{leaf}"
        if found := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.+)", name):
            stage, number = int(found[1]), resnets + 1 if found[2] is None else int(found[2])
            place = f"{stage}.upsamples.{number}" if nested else str(stage * (resnets + 2) + number)
            yield f"decoder.upsamples.{place}.{found[3]}"
            return
        for pattern, other in WAN_VAE:
            if found := re.fullmatch(pattern, name):
                last = resnets + 1 if name.startswith("decoder") else resnets
                yield found.expand(other).replace("{last}", str(last))
                return
        yield name

    return layout


def bare(name: str) -> str:
    """Take off a text encoder's weight name what wraps the model in some files."""
    while wrapper := next((each for each in TEXT_WRAPPERS if name.startswith(each)), None):
        name = name.removeprefix(wrapper)
    return name


def text_encoder(name: str) -> Iterator[str]:
    """List a text encoder weight's `bare` names in a file; shared embeddings may have either."""
    name = bare(name)
    yield name
    shared = ("shared.weight", "encoder.embed_tokens.weight")
    if name in shared:
        yield from shared
