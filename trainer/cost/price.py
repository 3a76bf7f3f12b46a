"""What `g2rpo plan` says: counts, memory, and the time as measured here or estimated for cards."""

from __future__ import annotations

import time

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
from .estimate import Counts, count, laid_out, rows_of
from .hours_by_card import rows_by_card
from .measured import measured
from .presets import remedy, says, this_card
from .remembered import counts_of

Rows = list[tuple[str, str]]


def price(config: Config, recipe: str, anew: bool = False) -> list[str]:
    """Return the lines of a run's price; ValueError or OSError where its prompts cannot be read.

    What is not measured is named with the reason; `anew` measures again what was measured here before.
    """
    counts, where = count(config), device()
    rows, reasons = rows_of(counts), []
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
        memory, full = memory_rows(config, where, large)
    except (OSError, ValueError) as error:
        reason = f"the model cannot be loaded here: {error}"
        return [laid_out(rows), f"time and memory are unknown, because {reason}", *warnings]
    rows += memory
    if full:
        reasons.append(full)
    if not reasons:
        try:
            rows += measured_rows(config, where, counts, anew)
        except (OSError, ValueError) as error:
            reasons.append(f"the model cannot be loaded here: {error}")
    if reasons:
        rows += rows_by_card(config, recipe)
        why = [f"the time is not measured, because {reason}" for reason in reasons]
        return [laid_out(rows), *why, *warnings]
    return [laid_out(rows), *warnings]


def foreseen(config: Config) -> list[str]:
    """Return what will go wrong, as far as the rewards that need no loading tell."""
    known = [[REWARDS.get(each.name) for each in some] for some in (config.rewards, config.heldout_rewards)]
    rewards, held = (some if None not in some else [] for some in known)
    return forewarnings(make_pace(config), read_prompts(config), rewards, [*rewards, *held])


def memory_rows(config: Config, where: torch.device, large: bool) -> tuple[Rows, str]:
    """Return rows about a run's memory, and why it does not fit here, if so."""
    try:
        counted = counts_of(config)
        found = footprint_of(config, counted)
    except UnknownMemoryError as error:
        return [("memory", str(error))], ""
    recipe, lines = make_recipe(config), found.lines()
    if recipe.replay:
        much = sized(recipe.replay_size * bytes_of_fork(counted.latent))
        lines.append((f"{recipe.replay_size} old forks", f"{much}, in memory and in every checkpoint"))
    if large:  # a card is wanted, and this is none
        return lines, ""
    card = this_card(where)
    rows = [*lines, ("memory", says(card, found))]
    return rows, "" if card.fits(found) else f"it does not fit; {remedy(config, card)}"


def measured_rows(config: Config, where: torch.device, counts: Counts, anew: bool) -> Rows:
    """Return rows about a run's time and memory as they are measured on this machine."""
    cost = measured(config, where, counts, anew)
    old = time.time() - cost.at
    ago = f", {clock(old)} ago (again with --measure)" if old > 60 else ""
    seconds = cost.run(counts, config.train.minutes)
    rows = [
        ("measured on", f"{cost.device}{ago}"),
        ("time per step", f"about {cost.step:.2g} s"),
        ("time per evaluation", f"about {cost.look:.2g} s"),
        ("time in all", f"about {clock(seconds)}, {cost.start:.0f} s of it to start"),
        ("memory, measured peak", f"{cost.peak / 2**30:.1f} GiB"),
    ]
    return rows + ([("  not in the time", f"what {cost.left_out} takes")] if cost.left_out else [])
