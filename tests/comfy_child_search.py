"""Runs inside a ComfyUI: Search Sampler on the bundled model, counted forward by forward.

What came out goes back to test_nodes_search.py.
"""

from typing import Any

import comfy.model_management
import comfy_graphs
import comfy_side
import torch
from comfy_graphs import block, core, drawing, outputs, reward, run, spoken, thing

protocol = comfy_side.pack_module("comfy_g2rpo.rewards.protocol")
types = comfy_side.pack_module("nodes.types")
given = comfy_side.given()
PROMPT = given["prompt"]
FOUND = outputs(block="latents images scores report")
PLAIN = outputs(plain="picture")


class Counting:
    """A model that counts the latents that it is asked for, and may press the stop button."""

    def __init__(self, model: Any) -> None:
        self.rows, self.model, self.stops = 0, model.clone(), False
        self.model.set_model_unet_function_wrapper(self.forward)

    def forward(self, apply: Any, args: dict[str, Any]) -> torch.Tensor:
        self.rows += len(args["input"])
        if self.stops:
            comfy.model_management.interrupt_current_processing(True)
        return apply(args["input"], args["timestep"], **args["c"])


class Dark(protocol.Reward):
    """Like dark images; stop at a call."""

    name, licence, compares_across_prompts, reads_prompt = "dark", "none", True, False
    stop_at, calls = 0, 0

    def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            comfy.model_management.interrupt_current_processing(True)
        return -images.flatten(1).mean(1)


loaded = run({"load": block("TinyDemoLoader")}, **outputs(load="model clip vae")).values
counting = Counting(loaded["model"])


def graph(**changes: Any) -> dict[str, Any]:
    """Return a graph with a search, changed by inputs of the block or whole nodes."""
    nodes = {**drawing(PROMPT, steps=8, seed=5), "reward": reward("agreement")}
    nodes["sigmas"] = thing("sigmas", torch.tensor(given["sigmas"]))
    nodes["model"] = thing("model", counting.model)
    nodes["guider"] = core("BasicGuider", model=["model", 0], conditioning=["text", 0])
    nodes |= {name: value for name, value in changes.items() if isinstance(value, dict)}
    changes = {"prompt": PROMPT, **changes}
    inputs = {name: value for name, value in changes.items() if not isinstance(value, dict)}
    nodes["block"] = block("SearchSampler", **inputs)
    return nodes


def guided(cfg: float) -> dict[str, Any]:
    """Return a guider with a negative prompt."""
    return core("CFGGuider", model=["model", 0], positive=["text", 0], negative=["blank", 0], cfg=cfg)


def sampled(**changes: Any) -> torch.Tensor:
    """Return an ordinary sampler's latent of the same noise."""
    nodes = graph(**changes)
    del nodes["block"]
    nodes["euler"] = core("KSamplerSelect", sampler_name="euler")
    wires = {name: [name, 0] for name in ("noise", "guider", "sigmas")}
    nodes["plain"] = core("SamplerCustomAdvanced", sampler=["euler", 0], latent_image=["empty", 0], **wires)
    return run(nodes, **PLAIN).values["picture"]["samples"]


BLANK = {"blank": core("CLIPTextEncode", clip=["load", 1], text="")}
answer, tensors, before = {}, {}, sampled()
for name, changes in given["ways"].items():
    counting.rows = 0
    lists = comfy_graphs.lists(graph(**changes), **FOUND)
    found = {key: values[0] for key, values in lists.items()}
    tensors |= {f"{name} images": found["images"], f"{name} latents": found["latents"]["samples"]}
    answer[name] = {"rows": counting.rows, "scores": lists["scores"], "report": found["report"]}
for cfg in (1.0, 2.0):
    counting.rows = 0
    found = run(graph(guider=guided(cfg), **BLANK, budget=64), **FOUND).values
    answer[f"cfg {cfg:g}"] = {"rows": counting.rows, "report": found["report"]}
counting.rows = 0
gap = {"score": "guidance_gap", "budget": 128}
found = run(graph(guider=guided(2.0), **BLANK, **gap), **FOUND).values
answer["gap"] = {"rows": counting.rows, "report": found["report"]}
tensors["gap latents"] = found["latents"]["samples"]
# A weight that a LoRA has changed.
weights = {name for name in counting.model.model_state_dict() if name.endswith("attn.proj.weight")}
lora = counting.model.clone()
key = min(weights)
lora.add_patches({key: ("diff", (0.5 * torch.randn(lora.model_state_dict()[key].shape),))})
tuned = {"model": thing("lora", lora)}
found = run(graph(**tuned, method="best of n", budget=8), **FOUND).values
answer["lora"] = (found["latents"]["samples"] - sampled(**tuned)).abs().max().item()
answer["what a lora changes"] = (found["latents"]["samples"] - before).abs().max().item()
four = {"empty": core("EmptySD3LatentImage", width=64, height=64, batch_size=4)}
counting.rows = 0
lists = comfy_graphs.lists(graph(**four, method="best of n", budget=16, keep=2), **FOUND)
answer["batch"] = {"rows": counting.rows, "scores": lists["scores"], "report": lists["report"][0]}
tensors["batch latents"], tensors["batch plain"] = lists["latents"][0]["samples"], sampled(**four)
start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
levels = torch.tensor([level for level in given["sigmas"] if level < 0.7])
other = {"empty": thing("start", {"samples": start}), "sigmas": thing("lower", levels)}
found = run(graph(**other, budget=len(levels) - 1), **FOUND).values
nodes = graph(**other)
nodes["euler"] = core("KSamplerSelect", sampler_name="euler")
wires = {name: [name, 0] for name in ("noise", "guider", "sigmas")}
nodes["block"] = core("SamplerCustomAdvanced", sampler=["euler", 0], latent_image=["empty", 0], **wires)
plain = run(nodes, picture=("block", 0)).values["picture"]["samples"]
answer["image to image"] = (found["latents"]["samples"] - plain).abs().max().item()

dark, reports = Dark(), []
judge = thing("dark", types.RewardSet((dark,), (1.0,)))
for stop_at in (2, 2, 0):
    # The same graph, whose results stay cached as in the server.
    dark.stop_at, dark.calls = stop_at, 0
    nodes = graph(reward=judge, method="best of n", budget=8 * 80, prompt=["words", 0])
    nodes["words"] = thing("words", PROMPT)
    ran = comfy_side.run_prompt(nodes, FOUND, fresh=False)
    assert ran.ok, ran
    reports.append(ran.values["report"])
answer["stopped"] = reports
counting.stops = True
answer["nothing yet"] = spoken(graph(method="best of n"))
counting.stops = False
pair = thing("pair", types.RewardSet((dark, Dark()), (1.0, 1.0), "zscore"))
answer["mixed"] = run(graph(reward=pair, budget=16), **FOUND).values["report"]
answer["unread"] = run(graph(prompt="", budget=16), **FOUND).values["report"]
answer["unchanged"] = torch.equal(before, sampled())
answer["refused"] = {name: spoken(graph(**changes)) for name, changes in given["refused"].items()}
comfy_side.answer(answer, tensors)
