"""Script of test_nodes_policy.py, inside ComfyUI: the bundled model on the wire, everything that the tests
ask about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy_side
import folder_paths
import torch
from comfy_graphs import WIRES, block, core, drawing, outputs
from comfy_policy_tools import (
    changes,
    checkpoint_error,
    core_node,
    difference_error,
    gradient,
    policy_module,
    portrait,
    rollout_module,
    sampling_module,
    trained_adapter,
)
from torch import Tensor

plan_module = comfy_side.pack_module("comfy_g2rpo.plan")
schedule_module = comfy_side.pack_module("comfy_g2rpo.schedule")
update_module = comfy_side.pack_module("comfy_g2rpo.update")
lora_module = comfy_side.pack_module("comfy_g2rpo.lora")
widgets_module = comfy_side.pack_module("nodes.inputs.widgets")

GIVEN, DATA = comfy_side.given_tensors(), comfy_side.given()
X, SIGMA, COTANGENT = GIVEN["x"], GIVEN["sigma"], GIVEN["cotangent"]
ROWS = [
    {"positive": [[GIVEN["tokens"][i : i + 1], {"pooled_output": GIVEN["pooled"][i : i + 1]}]]}
    for i in range(len(X))
]
BLANK = [[GIVEN["blank_tokens"], {"pooled_output": GIVEN["blank_pooled"]}]]

BRANCH = {"branch_step": 2, "branch": 4, "kernel": "cps"}
TREE = {
    "branch_steps": "0,2",
    "group_size": 3,
    "granularities": "1,2",
    "kernel": "cps",
    "eta": 0.6,
    "slots": 1,
}
TREE |= {"terminal": "exact", "antithetic": False}
GRAPH = {
    **drawing("a red circle and a blue square", steps=5, seed=2**63 + 7),
    "blank": core("CLIPTextEncode", clip=["load", 1], text=""),
    "guider": core("CFGGuider", model=["load", 0], positive=["text", 0], negative=["blank", 0], cfg=2.0),
    "euler": core("KSamplerSelect", sampler_name="euler"),
    "singular": block("SingularSDESampler", **BRANCH, eta=0.6),
    "image": core("SamplerCustomAdvanced", **WIRES, sampler=["euler", 0]),
    "branch": core("SamplerCustomAdvanced", **WIRES, sampler=["singular", 0]),
    "rollout": block("Rollout", **TREE),
}
WANT = {"image": ("image", 0), "branch": ("branch", 0), **outputs(rollout="data completions anchor")}


def changed_graph(node: str, **inputs: object) -> dict[str, Any]:
    """Return the graph with some inputs of a node changed."""
    return {**GRAPH, node: {**GRAPH[node], "inputs": {**GRAPH[node]["inputs"], **inputs}}}


def run(graph: dict[str, Any], *names: str) -> dict[str, Any]:
    """Run a graph to its end."""
    ran = comfy_side.run_prompt(graph, want={name: WANT[name] for name in names or WANT}, fresh=True)
    assert ran.ok, (ran.error, ran.problems)
    return ran.values


def sampling() -> dict[str, Any]:
    """Compare rollouts with core's sampler and with our own."""
    alone = run(GRAPH)
    rolled = alone["data"].rollout
    first_level = [
        i
        for i, state in enumerate(rolled.plan.images)
        if any(leaf.state == state and leaf.granularity == 0 for leaf in rolled.plan.leaves)
    ]
    batched = run(changed_graph("rollout", slots=16), "completions", "anchor")
    partly = run(changed_graph("sigmas", denoise=0.6), "image", "anchor")
    started = changed_graph("sigmas", denoise=0.6)
    started["empty"] = core("VAEEncode", vae=["load", 2], pixels=["picture", 0])
    started["picture"] = core("EmptyImage", width=64, height=64, batch_size=1, color=0x80FF20)
    begun = run(started)
    split = changed_graph("rollout")
    split["halves"] = core("SplitSigmas", sigmas=["sigmas", 0], step=3)
    for sampler in ("image", "branch"):
        split[sampler] = changed_graph(sampler, sigmas=["halves", 0])[sampler]
    split["singular"] = block("SingularSDESampler", **BRANCH, eta=0.0)
    halves = run(split, "image", "branch")
    return {
        "anchor": torch.equal(alone["image"]["samples"], alone["anchor"]["samples"]),
        "branch": torch.equal(alone["branch"]["samples"][0], alone["completions"]["samples"][first_level[4]]),
        "branch differs": not torch.equal(alone["branch"]["samples"], alone["image"]["samples"]),
        "images": [
            list(alone["completions"]["samples"].shape),
            len(rolled.plan.images),
            list(rolled.latents.shape),
        ],
        "slots": max((batched[key]["samples"] - alone[key]["samples"]).abs().max().item() for key in batched),
        "partial anchor": torch.equal(partly["image"]["samples"], partly["anchor"]["samples"]),
        "img2img anchor": torch.equal(begun["image"]["samples"], begun["anchor"]["samples"]),
        "img2img branch": torch.equal(
            begun["branch"]["samples"][0], begun["completions"]["samples"][first_level[4]]
        ),
        "split": (halves["image"]["samples"] - halves["branch"]["samples"]).abs().max().item(),
        "ordinary tensors": not any(
            tensor.is_inference() for tensor in (rolled.x, rolled.velocity, rolled.latents)
        ),
    }


