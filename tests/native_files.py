"""Models of every family at the smallest size that keeps the published heads, as a diffusers folder and as
the files that ComfyUI has.

The names of the files' weights are written out by hand, from what was published.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import flux2_folder
import flux_folder
import lumina2_folder
import qwen_folder
import torch
import transformers
import wan_folder
import z_image_folder
from safetensors.torch import save_file
from torch import Tensor, nn

from comfy_g2rpo.rollout import seeded_noise
from g2rpo_trainer.families.files.text_files import CONFIGS as configs

Weights = Mapping[str, Tensor]
CLIP = {"max_position_embeddings": 12, "vocab_size": 583, "num_hidden_layers": 1, "intermediate_size": 64}
MARKS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def clip(width: int, act: str, kind: Any = transformers.CLIPTextModelWithProjection) -> nn.Module:
    """Make a CLIP text encoder."""
    sizes = {"hidden_size": width, "projection_dim": width, "num_attention_heads": width // 64}
    made = kind(transformers.CLIPTextConfig(**CLIP, **MARKS, **sizes, hidden_act=act))
    if width == 64 and hasattr(made, "text_projection"):
        nn.init.eye_(made.text_projection.weight)
    return made


def t5(kind: str, width: int) -> nn.Module:
    """Make the encoder of a T5 or UMT5."""
    sizes = {
        "d_model": width,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    return getattr(transformers, f"{kind}EncoderModel")(
        getattr(transformers, f"{kind}Config")(vocab_size=300, **sizes)
    )


def qwen_vl() -> nn.Module:
    """Make a Qwen2.5-VL with its tower."""
    text = {
        "hidden_size": 128,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
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
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": [32, 32, 64, 64], "latent_channels": 16, "layers_per_block": 1}
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.AutoencoderKL(**blocks, **sizes, **bare, scaling_factor=scale, shift_factor=shift)


def sd3() -> Any:
    """Make a Stable Diffusion 3.5 with dual attention."""
    words = transformers.CLIPTokenizer.from_pretrained(flux_folder.TINY / "tokenizer")
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=diffusers.SD3Transformer2DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=64,
            caption_projection_dim=128,
            joint_attention_dim=192,
            pooled_projection_dim=192,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
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
    made.scheduler = diffusers.UniPCMultistepScheduler(
        **{**wan_folder.SCHEDULER, "flow_shift": 3.0 if kind == "2.1" else 5.0}
    )
    return made


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
    made.transformer, made.vae = (
        diffusers.ZImageTransformer2DModel(**sizes, axes_lens=[1536, 512, 512]),
        kl(0.3611, 0.1159),
    )
    config = {
        **made.text_encoder.config.to_dict(),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    made.text_encoder = transformers.Qwen3Model(transformers.Qwen3Config.from_dict(config))
    return made


def klein() -> Any:
    """Make a FLUX.2 klein, whose VAE normalises latents by statistics of its own."""
    made = flux2_folder.pipeline("klein base")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = diffusers.AutoencoderKLFlux2(
        **blocks,
        block_out_channels=[32, 32, 64, 64],
        decoder_block_out_channels=[32, 32, 32, 64],
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    config = {
        **made.text_encoder.config.to_dict(),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    made.vae, made.text_encoder = (
        vae,
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(config)),
    )
    return made


def lumina2() -> Any:
    """Make a Lumina-Image 2.0, three of whose heads of queries share one of keys and values."""
    made = lumina2_folder.pipeline()
    torch.manual_seed(1)
    sizes = {
        "hidden_size": 288,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "cap_feat_dim": 32,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    made.transformer, made.vae = diffusers.Lumina2Transformer2DModel(**sizes), kl(0.3611, 0.1159)
    made.text_encoder = transformers.Gemma2Model(
        transformers.Gemma2Config(**text, head_dim=256, vocab_size=300)
    )
    return made


def renamed(weights: Weights, pairs: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """Replace parts of names, one pair after the other."""
    made = {}
    for name, value in weights.items():
        for old, new in pairs:
            name = name.replace(old, new)
        made[name] = value
    return made


def fused(weights: Weights, groups: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Put the rows of several modules into one; a group's names stand for any prefix."""
    made = dict(weights)
    for name in weights:
        for whole, parts in groups.items():
            for leaf in ("weight", "bias"):
                if name.endswith(f".{parts[0]}.{leaf}"):
                    prefix = name.removesuffix(f"{parts[0]}.{leaf}")
                    made[f"{prefix}{whole}.{leaf}"] = torch.cat(
                        [made.pop(f"{prefix}{part}.{leaf}") for part in parts]
                    )
    return made


