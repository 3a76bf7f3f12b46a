"""Run inside ComfyUI by test_flux.py: velocities of a FLUX file, alone, with a picture to edit, and
through LoraLoaderModelOnly.
"""

import logging

import comfy.model_management
import comfy.sd
import comfy_side
import torch

import nodes

files, given = comfy_side.given(), comfy_side.given_tensors()


class Warnings(logging.Handler):
    """Collect what core only says in its log, such as a LoRA key that it does not take."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


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
    heard = Warnings()
    logging.getLogger().addHandler(heard)
    (tuned_model,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, files["lora"], 1.0)
    tuned = velocity(tuned_model)
mapped = sum(len(patches) for patches in tuned_model.patches.values())
comfy_side.answer(
    {"mapped": mapped, "warnings": heard.messages}, {"base": base, "edited": edited, "tuned": tuned}
)
