"""Search Sampler: spend a budget of forwards to find an image that a reward likes."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, ClassVar

import torch
from comfy_api.latest import io
from torch import Tensor

from ...comfy_g2rpo.sampling.search import Result, search
from ...comfy_g2rpo.sampling.search_methods import METHODS
from ...comfy_g2rpo.sampling.search_settings import READS, SearchSettings
from ..inputs.checks import check_inputs
from ..inputs.finding import offered
from ..inputs.judging import MAX_IMAGES, check_channels, checked_prompt, decode_latents
from ..inputs.widgets import Progress, announce, int_input, int_list, option_input, output, show, slots_input
from ..model.comfy_policy import check_flow
from ..sampling import MAX_WORK, check_ends, one_latent, start_noise
from ..types import SAMPLING, RewardSet
from .hunt import Hunt, Interrupted, image_inputs, price_of, stopped_before

MAX_BUDGET = 1_000_000
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
            result, report = searched(hunt, NAMES[method], settings, budget, keep, bool(results))
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


def searched(
    hunt: Hunt, method: str, settings: SearchSettings, budget: int, keep: int, others: bool
) -> tuple[Result | None, str]:
    """Search; return what was found and a report. With `others` there, a stop may find nothing."""
    begin, total = time.perf_counter(), budget // price_of(hunt.guider)
    try:
        result = search(METHODS[method], hunt.space(), settings, total, hunt.evaluate, keep)
    except Interrupted:
        if not others:
            raise
        hunt.stopped = True
        return None, "stopped by you before its first image"
    return result, described(result, method, budget, hunt, time.perf_counter() - begin)


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
