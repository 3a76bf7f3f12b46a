"""Models of every family at the smallest size that keeps the published heads, as a diffusers folder and as
the files that ComfyUI has.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import flux2_folder
import flux_folder
import lumina2_folder
import native_names as names
import qwen_folder
import torch
import transformers
import wan_folder
import z_image_folder
from safetensors.torch import save_file
from torch import Tensor, nn

from comfy_g2rpo.rollout import seeded_noise
from g2rpo_trainer.families.files.text_files import FACTS as configs

CLIP = {"max_position_embeddings": 12, "vocab_size": 583, "num_hidden_layers": 1, "intermediate_size": 64}
MARKS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
TEXT = {"intermediate_size": 32, "num_hidden_layers": 2}
BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def clip(width: int, act: str, kind: Any = transformers.CLIPTextModelWithProjection) -> nn.Module:
    """Make a CLIP text encoder."""
    sizes = {"hidden_size": width, "projection_dim": width, "num_attention_heads": width // 64}
    made = kind(transformers.CLIPTextConfig(**CLIP, **MARKS, **sizes, hidden_act=act))
    if width == 64 and hasattr(made, "text_projection"):
        nn.init.eye_(made.text_projection.weight)
    return made


def t5(kind: str, width: int) -> nn.Module:
    """Make the encoder of a T5 or UMT5."""
    model, config = (getattr(transformers, f"{kind}{part}") for part in ("EncoderModel", "Config"))
    return model(config(vocab_size=300, d_model=width, **T5))


def qwen_vl() -> nn.Module:
    """Make a Qwen2.5-VL with its tower."""
    text = {**TEXT, "hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1}
    marks = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 80, "intermediate_size": 32, "num_heads": 1, "out_hidden_size": 128}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, **marks, "rope_parameters": rope, "vocab_size": 260, "rms_norm_eps": 1e-6},
        vision_config=vision,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def kl(scale: float, shift: float) -> nn.Module:
    """Make an autoencoder of latent diffusion's kind."""
    sizes = {"block_out_channels": [32, 32, 64, 64], "latent_channels": 16, "layers_per_block": 1}
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(**BLOCKS, **sizes, **bare, scaling_factor=scale, shift_factor=shift)


def sd3() -> Any:
    """Make a Stable Diffusion 3.5 with dual attention."""
    words = transformers.CLIPTokenizer.from_pretrained(flux_folder.TINY / "tokenizer")
    sizes = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "caption_projection_dim": 128,
    }
    sizes |= {"joint_attention_dim": 192, "pooled_projection_dim": 192, "pos_embed_max_size": 8}
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=diffusers.SD3Transformer2DModel(**sizes, dual_attention_layers=(0,), qk_norm="rms_norm"),
        vae=kl(1.5305, 0.0609),
        text_encoder=clip(64, "quick_gelu"),
        text_encoder_2=clip(128, "gelu"),
        text_encoder_3=t5("T5", 192),
        tokenizer=words,
        tokenizer_2=words,
        tokenizer_3=flux_folder.t5_tokenizer(),
    )


def flux(kind: str) -> Any:
    """Make a FLUX.1."""
    made = flux_folder.pipeline(kind)
    torch.manual_seed(1)
    made.text_encoder, made.text_encoder_2 = clip(64, "quick_gelu", transformers.CLIPTextModel), t5("T5", 32)
    made.transformer = diffusers.FluxTransformer2DModel.from_config(
        made.transformer.config, pooled_projection_dim=64
    )
    made.vae = kl(0.3611, 0.1159)
    return made


def qwen_image() -> Any:
    """Make a Qwen-Image."""
    made = qwen_folder.pipeline()
    sizes = {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1, "joint_attention_dim": 128}
    made.transformer, made.text_encoder = diffusers.QwenImageTransformer2DModel(**sizes), qwen_vl()
    return made


def wan(kind: str) -> Any:
    """Make a Wan."""
    made = wan_folder.pipeline(kind)
    torch.manual_seed(1)
    made.transformer = diffusers.WanTransformer3DModel.from_config(
        made.transformer.config, num_attention_heads=1, attention_head_dim=128, rope_max_seq_len=1024
    )
    made.text_encoder = t5("UMT5", 32)
    if kind == "2.2 5B":
        # What latents are normalised by no file of weights tells.
        published = json.loads((configs / "wan_5b.json").read_text("utf-8"))["vae"]["config"]
        made.vae.register_to_config(**{name: published[name] for name in ("latents_mean", "latents_std")})
    shift = {"flow_shift": 3.0 if kind == "2.1" else 5.0}
    made.scheduler = diffusers.UniPCMultistepScheduler(**{**wan_folder.SCHEDULER, **shift})
    return made


def qwen3(made: Any, kind: type[nn.Module]) -> nn.Module:
    """Make a Qwen3 like a pipeline's, whose positions turn at the published speed."""
    config = {**made.text_encoder.config.to_dict(), **ROPE}
    return kind(transformers.Qwen3Config.from_dict(config))


