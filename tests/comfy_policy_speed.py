"""Script of test_nodes_speed.py, inside ComfyUI: what makes rollouts fast changes no number, and leaves
nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import comfy.ldm.modules.diffusionmodules.mmdit as mmdit
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy_side
import torch
from comfy_policy_tools import changes, noise, policy_module, portrait, trained_adapter
from torch import Tensor, nn

merged_module = comfy_side.pack_module("nodes.model.merged_weights")
decoder_module = comfy_side.pack_module("nodes.model.tiny_decoder")
forward_module = comfy_side.pack_module("comfy_g2rpo.speed.joint_forward")
DATA = comfy_side.given()
SIGMA = torch.tensor([1.0, 0.8, 0.45, 0.1])
WIDE, POOLED = 24, 20


def is_not_plain(*given: object) -> bool:
    """Stand in for a question whose answer is no."""
    return False


@contextmanager
def replaced(*changed: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of the pack's modules, and set them back."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changed]
    try:
        for module, name, value in changed:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def by_core() -> Any:
    """Return a context in which no model is taken apart."""
    return replaced((policy_module, "is_plain", is_not_plain))


def without_memory() -> Any:
    """Return a context in which no byte is free, but for core's attention, which does not run on nothing."""
    own = comfy.model_management.get_free_memory

    def nothing(device: Any = None, torch_free_too: bool = False) -> Any:
        return own(device, torch_free_too) if torch_free_too else 0

    return replaced((comfy.model_management, "get_free_memory", nothing))


def random_sd3() -> Any:
    """Load a Stable Diffusion 3.5 of two blocks, one with an attention of the image's own, normed q and k."""
    network = mmdit.OpenAISignatureMMDITWrapper(
        input_size=None,
        in_channels=16,
        depth=2,
        num_patches=64,
        pos_embed_max_size=8,
        adm_in_channels=POOLED,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": WIDE, "out_features": 128},
        },
        qk_norm="rms",
        x_block_self_attn_layers=[0],
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
    )
    weights = {}
    for key, tensor in network.state_dict().items():
        width = tensor.shape[-1] if tensor.ndim > 1 else 1
        weights[key] = noise(tensor.shape, key) * (0.7 / width**0.5 if tensor.ndim > 1 else 0.1)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(
            {key: value.clone() for key, value in weights.items()}
        )


def rows_for(model: Any, lengths: tuple[int, ...] = (7, 7, 7, 7)) -> list[dict[str, Any]]:
    """Make four rows of conditioning with a negative of their own."""
    network = model.model.diffusion_model
    wide, pooled = network.context_embedder.in_features, network.y_embedder.mlp[0].in_features

    def entry(row: int, kind: str) -> list[Any]:
        tokens = noise((1, lengths[row], wide), row, kind)
        return [tokens, {"pooled_output": noise((1, pooled), row, kind, "pooled")}]

    # The third prompt is the first one again.
    return [{kind: [entry(row, kind)] for kind in ("positive", "negative")} for row in (0, 1, 0, 3)]


