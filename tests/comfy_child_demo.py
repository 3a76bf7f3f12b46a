"""Run inside ComfyUI by test_demo.py: the bundled model through ordinary graphs of core nodes."""

import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.taesd.taesd
import comfy_side
import torch
from comfy_graphs import block, core

given, tensors = comfy_side.given(), comfy_side.given_tensors()
loader = {"1": block("TinyDemoLoader")}
texts = {
    f"text{i}": core("CLIPTextEncode", clip=["1", 1], text=text) for i, text in enumerate(given["prompts"])
}
features = comfy_side.run_prompt({**loader, **texts}, {name: (name, 0) for name in texts})
assert features.ok, features
conds = [features.values[name][0] for name in texts]

sampling = {"steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
wires = {"positive": ["drawn", 0], "negative": ["drawn", 0], "latent_image": ["2", 0]}
words = dict.fromkeys(("clip_l", "clip_g", "t5xxl"), given["drawn"])
strengths = {"strength_model": 1.0, "strength_clip": 1.0}
tiling = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
drawing = {
    **loader,
    "drawn": core("CLIPTextEncode", clip=["1", 1], text=given["drawn"]),
    "2": core("EmptySD3LatentImage", width=64, height=64, batch_size=3),
    "3": core("KSampler", model=["1", 0], seed=given["seed"], **wires, **sampling),
    "4": core("VAEDecode", samples=["3", 0], vae=["1", 2]),
    "5": core("VAEEncode", pixels=["4", 0], vae=["1", 2]),
    "6": core("VAEDecodeTiled", samples=["3", 0], vae=["1", 2], **tiling),
    "7": core("CLIPSetLastLayer", clip=["1", 1], stop_at_clip_layer=-1),
    "8": core("CLIPTextEncode", clip=["7", 0], text="(a red circle:1.2)"),
    "9": core("CLIPTextEncodeSD3", clip=["1", 1], **words, empty_padding="none"),
    "10": core("LoraLoader", model=["1", 0], clip=["1", 1], lora_name="a.safetensors", **strengths),
    "11": core("CLIPTextEncode", clip=["10", 1], text=given["drawn"]),
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