def z_image() -> Any:
    """Make a Z-Image."""
    made = z_image_folder.pipeline()
    torch.manual_seed(1)
    sizes = {
        "dim": 128,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 1,
        "n_kv_heads": 1,
        "cap_feat_dim": 32,
    }
    made.transformer = diffusers.ZImageTransformer2DModel(**sizes, axes_lens=[1536, 512, 512])
    made.vae = kl(0.3611, 0.1159)
    made.text_encoder = qwen3(made, transformers.Qwen3Model)
    return made


def klein() -> Any:
    """Make a FLUX.2 klein, whose VAE normalises latents by statistics of its own."""
    made = flux2_folder.pipeline("klein base")
    widths = {"block_out_channels": [32, 32, 64, 64], "decoder_block_out_channels": [32, 32, 32, 64]}
    made.vae = diffusers.AutoencoderKLFlux2(**BLOCKS, **widths, layers_per_block=1)
    made.vae.bn.running_mean.normal_()
    made.vae.bn.running_var.uniform_(0.5, 2)
    made.text_encoder = qwen3(made, transformers.Qwen3ForCausalLM)
    return made


def lumina2() -> Any:
    """Make a Lumina-Image 2.0, three of whose heads of queries share one of keys and values."""
    made = lumina2_folder.pipeline()
    torch.manual_seed(1)
    sizes = {"hidden_size": 288, "num_layers": 1, "num_refiner_layers": 1, "cap_feat_dim": 32}
    heads = {"num_attention_heads": 3, "num_kv_heads": 1}
    text = {**TEXT, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Gemma2Config(**text, head_dim=256, vocab_size=300)
    made.transformer, made.vae = diffusers.Lumina2Transformer2DModel(**sizes, **heads), kl(0.3611, 0.1159)
    made.text_encoder = transformers.Gemma2Model(config)
    return made


Native = Callable[[names.Weights], dict[str, Tensor]]


def parts(transformer: Native, vae: Native, *texts: Native) -> dict[str, Native]:
    """Say what the weights of a model's parts are called in files."""
    encoders = dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), texts, strict=False))
    return {"transformer": transformer, "vae": vae, **encoders}


FLUX = parts(flux_folder.published, names.kl, names.clip, names.t5)
FAMILIES: dict[str, tuple[str, Callable[[], Any], dict[str, Native]]] = {
    "sd3": ("sd3", sd3, parts(names.sd3, names.kl, names.clip, names.clip, names.t5)),
    "flux dev": ("flux", lambda: flux("dev"), FLUX),
    "flux schnell": ("flux", lambda: flux("schnell"), FLUX),
    "flux2 klein": ("flux2", klein, parts(flux2_folder.published, names.flux2_vae, names.qwen)),
    "qwen_image": ("qwen_image", qwen_image, parts(names.same, names.wan_21_vae, names.qwen)),
    "wan 2.1": ("wan", lambda: wan("2.1"), parts(names.wan, names.wan_21_vae, names.t5)),
    "wan 5B": ("wan", lambda: wan("2.2 5B"), parts(names.wan, names.wan_22_vae, names.t5)),
    "lumina2": ("lumina2", lumina2, parts(names.lumina2, names.kl, names.qwen)),
    "z_image": ("z_image", z_image, parts(names.z_image, names.kl, names.qwen)),
}
"""Every model: its family, how it is made, and what its parts are called in files."""


def whole(pipeline: Any) -> Any:
    """Move norms off 1 and biases off 0, so that no weight can pass for another.

    Round all to what 16 bit hold.
    """
    with torch.no_grad():
        for name, part in pipeline.components.items():
            for key, value in part.named_parameters() if isinstance(part, nn.Module) else ():
                if value.dim() < 2 or value.std() == 0:
                    value.copy_(1 + 0.1 * seeded_noise(value.shape, name, key))
                value.copy_(value.bfloat16().float())
    return pipeline


def write(root: Path, model: str) -> dict[str, Path]:
    """Write a model as a folder and as files, and the transformer, VAE and text encoders together as a
    checkpoint.
    """
    _, make, layouts = FAMILIES[model]
    prefixes = {"transformer": "model.diffusion_model.", "vae": "first_stage_model."}
    pipeline = whole(make())
    pipeline.save_pretrained(root / "folder")
    found, checkpoint = {"folder": root / "folder"}, {}
    for part, native in layouts.items():
        held = getattr(pipeline, part).state_dict()
        weights = native({name: value.detach().clone() for name, value in held.items()})
        weights = {name: value.contiguous() for name, value in weights.items()}
        found[part] = root / f"{part}.safetensors"
        save_file(weights, found[part])
        prefix = prefixes.get(part, f"text_encoders.{part}.transformer.")
        checkpoint |= {f"{prefix}{name}": value for name, value in weights.items()}
    save_file(checkpoint, root / "checkpoint.safetensors")
    return {**found, "checkpoint": root / "checkpoint.safetensors"}


def sentencepiece(words: int = 300) -> bytes:
    """Train a SentencePiece model of a few hundred pieces, with the marks that T5 has."""
    from sentencepiece import SentencePieceTrainer

    draw = random.Random(0)
    text = [" ".join("".join(draw.choices("abcdefgÄö", k=4)) for _ in range(8)) for _ in range(200)]
    made = io.BytesIO()
    marks = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=words, **marks, minloglevel=2
    )
    return made.getvalue()