def policy_of(model: Any, adapter: Any, cfg: float = 1.0) -> Any:
    """Make a policy."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_cfg(cfg)
    return policy_module.GraphPolicy(guider, adapter)


def drawn(policy: Any, x: Tensor, rows: list[Any], times: int = 2) -> tuple[Tensor, dict[str, Any]]:
    """Return the last of some velocities in one inference session, and how it was computed."""
    with policy.inference():
        for _ in range(times):
            made = policy.velocity(x, SIGMA, rows)
        how = {"apart": policy._session.apart is not None, "merged": len(policy._merged.kept)}
    return made, how


def error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return ((one - other).abs().max() / other.abs().max()).item()


def ways(model: Any, cfg: float, size: tuple[int, int], lengths: tuple[int, ...]) -> dict[str, Any]:
    """Compute velocities in all three ways, and by core with the LoRA loaded."""
    x, rows, adapter = noise((4, 16, *size), "x"), rows_for(model, lengths), trained_adapter(model)
    apart, how = drawn(policy_of(model, adapter, cfg), x, rows)
    with by_core():
        merged, how_merged = drawn(policy_of(model, adapter, cfg), x, rows)
        called, how_called = drawn(policy_of(model, adapter, cfg), x, rows, times=1)
        with without_memory():
            small, how_small = drawn(policy_of(model, adapter, cfg), x, rows)
    with without_memory():
        tight, how_tight = drawn(policy_of(model, adapter, cfg), x, rows)
    loaded, _ = drawn(policy_of(policy_module.with_adapter(model, adapter), None, cfg), x, rows, times=1)
    return {
        "apart": error(apart, loaded),
        "merged": error(merged, loaded),
        "same": torch.equal(merged, called),
        # Core goes through the halves of guidance one by one here.
        "small": max(error(small, loaded), error(tight, loaded)),
        "how": [how, how_merged, how_called, how_small, how_tight],
        "modules": len(adapter.pairs),
    }


def moving(model: Any) -> dict[str, Any]:
    """Change the LoRA, and switch it off, inside one session; return the error of every state by way."""
    x, rows = noise((4, 16, 8, 8), "x"), rows_for(model)
    adapters = [trained_adapter(model, size=size) for size in (0.02, 0.1)]
    exact = [
        drawn(policy_of(policy_module.with_adapter(model, one), None), x, rows, 1)[0] for one in adapters
    ]
    base = drawn(policy_of(model, None), x, rows, 1)[0]

    def errors() -> list[float]:
        policy, found = policy_of(model, adapters[0]), []
        with policy.inference():
            for _ in range(2):
                found.append(error(policy.velocity(x, SIGMA, rows), exact[0]))
            policy.set_adapter(adapters[1])
            found.append(error(policy.velocity(x, SIGMA, rows), exact[1]))
            with policy.reference():
                found.append(error(policy.velocity(x, SIGMA, rows), base))
            found.append(error(policy.velocity(x, SIGMA, rows), exact[1]))
            found.append(error(policy.velocity(x[:2], SIGMA[:2], rows[:2]), exact[1][:2]))
        return found

    apart = errors()
    with by_core():
        return {"apart": apart, "merged": errors(), "effect": error(exact[0], exact[1])}


class Stop(Exception):
    """An interrupt."""


def stopping(*given: object, **more: object) -> None:
    """Stop."""
    raise Stop


def left_behind(model: Any) -> dict[str, list[str]]:
    """Stop sessions in every way, also in the middle of a forward; name what is left on the MODEL."""
    comfy.model_management.load_models_gpu([model])
    before, adapter = portrait(model), trained_adapter(model)
    x, rows = noise((4, 16, 8, 8), "x"), rows_for(model)

    def stopped(where: tuple[Any, str]) -> None:
        with suppress(Stop), (policy := policy_of(model, adapter)).inference():
            for _ in range(2):
                policy.velocity(x, SIGMA, rows)
            with replaced((*where, stopping)):
                policy.velocity(x, SIGMA, rows)
            raise AssertionError("it was not stopped")

    def finished() -> None:
        drawn(policy_of(model, adapter), x, rows, 3)

    def growing() -> None:
        with (policy := policy_of(model, adapter)).inference():
            for count in (1, 2, 2, 4, 4):
                policy.velocity(x[:count], SIGMA[:count], rows[:count])

    found = {}
    for name, work in {
        "apart": finished,
        "apart, growing": growing,
        "apart, stopped": lambda: stopped((forward_module, "modulate")),
    }.items():
        work()
        found[name] = changes(before, portrait(model))
    with by_core():
        for name, work in {
            "merged": finished,
            "merged, growing": growing,
            "merged, stopped in a block": lambda: stopped((mmdit, "modulate")),
            "merged, stopped while merging": lambda: stopped_while_merging(model, adapter, x, rows),
        }.items():
            work()
            found[name] = changes(before, portrait(model))
    return found


def stopped_while_merging(model: Any, adapter: Any, x: Tensor, rows: list[Any]) -> None:
    """Stop in the middle of the layers."""
    policy = policy_of(model, adapter)
    last = list(policy._deltas.values())[-1]
    with suppress(Stop), policy.inference():
        policy.velocity(x, SIGMA, rows)
        last.added = stopping
        policy.velocity(x, SIGMA, rows)
        raise AssertionError("it was not stopped")


def scaled(network: Any) -> Callable[..., Any]:
    """Return what stands in for a network's forward."""
    own = network.forward
    return lambda *given, **more: 0.5 * own(*given, **more)


