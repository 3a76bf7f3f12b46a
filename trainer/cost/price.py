"""What `g2rpo plan` says: counts, memory, and the time as measured here or estimated for cards."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from comfy_g2rpo.replay.old_forks import bytes_of_fork
from comfy_g2rpo.rewards import REWARDS
from comfy_g2rpo.run.watch import forewarnings

from ..config.file_checks import check_model_files, parameters_of, read_prompts
from ..config.reading import Config, ConfigError, make_pace, make_recipe
from ..config.reward_checks import missing_models
from ..model.cpu_refusal import LARGE, why_no_gpu
from ..model.inference import device
from ..model.placing import check_card
from ..reports.progress import clock
from .card_memory import UnknownMemoryError, footprint_of, sized
from .estimate import Cost, Counts, count, laid_out, rows_of
from .hours_by_card import rows_by_card
from .measured import measured
from .presets import remedy, says, this_card
from .remembered import counts_of

Rows = list[tuple[str, str]]


@dataclass
class Price:
    """A run's price: counts and rows for reading, what is to be said, and numbers where they are known."""

    counts: Counts
    rows: Rows
    remarks: list[str] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    """Bytes: what a run needs here, at its peaks and for good, and what there is."""
    cost: Cost | None = None
    minutes: float | None = None

    def lines(self) -> list[str]:
        """Lay it out for reading."""
        return [laid_out(self.rows), *self.remarks]

    def content(self) -> dict[str, Any]:
        """Return it for other programs; what is unknown is null."""
        counts, cost = self.counts, self.cost
        return {
            "steps": counts.steps,
            "prompts_per_step": counts.prompts,
            "evaluations": counts.evaluations,
            "forwards": counts.forwards,
            "forwards_per_step": counts.step_forwards,
            "pictures": counts.images,
            "memory": self.memory,
            "seconds": cost.run(counts, self.minutes) if cost else None,
            "seconds_per_step": cost.step if cost else None,
            "rows": {name.strip(): text for name, text in self.rows},
            "remarks": self.remarks,
        }


def price(config: Config, recipe: str, anew: bool = False) -> Price:
    """Return a run's price; ValueError or OSError where its prompts cannot be read.

    What is not measured is named with the reason; `anew` measures again what was measured here before.
    """
    counts, where = count(config), device()
    found, reasons = Price(counts, rows_of(counts), minutes=config.train.minutes), []
    warnings = [f"before you start: {text}" for text in foreseen(config)]
    large = where.type == "cpu" and (parameters_of(config.model) or 0) > LARGE
    if large:
        reasons.append(why_no_gpu())
    if missing := missing_models((*config.rewards, *config.heldout_rewards)):
        reasons.append(missing)
    try:
        try:
            check_model_files(config.model)
        except ConfigError as error:  # it is not here, and may be known all the same
            reasons.append(f"the model cannot be loaded here: {error}")
        check_card(config.model, config.memory, where)
        full = add_memory(found, config, where, large)
    except (OSError, ValueError) as error:
        reason = f"the model cannot be loaded here: {error}"
        found.remarks = [f"time and memory are unknown, because {reason}", *warnings]
        return found
    if full:
        reasons.append(full)
    if not reasons:
        try:
            found.cost = measured(config, where, counts, anew)
            found.rows += measured_rows(found)
        except (OSError, ValueError) as error:
            reasons.append(f"the model cannot be loaded here: {error}")
    if reasons:
        found.rows += rows_by_card(config, recipe)
    found.remarks = [*(f"the time is not measured, because {reason}" for reason in reasons), *warnings]
    return found


def foreseen(config: Config) -> list[str]:
    """Return what will go wrong, as far as the rewards that need no loading tell."""
    known = [[REWARDS.get(each.name) for each in some] for some in (config.rewards, config.heldout_rewards)]
    rewards, held = (some if None not in some else [] for some in known)
    return forewarnings(make_pace(config), read_prompts(config), rewards, [*rewards, *held])


def add_memory(found: Price, config: Config, where: torch.device, large: bool) -> str:
    """Add a run's memory to its price; return why it does not fit here, if so."""
    try:
        counted = counts_of(config)
        need = footprint_of(config, counted)
    except UnknownMemoryError as error:
        found.rows.append(("memory", str(error)))
        return ""
    recipe = make_recipe(config)
    found.rows += need.lines()
    if recipe.replay:
        much = sized(recipe.replay_size * bytes_of_fork(counted.latent))
        found.rows.append((f"{recipe.replay_size} old forks", f"{much}, in memory and in every checkpoint"))
    found.memory = {"needs": need.need, "peaks": dict(need.peaks), "stays": dict(need.parts)}
    if large:  # a card is wanted, and this is none
        return ""
    card = this_card(where)
    found.memory |= {"has": card.free, "fits": card.fits(need)}
    found.rows.append(("memory", says(card, need)))
    return "" if card.fits(need) else f"it does not fit; {remedy(config, card)}"


def measured_rows(found: Price) -> Rows:
    """Return rows about a run's time and memory as they are measured on this machine."""
    cost = found.cost
    old = time.time() - cost.at
    ago = f", {clock(old)} ago (again with --measure)" if old > 60 else ""
    seconds = cost.run(found.counts, found.minutes)
    rows = [
        ("measured on", f"{cost.device}{ago}"),
        ("time per step", f"about {cost.step:.2g} s"),
        ("time per evaluation", f"about {cost.look:.2g} s"),
        ("time in all", f"about {clock(seconds)}, {cost.start:.0f} s of it to start"),
        ("memory, measured peak", f"{cost.peak / 2**30:.1f} GiB"),
    ]
    return rows + ([("  not in the time", f"what {cost.left_out} takes")] if cost.left_out else [])
