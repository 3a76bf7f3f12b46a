"""The gradient of a VAE's decoder, which core runs for inference only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors

from ..inputs.checks import blamed
from .autograd import gradients, ordinary_weights
from .comfy_policy import resident

NO_GRADIENT = "vae: its decoder has no gradient; connect the model's ordinary VAE, in 16 or 32 bits"
ROOM = 4  # times what decoding takes: the decoder's activations are kept


def latent_gradient(
    model: Any, vae: Any, latents: Tensor, of_image: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return ∂/∂latents [1, …], in model space, of what has the gradient `of_image(image)`; and the image.

    The image [1, H, W, 3] and its gradient are float32 on the CPU.
    """
    network, patcher = getattr(vae, "first_stage_model", None), getattr(vae, "patcher", None)
    if not isinstance(network, torch.nn.Module) or patcher is None or not hasattr(vae, "process_output"):
        raise ValueError(NO_GRADIENT)
    patcher = resident(patcher, "vae") if getattr(patcher, "is_dynamic", bool)() else patcher
    network, shape = patcher.model, latents.shape
    room = ROOM * vae.memory_used_decode(shape, vae.vae_dtype)
    comfy.model_management.load_models_gpu([patcher], memory_required=room, force_full_load=True)
    try:
        with gradients(), ordinary_weights(network), allow_mutation_on_saved_tensors():
            start = latents.detach().clone().to(vae.device, torch.float32).requires_grad_()
            with blamed("vae: its decoder cannot be differentiated; connect the model's ordinary VAE"):
                image = decoded(model, vae, network, start)
            wanted = of_image(image.detach().cpu())
            scale = wanted.square().mean().sqrt()
            if not scale > 0 or not scale.isfinite():
                # Nothing to go back with; the caller sees to what is not finite.
                return torch.full(shape, scale.item()), image.detach().cpu()
            with blamed(NO_GRADIENT):
                (made,) = torch.autograd.grad(image, start, (wanted / scale).to(image))
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            "vae: the gradient of its decoder takes more memory than there is; use a smaller latent, or a "
            "tiny VAE (TAESD)"
        ) from error
    return made.cpu() * scale, image.detach().cpu()


def decoded(model: Any, vae: Any, network: torch.nn.Module, latents: Tensor) -> Tensor:
    """Decode latents [1, …] in model space as core does, without inference mode: [1, H, W, 3] in [0, 1]."""
    form = copy.copy(model.model.latent_format)
    for name, value in vars(form).items():
        if isinstance(value, Tensor):
            # Autograd refuses tensors that were made in inference mode.
            setattr(form, name, value.clone())
    raw = form.process_out(latents)
    raw = raw[:, :, 0] if getattr(vae, "latent_dim", 2) == 2 and raw.ndim == 5 else raw
    made = network.decode(raw.to(vae.vae_dtype)).float()
    # Newer cores write into what they are given.
    images = vae.process_output(made.clone()).movedim(1, -1)
    images = images[:, 0] if images.ndim == 5 else images
    if images.ndim != 4 or images.shape[-1] < 3:
        raise ValueError("vae: it makes no single RGB picture; connect the VAE that belongs to the model")
    return images[..., :3]
