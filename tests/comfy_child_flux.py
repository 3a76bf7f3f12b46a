"""Run inside ComfyUI by test_flux.py: velocities of a FLUX file, alone, with a picture to edit, and
through LoraLoaderModelOnly.
"""

import comfy.model_management
import comfy.sd
import comfy_side
import torch

import nodes

files, given = comfy_side.given(), comfy_side.given_tensors()


def velocity(model: object, pictures: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Return the velocity of a loaded model at the given inputs, with latents of pictures as
    ReferenceLatent gives them.
    """
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    x, sigma = given["x"], given["sigma"]
    guidance = torch.full_like(sigma, 3.5)
    conds = {"c_crossattn": given["context"], "y": given["pooled"], "guidance": guidance}
    denoised = model.model.apply_model(x, sigma, **conds, **({"ref_latents": pictures} if pictures else {}))
    return (x - denoised) / sigma.view(-1, 1, 1, 1)


with torch.no_grad():
    model = comfy.sd.load_diffusion_model(files["transformer"], {"dtype": torch.float32})
    base, edited = velocity(model), velocity(model, [given["picture"]])
    heard = comfy_side.hear_warnings()
    (tuned_model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, files["lora"], 1.0)
    tuned = velocity(tuned_model)
mapped = sum(len(patches) for patches in tuned_model.patches.values())
comfy_side.answer({"mapped": mapped, "warnings": heard}, {"base": base, "edited": edited, "tuned": tuned})
