"""Run inside ComfyUI by test_lora_comfyui.py: what core's own key map and adapters make of LoRA files, for
every architecture, and the velocities of tiny models through core's loaders.
"""

from functools import cache
from types import SimpleNamespace

import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import comfy_side
import torch
from comfy_extras import nodes_flux

import nodes

asked, given = comfy_side.given(), comfy_side.given_tensors()
MAKE = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}


def sd3() -> tuple[type, torch.nn.Module, dict]:
    """Stable Diffusion 3.5 with dual attention in its first block."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}}
    made = MMDiT(
        depth=2,
        in_channels=16,
        adm_in_channels=32,
        context_embedder_config=embedder,
        qk_norm="rms",
        x_block_self_attn_layers=[0],
        pos_embed_max_size=8,
        input_size=None,
        **MAKE,
    )
    return comfy.model_base.SD3, made, {"depth": 2}


def flux_like(config: dict) -> tuple[type, torch.nn.Module, dict]:
    """FLUX.1 or FLUX.2."""
    from comfy.ldm.flux.model import Flux

    shared = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 16,
        "context_in_dim": 32,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    }
    config = {**shared, **config}
    known = __import__("comfy.ldm.flux.model", fromlist=["FluxParams"]).FluxParams.__dataclass_fields__
    return (
        comfy.model_base.Flux,
        Flux(**{key: value for key, value in config.items() if key in known}, **MAKE),
        config,
    )


def flux2() -> tuple[type, torch.nn.Module, dict]:
    """FLUX.2: a gated feed-forward layer, modulations that the blocks share, no pooled text."""
    own = {
        "vec_in_dim": None,
        "mlp_ratio": 3.0,
        "patch_size": 1,
        "in_channels": 128,
        "out_channels": 128,
        "axes_dim": [32, 32, 32, 32],
    }
    return flux_like(
        {**own, "qkv_bias": False, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False}
    )


def qwen_image() -> tuple[type, torch.nn.Module, dict]:
    """Qwen-Image."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    made = QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=32, **MAKE
    )
    return comfy.model_base.QwenImage, made, {}


def wan() -> tuple[type, torch.nn.Module, dict]:
    """Wan 2.1, image to video."""
    from comfy.ldm.wan.model import WanModel

    made = WanModel(
        model_type="i2v", dim=64, ffn_dim=96, freq_dim=256, text_dim=32, num_heads=2, num_layers=2, **MAKE
    )
    return comfy.model_base.WAN21, made, {}


def next_dit(config: dict) -> tuple[type, torch.nn.Module, dict]:
    """Lumina Image 2.0 or Z-Image."""
    from comfy.ldm.lumina.model import NextDiT

    config = {
        "in_channels": 16,
        "n_layers": 2,
        "n_refiner_layers": 2,
        "cap_feat_dim": 32,
        "qk_norm": True,
        **config,
    }
    return comfy.model_base.Lumina2, NextDiT(**config, **MAKE), config


ARCHITECTURES = {
    "sd3": sd3,
    "flux": lambda: flux_like({}),
    "flux2": flux2,
    "qwen_image": qwen_image,
    "wan": wan,
    "z_image": lambda: next_dit(
        {
            "dim": 256,
            "n_heads": 2,
            "n_kv_heads": 2,
            "z_image_modulation": True,
            "multiple_of": 1,
            "ffn_dim_multiplier": 8 / 3,
        }
    ),
    "lumina2": lambda: next_dit({"dim": 144, "n_heads": 3, "n_kv_heads": 1, "axes_dims": [16, 16, 16]}),
}


@cache
def model_of(family: str) -> torch.nn.Module:
    """Make what core's key map wants to see of a loaded model."""
    kind, diffusion_model, config = ARCHITECTURES[family]()
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.diffusion_model, model.model_config = diffusion_model, SimpleNamespace(unet_config=config)
    return model