def interruption() -> dict[str, Any]:
    """Interrupt a rollout in its midst and draw an ordinary image again."""
    before = run(GRAPH, "image")["image"]["samples"]
    count, done = itertools.count(1), widgets_module.Progress.done

    def interrupting(self: Any, forwards: int) -> None:
        done(self, forwards)
        if next(count) == 5:
            comfy.model_management.interrupt_current_processing()

    widgets_module.Progress.done = interrupting
    ran = comfy_side.run_prompt(GRAPH, want={"data": WANT["data"]})
    widgets_module.Progress.done = done
    return {
        "error": ran.error,
        "forwards": next(count) - 1,
        "same": torch.equal(before, run(GRAPH, "image")["image"]["samples"]),
    }


def guider_of(model: Any, cfg: float = 1.0) -> Any:
    """Make a guider with a negative prompt."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(ROWS[0]["positive"], BLANK)
    guider.set_cfg(cfg)
    return guider


def counted(model: Any, work: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Count the model's forwards during some work."""
    calls: list[int] = []
    original = model.model.apply_model
    model.model.apply_model = lambda *args, **options: (calls.append(1), original(*args, **options))[1]
    try:
        return work(), len(calls)
    finally:
        del model.model.__dict__["apply_model"]


def velocities(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take velocities: plain and guided, batched and row by row, with a schedule in the conditioning."""
    plain, guided = (
        policy_module.GraphPolicy(guider_of(model)),
        policy_module.GraphPolicy(guider_of(model, 3.0)),
    )
    with plain.inference():
        base, forwards = counted(model, lambda: plain.velocity(X, SIGMA, ROWS))
        alone = torch.cat(
            [plain.velocity(X[i : i + 1], SIGMA[i : i + 1], ROWS[i : i + 1]) for i in range(len(X))]
        )
    with guided.inference():
        with_guidance, guided_forwards = counted(model, lambda: guided.velocity(X, SIGMA, ROWS))
    early = [
        [cond, {**options, "start_percent": 0.0, "end_percent": 0.5}] for cond, options in ROWS[0]["positive"]
    ]
    late = [
        [cond, {**options, "start_percent": 0.5, "end_percent": 1.0}] for cond, options in ROWS[1]["positive"]
    ]
    scheduled = [{"positive": early + late}] * len(X)
    with plain.inference():
        together = plain.velocity(X, SIGMA, scheduled)
        apart = torch.cat(
            [plain.velocity(X[i : i + 1], SIGMA[i : i + 1], scheduled[:1]) for i in range(len(X))]
        )
    own = policy_module.GraphPolicy(guider_of(model))
    pair = {"positive": [[GIVEN["tokens"][:2], {"pooled_output": GIVEN["pooled"][:2]}]]}
    with own.inference():
        first = own.velocity(X, SIGMA, [pair] * len(X)) - own.velocity(X, SIGMA, ROWS[:1] * len(X))
        fallback = own.velocity(X, SIGMA, [None] * len(X)) - own.velocity(X, SIGMA, ROWS[:1] * len(X))
    numbers = {
        "forwards": [forwards, guided_forwards],
        "rows": (base - alone).abs().max().item(),
        "schedule": (together - apart).abs().max().item(),
        "own conditioning": fallback.abs().max().item(),
        "two in one conditioning": first.abs().max().item(),
    }
    return numbers, {"base": base, "guided": with_guidance}


def training(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Differentiate: against differences, with checkpoints, and for the test to compare with diffusers and
    peft.
    """
    adapter = trained_adapter(model, "attention+feed_forward")
    policy = policy_module.GraphPolicy(guider_of(model), adapter)
    grads = gradient(policy, X, SIGMA, ROWS, COTANGENT)
    names = [f"{name}/{part}" for name in policy.pairs() for part in ("down", "up")]
    by_module = dict(zip(names, grads, strict=True))
    as_adapter = policy_module.Adapter(
        {name: (by_module[f"{name}/down"], by_module[f"{name}/up"]) for name in policy.pairs()}, 4, 4.0, ""
    )
    tensors = {}
    for kind, made in (("pair", adapter), ("gradient", as_adapter)):
        for name, (down, up) in policy_module.diffusers_pairs(made, model).items():
            tensors |= {f"{kind}/{name}/down": down, f"{kind}/{name}/up": up}

    def make(checkpoint: bool) -> Any:
        return policy_module.GraphPolicy(guider_of(model, 2.0), adapter, checkpoint=checkpoint)

    numbers = {
        "difference": difference_error(policy, X, SIGMA, ROWS, COTANGENT),
        "guided difference": difference_error(
            make(False), X, SIGMA, [{**row, "negative": BLANK} for row in ROWS], COTANGENT
        ),
        "checkpoint": checkpoint_error(make, X, SIGMA, ROWS, COTANGENT),
        "alpha": adapter.alpha,
    }
    return numbers, tensors


def records(model: Any, clip: Any, vae: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Roll out prompts with the policy of Train LoRA and collect the learner's records."""
    adapter = trained_adapter(model)
    policy = policy_module.text_policy(model, clip, vae, DATA["guidance"], "", adapter)
    plan = plan_module.singular(5, [0, 1], 4, (1, 2))
    conds = policy.encode(DATA["prompts"])
    sigmas = schedule_module.shifted_sigmas(5, 3.0)
    rollout = rollout_module.roll_out(
        policy, plan, sigmas, conds, DATA["seeds"], policy.latent_shape(64, 64), slots=8
    )
    with policy.training():
        made = update_module.records(rollout, list(GIVEN["advantages"]), samples=True)
        old = update_module.snapshot(policy, made, conds, micro_batch=3).split(3)
        ratios = [
            update_module.log_ratio(
                policy.velocity(part.x, part.sigma, [conds[p] for p in part.prompt.tolist()]), before, part
            )
            for part, before in zip(update_module.micro_batches(made, 3), old, strict=True)
        ]
    images = policy.decode(rollout.latents[:, 0])
    pairs = policy_module.diffusers_pairs(adapter, model).items()
    adapters = {
        f"records/{name}/{part}": tensor
        for name, pair in pairs
        for part, tensor in zip(("down", "up"), pair, strict=True)
    }
    tensors = {"x": made.x, "direction": made.direction, "images": images, **adapters}
    return {
        "ratio": max(ratio.detach().abs().max().item() for ratio in ratios),
        "samples": len(made.advantage),
    }, tensors


def saved(model: Any) -> dict[str, Any]:
    """Save a LoRA, load it with core's loaders, and compare velocities with what training saw."""
    policy = policy_module.GraphPolicy(guider_of(model), trained_adapter(model, "attention+feed_forward"))
    with policy.training():
        seen = policy.velocity(X, SIGMA, ROWS).detach()
        with policy.reference():
            base = policy.velocity(X, SIGMA, ROWS).detach()
    adapter = policy.adapter()
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    native, renamed = folder / "native.safetensors", folder / "diffusers.safetensors"
    lora_module.write(native, adapter.pairs, adapter.alpha, style="native")
    lora_module.write(
        renamed, policy_module.diffusers_pairs(adapter, model), adapter.alpha, style="diffusers"
    )
    found: dict[str, Any] = {"effect": (seen - base).abs().max().item(), "modules": len(adapter.pairs)}
    loaded = {
        "native": core_node("LoraLoaderModelOnly", model, native.name, 1.0),
        "diffusers": core_node("LoraLoaderModelOnly", model, renamed.name, 1.0),
        "wire": core_node("LoraModelLoader", model, policy_module.lora_model(adapter), 1.0),
        "clone": policy_module.with_adapter(model, adapter),
    }
    for name, tuned in loaded.items():
        reader = policy_module.GraphPolicy(guider_of(tuned))
        # The same attention kernel, so that nothing but the weights can differ.
        with reader.training(), torch.no_grad():
            found[name] = (reader.velocity(X, SIGMA, ROWS) - seen).abs().max().item()
        found[f"{name} patched"] = sum(map(len, tuned.patches.values()))
    return found


def on_top(model: Any) -> float:
    """Train on a MODEL that carries another LoRA already.

    Return how far that is from core's two LoRAs in a row.
    """
    lower, upper = trained_adapter(model), trained_adapter(model, "attention+feed_forward", 0.05)
    below = policy_module.with_adapter(model, lower)
    policy = policy_module.GraphPolicy(guider_of(below), upper)
    both = policy_module.GraphPolicy(guider_of(policy_module.with_adapter(below, upper)))
    with policy.inference():
        ours = policy.velocity(X, SIGMA, ROWS)
    with both.inference():
        return (ours - both.velocity(X, SIGMA, ROWS)).abs().max().item()


def precisions(path: str) -> dict[str, list[float]]:
    """Train a model kept in fewer bits: gradient's cosine with the exact one, and how far core's merged
    LoRA is from what training saw.
    """
    found = {}
    exact = None
    for name, dtype in {"float32": None, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}.items():
        model = comfy.sd.load_diffusion_model(path, model_options={"dtype": dtype} if dtype else {})
        adapter = trained_adapter(model, "attention+feed_forward", 0.1)
        policy = policy_module.GraphPolicy(guider_of(model), adapter)
        grads = torch.cat([part.flatten() for part in gradient(policy, X, SIGMA, ROWS, COTANGENT)])
        exact = grads if exact is None else exact
        reader = policy_module.GraphPolicy(guider_of(policy_module.with_adapter(model, adapter)))
        with policy.training(), torch.no_grad():
            seen = policy.velocity(X, SIGMA, ROWS)
        with reader.training(), torch.no_grad():
            merged = reader.velocity(X, SIGMA, ROWS)
        cosine = torch.nn.functional.cosine_similarity(grads, exact, dim=0).item()
        found[name] = [cosine, ((seen - merged).abs().max() / seen.abs().max()).item()]
    return found


def unchanged(model: Any) -> dict[str, list[str]]:
    """Use the model in every way, some of which fail half-way; name what is left behind."""
    # Core leaves the patches of the last clone that it loaded in the shared weights.
    comfy.model_management.load_models_gpu([model])
    before, adapter = portrait(model), trained_adapter(model)

    class Stop(Exception):
        pass

    def trained(checkpoint: bool, stop: bool) -> None:
        policy = policy_module.GraphPolicy(guider_of(model), adapter, checkpoint=checkpoint)
        with policy.training():
            made = policy.velocity(X, SIGMA, ROWS).sum()
            if stop:
                raise Stop
            made.backward()

    def inferred(stop: bool) -> None:
        with (policy := policy_module.GraphPolicy(guider_of(model), adapter)).inference():
            policy.velocity(X, SIGMA, ROWS)
            if stop:
                raise Stop

    def failing_forward() -> None:
        def stopping(*args: object, **options: object) -> Tensor:
            raise Stop

        policy = policy_module.GraphPolicy(guider_of(model), adapter)
        policy._guider.model_options["model_function_wrapper"] = stopping
        with policy.training():
            policy.velocity(X, SIGMA, ROWS)

    def bad_row() -> None:
        with (policy := policy_module.GraphPolicy(guider_of(model), adapter)).training():
            policy.velocity(X, SIGMA, [{"positive": [[GIVEN["tokens"][:1], {}]]}] * len(X))

    left = {}
    for name, work in {
        "training": lambda: trained(False, False),
        "checkpoints": lambda: trained(True, False),
        "training stopped": lambda: trained(False, True),
        "checkpoints stopped": lambda: trained(True, True),
        "inference": lambda: inferred(False),
        "inference stopped": lambda: inferred(True),
        "forward fails": failing_forward,
        "conditioning fails": bad_row,
    }.items():
        with suppress(Stop, ValueError):
            work()
        left[name] = changes(before, portrait(model))
    return left


def refusal(work: Callable[[], object]) -> str:
    """Return the words of the ValueError that something raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(model: Any) -> dict[str, str]:
    """Give the blocks what they cannot use."""
    eps = core_node("ModelSamplingDiscrete", model, "eps", False)
    sigmas, latent = torch.tensor([1.0, 0.6, 0.2, 0.0]), torch.zeros(1, 16, 8, 8)
    usual = {"guider": guider_of(model), "noise": core_node("RandomNoise", 3), "sigmas": sigmas, **TREE}
    usual["latent_image"] = {"samples": latent}
    cases: dict[str, dict[str, Any]] = {
        "not a flow": {"guider": guider_of(eps)},
        "batch": {"latent_image": {"samples": latent.repeat(2, 1, 1, 1)}},
        "empty batch": {"latent_image": {"samples": latent[:0]}},
        "no latent": {"latent_image": {"samples": None}},
        "three dimensions": {"latent_image": {"samples": latent[0]}},
        "mask": {"latent_image": {"samples": latent, "noise_mask": torch.ones(1, 64, 64)}},
        "NaN": {"latent_image": {"samples": latent * float("nan")}},
        "infinite": {"latent_image": {"samples": latent + float("inf")}},
        "one sigma": {"sigmas": sigmas[:1]},
        "no sigma": {"sigmas": sigmas[:0]},
        "unfinished sigmas": {"sigmas": sigmas[:3]},
        "rising sigmas": {"sigmas": sigmas.flip(0)},
        "NaN sigmas": {"sigmas": sigmas * float("nan")},
        "large sigmas": {"sigmas": sigmas * 14},
        "step": {"branch_steps": "3"},
        "too much": {"branch_steps": "0-2", "group_size": 256, "granularities": "1-500"},
        "too large": {"latent_image": {"samples": torch.zeros(1, 16, 2048, 2048)}, "group_size": 64},
    }
    words = {
        name: refusal(lambda case=case: sampling_module.RolloutBlock.execute(**{**usual, **case}))
        for name, case in cases.items()
    }
    alone = policy_module.GraphPolicy(guider_of(model))
    words["outside"] = refusal(lambda: alone.velocity(X, SIGMA, ROWS))
    words["targets"] = refusal(lambda: policy_module.fresh_adapter(model, 4, 4, 0, "all"))
    words["no adapter"] = refusal(alone.adapter)
    return words | refused_lists()


def refused_lists() -> dict[str, str]:
    """Give the blocks lists of numbers that are none."""
    texts = ["", " ", "x", "-1", "3-1", "0-", "1.5", "٣", "0\x000", "<b>", "../..", "9" * 100000]
    texts += ["0-999999", "0," * 30000, "\ud800", "1;2"]
    read = widgets_module.int_list
    return {f"list {text[:20]!a}": refusal(partial(read, text, "branch_steps", 0, 2)) for text in texts}


def main() -> None:
    """Do it all, in the executor's mode, and reply."""
    numbers: dict[str, Any] = {
        "lists": [
            list(widgets_module.int_list(text, "x", 0, 9)) for text in ("0-3", "2, 0,2", "7", "1 - 2,5")
        ]
    }
    with torch.inference_mode():
        model, clip, vae = comfy_side.node_class("G2RPO_TinyDemoLoader").execute().result
    assert next(model.model.parameters()).is_inference()
    numbers["sampling"], numbers["interruption"] = sampling(), interruption()
    with torch.inference_mode():
        numbers["velocities"], tensors = velocities(model)
        for name, work in {
            "training": lambda: training(model),
            "records": lambda: records(model, clip, vae),
        }.items():
            numbers[name], more = work()
            tensors |= more
        numbers["saved"], numbers["unchanged"], numbers["refusals"] = (
            saved(model),
            unchanged(model),
            refusals(model),
        )
        numbers["on top"], numbers["precisions"] = on_top(model), precisions(DATA["transformer"])
    comfy_side.answer(numbers, tensors)


main()