def swapped(weights: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    """Let shift and scale of a modulation change places."""
    for leaf in ("weight", "bias"):
        weights[f"{module}.{leaf}"] = torch.cat(weights[f"{module}.{leaf}"].chunk(2)[::-1])
    return weights


def native_sd3(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Stability's files do."""
    groups = {
        "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "context.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    names = (
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
        ("transformer_blocks.", "joint_blocks."),
        ("norm1.linear", "x_block.adaLN_modulation.1"),
        ("norm1_context.linear", "context_block.adaLN_modulation.1"),
        (".context.attn.qkv", ".context_block.attn.qkv"),
        (".attn.to_add_out", ".context_block.attn.proj"),
        (".attn.norm_added_q", ".context_block.attn.ln_q"),
        (".attn.norm_added_k", ".context_block.attn.ln_k"),
        ("ff_context.net.0.proj", "context_block.mlp.fc1"),
        ("ff_context.net.2", "context_block.mlp.fc2"),
        ("ff.net.0.proj", "x_block.mlp.fc1"),
        ("ff.net.2", "x_block.mlp.fc2"),
    )
    made = renamed(fused(weights, groups), names)
    for old, new in (("qkv", "qkv"), ("to_out.0", "proj"), ("norm_q", "ln_q"), ("norm_k", "ln_k")):
        pattern, ours = rf"^(joint_blocks\.\d+)\.(attn2?)\.{old}\.", rf"\1.x_block.\2.{new}."
        made = {re.sub(pattern, ours, name): value for name, value in made.items()}
    made = {
        name if not name.startswith("proj_out") else f"final_layer.linear{name[8:]}": value
        for name, value in made.items()
    }
    return swapped(
        swapped(made, "final_layer.adaLN_modulation.1"), "joint_blocks.1.context_block.adaLN_modulation.1"
    )


def native_wan(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Wan's own files do."""
    names = (
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("attn1.", "self_attn."),
        ("attn2.", "cross_attn."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        (".to_out.0.", ".o."),
        (".norm2.", ".norm3."),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        (".scale_shift_table", ".modulation"),
        ("scale_shift_table", "head.modulation"),
        ("proj_out", "head.head"),
    )
    return renamed(weights, names)


def native_z_image(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Tongyi's own files do."""
    names = (
        ("all_x_embedder.2-1", "x_embedder"),
        ("all_final_layer.2-1", "final_layer"),
        (".attention.norm_q", ".attention.q_norm"),
        (".attention.norm_k", ".attention.k_norm"),
        (".attention.to_out.0", ".attention.out"),
    )
    groups = {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")}
    return {
        **renamed(fused(weights, groups), names),
        "norm_final.weight": torch.ones(weights["x_pad_token"].shape[-1]),
    }


def native_lumina2(weights: Weights) -> dict[str, Tensor]:
    """Name a transformer's weights as Alpha-VLLM's own files do."""
    names = (
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"),
        ("time_caption_embed.caption_embedder", "cap_embedder"),
        ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("feed_forward.linear_", "feed_forward.w"),
        (".ffn_norm1.", ".ffn_norm_first."),
        ("norm1.linear", "adaLN_modulation.1"),
        (".norm1.norm.", ".attention_norm1."),
        (".norm1.", ".attention_norm1."),
        (".norm2.", ".attention_norm2."),
        (".ffn_norm_first.", ".ffn_norm1."),
        (".attn.norm_q.", ".attention.q_norm."),
        (".attn.norm_k.", ".attention.k_norm."),
        (".attn.to_out.0.", ".attention.out."),
        (".attn.qkv.", ".attention.qkv."),
    )
    return renamed(fused(weights, {"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")}), names)


def native_kl(weights: Weights) -> dict[str, Tensor]:
    """Name an autoencoder's weights as latent diffusion does, whose attention is made of convolutions."""
    made = {}
    for name, value in weights.items():
        name = re.sub(r"(encoder\.down)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3", name)
        name = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(
            r"decoder\.up_blocks\.(\d)\.resnets", lambda found: f"decoder.up.{3 - int(found[1])}.block", name
        )
        name = re.sub(
            r"decoder\.up_blocks\.(\d)\.upsamplers\.0",
            lambda found: f"decoder.up.{3 - int(found[1])}.upsample",
            name,
        )
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace(
            "mid_block.resnets.1", "mid.block_2"
        )
        if "attentions" in name:
            name = re.sub(
                r"\.to_([qkv])\.",
                r".\1.",
                name.replace("mid_block.attentions.0", "mid.attn_1").replace("to_out.0", "proj_out"),
            )
            name = name.replace("group_norm", "norm")
            value = value[:, :, None, None] if value.dim() == 2 else value
        made[name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = value
    return made


def native_flux2_vae(weights: Weights) -> dict[str, Tensor]:
    """Name an autoencoder's weights as the FLUX.2 file does."""
    pairs = (
        ("post_quant_conv", "decoder.post_conv"),
        ("quant_conv", "encoder.quant_conv"),
        ("post_conv", "post_quant_conv"),
    )
    return renamed(native_kl(weights), pairs)


def native_wan_vae(weights: Weights, nested: bool) -> dict[str, Tensor]:
    """Name an autoencoder's weights as Wan does: with one residual block per stage of the encoder, two of
    the decoder.
    """
    made = {}
    for name, value in weights.items():
        if nested:
            name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"downsamples.\1.downsamples.\2", name)
            name = re.sub(r"down_blocks\.(\d)\.downsampler", r"downsamples.\1.downsamples.1", name)
            name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", r"upsamples.\1.upsamples.\2", name)
            name = re.sub(r"up_blocks\.(\d)\.upsampler", r"upsamples.\1.upsamples.2", name)
        name = name.replace("encoder.down_blocks", "encoder.downsamples")
        name = re.sub(
            r"up_blocks\.(\d)\.resnets\.(\d)",
            lambda found: f"upsamples.{3 * int(found[1]) + int(found[2])}",
            name,
        )
        name = re.sub(
            r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"upsamples.{3 * int(found[1]) + 2}", name
        )
        for old, new in (("resnets.0", "middle.0"), ("attentions.0", "middle.1"), ("resnets.1", "middle.2")):
            name = name.replace(f"mid_block.{old}", new)
        if name.startswith(("quant_conv", "post_quant_conv")):
            name = name.replace("post_quant_conv", "conv2").replace("quant_conv", "conv1")
        elif name.split(".")[1] in ("downsamples", "upsamples") or ".middle.0" in name or ".middle.2" in name:
            for old, new in (
                ("norm1.", "residual.0."),
                ("conv1.", "residual.2."),
                ("norm2.", "residual.3."),
                ("conv2.", "residual.6."),
            ):
                name = name.replace(old, new)
            name = name.replace("conv_shortcut", "shortcut")
        else:
            name = (
                name.replace("conv_in", "conv1").replace("norm_out", "head.0").replace("conv_out", "head.2")
            )
        made[name] = value
    return made


def native_clip(weights: Weights) -> dict[str, Tensor]:
    """Name a CLIP's weights as ComfyUI's files do; versions of transformers differ in the prefix."""
    bare = {name.removeprefix("text_model."): value for name, value in weights.items()}
    return {
        name if name == "text_projection.weight" else f"text_model.{name}": value
        for name, value in bare.items()
    }


def native_t5(weights: Weights) -> dict[str, Tensor]:
    """Name a T5's weights as ComfyUI's files do: the embedding stands once."""
    return {name: value for name, value in weights.items() if name != "encoder.embed_tokens.weight"}


def native_qwen(weights: Weights) -> dict[str, Tensor]:
    """Name a Qwen's weights as ComfyUI's files do."""
    made = renamed(weights, (("model.language_model.", "model."), ("model.visual.", "visual.")))
    return {
        name if name.startswith(("model.", "visual.", "lm_head.")) else f"model.{name}": value
        for name, value in made.items()
    }


def wan_21_vae(weights: Weights) -> dict[str, Tensor]:
    """Name the weights of Wan 2.1's autoencoder, which Qwen-Image has, too."""
    return native_wan_vae(weights, nested=False)


def wan_22_vae(weights: Weights) -> dict[str, Tensor]:
    """Name the weights of the autoencoder of Wan 2.2 5B."""
    return native_wan_vae(weights, nested=True)


def same(weights: Weights) -> dict[str, Tensor]:
    """Keep names as they are."""
    return dict(weights)


Native = Callable[[Weights], dict[str, Tensor]]
FLUX = {
    "transformer": flux_folder.published,
    "vae": native_kl,
    "text_encoder": native_clip,
    "text_encoder_2": native_t5,
}
WAN = {"transformer": native_wan, "text_encoder": native_t5}
SD3 = {"transformer": native_sd3, "vae": native_kl}
FAMILIES: dict[str, tuple[str, Callable[[], Any], dict[str, Native]]] = {
    "sd3": (
        "sd3",
        sd3,
        {**SD3, "text_encoder": native_clip, "text_encoder_2": native_clip, "text_encoder_3": native_t5},
    ),
    "flux dev": ("flux", lambda: flux("dev"), FLUX),
    "flux schnell": ("flux", lambda: flux("schnell"), FLUX),
    "flux2 klein": (
        "flux2",
        klein,
        {"transformer": flux2_folder.published, "vae": native_flux2_vae, "text_encoder": native_qwen},
    ),
    "qwen_image": (
        "qwen_image",
        qwen_image,
        {"transformer": same, "vae": wan_21_vae, "text_encoder": native_qwen},
    ),
    "wan 2.1": ("wan", lambda: wan("2.1"), {**WAN, "vae": wan_21_vae}),
    "wan 5B": ("wan", lambda: wan("2.2 5B"), {**WAN, "vae": wan_22_vae}),
    "lumina2": (
        "lumina2",
        lumina2,
        {"transformer": native_lumina2, "vae": native_kl, "text_encoder": native_qwen},
    ),
    "z_image": (
        "z_image",
        z_image,
        {"transformer": native_z_image, "vae": native_kl, "text_encoder": native_qwen},
    ),
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
    pipeline = whole(make())
    pipeline.save_pretrained(root / "folder")
    found, checkpoint = {"folder": root / "folder"}, {}
    for part, native in layouts.items():
        weights = native(
            {name: value.detach().clone() for name, value in getattr(pipeline, part).state_dict().items()}
        )
        found[part] = root / f"{part}.safetensors"
        save_file({name: value.contiguous() for name, value in weights.items()}, found[part])
        prefix = {"transformer": "model.diffusion_model.", "vae": "first_stage_model."}.get(
            part, f"text_encoders.{part}.transformer."
        )
        checkpoint |= {f"{prefix}{name}": value.contiguous() for name, value in weights.items()}
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
