"""What the blocks that search share: requests as samplers, images judged as they come, what a stop leaves."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ...comfy_g2rpo.rewards.mixing import mix
from ...comfy_g2rpo.sampling.search import Ask, Space, Stopped, Told, answer
from ..inputs.checks import blamed
from ..inputs.judging import decode_latents, judge, judgement_notes
from ..inputs.widgets import Progress, reward_input, text_area
from ..model.conditioning import first_row
from ..sampling import MISFIT, Inside
from ..types import RewardSet

Interrupted = comfy.model_management.InterruptProcessingException


class Walks(comfy.samplers.Sampler):
    """A request of a search as a sampler, inside all that core sets up around one; it keeps `told`."""

    def __init__(self, ask: Ask, slots: int, progress: Progress) -> None:
        self.ask, self.slots, self.progress = ask, slots, progress
        self.told: Told | None = None

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Return the ends of the walks [n, …]."""
        self.told = answer(
            self.ask._replace(start=self.ask.start.to(noise.device)),
            Inside(model_wrap, extra_args, lambda x, *_: self.progress.done(len(x))),
            first_row(model_wrap.conds),
            sigmas.cpu().float(),
            lambda latents: torch.full((len(latents),), math.nan),
            self.slots,
            self.progress.check,
        )
        return self.told.latents


@dataclasses.dataclass
class Hunt:
    """A search in a graph: what evaluates its requests, and what it has seen so far."""

    guider: Any
    sigmas: Tensor
    latent: dict[str, Any]
    noise: Tensor  # [1, …]
    seed: int
    vae: Any
    reward: RewardSet
    prompt: str
    slots: int
    progress: Progress
    best: float = -math.inf
    stopped: bool = False
    seen: list[Tensor] = dataclasses.field(default_factory=list)
    """Scores [R, n] of all that was judged."""

    def space(self) -> Space:
        """Return where the search looks; starts are mixed with the latent as core mixes them."""
        patcher = self.guider.model_patcher
        samples = self.latent["samples"].float()
        # Core leaves an empty latent as it is, too.
        image = patcher.model.process_latent_in(samples) if samples.count_nonzero() else samples
        sampling = patcher.get_model_object("model_sampling")

        def mixed(noise: Tensor) -> Tensor:
            return sampling.noise_scaling(self.sigmas[0], noise, image.expand_as(noise))

        return Space(self.sigmas.cpu().float(), self.noise[0].float().cpu(), self.seed, mixed)

    def evaluate(self, ask: Ask) -> Told:
        """Sample a request, decode and judge its images; an interruption ends the search."""
        if self.stopped:
            raise Stopped
        walks = Walks(ask, self.slots, self.progress)
        rows = (min(self.slots, len(ask.start)), *[1] * (self.noise.ndim - 1))
        samples = self.latent["samples"].repeat(rows)
        try:
            with blamed(MISFIT):
                ends = copy.copy(self.guider).sample(
                    self.noise.repeat(rows), samples, walks, self.sigmas, disable_pbar=True, seed=self.seed
                )
        except Interrupted as stop:
            if self.best == -math.inf:
                raise
            self.stopped = True
            raise Stopped from stop
        told = Told(*(part.cpu() for part in walks.told))
        return told._replace(scores=self.judged(ends)) if ask.judged else told

    def judged(self, latents: Tensor) -> Tensor:
        """Score LATENT samples [n, …] as [n], some at a time; an interruption leaves the rest NaN."""
        found = torch.full((len(latents),), math.nan, dtype=torch.float64)
        for first in range(0, len(latents), self.slots):
            part = slice(first, first + self.slots)
            try:
                found[part] = self.scored(latents[part])
            except Interrupted:
                if self.best == -math.inf:
                    raise
                self.stopped = True
                break
        return found

    def scored(self, latents: Tensor) -> Tensor:
        """Score LATENT samples [n, …] as [n]; show the best so far on the node."""
        images = decode_latents(self.vae, latents)
        scores = judge(self.reward, list(images), [self.prompt] * len(images))
        self.seen.append(scores)
        found = mix(scores, self.reward.weights, single_mix(self.reward), self.reward.gates).double()
        best = found.nan_to_num(nan=-math.inf).argmax()
        if found[best] > self.best:
            self.best = found[best].item()
            self.progress.picture(images[best])
        return found

    def notes(self) -> list[str]:
        """Note what was not judged, and a mix that has no meaning here."""
        scores = torch.cat(self.seen, 1)
        mixed = single_mix(self.reward)
        other = len(scores) > 1 and mixed != self.reward.mix
        told = f"{self.reward.mix} compares images of a group; a search takes the {mixed} of the scores"
        return [*[told] * other, *judgement_notes(self.reward, scores, [self.prompt] * scores.shape[1])]


def single_mix(reward: RewardSet) -> str:
    """Return how several rewards become one where an image stands by itself: their sum, or the minimum."""
    return "minimum" if reward.mix == "minimum" else "sum"


def price_of(guider: Any) -> int:
    """Return the forwards that core makes of one latent: one per prompt that guidance weighs up."""
    kinds = len(guider.original_conds)
    return 1 if kinds == 2 and math.isclose(getattr(guider, "cfg", 0.0), 1.0) else kinds


def image_inputs(noise: str, sigmas: str, vae: str) -> list[io.Input]:
    """Make the inputs of an image that is drawn and judged, with the tooltips of three of them."""
    return [
        io.Guider.Input(
            "guider", tooltip="Model, prompts and guidance; from any guider node, with a flow model."
        ),
        io.Noise.Input("noise", tooltip=noise),
        io.Sigmas.Input("sigmas", tooltip=sigmas),
        io.Latent.Input(
            "latent_image",
            tooltip="An empty latent of one image, or one to start from at a lower first noise level.",
        ),
        io.Vae.Input("vae", tooltip=vae),
        reward_input(),
        text_area("prompt", "What the image should show, if the reward reads prompts."),
    ]


def stopped_before(stopped: list[dict[str, Any]], typed: dict[str, Any]) -> int:
    """Count the runs that were stopped and that these widgets may belong to: those over links are None."""
    return sum(
        all(typed.get(name) in (None, value) for name, value in widgets.items()) for widgets in stopped
    )