def others(model: Any) -> dict[str, dict[str, Any]]:
    """Put others' things on a MODEL; compare the policy's velocity with core's own."""
    x, rows, adapter = noise((4, 16, 8, 8), "x"), rows_for(model), trained_adapter(model)
    plain = drawn(policy_of(policy_module.with_adapter(model, adapter), None, 3.0), x, rows, 1)[0]
    lora = trained_adapter(model, "attention+feed_forward", 0.05)
    network = model.model.diffusion_model

    def block(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        made = own["original_block"](given)
        return {**made, "img": 0.9 * made["img"]}

    def attention(function: Callable[..., Tensor], *given: Any, **more: Any) -> Tensor:
        return 0.9 * function(*given, **more)

    wrapped = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    put: dict[str, Callable[[Any], Any]] = {
        "a LoRA": lambda clone: policy_module.with_adapter(clone, lora),
        "a merge": lambda clone: merge(clone),
        "a shift": lambda clone: shifted(clone),
        "model_function_wrapper": lambda clone: clone.set_model_unet_function_wrapper(
            lambda run, given: 0.9 * run(given["input"], given["timestep"], **given["c"])
        ),
        "sampler_cfg_function": lambda clone: clone.set_model_sampler_cfg_function(
            lambda given: given["cond"] * 0.9
        ),
        "post_cfg_function": lambda clone: clone.set_model_sampler_post_cfg_function(
            lambda given: given["denoised"] * 0.9
        ),
        "a replaced block": lambda clone: clone.set_model_patch_replace(block, "dit", "double_block", 0),
        "attention": lambda clone: clone.model_options["transformer_options"].__setitem__(
            "optimized_attention_override", attention
        ),
        "a wrapper": lambda clone: clone.add_wrapper(
            wrapped, lambda run, *given, **more: 0.9 * run(*given, **more)
        ),
        "another forward": lambda clone: clone.add_object_patch("diffusion_model.forward", scaled(network)),
    }
    found = {}
    for name, change in put.items():
        clone = model.clone()
        clone = change(clone) or clone
        ours, how = drawn(policy_of(clone, adapter, 3.0), x, rows)
        core, _ = drawn(policy_of(policy_module.with_adapter(clone, adapter), None, 3.0), x, rows, 1)
        found[name] = {"error": error(ours, core), "effect": error(core, plain), **how}
    return found | {"a hook": hooked(model, adapter, x, rows, plain)}


def hooked(model: Any, adapter: Any, x: Tensor, rows: list[Any], plain: Tensor) -> dict[str, Any]:
    """Put a hook of PyTorch's on one layer."""
    layer = model.model.diffusion_model.joint_blocks[0].x_block.mlp.fc1
    handle = layer.register_forward_hook(lambda module, given, made: 0.9 * made)
    try:
        ours, how = drawn(policy_of(model, adapter, 3.0), x, rows)
        core, _ = drawn(policy_of(policy_module.with_adapter(model, adapter), None, 3.0), x, rows, 1)
    finally:
        handle.remove()
    return {"error": error(ours, core), "effect": error(core, plain), **how}


def merge(clone: Any) -> None:
    """Mix another model's weights in, as core's merges do."""
    keys = [key for key in clone.model_state_dict() if key.endswith("attn.qkv.weight")]
    clone.add_patches({key: (0.1 * noise(clone.model.state_dict()[key].shape, key),) for key in keys})


def shifted(clone: Any) -> Any:
    """Set another time shift and scale of time, as core's ModelSamplingSD3 does."""
    block = comfy_side.node_class("ModelSamplingSD3")()
    return block.patch(clone, 5.0, 900.0)[0]


def fewer_bits(path: str) -> dict[str, dict[str, Any]]:
    """Roll out on weights in fewer bits: merged once and added at every call."""
    found = {}
    for name, dtype in {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}.items():
        model = comfy.sd.load_diffusion_model(path, model_options={"dtype": dtype})
        x, rows = noise((4, 16, 8, 8), "x"), rows_for(model)
        policy = policy_of(model, trained_adapter(model))
        many, how = drawn(policy, x, rows)
        with without_memory():
            called, _ = drawn(policy, x, rows)
        found[name] = {"same": torch.equal(many, called), **how, "modules": len(policy.pairs())}
    return found


def later_cores(model: Any, clip: Any, vae: Any) -> dict[str, dict[str, Any]]:
    """Let our forward and our decoder do what core does not do."""
    x, rows, adapter = noise((4, 16, 8, 8), "x"), rows_for(model), trained_adapter(model)
    loaded, _ = drawn(policy_of(policy_module.with_adapter(model, adapter), None), x, rows, 1)
    kept = forward_module.Ends
    changed = {
        "another norm": (forward_module, "EPS", 0.5),
        "a lost part": (forward_module.JointForward, "prepare", None),
        "no number": (kept, "side", 3),
        "another attention": (forward_module, "attend", lambda q, k, v: q.transpose(1, 2)),
    }
    found = {}
    for name, change in changed.items():
        with replaced(change):
            made, how = drawn(policy_of(model, adapter), x, rows)
        found[name] = {"error": error(made, loaded), **how}
    policy = policy_module.text_policy(model, clip, vae, 1.0, "", adapter)
    pictures = vae.decode(model.model.process_latent_out(x))
    found["decoder"] = {"error": error(policy.decode(x), pictures), "folded": policy._folded is not None}
    own = decoder_module.FoldedDecoder.__call__
    for name, call in {
        "another decoder": lambda self, latents: 0.5 * own(self, latents),
        "another shape": lambda self, latents: own(self, latents)[..., :3],
        "no decoder": lambda self, latents: latents.nothing,
    }.items():
        policy = policy_module.text_policy(model, clip, vae, 1.0, "", adapter)
        with replaced((decoder_module.FoldedDecoder, "__call__", call)):
            made = policy.decode(x)
        found[name] = {"error": error(made, pictures), "folded": policy._folded is not None}
    return found


def decoding(vae: Any) -> dict[str, Any]:
    """Decode by the folded decoder and by core."""
    latents = noise((3, 16, 8, 12), "latents")
    folded = decoder_module.tiny_decoder(vae)
    raw = {"tiny": error(folded(latents), vae.decode(latents)), "fits": decoder_module.fits(vae, latents)}
    with without_memory():
        raw["fits nothing"] = decoder_module.fits(vae, latents)
    wide = comfy.sd.VAE(sd=taesd_weights(), dtype=torch.float32)
    raw["core's size"] = error(decoder_module.tiny_decoder(wide)(latents), wide.decode(latents))
    handle = wide.first_stage_model.taesd_decoder[3].register_forward_hook(lambda *given: None)
    raw["hooked"] = decoder_module.tiny_decoder(wide) is None
    handle.remove()
    raw["low precision"] = decoder_module.tiny_decoder(comfy.sd.VAE(sd=taesd_weights(), dtype=torch.bfloat16))
    raw["no VAE"] = decoder_module.tiny_decoder(nn.Identity())
    return raw


def taesd_weights() -> dict[str, Tensor]:
    """Make the weights of a tiny autoencoder of core's own size."""
    network = comfy.taesd.taesd.TAESD(latent_channels=16)
    made = {}
    for key, tensor in network.state_dict().items():
        size = 0.7 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.05
        made[key] = size * noise(tensor.shape, key) if tensor.ndim else tensor
    return made


def main() -> None:
    """Do it all, in the executor's mode, and reply."""
    with torch.inference_mode():
        model, clip, vae = comfy_side.node_class("G2RPO_TinyDemoLoader").execute().result
        larger = random_sd3()
        comfy_side.answer(
            {
                "ways": {
                    "tiny": ways(model, 1.0, (8, 8), (7, 7, 7, 7)),
                    "guided": ways(model, 3.0, (8, 12), (7, 7, 7, 7)),
                    "prompts of two lengths": ways(larger, 3.0, (6, 8), (7, 9, 7, 9)),
                    "two attentions": ways(larger, 1.0, (12, 4), (5, 5, 5, 5)),
                },
                "moving": {"tiny": moving(model), "larger": moving(larger)},
                "left behind": {"tiny": left_behind(model), "larger": left_behind(larger)},
                "others": others(larger),
                "fewer bits": fewer_bits(DATA["transformer"]),
                "decoding": decoding(vae),
                "later cores": later_cores(model, clip, vae),
            }
        )


main()
