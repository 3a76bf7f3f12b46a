"""Runs inside a ComfyUI: Early Filter Sampler on the bundled model, beside core's Euler.

What came out goes back to test_nodes_filter.py.
"""

import logging
from types import SimpleNamespace
from typing import Any

import comfy.sample
import comfy.samplers
import comfy_side
import torch
from comfy_graphs import block, core, drawing, outputs, run, spoken, thing

gap_module = comfy_side.pack_module("nodes.model.guidance_gap")
given = comfy_side.given()
ROWS = 6
WIRES = {name: [name, 0] for name in ("noise", "guider", "sigmas", "sampler")}
PICTURE = outputs(draw="samples denoised")
EULER = core("KSamplerSelect", sampler_name="euler")
messages: list[str] = []


class Hearing(logging.Handler):
    """Keeps what blocks say."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        messages.append(record.getMessage())


class Listening:
    """A model that counts its rows, and keeps what guidance sees in a post-CFG function of its own."""

    def __init__(self, model: Any) -> None:
        self.rows, self.squares, self.model = 0, [], model.clone()
        self.model.set_model_unet_function_wrapper(self.forward)
        self.model.set_model_sampler_post_cfg_function(self.after)

    def forward(self, apply: Any, args: dict[str, Any]) -> torch.Tensor:
        """Count a forward's rows."""
        self.rows += len(args["input"])
        return apply(args["input"], args["timestep"], **args["c"])

    def after(self, args: dict[str, Any]) -> torch.Tensor:
        """Keep the mean square of the predictions' difference per row, and σ."""
        gap = (args["cond_denoised"] - args["uncond_denoised"]).double().square().flatten(1).mean(1)
        self.squares.append([float(args["sigma"][0]), *gap.tolist()])
        return args["denoised"]


class Rows:
    """A NOISE of rows in an order."""

    def __init__(self, noise: torch.Tensor, seed: int) -> None:
        self.noise, self.seed = noise, seed

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        """Return it."""
        return self.noise


logging.getLogger().setLevel(logging.INFO)
logging.getLogger().addHandler(Hearing())
loaded = run({"load": block("TinyDemoLoader")}, **outputs(load="model clip vae")).values
listening = Listening(loaded["model"])


def graph(sampler: dict[str, Any], batch: int = ROWS, cfg: float = 2.0, **nodes: Any) -> dict[str, Any]:
    """Return a graph that samples a batch, changed by whole nodes."""
    made = {**drawing(given["prompt"], steps=8, seed=5), "sampler": sampler}
    made["sigmas"] = thing("sigmas", torch.tensor(given["sigmas"]))
    made["model"] = thing("model", listening.model)
    made["blank"] = core("CLIPTextEncode", clip=["load", 1], text="")
    made["empty"] = core("EmptySD3LatentImage", width=64, height=64, batch_size=batch)
    made["guider"] = guided(cfg=cfg)
    made["draw"] = core("SamplerCustomAdvanced", latent_image=["empty", 0], **WIRES)
    return {**made, **nodes}


def guided(
    cfg: float = 2.0, model: str = "model", positive: str = "text", negative: str = "blank"
) -> dict[str, Any]:
    """Return a guider with a negative prompt."""
    wires = {"model": [model, 0], "positive": [positive, 0], "negative": [negative, 0]}
    return core("CFGGuider", cfg=cfg, **wires)


def drawn(name: str, keep: int = 0, after: float = 0.3, measure: str = "velocity", **changes: Any) -> None:
    """Sample, by Euler where nothing is kept; what came out is answered under the name."""
    listening.rows = 0
    listening.squares.clear()
    messages.clear()
    sampler = block("EarlyFilter", keep=keep, after=after, measure=measure) if keep else EULER
    found = run(graph(sampler, **changes), **PICTURE).values
    tensors[f"{name} samples"] = found["samples"]["samples"]
    tensors[f"{name} denoised"] = found["denoised"]["samples"]
    said = [text for text in messages if text.startswith("Early Filter Sampler")]
    answer[name] = {"rows": listening.rows, "squares": list(listening.squares), "said": said}


def both(name: str, keep: int = 2, **changes: Any) -> None:
    """Sample by Euler and with the filter."""
    drawn(f"{name}, all", **changes)
    drawn(name, keep, **changes)


def patched(node: str, **inputs: Any) -> dict[str, Any]:
    """Return the nodes of a patched model with its guider."""
    return {"patched": core(node, model=["model", 0], **inputs), "guider": guided(model="patched")}


def alike(args: dict[str, Any]) -> list[torch.Tensor]:
    """Predict as core does, but rows 0 and 3 without a prompt as with one."""
    made = comfy.samplers.calc_cond_batch(
        args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
    )
    if len(args["input"]) == ROWS:
        made[1][[0, 3]] = made[0][[0, 3]]
    return made


def seen(image: Any, mask: Any = None) -> dict[str, Any]:
    """Return the node of a latent to start from, with a mask."""
    more = {} if mask is None else {"noise_mask": mask}
    return {"empty": thing("seen", {"samples": image, **more})}


