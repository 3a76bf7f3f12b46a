"""Run inside ComfyUI by test_comfyui.py: velocities of a transformer file, alone and with a LoRA, as
core's own loaders make them.
"""

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import comfy_side
import torch

files, given = comfy_side.given(), comfy_side.given_tensors()


class Warnings(logging.Handler):
    """Collect what core only says in its log, such as a LoRA key that it does not take."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


def velocity(model: object) -> torch.Tensor:
    """Return the velocity of a loaded model at the given inputs."""
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    x, sigma = given["x"], given["sigma"]
    denoised = model.model.apply_model(x, sigma, c_crossattn=given["context"], y=given["pooled"])
    return (x - denoised) / sigma.view(-1, 1, 1, 1)


with torch.no_grad():
    model = comfy.sd.load_diffusion_model(files["transformer"])
    base = velocity(model)
    heard = Warnings()
    logging.getLogger().addHandler(heard)
    tuned_model, _ = comfy.sd.load_lora_for_models(
        model, None, comfy.utils.load_torch_file(files["lora"]), 1.0, 0.0
    )
    tuned = velocity(tuned_model)
comfy_side.answer(
    {"patched": len(tuned_model.patches), "warnings": heard.messages}, {"base": base, "tuned": tuned}
)
