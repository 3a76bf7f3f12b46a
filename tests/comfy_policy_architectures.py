"""Script of test_nodes_policy.py, inside ComfyUI: tiny models of other architectures, random weights,
through core's own loader.
"""

from __future__ import annotations

import json
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.lightricks.model
import comfy.ldm.wan.model
import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy_side
import torch
from comfy_policy_tools import (
    changes,
    checkpoint_error,
    core_node,
    difference_error,
    noise,
    policy_module,
    portrait,
    sampling_module,
    trained_adapter,
)
from torch import nn

WIDTH = 32


def flux() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    """Make FLUX: two double and two single blocks of one head."""
    network = comfy.ldm.flux.model.Flux(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        vec_in_dim=WIDTH,
        context_in_dim=WIDTH,
        hidden_size=128,
        mlp_ratio=4.0,
        num_heads=1,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )
    return network, {}, (16, 8, 8)


def wan() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    """Make Wan 2.1: two blocks of one head."""
    config = {"text_dim": WIDTH, "text_len": 8}
    network = comfy.ldm.wan.model.WanModel(
        dim=128,
        ffn_dim=256,
        num_heads=1,
        num_layers=2,
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        **config,
    )
    return network, config, (16, 1, 8, 8)


def ltxv() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    """Make LTXV, which edits activations in place: two blocks of two heads."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": WIDTH,
        "num_layers": 2,
    }
    network = comfy.ldm.lightricks.model.LTXVModel(
        operations=comfy.ops.disable_weight_init, dtype=torch.float32, **config
    )
    return network, config, (128, 1, 4, 4)


def load(network: nn.Module, config: dict[str, Any], name: str) -> Any:
    """Give the network random weights and load them as a file would be."""
    weights = {}
    for key, tensor in network.state_dict().items():
        width = tensor.shape[-1] if tensor.ndim > 1 else 1
        weights[key] = noise(tensor.shape, name, key) * (0.7 / width**0.5 if tensor.ndim > 1 else 0.1) + (
            "norm" in key and tensor.ndim == 1
        )
    with torch.inference_mode():
        metadata = {"config": json.dumps({"transformer": config})} if config else None
        return comfy.sd.load_diffusion_model_state_dict(
            {key: value.clone() for key, value in weights.items()}, metadata=metadata
        )


def study(name: str, make: Any) -> dict[str, Any]:
    """Train and roll out on one architecture."""
    network, config, shape = make()
    model = load(network, config, name)
    mask = {"attention_mask": torch.ones(1, 8, dtype=torch.long)} if name == "ltxv" else {}
    context = [
        [noise((1, 8, WIDTH), name, row), {"pooled_output": noise((1, WIDTH), name, "pooled", row), **mask}]
        for row in ("a", "b")
    ]
    conds = [{"positive": [context[0]]}, {"positive": [context[1]]}, {"positive": [context[0]]}]
    x, sigma, cotangent = (
        noise((3, *shape), name, "x"),
        torch.tensor([1.0, 0.7, 0.3]),
        noise((3, *shape), name, "v"),
    )
    before = portrait(model)

    def policy(checkpoint: bool) -> Any:
        guider = comfy.samplers.CFGGuider(model)
        return policy_module.GraphPolicy(
            guider, trained_adapter(model, "attention+feed_forward"), checkpoint=checkpoint
        )

    trained = policy(False)
    with trained.inference():
        together = trained.velocity(x, sigma, conds)
        alone = torch.cat(
            [trained.velocity(x[i : i + 1], sigma[i : i + 1], conds[i : i + 1]) for i in range(3)]
        )
    found = {
        "modules": len(trained.pairs()),
        "batch": ((together - alone).abs().max() / alone.abs().max()).item(),
        "difference": difference_error(trained, x, sigma, conds, cotangent),
        "checkpoint": checkpoint_error(policy, x, sigma, conds, cotangent),
        "anchor": anchor_equals_euler(model, context[0], shape),
    }
    return {**found, "changed": changes(before, portrait(model))}


def anchor_equals_euler(model: Any, context: Any, shape: tuple[int, ...]) -> bool:
    """Compare a rollout's anchor with core's Euler sampler, bit for bit."""
    guider, start = core_node("BasicGuider", model, [context]), core_node("RandomNoise", 3)
    latent, sigmas = {"samples": torch.zeros(1, *shape)}, torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
    euler = comfy.samplers.sampler_object("euler")
    image = core_node("SamplerCustomAdvanced", start, guider, euler, sigmas, latent)["samples"]
    rolled = sampling_module.RolloutBlock.execute(
        guider, start, sigmas, latent, "1", 2, "1", "flow_sde", 0.7, "exact", False, 1
    )
    return torch.equal(image, rolled.result[2]["samples"]) and bool(
        rolled.result[1]["samples"].isfinite().all()
    )


# Its bar belongs to the prompt that runs, and none does.
comfy.utils.set_progress_bar_global_hook(None)
with torch.inference_mode():
    comfy_side.answer(
        {name: study(name, make) for name, make in {"flux": flux, "wan": wan, "ltxv": ltxv}.items()}
    )
