"""Runs inside a ComfyUI, in its root: velocities of a transformer file, alone and with a LoRA, as core's own loaders make them.

python comfy_child.py TRANSFORMER LORA INPUTS OUTPUT    (all safetensors; inputs: x, sigma, context, pooled)
"""

import json
import logging
import os
import sys


class Warnings(logging.Handler):
    """Collect what core only says in its log, such as a LoRA key that it does not take."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message."""
        self.messages.append(record.getMessage())


def start_core() -> None:
    """Put ComfyUI's root first on the path and have core read its command line, which must happen before any other import of it."""
    sys.path[0] = os.getcwd()
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


def main(transformer: str, lora: str, inputs: str, output: str) -> None:
    """Write the base and the tuned velocity, with the number of patched weights and core's warnings as metadata."""
    start_core()
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import torch
    from safetensors.torch import load_file, save_file

    given = load_file(inputs)

    def velocity(model: object) -> torch.Tensor:
        comfy.model_management.load_models_gpu([model], force_patch_weights=True)
        x, sigma = given["x"], given["sigma"]
        denoised = model.model.apply_model(x, sigma, c_crossattn=given["context"], y=given["pooled"])
        return (x - denoised) / sigma.view(-1, 1, 1, 1)

    with torch.no_grad():
        model = comfy.sd.load_diffusion_model(transformer)
        base = velocity(model)
        warnings = watch_log()
        tuned_model, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(lora), 1.0, 0.0)
        tuned = velocity(tuned_model)
    notes = {"patched": str(len(tuned_model.patches)), "warnings": json.dumps(warnings.messages)}
    save_file({"base": base.contiguous(), "tuned": tuned.contiguous()}, output, metadata=notes)


def watch_log() -> Warnings:
    """Listen to core's log from here on."""
    handler = Warnings()
    logging.getLogger().addHandler(handler)
    return handler


if __name__ == "__main__":
    main(*sys.argv[1:])
