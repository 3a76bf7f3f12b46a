"""Optimize Noise: move the start noise of an image along a reward's gradient."""

from __future__ import annotations

import copy
import math
import time
from typing import Any, ClassVar

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ...comfy_g2rpo.rewards.mixing import mix
from ...comfy_g2rpo.sampling.noise_optimizing import (
    FLOOR,
    LENGTHS,
    MAX_STEPS,
    Climb,
    Optimised,
    Seen,
    backpropagate,
    estimated_gradient,
    improbability,
    length,
    nearby,
    optimise,
    shuffles,
)
from ...comfy_g2rpo.sampling.search import Ask, Stopped
from ..inputs.checks import check_inputs
from ..inputs.finding import offered
from ..inputs.judging import check_channels, checked_prompt, decode_latents, judge
from ..inputs.widgets import Progress, announce, int_input, output, show
from ..model.adapter import is_large
from ..model.autograd import gradients
from ..model.comfy_policy import GraphPolicy, check_flow, resident
from ..model.decoder_gradient import latent_gradient
from ..sampling import MAX_WORK, check_ends, one_latent, start_noise
from ..types import SAMPLING, RewardSet
from .hunt import Hunt, Interrupted, image_inputs, price_of, single_mix, stopped_before

BACKWARD = 2
"""Forwards that a step of the sampler counts on the way back: it is computed again, then differentiated."""
SHOWN_SCORES = 12
SLOTS = 8
"""Probes that share a forward."""
GRADIENTS = ("auto", "reward", "estimated")


class KeptNoise:
    """Core's NOISE: a noise that is there, for the latent that it was made for."""

    def __init__(self, noise: Tensor, seed: int) -> None:
        self.noise, self.seed = noise, seed

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Return the noise."""
        shape = latent["samples"].shape
        if shape != self.noise.shape:
            raise ValueError(
                f"noise: it was optimised for a latent {list(self.noise.shape)} and got one of "
                f"{list(shape)}; connect the same latent as there"
            )
        return self.noise.clone()


class Gradients:
    """What an optimised noise's image scores in a graph, and which way its noise should go."""

    def __init__(self, hunt: Hunt, through: bool, probes: int) -> None:
        self.hunt, self.through, self.probes = hunt, through, probes
        self.space, self.forwards, self.judged = hunt.space(), 0, 0
        guider = copy.copy(hunt.guider)
        guider.model_patcher = resident(guider.model_patcher)
        self.policy = GraphPolicy(guider, checkpoint=is_large(guider.model_patcher))

    def look(self, noise: Tensor, number: int, wanted: bool) -> Seen:
        """Draw and judge a noise's image, and differentiate its score if that is wanted."""
        count = self.space.num_steps
        ask = Ask(self.start(noise), tuple(range(count + 1)), kept=True)
        with torch.inference_mode():
            told = self.hunt.evaluate(ask)
        self.forwards += count
        self.judged += 1
        score = told.scores[0].item()
        if not wanted or math.isnan(score):
            return Seen(score, None)
        try:
            return Seen(score, self.gradient(noise, number, told.x[0], told.latents, score))
        except (Interrupted, Stopped):
            self.hunt.stopped = True
            # The image that was just judged may be the best.
            return Seen(score, None)

    def start(self, noise: Tensor) -> Tensor:
        """Return where sampling starts from a noise."""
        with torch.inference_mode():
            return self.space.mix(noise)

    def gradient(self, noise: Tensor, number: int, states: Tensor, end: Tensor, score: float) -> Tensor:
        """Return the score's gradient with respect to the noise, through the decoder and the sampler."""
        of_image = self.of_image if self.through else self.estimate(noise, number, end, score)
        model = self.hunt.guider.model_patcher
        back, _ = latent_gradient(model, self.hunt.vae, end, of_image)
        sigmas = self.space.sigmas.clone()

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            made = self.policy.velocity(x, sigma, [None]).cpu()
            if not made.requires_grad:
                raise ValueError(
                    "guider: its model has no gradient; connect the model without what runs it for "
                    "inference only"
                )
            self.hunt.progress.done(BACKWARD)
            self.forwards += BACKWARD
            return made

        with self.policy.training():
            steps = list(states.clone()[:, None])
            made = backpropagate(velocity, steps, sigmas, back, self.hunt.progress.check)
        # The start is σ₀ · noise + (1 − σ₀) · latent.
        return made * sigmas[0]

    def of_image(self, image: Tensor) -> Tensor:
        """Return the reward's own gradient with respect to an image [1, H, W, 3]."""
        reward = self.hunt.reward
        with gradients():
            given = image.detach().clone().requires_grad_()
            # Weights of 0 do not count.
            used = [i for i, weight in enumerate(reward.weights) if weight]
            found = [reward.rewards[i].differentiable(given, [self.hunt.prompt]).cpu() for i in used]
            weights = [reward.weights[i] for i in used]
            score = mix(torch.stack([each.float() for each in found]), weights, single_mix(reward))
            return torch.autograd.grad(score.sum(), given)[0]

    def estimate(self, noise: Tensor, number: int, end: Tensor, score: float) -> Any:
        """Look at the images of noises nearby; return what gives the gradient with respect to an image."""
        hunt, count = self.hunt, self.space.num_steps
        around = nearby(noise, self.probes, hunt.seed, number)
        model = hunt.guider.model_patcher.model
        with torch.inference_mode():
            told = hunt.evaluate(Ask(self.start(around), tuple(range(count + 1)), judged=False))
            self.forwards += count * self.probes
            raw = model.process_latent_out(torch.cat([end, told.latents]))
            images = torch.cat([decode_latents(hunt.vae, part) for part in raw.split(hunt.slots)])
            scores = judge(hunt.reward, list(images[1:]), [hunt.prompt] * self.probes)
            scores = mix(scores, hunt.reward.weights, single_mix(hunt.reward), hunt.reward.gates)
            self.judged += self.probes
            sound = images[1:].flatten(1).isfinite().all(1)
            made = estimated_gradient(images[1:][sound], images[0], scores[sound], score)
        wanted = made.clone()[None]
        return lambda image: wanted


