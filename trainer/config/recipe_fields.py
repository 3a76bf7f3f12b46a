"""A recipe as a whole, and every option in it with type, default, range and sentence; needs no torch."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, field_validator
from pydantic.fields import FieldInfo

from comfy_g2rpo.recipes import Recipe

from .sections import (
    HeldoutReward,
    LoraSection,
    MemorySection,
    MethodSection,
    ModelSection,
    PairsSection,
    PriorSection,
    PromptSection,
    ReportSection,
    SearchSection,
    Section,
    SpeedSection,
    TrainedReward,
    TrainSection,
)


class Config(Section):
    """All of a run."""

    model: ModelSection
    memory: MemorySection = MemorySection()
    lora: LoraSection = LoraSection()
    method: MethodSection = MethodSection()
    rewards: tuple[TrainedReward, ...] = Field(
        min_length=1, description="Rewards to train on, by name or as a section."
    )
    heldout_rewards: tuple[HeldoutReward, ...] = Field(
        (),
        description=(
            "Rewards that only measure, by name or as a section; those trained on are measured anyway."
        ),
    )
    prompts: PromptSection
    train: TrainSection = TrainSection()
    speed: SpeedSection = SpeedSection()
    pairs: PairsSection = PairsSection()
    search: SearchSection = SearchSection()
    prior: PriorSection = PriorSection()
    report: ReportSection = ReportSection()
    out: str | None = Field(None, description="Run folder; runs/<recipe> where it is not given.")

    @field_validator("rewards", "heldout_rewards", mode="before")
    @classmethod
    def take_names(cls, value: Any) -> Any:
        """Take a name for a reward of that name."""
        return (
            [{"name": item} if isinstance(item, str) else item for item in value]
            if isinstance(value, (list, tuple))
            else value
        )


CHOICE = "one of"
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True)
class RecipeOption:
    """One option of a recipe, as people read it."""

    name: str
    """Dotted, with `0` for a place in a list."""
    kind: str
    default: str
    limits: str
    """The range or the choices; empty where any value of the kind will do."""
    sentence: str

    def line(self) -> str:
        """Return all but the sentence, in one line."""
        return f"{self.name} = {self.default}  ({self.takes})"

    @property
    def takes(self) -> str:
        """Return the kind with its range or choices."""
        return (
            f"{self.kind}{': ' if self.kind == CHOICE else ', '}{self.limits}" if self.limits else self.kind
        )


def options(pattern: str = "") -> list[RecipeOption]:
    """List the options that a pattern names: part of a name or sentence, or a name with * and ?."""
    asked = pattern.lower()
    known = [_described(name, field) for name, field in _fields()]
    if set(asked) & set("*?"):
        return [option for option in known if fnmatch(option.name, asked)]
    return [option for option in known if asked in option.name or asked in option.sentence.lower()]


def fields() -> Iterator[tuple[str, str]]:
    """List every field as dotted name (`0` for a place in a list) and sentence."""
    for name, field in _fields():
        yield name, field.description or ""


def similar(pattern: str) -> list[str]:
    """Return the names of options that are most like a pattern."""
    names = {name.rpartition(".")[2]: name for name, _ in reversed(list(_fields()))}
    return [names[each] for each in difflib.get_close_matches(pattern.rpartition(".")[2], list(names), 3)]


def _fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """List every field by its dotted name."""
    for name, field in section.model_fields.items():
        kind, item = field.annotation, get_args(field.annotation)[:1]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _fields(kind, f"{prefix}{name}.")
        elif item and isinstance(item[0], type) and issubclass(item[0], BaseModel):
            yield from _fields(item[0], f"{prefix}{name}.0.")
        else:
            yield f"{prefix}{name}", field


def _described(name: str, field: FieldInfo) -> RecipeOption:
    """Say of a field what it takes; a field of a method has the default of the first method."""
    default = field.default
    section, _, own = name.partition(".")
    if section == "method" and default is None:
        default = getattr(Recipe(), own)
    kinds = [get_args(kind)[0] if get_origin(kind) is tuple else kind for kind in _members(field)]
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    rule = field.json_schema_extra or {}
    limits = ", ".join(map(str, choices)) or (f"{rule['low']:.10g} to {rule['high']:.10g}" if rule else "")
    return RecipeOption(
        name, _kind(field), "required" if field.is_required() else spelt(default), limits, field.description
    )


def _members(field: FieldInfo) -> list[Any]:
    """List the kinds of which a field's value is one, nothing aside."""
    kind = field.annotation
    union = get_origin(kind) in (Union, types.UnionType)
    return [each for each in (get_args(kind) if union else (kind,)) if each is not type(None)]


def _kind(field: FieldInfo) -> str:
    """Name the kind of a field's value."""
    (kind,) = _members(field)
    if get_origin(kind) is Literal:
        return CHOICE
    if get_origin(kind) is tuple:
        return f"list of {KINDS.get(get_args(kind)[0], 'word')}s"
    return KINDS[kind]


def spelt(value: Any) -> str:
    """Write a value as a recipe has it."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(spelt, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
