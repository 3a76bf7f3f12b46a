"""What a run was made with that is asked for otherwise now, in the words of the blocks' widgets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...comfy_g2rpo.files.safe import spelt_out
from ...comfy_g2rpo.recipes import FIELDS, RECIPES
from ...comfy_g2rpo.run.folder import RunFolder
from ..model.fingerprint import UNPATCHED

WIDGETS = {"method.name": "recipe", "prompts.train": "prompts", "prompts.heldout": "heldout_prompts"}
"""Widgets of another name than their field's; all others are named alike, or set by lines in changes."""
WIRES = {"rewards": "reward", "heldout_rewards": "heldout_reward"}
DERIVED = ("num_steps", "shift")
"""What noise levels come from, unless they are connected."""
OF_MODEL = ("fingerprint", "patches")
UNITS = {"train": "lines", "heldout": "lines", "sigmas": "noise levels", "negative": "characters"}
LONGEST = 40  # characters of a value that is told as it is
MOST = 4  # settings that a sentence tells
MAY_GO_ON = {
    "method": {*FIELDS, "name"} - {"num_steps", "shift", "ema", "old_decay", "optimizer"},
    "prompts": {"train"},
    "train": {"prompts_per_step"},
    "rewards": {"weight", "gate"},
}
"""Fields that may change while a run goes on if the user asks for it: how it learns from now on.

All others make its LoRA another one, or what it is measured on."""


@dataclass(frozen=True)
class Change:
    """A field that a run was made with otherwise, by its widget, and a sentence on both values."""

    field: str
    widget: str
    text: str

    @property
    def goes_on(self) -> bool:
        """Return whether a run may go on with the new value."""
        section, _, field = self.field.partition(".")
        return field.rpartition(".")[2] in MAY_GO_ON.get(section, ())


def without(section: Any, fields: Collection[str]) -> Any:
    """Return a section of a configuration, or a list of them, without some fields."""
    if isinstance(section, list):
        return [without(one, fields) for one in section]
    if isinstance(section, dict):
        return {name: value for name, value in section.items() if name not in fields}
    return section


def changes_of(
    run: RunFolder,
    config: Mapping[str, Any],
    defaults: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, str],
) -> list[Change]:
    """List what a run was made with otherwise.

    `defaults`, by section and field, stand for what the run does not hold; `sources` name the widget of a
    field that comes from another one now, such as a preset.
    """
    now, was = config["config"], spelt_out(run.config().get("config"))
    changes = []
    for field, before, value in run.differences(config, defaults):
        section, _, name = field.partition(".")
        if section in WIRES:
            text = f"{rewards(was.get(section))} → {rewards(now[section])}"
            widget = "reward" if measured(was) == measured(now) else WIRES[section]
        else:
            widget = sources.get(name, "model" if name in OF_MODEL else WIDGETS.get(field, name))
            text = ("" if widget != "preset" else f"{name} ") + both(name, before, value)
        changes.append(Change(field, widget, text))
    return implied(changes, spelt_out(was.get("method")), now["method"])


def measured(config: Mapping[str, Any]) -> set[str]:
    """Return the rewards that are measured and not trained on."""
    named = [config.get(section) for section in ("heldout_rewards", "rewards")]
    listed = [part if isinstance(part, list) else [] for part in named]
    judges, trained = ({name_of(one) for one in part} for part in listed)
    return judges - trained


def name_of(reward: Any) -> str:
    """Return a reward's name out of a configuration: a section, or the mere name."""
    return str(reward.get("name") if isinstance(reward, Mapping) else reward)


def implied(changes: list[Change], was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Lay what follows from another change at its widget: a recipe's own fields, noise levels."""
    recipes = [RECIPES.get(str(method.get("name"))) for method in (was, now)]
    others = was.get("name") != now.get("name")
    derived = next((c.widget for c in changes if c.field.partition(".")[2] in DERIVED), "")
    found = []
    for change in changes:
        section, _, name = change.field.partition(".")
        own = [getattr(recipe, name, None) for recipe in recipes]
        if section == "method" and others and own == [whole(method.get(name)) for method in (was, now)]:
            change = replace(change, widget="recipe")
        elif name == "sigmas" and derived:
            change = replace(change, widget=derived)
        found.append(change)
    return found


def whole(value: Any) -> Any:
    """Return a value of JSON as a recipe holds it."""
    return tuple(value) if isinstance(value, list) else value


def both(name: str, before: Any, now: Any) -> str:
    """Tell a field's value of then and of now; of what is long, how much it is."""
    if name == "fingerprint":
        return "another one than the run's"
    if name == "patches":
        if now == UNPATCHED:
            return "without the LoRAs or merges that the run's has"
        return f"with LoRAs or merges that the run's {'has not' if before == UNPATCHED else 'has otherwise'}"
    if name in UNITS and (is_long(before) or is_long(now)):
        return counted(UNITS[name], before, now)
    return f"{said(before)} → {said(now)}"


def is_long(value: Any) -> bool:
    """Return whether a value is told by its length."""
    return isinstance(value, list) or (isinstance(value, str) and (len(value) > LONGEST or "\n" in value))


def counted(unit: str, before: Any, now: Any) -> str:
    """Tell how long two texts or lists are."""
    many = [len(value) if isinstance(value, (list, str)) else 0 for value in (now, before)]
    if many[0] != many[1]:
        return f"{many[0]} {unit if many[0] != 1 else unit.removesuffix('s')}, the run has {many[1]}"
    others = sum(one != other for one, other in zip(now, before, strict=True))
    return f"{others} of {many[0]} {unit} changed"


def said(value: Any) -> str:
    """Write a value as its widget, or a line in changes, would have it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.6g}"
    if isinstance(value, str):
        return " ".join(value.split())[:LONGEST] or "nothing"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(said, value[:8])) or "nothing"
    return f"{len(value)} values" if isinstance(value, Mapping) else type(value).__name__


def rewards(section: Any) -> str:
    """Write rewards as their weights and names."""
    parts = []
    for one in section if isinstance(section, list) else []:
        reward = one if isinstance(one, Mapping) else {"name": one}
        weight = "" if reward.get("weight") is None else f"{said(reward['weight'])} "
        gate = "" if reward.get("gate") is None else f" from {said(reward['gate'])} on"
        parts.append(f"{weight}{said(name_of(one))}{gate}")
    return ", ".join(parts[:MOST]) + (" …" if len(parts) > MOST else "") or "none"


def told(changes: Sequence[Change]) -> str:
    """Tell the changes in one line, each widget once."""
    parts: dict[str, str] = {}
    # A recipe's name first: the fields that it brings along are told by it.
    for change in sorted(changes, key=lambda change: change.field != "method.name"):
        parts.setdefault(change.widget, f"{change.widget}: {change.text}")
    lines = list(parts.values())
    more = f"; and {len(lines) - MOST} more" if len(lines) > MOST else ""
    return "; ".join(lines[:MOST]) + more


def widgets_of(changes: Sequence[Change]) -> str:
    """Name the widgets of changes, each once."""
    names = list(dict.fromkeys(change.widget for change in changes))
    return ", ".join(names[:MOST]) + (" …" if len(names) > MOST else "")