heard = comfy_side.hear_warnings()
answers, tensors = {}, {}
for name, (family, file, wants_tensors) in asked["files"].items():
    heard.clear()
    try:
        model = model_of(family)
    except (TypeError, ImportError, AttributeError) as error:
        answers[name] = {"missing": str(error)}
        continue
    weights = {key: value.shape for key, value in model.state_dict().items()}
    # As comfy.sd.load_lora_for_models and ModelPatcher.add_patches do.
    loaded = comfy.lora.load_lora(
        comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(file)),
        comfy.lora.model_lora_keys_unet(model, {}),
    )
    patches: dict = {}
    for target, adapter in loaded.items():
        key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
        patches.setdefault(key, []).append((1.0, adapter, 1.0, offset, function))
    answers[name] = {
        "ignored": [m.removeprefix("lora key not loaded: ") for m in heard],
        "strange": sorted(patches.keys() - weights.keys()),
    }
    if wants_tensors:
        answers[name]["shapes"] = {key: list(shape) for key, shape in weights.items()}
        for key in patches.keys() & weights.keys():
            tensors[f"{name}|{key}"] = comfy.lora.calculate_weight(
                patches[key], torch.zeros(weights[key]), key
            )
    answers[name]["errors"] = [message for message in heard if message.startswith("ERROR")]


def tensors_of(patch: object) -> list[torch.Tensor]:
    """List the tensors of a patch: of an adapter, or of what is added or set."""
    parts = patch[1] if isinstance(patch, tuple) else patch.weights
    return [part for part in parts if isinstance(part, torch.Tensor)]


def applied(family: str, keys: dict[str, int]) -> list[str] | str:
    """Return which keys of a file, with their numbers of dimensions, end in a weight of the model.

    Where the loader stops with an error, return what it looked for.
    """
    model, heard[:] = model_of(family), []
    weights = model.state_dict().keys()
    file = {key: torch.ones([1] * dimensions) for key, dimensions in keys.items()}
    seen = comfy.lora_convert.convert_lora(dict(file))
    names = {id(tensor): key for key, tensor in file.items()}
    try:
        loaded = comfy.lora.load_lora(seen, comfy.lora.model_lora_keys_unet(model, {}))
    except KeyError as error:
        return str(error)
    ignored = {m.removeprefix("lora key not loaded: ") for m in heard}
    found = set()
    for target, patch in loaded.items():
        if (target if isinstance(target, str) else target[0]) in weights:
            found |= {names[id(tensor)] for tensor in tensors_of(patch)}
    # These become numbers as they are read.
    numbers = (".alpha", ".reshape_weight")
    whole = {
        names.get(id(tensor)) for key, tensor in seen.items() if key.endswith(numbers) and key not in ignored
    }
    return sorted(found | (whole - {None}))


for name, (family, keys) in asked["layouts"].items():
    try:
        answers[f"layout {name}"] = applied(family, keys)
    except (TypeError, ImportError, AttributeError) as error:
        answers[f"layout {name}"] = {"missing": str(error)}
answers["new"] = hasattr(comfy.utils, "z_image_to_diffusers")
if block := getattr(nodes_flux, "Flux2Scheduler", None):
    tensors["flux2 sigmas"] = block.execute(20, 768, 512).result[0]


def velocity(model: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the velocity of a loaded model."""
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    x, sigma = inputs["x"], inputs["sigma"]
    more = {name: inputs[key] for name, key in (("guidance", "guidance"), ("y", "pooled")) if key in inputs}
    denoised = model.model.apply_model(x, sigma, c_crossattn=inputs["context"], **more)
    return (x - denoised) / sigma.view(-1, *[1] * (x.ndim - 1))


def outputs(name: str, file: str, loras: dict[str, str]) -> dict[str, object]:
    """Load a model by core's loader and LoRAs of it by its block."""
    inputs = {key.partition("|")[2]: value for key, value in given.items() if key.startswith(f"{name}|")}
    model = comfy.sd.load_diffusion_model(file, {"dtype": torch.float32})
    tensors[f"output|{name}"] = velocity(model, inputs)
    said = {}
    for form, lora_name in loras.items():
        heard.clear()
        (tuned,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_name, 1.0)
        tensors[f"output|{name}|{form}"] = velocity(tuned, inputs)
        said[form] = {
            "warnings": list(heard),
            "mapped": sum(len(patches) for patches in tuned.patches.values()),
        }
    return said


with torch.no_grad():
    for name, (family, file, loras) in asked["outputs"].items():
        if not answers[f"{family}/native"].get("missing"):
            answers[f"output {name}"] = outputs(name, file, loras)
comfy_side.answer(answers, tensors)