def goes_through(reward: RewardSet, gradient: str) -> bool:
    """Return whether the rewards' own gradient is taken; raise ValueError where that is asked for in vain."""
    used = [each for each, weight in zip(reward.rewards, reward.weights, strict=True) if weight]
    without = [each.name for each in used if not each.gradient]
    if gradient == "reward" and without:
        raise ValueError(
            f"gradient is reward, and {', '.join(without)} has none; choose estimated, or auto, which "
            "estimates where it must"
        )
    return gradient == "reward" or (gradient == "auto" and not without)


def check_work(sigmas: Tensor, steps: int, probes: int, price: int, positions: int) -> int:
    """Return the forwards of the whole; raise ValueError where they are more than anyone means."""
    count = len(sigmas) - 1
    if count > MAX_STEPS:
        raise ValueError(
            f"sigmas: it holds {count} steps, and the gradient goes back through every one; at most "
            f"{MAX_STEPS} are allowed, connect a scheduler with fewer"
        )
    # The last image is judged, and at the end the best one is drawn once more.
    total = count * (2 + steps * (1 + probes + BACKWARD))
    if total * price * positions > MAX_WORK:
        raise ValueError(
            f"steps: {total * price} forwards × {positions} latent positions are above the limit of "
            f"{MAX_WORK}; lower it, take fewer probes, or use a smaller latent"
        )
    return total


def described(made: Optimised, views: Gradients, climb: Climb, seconds: float) -> str:
    """Say in a few lines what came out, and what it took."""
    hunt, count = views.hunt, len(made.scores)
    way = "the reward's gradient" if views.through else f"a gradient estimated from {views.probes} probes"
    spent = views.forwards * price_of(hunt.guider)
    flat = made.noise.flatten()
    unlikely = improbability(flat, shuffles(len(flat), "report"))
    every = max(1, math.ceil(count / SHOWN_SCORES))
    shown = ", ".join(f"{score:.4g}" for score in made.scores[::every])
    lines = [
        f"best {made.score:.4g}: "
        + (f"step {made.step} of {climb.steps}" if made.step else "the given noise; no step was better"),
        f"ordinary sampling: {made.scores[0]:.4g}" * (made.scores[0] == made.scores[0]),
        f"{way}: {spent} forwards (a backward counts 2), {views.judged} images judged, {seconds:.1f} s",
        f"noise: {unlikely:.4g} unlikely ({FLOOR:.4g} is the least), length {length(flat):.3f} (kept within "
        f"{LENGTHS[0]:g} to {LENGTHS[1]:g})",
        f"scores{f' of every {every}. step' if every > 1 else ' by step'}: {shown}",
        f"ended early: {made.ended}; this is the best before" if made.ended else "",
        "stopped by you; this is the best so far" if hunt.stopped else "",
        *hunt.notes(),
    ]
    return "\n".join(filter(None, lines))


