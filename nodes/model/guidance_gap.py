"""How far guidance moves every row, read where core has both predictions at hand."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_patcher
import comfy.samplers
from torch import Tensor

from ...comfy_g2rpo.sampling.early_filter import velocity_gap
from .conditioning import Conds, mapped

NO_GUIDANCE = (
    "guider: it has no negative prompt, so that guidance says nothing; connect CFGGuider with a negative "
    "prompt. Models that take guidance as a number, such as FLUX.1 dev, have no such gap"
)


def check_guided(guider: Any) -> None:
    """Raise ValueError where a guider weighs up only one prompt."""
    if len(guider.conds) < 2:
        raise ValueError(NO_GUIDANCE)


class Gauge:
    """Keeps Δv = v_c − v_∅ of every evaluation; `attached` makes the model options that it listens by."""

    def __init__(self, guider: Any) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        """Δv [B, …] and σ [B] per evaluation."""
        self.plain = getattr(type(guider), "predict_noise", None) is comfy.samplers.CFGGuider.predict_noise
        self.raw: tuple[Tensor, Tensor] | None = None
        self.added = False
        """Whether the negative prompt is evaluated at guidance 1, too, for our sake alone."""

    def attached(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return model options of our own, with this gauge."""
        own = comfy.model_patcher.create_model_options_clone(options)
        self.added = not options.get("disable_cfg1_optimization", False)
        own["disable_cfg1_optimization"] = True
        # First in both lists: patches such as APG hand on other predictions than the model's.
        own["sampler_pre_cfg_function"] = [self.before, *options.get("sampler_pre_cfg_function", [])]
        own["sampler_post_cfg_function"] = [self.after, *options.get("sampler_post_cfg_function", [])]
        return own

    def before(self, args: dict[str, Any]) -> list[Tensor]:
        """Remember the model's own predictions; core hands them out before guidance."""
        conds, made = args["conds"], args["conds_out"]
        if len(made) > 1 and conds[0] is not None and conds[1] is not None:
            self.raw = made[0], made[1]
        return made

    def after(self, args: dict[str, Any]) -> Tensor:
        """Keep the gap; some guiders ask only here."""
        if self.raw is None and args.get("uncond") is None:
            raise ValueError(NO_GUIDANCE)
        given, without = self.raw or (args["cond_denoised"], args["uncond_denoised"])
        self.raw = None
        sigma = args["sigma"].expand(len(given))
        self.seen.append((velocity_gap(given, without, sigma), sigma))
        # Without us there would be no such pass, and no rounding by it.
        skipped = self.added and self.plain and math.isclose(args["cond_scale"], 1.0)
        if skipped and "sampler_cfg_function" not in args["model_options"]:
            return args["cond_denoised"]
        return args["denoised"]


def rows_of(conds: Conds, rows: Tensor) -> Conds:
    """Return processed conditioning for some rows [K] of a batch, as core hands it to each of them.

    Core repeats what has fewer rows than the batch. ValueError where a ControlNet has an image per row.
    """

    def some(tensor: Tensor) -> Tensor:
        many = tensor.ndim and len(tensor) > 1
        return tensor[(rows % len(tensor)).to(tensor.device)] if many else tensor

    chosen = mapped(conds, some)
    for entry in (entry for entries in chosen.values() for entry in entries):
        check_controls(entry.get("control"))
        if "mask" in entry:
            entry["mask"] = some(entry["mask"])
    return chosen


def check_controls(control: Any) -> None:
    """Raise ValueError where a ControlNet, or one that it builds on, holds several images."""
    while control is not None:
        hint = getattr(control, "cond_hint_original", None)
        if isinstance(hint, Tensor) and len(hint) > 1:
            raise ValueError(
                f"guider: a ControlNet has {len(hint)} images, and cannot follow the rows that are kept; "
                "give it one image for all"
            )
        control = getattr(control, "previous_controlnet", None)
