"""Architecture of the bundled tiny model: a Stable Diffusion 3 pipeline in a few megabytes, with untrained
weights.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from comfy_g2rpo.rewards.shapes.vocabulary import COLOURS, NUMBERS, RELATIONS, SHAPES

LATENT_CHANNELS, DOWNSCALE = 16, 8
PROMPT_TOKENS = 12
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTHS = (96, 32)
LAYERS = 3  # = attention heads = hidden width / 64, so that ComfyUI recognises the transformer


def vocabulary() -> list[str]:
    """List every word of the toy world's prompts, sorted."""
    words = {"and", *COLOURS, *SHAPES, *NUMBERS, *(f"{shape}s" for shape in SHAPES)}
    return sorted(words.union(*(relation.split() for relation in RELATIONS)))


def byte_symbols() -> list[str]:
    """List the 256 characters by which byte-level BPE (GPT-2) writes bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer that has one token for each word.

    The merges spell the words out, longest first.
    """
    symbols = byte_symbols()
    merges: dict[str, None] = {}
    tokens = dict.fromkeys([*symbols, *(f"{symbol}</w>" for symbol in symbols)])
    for word in sorted(vocabulary(), key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges[f"{pieces[0]} {pieces[1]}"] = None
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens[pieces[0]] = None
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: index for index, token in enumerate([*tokens, START, END])}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files and read them."""
    write_tokenizer(folder)
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=PROMPT_TOKENS
    )


def initialise_autoencoder(vae: AutoencoderTiny) -> AutoencoderTiny:
    """Draw weights that keep activations at unit scale and start residual blocks as identities: six times
    fewer steps.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, AutoencoderTinyBlock):
            nn.init.zeros_(module.conv[-1].weight)
    for last in (vae.encoder.layers[-1], vae.decoder.layers[-1]):
        last.weight.data.mul_(0.1)
    nn.init.constant_(last.bias, 0.9)  # about the background's grey
    return vae


def make_autoencoder(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> AutoencoderTiny:
    """Build a narrow TAESD: half the width, few blocks at full resolution."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 0),
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def make_text_encoder(width: int, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Build a two-layer CLIP text encoder."""
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 32,
            max_position_embeddings=PROMPT_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    nn.init.normal_(
        encoder.get_input_embeddings().weight, std=0.3
    )  # CLIP's 0.02 would drown in what the first layer adds
    return encoder


def make_transformer(layers: int = LAYERS) -> SD3Transformer2DModel:
    """Build the flow model."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=layers,
        attention_head_dim=64,
        caption_projection_dim=64 * layers,
        joint_attention_dim=sum(TEXT_WIDTHS),
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def initialise_transformer(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Draw weights as DiT does: Xavier, and zeros where a block is modulated and where the velocity
    leaves.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            closed = (
                name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear"))
                or name == "proj_out"
            )
            (nn.init.zeros_ if closed else nn.init.xavier_uniform_)(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return transformer


def make_pipeline(
    vae: AutoencoderTiny, tokenizer: CLIPTokenizer, layers: int = LAYERS
) -> StableDiffusion3Pipeline:
    """Put an autoencoder and an untrained flow model into a pipeline without T5."""
    return StableDiffusion3Pipeline(
        transformer=initialise_transformer(make_transformer(layers)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=make_text_encoder(TEXT_WIDTHS[0], tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(TEXT_WIDTHS[1], tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def flow_modules(pipeline: StableDiffusion3Pipeline) -> dict[str, nn.Module]:
    """Name the networks that are trained together."""
    return {name: getattr(pipeline, name) for name in ("transformer", "text_encoder", "text_encoder_2")}


def encode_prompts(
    pipeline: StableDiffusion3Pipeline, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode token ids [B, 12] as the pipeline does: tokens [B, 12, 128] and pooled [B, 128]."""
    distinct, place = ids.unique(dim=0, return_inverse=True)
    outputs = [
        encoder(distinct, output_hidden_states=True)
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    ]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1)[place], torch.cat(
        [o.text_embeds for o in outputs], -1
    )[place]
