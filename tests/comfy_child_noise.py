"""Runs inside a ComfyUI: Optimize Noise on the bundled model, counted forward by forward.

What came out goes back to test_nodes_noise.py.
"""

from typing import Any

import comfy.model_management
import comfy_side
import torch
from comfy_graphs import block, core, drawing, outputs, reward, run, spoken, thing

protocol = comfy_side.pack_module("comfy_g2rpo.rewards.protocol")
types = comfy_side.pack_module("nodes.types")
noise_block = comfy_side.pack_module("nodes.search.optimize_noise")
given = comfy_side.given()
PROMPT = given["prompt"]
MADE = outputs(block="noise latent image report")
PLAIN = outputs(plain="picture")
BLANK = {"blank": core("CLIPTextEncode", clip=["load", 1], text="")}


class Dark(protocol.Reward):
    """Like dark images; have a gradient or none; stop at a call, or fail in one way."""

    name, licence, compares_across_prompts, reads_prompt = "dark", "none", True, False

    def __init__(self, gradient: bool = True, stop_at: int = 0, broken_at: int = 0, abstain_at: int = 0):
        self.gradient, self.stop_at, self.broken_at, self.abstain_at = (
            gradient,
            stop_at,
            broken_at,
            abstain_at,
        )
        self.calls = self.slopes = 0

    def score(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            comfy.model_management.interrupt_current_processing(True)
        bad = torch.nan if self.calls == self.abstain_at else 0.0
        return -images.flatten(1).mean(1) + bad

    def differentiable(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        self.slopes += 1
        bad = torch.nan if self.slopes == self.broken_at else 1.0
        return -images.flatten(1).mean(1) * bad


class Counting:
    """A model that counts the latents that it is asked for, with a gradient and without."""

    def __init__(self, model: Any) -> None:
        self.rows, self.stops, self.model = [0, 0], False, model.clone()
        self.model.set_model_unet_function_wrapper(self.forward)

    def forward(self, apply: Any, args: dict[str, Any]) -> torch.Tensor:
        self.rows[torch.is_grad_enabled()] += len(args["input"])
        if self.stops:
            comfy.model_management.interrupt_current_processing(True)
        return apply(args["input"], args["timestep"], **args["c"])


class Flat:
    """A VAE whose decoder cannot be followed."""

    def __init__(self, vae: Any, **changes: Any) -> None:
        self.__dict__ |= vae.__dict__ | changes
        self.own = vae

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.own.decode(latents)

    def memory_used_decode(self, *args: Any) -> int:
        return 0


def blind(image: torch.Tensor) -> torch.Tensor:
    """Forget where an image comes from."""
    return image.detach()


loaded = run({"load": block("TinyDemoLoader")}, **outputs(load="model clip vae")).values


def judging(dark: Any, weight: float = 1.0) -> Any:
    """Return a node that gives a reward."""
    return thing(f"dark {id(dark)}", types.RewardSet((dark,), (weight,)))


def graph(**changes: Any) -> dict[str, Any]:
    """Return a graph with an optimised noise, changed by inputs of the block or whole nodes."""
    nodes = {**drawing(PROMPT, steps=4, seed=5), "reward": reward("exposure"), **BLANK}
    nodes |= {name: value for name, value in changes.items() if isinstance(value, dict)}
    inputs = {name: value for name, value in changes.items() if not isinstance(value, dict)}
    nodes["block"] = block("OptimizeNoise", **{"prompt": PROMPT, **inputs})
    return nodes


def guided(cfg: float) -> dict[str, Any]:
    """Return a guider with a negative prompt."""
    return core("CFGGuider", model=["load", 0], positive=["text", 0], negative=["blank", 0], cfg=cfg)


def nodes_of(counting: Counting, cfg: float) -> dict[str, Any]:
    """Return the nodes that a counting model stands in."""
    nodes = {"counted": thing("counted", counting.model), "guider": guided(cfg)}
    nodes["guider"]["inputs"]["model"] = ["counted", 0]
    return nodes


def slopes(**changes: Any) -> list[float]:
    """Return the block's gradient along itself, and that of small steps to both sides."""
    optimise, found = noise_block.optimise, []

    def measure(noise: torch.Tensor, climb: Any, seed: int, look: Any) -> Any:
        gradient = look(noise.float().clone(), 0, True).gradient
        way = 0.01 * gradient / gradient.norm()
        up, down = (look(noise.float() + side * way, 1, False).score for side in (1, -1))
        found[:] = [gradient.norm().item(), (up - down) / 0.02]
        return optimise(noise, noise_block.Climb(1), seed, look)

    noise_block.optimise = measure
    run(graph(**changes), **MADE)
    noise_block.optimise = optimise
    return found


def again(nodes: dict[str, Any], noise: Any) -> torch.Tensor:
    """Return an ordinary sampler's latent of a noise, or of the graph's own."""
    nodes = {name: node for name, node in nodes.items() if name != "block"}
    nodes |= {"noise": thing("made", noise)} if noise is not None else {}
    nodes["euler"] = core("KSamplerSelect", sampler_name="euler")
    wires = {name: [name, 0] for name in ("noise", "guider", "sigmas")}
    nodes["plain"] = core("SamplerCustomAdvanced", sampler=["euler", 0], latent_image=["empty", 0], **wires)
    return run(nodes, **PLAIN).values["picture"]["samples"]


def made(name: str, **changes: Any) -> dict[str, Any]:
    """Run the block; keep what a test looks at."""
    nodes = graph(**changes)
    found = run(nodes, **MADE).values
    noise = found["noise"].generate_noise(found["latent"])
    drawn = again(nodes, found["noise"])
    tensors[f"{name} image"] = found["image"]
    told = {
        "report": found["report"],
        "apart": (drawn - found["latent"]["samples"]).abs().max().item(),
        "length": noise.square().mean().sqrt().item(),
        "moved": (drawn - again(nodes, None)).abs().max().item(),
        "seed": found["noise"].seed,
    }
    answer[name] = told
    return found


answer: dict[str, Any] = {}
tensors: dict[str, torch.Tensor] = {}
before = again(graph(), None)
start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
image = {"empty": thing("start", {"samples": start})}
image["sigmas"] = core("BasicScheduler", model=["load", 0], scheduler="simple", steps=4, denoise=0.6)
first = made("reward", steps=6)
made("again", steps=6)
made("estimated", gradient="estimated", steps=3)
made("auto estimates", reward=reward("jpeg"), steps=2)
made("guided", guider=guided(2.0))
made("guided estimated", guider=guided(2.0), gradient="estimated", steps=2)
made("image to image", **image, reward=judging(Dark()))
made("dark", reward=judging(Dark()), gradient="reward")
pair = types.RewardSet((Dark(), Dark()), (2.0, 1.0), "zscore")
made("two rewards", reward=thing("pair", pair), steps=1)
made("unread", reward=reward("agreement"), prompt="", steps=2)
made("broken", reward=judging(Dark(broken_at=3)), steps=6)
made("abstains", reward=judging(Dark(abstain_at=3)), steps=6)
for name, cfg in (("reward", 1.0), ("estimated", 1.0), ("reward", 2.0)):
    counting = Counting(loaded["model"])
    found = run(graph(**nodes_of(counting, cfg), gradient=name, steps=2, probes=3), **MADE).values
    answer[f"counted {name} {cfg:g}"] = {"rows": list(counting.rows), "report": found["report"]}

dark = Dark(stop_at=3)
nodes = graph(reward=judging(dark), steps=12, prompt=["words", 0])
nodes["words"] = thing("words", PROMPT)
reports = []
for stop_at in (3, 2, 0):
    # The same graph, whose results stay cached as in the server.
    dark.stop_at, dark.calls = stop_at, 0
    ran = comfy_side.run_prompt(nodes, MADE, fresh=False)
    assert ran.ok, ran
    reports.append(ran.values["report"])
answer["stopped"] = reports
counting.stops = True
answer["nothing yet"] = spoken(graph(**nodes_of(counting, 1.0)))
answer["slopes"] = {"i2i": slopes(**image), "guided": slopes(guider=guided(2.0), reward=judging(Dark()))}
answer["other size"] = ""
try:
    first["noise"].generate_noise({"samples": torch.zeros(1, 16, 4, 4)})
except ValueError as error:
    answer["other size"] = str(error)
answer["unchanged"] = torch.equal(before, again(graph(), None))
answer["refused"] = {name: spoken(graph(**changes)) for name, changes in given["refused"].items()}
no_slope = Flat(loaded["vae"], process_output=blind)
long = torch.linspace(1, 0, 18)
answer["refused"] |= {
    "no slope": spoken(graph(vae=["flat", 0], flat=thing("flat", no_slope))),
    "no network": spoken(graph(vae=["flat", 0], flat=thing("none", Flat(loaded["vae"], patcher=None)))),
    "long": spoken(graph(sigmas=thing("long", long))),
    "none": spoken(graph(gradient="reward", reward=reward("jpeg"))),
}
comfy_side.answer(answer, tensors)
