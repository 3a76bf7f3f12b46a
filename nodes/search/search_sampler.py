"""Search Sampler: spend a budget of forwards to find an image that a reward likes."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, ClassVar

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ...comfy_g2rpo.rewards.mixing import mix
from ...comfy_g2rpo.sampling.search import Ask, Result, Space, Stopped, Told, answer, search
from ...comfy_g2rpo.sampling.search_methods import METHODS
from ...comfy_g2rpo.sampling.search_settings import READS, SearchSettings
from ..inputs.checks import blamed, check_inputs
from ..inputs.finding import offered
from ..inputs.judging import (
    MAX_IMAGES,
    check_channels,
    checked_prompt,
    decode_latents,
    judge,
    judgement_notes,
)
from ..inputs.widgets import (
    Progress,
    announce,
    int_input,
    int_list,
    option_input,
    output,
    reward_input,
    show,
    slots_input,
    text_area,
)
from ..model.comfy_policy import check_flow
from ..model.conditioning import first_row
from ..sampling import MAX_WORK, MISFIT, Inside, check_ends, one_latent, start_noise
from ..types import SAMPLING, RewardSet

MAX_BUDGET = 1_000_000
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

    def through(
        self, method: str, settings: SearchSettings, budget: int, keep: int, others: bool
    ) -> tuple[Result | None, str]:
        """Search; return what was found and a report. With `others` there, a stop may find nothing."""
        begin, total = time.perf_counter(), budget // price_of(self.guider)
        try:
            result = search(METHODS[method], self.space(), settings, total, self.evaluate, keep)
        except Interrupted:
            if not others:
                raise
            self.stopped = True
            return None, "stopped by you before its first image"
        return result, described(result, method, budget, self, time.perf_counter() - begin)

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


TITLES = {name: name.replace("_", " ") for name in READS}
NAMES = {title: name for name, title in TITLES.items()}
SETTINGS = {field.name: field for field in dataclasses.fields(SearchSettings)}


LATER = ("score",)
"""Settings that saved graphs of the first version lack: their widgets come last."""


def later_input(name: str) -> io.Input:
    """Make the input of a choice that came later."""
    rule, default = SETTINGS[name].metadata, SETTINGS[name].default
    options = list(rule["choices"])
    return io.Combo.Input(name, options=options, default=default, optional=True, tooltip=rule["help"])


def settings_of(given: dict[str, Any]) -> SearchSettings:
    """Read the inputs that are settings."""
    lists = {
        name: int_list(given[name], name, 0, 999)
        for name, field in SETTINGS.items()
        if isinstance(field.default, tuple)
    }
    return SearchSettings(**{name: given[name] for name in SETTINGS} | lists)


def described(result: Result, method: str, budget: int, hunt: Hunt, seconds: float) -> str:
    """Say in a few lines what a search found, and what it took."""
    best, spent = result.found[0], result.forwards * price_of(hunt.guider)
    lines = [
        f"best {best.score:.4g}: {best.name}",
        f"ordinary sampling: {result.given:.4g}" if result.given == result.given else "",
        f"{TITLES[method]}: {spent} of {budget} forwards, {result.scored} images judged, {seconds:.1f} s",
        "stopped by you; this is the best so far" if hunt.stopped else "",
        f"{len(result.found)} images, not {result.keep}: no more were finished"
        * (len(result.found) < result.keep),
        *hunt.notes(),
    ]
    ignored = [name for name in SETTINGS if name not in READS[method]]
    return "\n".join(filter(None, [*lines, f"not read by {TITLES[method]}: {', '.join(ignored)}"]))


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


class SearchSampler(io.ComfyNode):
    """The best images that a budget of forwards finds."""

    stopped: ClassVar[list[dict[str, Any]]] = []
    """The widgets of searches that were stopped, whose results are no whole ones."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_SearchSampler",
            display_name="Search Sampler",
            category=SAMPLING,
            description="Find better images without training: spend a number of forwards on looking for "
            "images that the reward likes. Cancel keeps the best so far.",
            inputs=[
                *image_inputs(
                    "The first start noise; its seed also draws all others.",
                    "The noise levels of an image, falling to 0: from any scheduler node.",
                    "Images are decoded and judged while searching.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(TITLES.values()),
                    default=TITLES["coarse_first"],
                    tooltip="How to search. coarse first is a good start; funnel and particles judge more "
                    "images and find more where that is cheap; best of n is the plain way.",
                ),
                int_input(
                    "budget",
                    128,
                    1,
                    MAX_BUDGET,
                    "Forwards of the model to spend: an image takes one per step, with guidance two.",
                ),
                int_input("keep", 1, 1, MAX_IMAGES, "How many images to return, the best first."),
                *(option_input(field) for name, field in SETTINGS.items() if name not in LATER),
                slots_input("Latents evaluated at a time: more are faster until memory is full.", 256),
                *(later_input(name) for name in LATER),
            ],
            outputs=[
                output(io.Latent, "found", "The best images' latents, best first.", shown="latents"),
                output(io.Image, "images", "The same, decoded."),
                output(io.Float, "scores", "Their scores.", many=True),
                output(io.String, "report", "What was spent, and where the best image comes from."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "best of n, search, particles, reward guidance, better images, without training, "
            "inference time scaling",
            rare=", ".join([*SETTINGS, "slots"]),
        )

    @classmethod
    def fingerprint_inputs(cls, **typed: Any) -> int:
        """Return what changes whenever a search is stopped, so that the next run goes all the way.

        What comes over a link is not known here, so that it may be anything.
        """
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
        method: str,
        budget: int,
        keep: int,
        steps: str,
        eta: float,
        kernel: str,
        group: int,
        stride: int,
        strength: float,
        judge_at: str,
        iterations: int,
        mutation: float,
        pull: float,
        slots: int,
        score: str = "reward",
    ) -> io.NodeOutput:
        """Search."""
        given = check_inputs(cls, locals())
        settings = settings_of(given)
        check_flow(guider.model_patcher)
        check_ends(sigmas, "a search")
        latents = [
            {**row, "samples": one_latent(guider.model_patcher, row)} for row in each_row(latent_image)
        ]
        samples = torch.cat([latent["samples"] for latent in latents])
        check_channels(vae, samples.shape[1], "the model")
        settings.check(NAMES[method], price_of(guider) > 1)
        price, count, positions = price_of(guider), len(samples), math.prod(samples.shape[2:])
        check_budget(budget, len(sigmas) - 1, price, positions * count)
        noises = start_noise(noise, {**latent_image, "samples": samples}).split(1)
        progress = Progress(cls, budget // price * count)
        judged = (vae, reward, checked_prompt(prompt), slots, progress)
        announce(cls, f"{method}, up to {budget} forwards" + f" for each of {count} images" * (count > 1))
        results, reports = [], []
        for i, (latent, start) in enumerate(zip(latents, noises, strict=True)):
            hunt = Hunt(guider, sigmas, latent, start, noise.seed + i, *judged)
            result, report = hunt.through(NAMES[method], settings, budget, keep, bool(results))
            results += [result] if result else []
            reports.append(f"image {i + 1} of {count}\n{report}" if count > 1 else report)
            if hunt.stopped:
                cls.stopped.append({k: v for k, v in given.items() if isinstance(v, (str, int, float))})
                break
        found = [one for result in results for one in result.found]
        made = guider.model_patcher.model.process_latent_out(torch.stack([one.latent for one in found]))
        images = torch.cat([decode_latents(vae, part) for part in made.split(slots)]).nan_to_num(0.0)
        text = "\n\n".join(reports)
        return io.NodeOutput(
            {"samples": made}, images, [one.score for one in found], text, ui=show(cls, text)
        )


def each_row(latent: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a LATENT's images, each as a LATENT; one that is none is left to what checks it."""
    samples = latent.get("samples")
    if not isinstance(samples, Tensor) or getattr(samples, "is_nested", False) or samples.ndim < 4:
        return [latent]
    if len(samples) > MAX_IMAGES:
        raise ValueError(f"latent_image: it has {len(samples)} images; at most {MAX_IMAGES} are allowed")
    return [{**latent, "samples": row} for row in samples.split(1)] or [latent]


def check_budget(budget: int, num_steps: int, price: int, positions: int) -> None:
    """Raise ValueError where a budget does not pay for an image, or is more work than anyone means."""
    least = num_steps * price
    if budget < least:
        each = f" of {price} forwards with guidance" if price > 1 else ""
        raise ValueError(
            f"budget is {budget}; one image takes {least} forwards ({num_steps} steps{each}): raise it, or "
            "connect a scheduler with fewer steps"
        )
    if budget * positions > MAX_WORK:
        raise ValueError(
            f"budget: {budget} forwards × {positions} latent positions are above the limit of {MAX_WORK}; "
            "lower it, or use a smaller latent"
        )


NODES: list[type[io.ComfyNode]] = [SearchSampler]
