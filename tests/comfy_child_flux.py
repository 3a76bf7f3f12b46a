"""Run inside ComfyUI by test_flux.py: velocities of a FLUX file, alone, with a picture to edit, and
through LoraLoaderModelOnly; and a search with it.
"""

import comfy.model_management
import comfy.sd
import comfy_graphs
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


def found_and_plain() -> tuple[torch.Tensor, torch.Tensor]:
    """Search with as many forwards as an image takes, and sample; return both latents."""
    given_text = [[given["context"][:1], {"pooled_output": given["pooled"][:1]}]]
    graph = {
        **comfy_graphs.drawing("", steps=4),
        "text": comfy_graphs.thing("text", [given_text]),
        "flux": comfy_graphs.thing("flux", model),
        "guider": comfy_graphs.core("BasicGuider", model=["flux", 0], conditioning=["text", 0]),
        "reward": comfy_graphs.reward("colourfulness"),
        "euler": comfy_graphs.core("KSamplerSelect", sampler_name="euler"),
        "block": comfy_graphs.block("SearchSampler", budget=4),
    }
    wires = {name: [name, 0] for name in ("noise", "guider", "sigmas")}
    graph["plain"] = comfy_graphs.core(
        "SamplerCustomAdvanced", sampler=["euler", 0], latent_image=["empty", 0], **wires
    )
    values = comfy_graphs.run(graph, found=("block", 0), plain=("plain", 0)).values
    return values["found"]["samples"], values["plain"]["samples"]


searched, plain = found_and_plain()
mapped = sum(len(patches) for patches in tuned_model.patches.values())
comfy_side.answer(
    {"mapped": mapped, "warnings": heard},
    {"base": base, "edited": edited, "tuned": tuned, "searched": searched, "plain": plain},
)
