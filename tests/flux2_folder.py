"""A FLUX.2 of diffusers' and transformers' own classes, random and too small to cost anything, in a folder
as it is published.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from qwen_folder import tokenizer
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

# What the published folders say.
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
KINDS = ("klein base", "klein", "dev")
MARKS = {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 256}
QWEN = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking "
    "%}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/{{ message['role'] }}]{% endfor %}"
)


def transformer(kind: str = "dev") -> Flux2Transformer2DModel:
    """Make the transformer: a double block and two single ones of one head, the smallest that ComfyUI can
    load.
    """
    made = Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=96,
        guidance_embeds=kind == "dev",
    )
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm_" in name and weight.ndim == 1:
                weight.normal_(1, 0.1)
    return made


def text_parts(kind: str) -> dict[str, object]:
    """Make the language model and what cuts its texts.

    Three layers of it are read, the 27th (klein) or 30th (dev) last.
    """
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    words = tokenizer()
    if kind != "dev":
        words.chat_template = QWEN
        return {
            "text_encoder": Qwen3ForCausalLM(
                Qwen3Config(**sizes, **MARKS, num_hidden_layers=27, vocab_size=260)
            ),
            "tokenizer": words,
        }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
    }
    config = Mistral3Config(
        text_config={**sizes, **MARKS, "model_type": "mistral", "num_hidden_layers": 30, "vocab_size": 260},
        vision_config={**vision, "model_type": "pixtral"},
    )
    # Published is a PixtralProcessor, which wants torchvision and hands texts on to its tokenizer.
    words.padding_side, words.chat_template = "left", MISTRAL
    return {"text_encoder": Mistral3ForConditionalGeneration(config), "tokenizer": words}


def pipeline(kind: str = "klein base") -> Flux2Pipeline | Flux2KleinPipeline:
    """Make a whole pipeline with random weights."""
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [8] * 4,
    }
    vae = AutoencoderKLFlux2(**blocks, latent_channels=32, layers_per_block=1, norm_num_groups=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        "vae": vae,
        "transformer": transformer(kind),
        **text_parts(kind),
    }
    made = (
        Flux2Pipeline(**parts) if kind == "dev" else Flux2KleinPipeline(**parts, is_distilled=kind == "klein")
    )
    made.set_progress_bar_config(disable=True)
    return made


def save(folder: Path, kind: str = "klein base") -> Path:
    """Write a pipeline's folder."""
    pipeline(kind).save_pretrained(folder)
    return folder


# The published single file by name: where its weights stand in diffusers' model. Several names: their rows
# one after the other.
DOUBLE = {
    "img_attn.qkv.weight": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "img_attn.proj.weight": ["attn.to_out.0"],
    "img_attn.norm.query_norm.scale": ["attn.norm_q"],
    "img_attn.norm.key_norm.scale": ["attn.norm_k"],
    "img_mlp.0.weight": ["ff.linear_in"],
    "img_mlp.2.weight": ["ff.linear_out"],
    "txt_attn.qkv.weight": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "txt_attn.proj.weight": ["attn.to_add_out"],
    "txt_attn.norm.query_norm.scale": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm.scale": ["attn.norm_added_k"],
    "txt_mlp.0.weight": ["ff_context.linear_in"],
    "txt_mlp.2.weight": ["ff_context.linear_out"],
}
SINGLE = {
    "linear1.weight": ["attn.to_qkv_mlp_proj"],
    "linear2.weight": ["attn.to_out"],
    "norm.query_norm.scale": ["attn.norm_q"],
    "norm.key_norm.scale": ["attn.norm_k"],
}
WHOLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}


def published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name a transformer's weights as its published single file does."""
    made = {
        f"{name}.weight": weights[f"{theirs}.weight"]
        for name, theirs in WHOLE.items()
        if f"{theirs}.weight" in weights
    }
    made["final_layer.adaLN_modulation.1.weight"] = torch.cat(
        weights["norm_out.linear.weight"].chunk(2)[::-1]
    )
    for kind, theirs, names, count in (
        ("double_blocks", "transformer_blocks", DOUBLE, 1),
        ("single_blocks", "single_transformer_blocks", SINGLE, 2),
    ):
        for block in range(count):
            for name, parts in names.items():
                made[f"{kind}.{block}.{name}"] = torch.cat(
                    [weights[f"{theirs}.{block}.{part}.weight"] for part in parts]
                )
    return made
