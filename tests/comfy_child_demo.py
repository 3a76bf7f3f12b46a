"""Run inside ComfyUI by test_demo.py: the bundled model through ordinary graphs of core nodes."""

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy_side
import torch

given, tensors = comfy_side.given(), comfy_side.given_tensors()
loader = {"1": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}}}


def encode(number: int, text: str) -> dict[str, dict]:
    """Return a text encoding node."""
    return {f"text{number}": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}}


texts: dict[str, dict] = {}
for number, text in enumerate(given["prompts"]):
    texts |= encode(number, text)
features = comfy_side.run_prompt({**loader, **texts}, {name: (name, 0) for name in texts})
assert features.ok, features
conds = [features.values[name][0] for name in texts]

sampling = {
    "seed": given["seed"],
    "steps": 8,
    "cfg": 1.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}
words = dict.fromkeys(("clip_l", "clip_g", "t5xxl"), given["drawn"])
strengths = {"strength_model": 1.0, "strength_clip": 1.0}
tiling = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
drawing = {
    **loader,
    **encode(0, given["drawn"]),
    "2": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 3}},
    "3": {
        "class_type": "KSampler",
        "inputs": {
            **sampling,
            "model": ["1", 0],
            "positive": ["text0", 0],
            "negative": ["text0", 0],
            "latent_image": ["2", 0],
        },
    },
    "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
    "5": {"class_type": "VAEEncode", "inputs": {"pixels": ["4", 0], "vae": ["1", 2]}},
    "6": {"class_type": "VAEDecodeTiled", "inputs": {"samples": ["3", 0], "vae": ["1", 2], **tiling}},
    "7": {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["1", 1], "stop_at_clip_layer": -1}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["7", 0], "text": "(a red circle:1.2)"}},
    "9": {"class_type": "CLIPTextEncodeSD3", "inputs": {"clip": ["1", 1], **words, "empty_padding": "none"}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"model": ["1", 0], "clip": ["1", 1], "lora_name": "a.safetensors", **strengths},
    },
    "11": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["10", 1], "text": given["drawn"]}},
}
want = {"latent": ("3", 0), "image": ("4", 0), "encoded": ("5", 0), "tiled": ("6", 0), "weighted": ("8", 0)}
more = {"sd3": ("9", 0), "lora": ("11", 0)}
drawn = comfy_side.run_prompt(drawing, {**want, **more, "model": ("1", 0), "vae": ("1", 2)})
assert drawn.ok, drawn

model, vae, wire = drawn.values["model"], drawn.values["vae"], comfy.latent_formats.SD3()
comfy.model_management.unload_all_models()
again = comfy_side.run_prompt(drawing, {"image": ("4", 0)})
comfy_side.answer(
    {
        "shift": model.model.model_sampling.shift,
        "types": [type(drawn.values["vae"]) is comfy.sd.VAE, type(model).__module__],
        "core_taesd_width": comfy.taesd.taesd.TAESD(latent_channels=16).taesd_decoder[1].weight.shape[0],
        "repeats": bool(torch.equal(again.values["image"], drawn.values["image"])),
        "same_text": [bool(torch.equal(drawn.values[name][0][0], conds[0][0])) for name in more],
        "weighted_shape": list(drawn.values["weighted"][0][0].shape),
    },
    {
        "features": torch.cat([cond[0] for cond in conds]),
        "pooled": torch.cat([cond[1]["pooled_output"] for cond in conds]),
        "latent": wire.process_in(drawn.values["latent"]["samples"]),
        "image": drawn.values["image"],
        "tiled": drawn.values["tiled"],
        "encoded": wire.process_in(drawn.values["encoded"]["samples"]),
        "redecoded": vae.decode(wire.process_out(tensors["latent"])),
    },
)
