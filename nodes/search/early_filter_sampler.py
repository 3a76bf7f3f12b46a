"""Early Filter Sampler: drop images early by what guidance itself says; no reward is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ...comfy_g2rpo.sampling.early_filter import MEASURES, forwards, largest, squared_gap, steps_with_all
from ..inputs.checks import blamed, check_inputs
from ..inputs.finding import offered
from ..inputs.widgets import announce, int_input
from ..model.comfy_policy import check_flow
from ..model.guidance_gap import Gauge, check_guided, rows_of
from ..sampling import MISFIT, check_fit, check_sigmas
from ..types import SAMPLING
from .hunt import price_of

MAX_KEPT = 256
REMEMBERS = (
    "guider: its model took the whole batch, but not the rows that are kept; a patch on it may remember the "
    "batch: remove it, or set the momentum of APG to 0"
)
EULER = comfy.k_diffusion.sampling.sample_euler
Heard = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class Filtering:
    """Euler's steps, first for all rows of a batch, then for the rows that guidance moves most, best first.

    Core calls it as it calls every sampler's function: `model` is core's wrapper around the guider, which
    also puts an image back where a mask protects it.
    """

    keep: int
    after: float
    measure: str
    block: type[io.ComfyNode]
    __name__ = "early_filter"

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Heard | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Sample from states x [N, …] to [keep, …]."""
        guider, num_steps, rows = model.inner_model, len(sigmas) - 1, len(x)
        check_flow(guider.model_patcher)
        check_sigmas(sigmas)
        check_fit(guider.model_patcher, x)
        # Older cores sample a latent of half precision in its own, where steps overflow.
        x = x.float()
        if rows <= self.keep:
            announce(self.block, f"keep is {self.keep} and the batch has {rows}: all are kept, as they come")
            with blamed(MISFIT):
                return EULER(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)
        check_guided(guider)
        gauge, until = Gauge(guider), steps_with_all(self.after, num_steps)
        options = gauge.attached(extra_args["model_options"])
        mask = extra_args.get("denoise_mask")
        gaps = torch.zeros(rows, dtype=torch.float64)

        def heard(step: dict[str, Any]) -> None:
            gaps.add_(self.heard(gauge, rows, mask))
            if callback and step["i"] + 1 == until:
                # From here on the first row, which previews show, is the best one.
                best = largest(gaps, self.keep)
                step = {**step, "x": step["x"][best], "denoised": step["denoised"][best]}
            if callback:
                callback(step)

        given = {**extra_args, "model_options": options}
        with blamed(MISFIT):
            x = EULER(model, x, sigmas[: until + 1], extra_args=given, callback=heard, disable=disable)
        kept = largest(gaps, self.keep)
        announce(self.block, self.described(guider, gaps, kept, until, num_steps))
        if until == num_steps:
            return x[kept]
        return self.finish(model, x[kept], kept, sigmas, until, extra_args, callback, disable)

    def heard(self, gauge: Gauge, rows: int, mask: Tensor | None) -> Tensor:
        """Return what a step adds to every row's gap [N]."""
        found = sum(squared_gap(gap, sigma, self.measure, mask) for gap, sigma in gauge.seen)
        gauge.seen.clear()
        if not isinstance(found, Tensor) or len(found) != rows:
            raise ValueError(
                "guider: it does not show its predictions with and without the prompt; connect CFGGuider"
            )
        return found

    def finish(
        self,
        model: Any,
        x: Tensor,
        kept: list[int],
        sigmas: Tensor,
        until: int,
        extra_args: dict[str, Any],
        callback: Heard | None,
        disable: bool | None,
    ) -> Tensor:
        """Take the other steps with the kept rows [K, …], each with its own conditioning, mask and image."""
        guider, mask = model.inner_model, extra_args.get("denoise_mask")
        conds, held = guider.conds, {}
        guider.conds = rows_of(conds, torch.tensor(kept))
        if mask is not None:
            mask, held = mask[kept], {name: getattr(model, name) for name in ("noise", "latent_image")}

        def heard(step: dict[str, Any]) -> None:
            if step["denoised"].shape != step["x"].shape:
                raise ValueError(REMEMBERS)
            if callback:
                callback({**step, "i": step["i"] + until})

        try:
            for name, value in held.items():
                setattr(model, name, value[kept])
            given = {**extra_args, "denoise_mask": mask}
            with blamed(REMEMBERS):
                return EULER(model, x, sigmas[until:], extra_args=given, callback=heard, disable=disable)
        finally:
            guider.conds = conds
            for name, value in held.items():
                setattr(model, name, value)

    def described(self, guider: Any, gaps: Tensor, kept: list[int], steps: int, of: int) -> str:
        """Say which rows are kept, and what it all takes."""
        price = price_of(guider)
        total = forwards(len(gaps), self.keep, steps, of, len(guider.conds), price)
        rows = ", ".join(f"{row} ({gaps[row]:.3g})" for row in kept)
        lines = [
            f"{len(kept)} of {len(gaps)} kept after {steps} of {of} steps, {total} forwards",
            f"rows of the batch, counted from 0, with their gaps: {rows}; all: {gaps.mean():.3g}",
            f"guidance is 1: the first {steps} steps take the negative prompt, too" * (price == 1),
        ]
        return "\n".join(filter(None, lines))


class EarlyFilterSampler(io.ComfyNode):
    """A sampler that returns the rows of a batch that guidance moves most."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Declare the block."""
        schema = io.Schema(
            node_id="G2RPO_EarlyFilter",
            display_name="Early Filter Sampler",
            category=SAMPLING,
            description="Begin many images, and finish only some: after a few steps those are dropped that "
            "guidance moves least, which mostly follow the prompt worst. No reward is needed.",
            inputs=[
                int_input("keep", 4, 1, MAX_KEPT, "How many images of the batch to finish, the best first."),
                io.Float.Input(
                    "after",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=False,
                    tooltip="The share of the steps that all images take. More choose better and cost more.",
                ),
                io.Combo.Input(
                    "measure",
                    options=list(MEASURES),
                    default="velocity",
                    tooltip="What guidance's effect is measured on: the velocity, the predicted noise (later "
                    "steps count more) or the predicted clean image (earlier steps count more). Keep "
                    "velocity.",
                ),
            ],
            outputs=[
                io.Sampler.Output(
                    tooltip="For SamplerCustomAdvanced, with CFGGuider and an empty latent of many images."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )
        return offered(
            schema,
            "cfg rejection, early stopping, best of n, batch, seeds, without training, filter",
            rare="measure",
        )

    @classmethod
    def execute(cls, keep: int, after: float, measure: str) -> io.NodeOutput:
        """Make the sampler."""
        check_inputs(cls, locals())
        return io.NodeOutput(comfy.samplers.KSAMPLER(Filtering(keep, after, measure, cls)))


NODES: list[type[io.ComfyNode]] = [EarlyFilterSampler]
