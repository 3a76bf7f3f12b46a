"""Runs inside a ComfyUI: noise priors on the bundled model. What came out goes to test_nodes_prior.py."""

from pathlib import Path
from typing import Any

import comfy_side
import folder_paths
import torch
from comfy_graphs import block, core, drawing, outputs, run, spoken, thing

import nodes

priors = comfy_side.pack_module("comfy_g2rpo.priors.noise_prior")
blocks = comfy_side.pack_module("nodes.search.prior_blocks")
given = comfy_side.given()
FOLDER = Path(folder_paths.models_dir) / "noise_priors"
BLOCKS = {name: nodes.NODE_CLASS_MAPPINGS[f"G2RPO_{name}"] for name in ("LoadNoisePrior", "ApplyNoisePrior")}
answer: dict[str, Any] = {"none yet": blocks.choices()}

loaded = run({"load": block("TinyDemoLoader")}, **outputs(load="model clip vae")).values
model = loaded["model"]
known = blocks.vectors_of(model)
answer["vectors"] = [known.count, known.mean]


def prior_of(shape: tuple[int, ...] = (16, 8, 8), features: int = 128) -> Any:
    """Return a prior with a shift."""
    made = priors.NoisePrior(features, shape, rank=4, seed=1)
    with torch.no_grad():
        made.outer.weight.copy_(
            torch.randn(made.outer.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    return made


good = prior_of()
priors.save_prior(FOLDER / "good.safetensors", good, known, {"kl": "3.5", "gain": "agreement +0.1 ± 0.05"})
priors.save_prior(FOLDER / "wide.safetensors", prior_of((16, 8, 16)), known, {})
priors.save_prior(FOLDER / "text.safetensors", prior_of(features=64), known, {})
priors.save_prior(
    FOLDER / "other.safetensors", good, known._replace(mean=known.mean * 1.01), {"model": "other"}
)
(FOLDER / "broken.safetensors").write_bytes((FOLDER / "good.safetensors").read_bytes()[:-5])


def graph(strength: float = 1.0, prior: str = "good.safetensors", **changes: Any) -> dict[str, Any]:
    """Return a graph that draws with moved noise."""
    drawn = drawing(given["prompt"], steps=4, seed=5)
    drawn |= {"prior": block("LoadNoisePrior", prior=prior, model=["load", 0])}
    wires = {"noise": ["noise", 0], "prior": ["prior", 0], "conditioning": ["text", 0]}
    drawn["moved"] = block("ApplyNoisePrior", strength=strength, **wires)
    drawn["euler"] = core("KSamplerSelect", sampler_name="euler")
    wires = {name: [name, 0] for name in ("guider", "sigmas")}
    more = {"sampler": ["euler", 0], "latent_image": ["empty", 0], **wires}
    drawn["block"] = core("SamplerCustomAdvanced", noise=["moved", 0], **more)
    return {**drawn, **changes}


def drawn(nodes: dict[str, Any]) -> torch.Tensor:
    """Return the latent that a graph draws."""
    return run(nodes, out=("block", 0)).values["out"]["samples"]


def plain() -> torch.Tensor:
    """Return what is drawn without a prior."""
    nodes = graph()
    nodes["block"]["inputs"]["noise"] = ["noise", 0]
    return drawn({name: node for name, node in nodes.items() if name not in ("prior", "moved")})


before = plain()
answer["different"] = (drawn(graph()) - before).abs().max().item()
answer["half"] = (drawn(graph(0.5)) - before).abs().max().item()
answer["strength 0"] = torch.equal(drawn(graph(0.0)), before)
answer["after"] = torch.equal(plain(), before)
found = run(graph(), moved=("moved", 0), text=("text", 0), noise=("noise", 0), report=("prior", 1)).values
answer["report"], moved, noise = found["report"], found["moved"], found["noise"]
answer["seed"] = [moved.seed, noise.seed]


def latent(*shape: int, **more: Any) -> dict[str, Any]:
    """Return an empty latent."""
    return {"samples": torch.zeros(shape), **more}


feature = blocks.features_of(found["text"])
shift = good(feature).detach()


def off(sent: dict[str, Any], wanted: torch.Tensor = shift) -> float:
    """Say how far the moved noise is from the given noise and the shift."""
    return (moved.generate_noise(sent) - noise.generate_noise(sent) - wanted).abs().max().item()


answer["batch"] = off(latent(3, 16, 8, 8))
answer["batch index"] = off(latent(2, 16, 8, 8, batch_index=[4, 1]))
answer["one frame"] = off(latent(1, 16, 1, 8, 8), shift[:, :, None])
try:
    moved.generate_noise(latent(1, 16, 8, 16))
except ValueError as error:
    answer["another size"] = str(error)
two = [[torch.cat([found["text"][0][0]] * 2), {"pooled_output": torch.cat([feature, 2 * feature])}]]
pair = BLOCKS["ApplyNoisePrior"].execute(noise, found and run(graph(), p=("prior", 0)).values["p"], two, 1.0)
sent = latent(2, 16, 8, 8)
apart = pair.args[0].generate_noise(sent) - noise.generate_noise(sent)
answer["two prompts"] = (apart - good(torch.cat([feature, 2 * feature])).detach()).abs().max().item()
answer["refused"] = {
    name: spoken(graph(prior=f"{name}.safetensors"))
    for name in ("other", "broken", "text", "wide", "gone", "../loras/x")
}
answer["refused"] |= {
    f"strength {value}": spoken(graph(strength=value)) for value in (-0.1, 2.1, "much", float("nan"))
}
words = {"no text": [], "no tensors": [["x", {}]], "half": [[torch.zeros(1, 0, 8)]]}
for name, value in words.items():
    # The guider keeps its own: core would stumble first.
    nodes_of = graph(words=thing("words", [value]))
    nodes_of["moved"]["inputs"]["conditioning"] = ["words", 0]
    answer["refused"][name] = spoken(nodes_of)
answer["again"] = torch.equal(plain(), before)
comfy_side.answer(answer, {"feature": feature, "shift": shift})
