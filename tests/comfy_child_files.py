"""Run by a ComfyUI's Python in its root: where core's own classes name weights otherwise than the test's
files, whose folder is read.
"""

import json
import sys

import comfy.clip_model
import comfy.ldm.lumina.model
import comfy.ldm.models.autoencoder
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.ops
import comfy.text_encoders.t5
import torch
from safetensors import safe_open

OPS = comfy.ops.disable_weight_init
COMMON = {"dtype": torch.float32, "device": "meta", "operations": OPS}
KL = {
    "double_z": True,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 2, 2],
    "num_res_blocks": 1,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 300,
    "is_gated_act": True,
}
SD3 = {
    "patch_size": 2,
    "in_channels": 16,
    "depth": 2,
    "pos_embed_max_size": 8,
    "num_patches": 64,
    "qk_norm": "rms",
}
Z = {
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 1,
    "n_kv_heads": 1,
    "qk_norm": True,
}


def kl() -> torch.nn.Module:
    """Make the autoencoder of SD3, FLUX.1 and Z-Image."""
    config = {**KL, "z_channels": 16, "attn_resolutions": [], "dropout": 0.0}
    place, regular = (
        "comfy.ldm.modules.diffusionmodules.model",
        {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
    )
    encoder, decoder = ({"target": f"{place}.{name}", "params": config} for name in ("Encoder", "Decoder"))
    engine = comfy.ldm.models.autoencoder.AutoencodingEngine
    return engine(regularizer_config=regular, encoder_config=encoder, decoder_config=decoder)


def wan() -> torch.nn.Module:
    """Make the transformer of Wan 2.1."""
    sizes = {
        "dim": 128,
        "in_dim": 16,
        "out_dim": 16,
        "ffn_dim": 48,
        "freq_dim": 32,
        "text_dim": 32,
        "num_heads": 1,
        "num_layers": 2,
    }
    return comfy.ldm.wan.model.WanModel(model_type="t2v", **sizes, **COMMON)


def sd3() -> torch.nn.Module:
    """Make the transformer of Stable Diffusion 3.5 medium."""
    reads = {"target": "torch.nn.Linear", "params": {"in_features": 192, "out_features": 128}}
    more = {
        "adm_in_channels": 192,
        "context_embedder_config": reads,
        "x_block_self_attn_layers": [0],
        "pos_embed_scaling_factor": None,
    }
    return comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper(
        input_size=None, **SD3, **more, **COMMON
    )


def z_image() -> torch.nn.Module:
    """Make the transformer of Z-Image."""
    axes = {
        "cap_feat_dim": 32,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "pad_tokens_multiple": 32,
    }
    return comfy.ldm.lumina.model.NextDiT(**Z, **axes, z_image_modulation=True, time_scale=1000.0, **COMMON)


def lumina2() -> torch.nn.Module:
    """Make the transformer of Lumina-Image 2.0."""
    axes = {"cap_feat_dim": 32, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512]}
    sizes = {**Z, "dim": 288, "n_layers": 1, "n_heads": 3, "n_kv_heads": 1}
    return comfy.ldm.lumina.model.NextDiT(**sizes, **axes, **COMMON)


def clip() -> torch.nn.Module:
    """Make CLIP-L."""
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "intermediate_size": 64,
        "max_position_embeddings": 12,
    }
    return comfy.clip_model.CLIPTextModel(
        {**sizes, "hidden_act": "quick_gelu", "eos_token_id": 2}, torch.float32, "meta", OPS
    )


def t5(kind: str) -> torch.nn.Module:
    """Make the encoder of a T5 or UMT5."""
    more = {
        "model_type": kind,
        "dense_act_fn": "gelu_pytorch_tanh",
        "relative_attention_num_buckets": 32,
        "layer_norm_epsilon": 1e-6,
    }
    return comfy.text_encoders.t5.T5({**T5, **more}, torch.float32, "meta", OPS)


WAN_VAE = {"dim": 8, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
MAKE = {
    "sd3/transformer": sd3,
    "sd3/vae": kl,
    "sd3/text_encoder": clip,
    "flux_dev/text_encoder_2": lambda: t5("t5"),
    "wan_2.1/transformer": wan,
    "wan_2.1/vae": lambda: comfy.ldm.wan.vae.WanVAE(z_dim=16, **WAN_VAE),
    "wan_2.1/text_encoder": lambda: t5("umt5"),
    "wan_5B/vae": lambda: comfy.ldm.wan.vae2_2.WanVAE(z_dim=48, dec_dim=8, **WAN_VAE),
    "qwen_image/vae": lambda: comfy.ldm.wan.vae.WanVAE(z_dim=16, **WAN_VAE),
    "z_image/transformer": z_image,
    "lumina2/transformer": lumina2,
}

root, found = sys.stdin.read(), {}
for name, make in MAKE.items():
    with safe_open(f"{root}/{name}.safetensors", "pt") as file:
        found[name] = sorted(set(make().state_dict()) ^ set(file.keys()))
print(json.dumps(found))