def climb_inputs() -> list[io.Input]:
    """Make the inputs of how the noise is changed."""
    return [
        int_input("steps", 20, 1, 500, "How often the noise is changed. More find more, and cost more."),
        io.Float.Input(
            "learning_rate",
            default=0.05,
            min=1e-5,
            max=10.0,
            step=0.01,
            round=False,
            tooltip="How far the noise moves in a step. Lower it where scores jump up and down.",
        ),
        io.Combo.Input(
            "gradient",
            options=list(GRADIENTS),
            default=GRADIENTS[0],
            tooltip="reward: the reward's own gradient, which is exact. estimated: from probes, for "
            "any reward. auto takes the first where there is one.",
        ),
        int_input(
            "probes",
            4,
            1,
            64,
            "For an estimated gradient: images drawn nearby in every step. More are surer and cost more.",
        ),
        io.Float.Input(
            "regularise",
            default=0.1,
            min=0.0,
            max=100.0,
            step=0.01,
            round=False,
            tooltip="How strongly the noise is kept like ordinary noise. At 0 images may break.",
        ),
    ]


class OptimizeNoise(io.ComfyNode):
    """The start noise that a reward's gradient leads to."""

    stopped: ClassVar[list[dict[str, Any]]] = []
    """The widgets of runs that were stopped, whose results are no whole ones."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_OptimizeNoise",
            display_name="Optimize Noise",
            category=SAMPLING,
            description="Experimental: changes the start noise of one image step by step, along the gradient "
            "of a reward. Search Sampler usually finds more for the same time. Cancel keeps the best so far.",
            inputs=[
                *image_inputs(
                    "The start noise that is changed; its seed draws all else.",
                    "The noise levels of an image, falling to 0: from any scheduler node, at most "
                    f"{MAX_STEPS} steps.",
                    "Images are decoded in every step; the gradient goes through it.",
                ),
                *climb_inputs(),
            ],
            outputs=[
                output(
                    io.Noise, "optimised", "The noise, for SamplerCustomAdvanced with euler.", shown="noise"
                ),
                output(io.Latent, "found", "Its image's latent.", shown="latent"),
                output(io.Image, "image", "The same, decoded."),
                output(io.String, "report", "Scores, what was spent, and whether the noise is still one."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "dno, reward gradient, noise optimization, better images, without training",
            rare="probes, regularise",
        )

    @classmethod
    def fingerprint_inputs(cls, **typed: Any) -> int:
        """Return what changes whenever a run is stopped, so that the next one goes all the way."""
        return stopped_before(cls.stopped, typed)

    @classmethod
    def execute(
        cls,
        guider: Any,
        noise: Any,
        sigmas: Tensor,
        latent_image: dict[str, Any],
        vae: Any,
        reward: RewardSet,
        prompt: str,
        steps: int,
        learning_rate: float,
        gradient: str,
        probes: int,
        regularise: float,
    ) -> io.NodeOutput:
        """Optimise."""
        given = check_inputs(cls, locals())
        check_flow(guider.model_patcher)
        check_ends(sigmas, "the block")
        samples = one_latent(guider.model_patcher, latent_image)
        check_channels(vae, samples.shape[1], "the model")
        through = goes_through(reward, gradient)
        price, positions = price_of(guider), math.prod(samples.shape[2:])
        total = check_work(sigmas, steps, 0 if through else probes, price, positions)
        latent = {**latent_image, "samples": samples}
        start, text = start_noise(noise, latent), checked_prompt(prompt)
        progress = Progress(cls, total)
        hunt = Hunt(guider, sigmas, latent, start, noise.seed, vae, reward, text, SLOTS, progress)
        announce(cls, f"up to {total * price} forwards")
        begin, climb = time.perf_counter(), Climb(steps, learning_rate, regularise)
        views = Gradients(hunt, through, probes)
        with torch.inference_mode(False), torch.no_grad():
            made = optimise(start, climb, noise.seed, views.look)
        if hunt.stopped:
            cls.stopped.append({k: v for k, v in given.items() if isinstance(v, (str, int, float))})
        kept = KeptNoise(made.noise, noise.seed)
        found = drawn(hunt, kept)
        views.forwards += views.space.num_steps
        report = described(made, views, climb, time.perf_counter() - begin)
        image = decode_latents(vae, found).nan_to_num(0.0)
        return io.NodeOutput(kept, {"samples": found}, image, report, ui=show(cls, report))


def drawn(hunt: Hunt, noise: KeptNoise) -> Tensor:
    """Sample a noise as an ordinary sampler will."""
    euler = comfy.samplers.sampler_object("euler")
    start = noise.generate_noise(hunt.latent)
    made = copy.copy(hunt.guider).sample(
        start, hunt.latent["samples"], euler, hunt.sigmas, disable_pbar=True, seed=noise.seed
    )
    return made.to(comfy.model_management.intermediate_device())


NODES: list[type[io.ComfyNode]] = [OptimizeNoise]
"""The block that differentiates through the sampler."""
