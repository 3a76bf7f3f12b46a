"""Run inside ComfyUI by test_comfyui.py: velocities of a transformer file, alone and with a LoRA, as
core's own loaders make them.
"""

import comfy.model_management
import comfy.sd
import comfy.utils
import comfy_side
import torch

files, given = comfy_side.given(), comfy_side.given_tensors()


def velocity(model: object) -> torch.Tensor:
    """Return the velocity of a loaded model at the given inputs."""
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    x, sigma = given["x"], given["sigma"]
    denoised = model.model.apply_model(x, sigma, c_crossattn=given["context"], y=given["pooled"])
    return (x - denoised) / sigma.view(-1, 1, 1, 1)


with torch.no_grad():
    model = comfy.sd.load_diffusion_model(files["transformer"])
    base = velocity(model)
    heard = comfy_side.hear_warnings()
    tuned_model, _ = comfy.sd.load_lora_for_models(
        model, None, comfy.utils.load_torch_file(files["lora"]), 1.0, 0.0
    )
    tuned = velocity(tuned_model)
comfy_side.answer({"patched": len(tuned_model.patches), "warnings": heard}, {"base": base, "tuned": tuned})
