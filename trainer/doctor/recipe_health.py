"""The model, the prompts and the rewards of a recipe, as far as can be told without loading them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .findings import OK, PROBLEM, WARNING, Finding, apart

if TYPE_CHECKING:
    from ..config.reading import Config
    from ..config.sections import RewardSection


def check_recipe(recipe: str, settings: Sequence[str], reach: bool) -> Iterator[Finding]:
    """Look at a recipe: its fields, prompts, trackers, model and rewards."""
    from ..config.reading import load

    config = load(recipe, list(settings))
    method = config.method.name
    yield Finding("recipe", OK, f"{recipe}: {method}, {config.train.steps} steps")
    yield from apart("prompts", lambda: check_prompts(config))
    yield from apart("trackers", lambda: check_trackers(config))
    yield from apart("model", lambda: check_model(config))
    yield from apart("memory", lambda: check_memory(config))
    for reward in (*config.rewards, *config.heldout_rewards):
        yield from apart(f"reward {reward.name}", lambda reward=reward: check_reward(reward, reach))


def check_prompts(config: Config) -> Iterator[Finding]:
    """Read the prompts."""
    from ..config.file_checks import read_prompts

    found = read_prompts(config)
    text = f"{len(found.train)} to train on, {len(found.heldout)} held out"
    if len(found.heldout) < 2:
        yield Finding("prompts", WARNING, text, "set prompts.heldout or prompts.heldout_share, to see a gain")
    else:
        yield Finding("prompts", OK, text)


def check_trackers(config: Config) -> Iterator[Finding]:
    """Look for the trackers' packages."""
    from ..reports.listeners import check_trackers as refuse

    refuse(config.report.trackers)
    for name in config.report.trackers:
        yield Finding("trackers", OK, f"{name} is installed")


def check_model(config: Config) -> Iterator[Finding]:
    """Look for the model's files, by their index and headers."""
    from ..config.file_checks import check_model_files, parameters_of

    check_model_files(config.model)
    count = parameters_of(config.model)
    size = f", {count / 1e9:.2f} billion parameters" if count else ""
    text = f"{config.model.transformer or config.model.path}: family {config.model.family}{size}"
    yield Finding("model", OK, text)


def check_memory(config: Config) -> Iterator[Finding]:
    """Say whether a run fits this card, as `g2rpo plan` estimates it."""
    from ..cost.card_memory import UnknownMemoryError, footprint_of
    from ..cost.presets import remedy, says, this_card
    from ..cost.remembered import counts_of
    from ..model.cpu_refusal import refuse_cpu
    from ..model.inference import device

    where = device()
    if remark := refuse_cpu(config.model, where):
        yield Finding("memory", WARNING, remark)
    try:
        need = footprint_of(config, counts_of(config))
    except UnknownMemoryError as error:
        yield Finding("memory", WARNING, str(error), "start with a small model.width and watch memory/peak")
        return
    card = this_card(where)
    if card.fits(need):
        yield Finding("memory", OK, says(card, need))
    else:
        yield Finding("memory", PROBLEM, says(card, need), remedy(config, card))


def check_reward(section: RewardSection, reach: bool) -> Iterator[Finding]:
    """Look at a reward; a judge over HTTP is asked only if wished."""
    from ..config.reward_checks import check_reward as refuse

    name = f"reward {section.name}"
    refuse(section)
    if not section.url:
        yield Finding(name, OK, f"own code, {section.path}" if section.path else "is here")
    elif not reach:
        yield Finding(name, OK, f"a judge at {section.url}, not asked", "ask it with --reach")
    else:
        from .asking import ask

        try:
            # Whatever it answers to this, it is there; what it needs to judge is another matter.
            text = f"the judge at {section.url} answers with status {ask(section.url)[0]}"
        except OSError as error:
            said = f"the judge at {section.url} does not answer: {error}"
            yield Finding(name, PROBLEM, said, "start it, or mend its url")
        else:
            yield Finding(name, OK, text)


def check_installed_rewards() -> Iterator[Finding]:
    """List the reward models of this machine, where no recipe says which are needed."""
    from comfy_g2rpo.rewards.models.installed import installed

    from ..config.reward_checks import rewards_root

    root = rewards_root()
    names = ", ".join(installed(root)) or "none; rules and your own code need none"
    yield Finding("reward models", OK, f"in {root}: {names}")