answer, tensors = {}, {}
both("plain")
drawn("keep all", ROWS)
drawn("keep more", 200)
drawn("one of one", 1, batch=1)
drawn("one, all", batch=1)
for measure in ("noise", "clean"):
    drawn(measure, 3, measure=measure)
drawn("to the end", 2, after=1.0)
both("cfg 1", cfg=1.0)
start = comfy.sample.prepare_noise(torch.zeros(ROWS, 16, 8, 8), 5)
order = torch.tensor([4, 2, 0, 5, 1, 3])
drawn("turned", 2, noise=thing("turned", Rows(start[order], 5)))

both("rescaled", after=0.01, **patched("RescaleCFG", multiplier=0.7))
both("projected", after=0.01, **patched("APG", eta=0.5, norm_threshold=0.5, momentum=0.0))
drawn("one step", 2, after=0.01)
marked = listening.model.clone()
marked.model_options["sampler_calc_cond_batch_function"] = alike
both("marked", 4, model=thing("marked", marked))

half = {"width": 0.5, "height": 1.0, "y": 0.0, "strength": 1.0}
region = {
    "words": core("CLIPTextEncode", clip=["load", 1], text="a blue circle"),
    "left": core("ConditioningSetAreaPercentage", conditioning=["text", 0], x=0.0, **half),
    "right": core("ConditioningSetAreaPercentage", conditioning=["words", 0], x=0.5, **half),
    "regions": core("ConditioningCombine", conditioning_1=["left", 0], conditioning_2=["right", 0]),
}
both("regional", **region, guider=guided(positive="regions"))
texts = run({**graph(EULER), **region}, one=("text", 0), other=("words", 0)).values
mixed = [texts[name][0] for name in ("one", "other", "one", "other", "other", "one")]
width = min(features.shape[1] for features, _ in mixed)
pooled = torch.cat([more["pooled_output"] for _, more in mixed])
rows = [[torch.cat([features[:, :width] for features, _ in mixed]), {"pooled_output": pooled}]]
both("a prompt per row", each=thing("each", [rows]), guider=guided(positive="each"))
dual = {"cond1": ["text", 0], "cond2": ["words", 0], "negative": ["blank", 0], "style": "regular"}
dual |= {"model": ["model", 0], "cfg_conds": 1.5, "cfg_cond2_negative": 2.0}
both("dual", **region, guider=core("DualCFGGuider", **dual))
perp = {"positive": ["text", 0], "negative": ["words", 0], "empty_conditioning": ["blank", 0]}
# Core's Perp-Neg measures the batch as a whole: no row of it is what it is alone.
drawn("perp", 2, **region, guider=core("PerpNegGuider", model=["model", 0], cfg=2.0, neg_scale=1.0, **perp))

levels = thing("lower", torch.tensor([level for level in given["sigmas"] if level < 0.7]))
images = torch.randn(ROWS, 16, 8, 8, generator=torch.Generator().manual_seed(0))
masks = (torch.rand(ROWS, 64, 64, generator=torch.Generator().manual_seed(1)) > 0.5).float()
both("image to image", **seen(images), sigmas=levels)
both("inpaint", **seen(images, masks))
both("one mask", **seen(images, masks[:1]), sigmas=levels)

basic = core("BasicGuider", model=["model", 0], conditioning=["text", 0])
drawn("basic, few", ROWS, guider=basic)
discrete = core("ModelSamplingDiscrete", model=["model", 0], sampling="eps", zsnr=False)
early = block("EarlyFilter", keep=2)
momentum = patched("APG", eta=1.0, norm_threshold=0.0, momentum=0.5)
answer["refused"] = {
    "no negative": spoken(graph(early, guider=basic), "draw"),
    "momentum": spoken(graph(early, **momentum), "draw"),
    "momentum, one": spoken(graph(block("EarlyFilter", keep=1), **momentum), "draw"),
    "no flow": spoken(graph(early, eps=discrete, guider=guided(model="eps")), "draw"),
    "rising": spoken(graph(early, sigmas=thing("rising", torch.tensor([0.0, 1.0]))), "draw"),
    "keep 0": spoken(graph(block("EarlyFilter", keep=0)), "draw"),
    "after 2": spoken(graph(block("EarlyFilter", after=2.0)), "draw"),
    "a measure": spoken(graph(block("EarlyFilter", measure="luck")), "draw"),
}
hint = SimpleNamespace(previous_controlnet=SimpleNamespace(cond_hint_original=torch.zeros(2, 3, 8, 8)))
try:
    gap_module.rows_of({"positive": [{"model_conds": {}, "control": hint}]}, torch.tensor([1]))
except ValueError as error:
    answer["refused"]["an image per row"] = str(error)
kept_options = sorted(listening.model.model_options)
drawn("plain again, all")
answer["options"] = kept_options
comfy_side.answer(answer, tensors)
