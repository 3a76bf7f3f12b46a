"""Fields of a recipe and of a run's pace as text: one `name = value`, or `name: value`, per line."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, get_args, get_origin, get_type_hints

from .. import recipes
from ..options import check_value, nearest
from . import pace

MAX_CHARACTERS = 4000
SECTIONS = {
    "method": (recipes.FIELDS, get_type_hints(recipes.Recipe)),
    "train": (pace.FIELDS, get_type_hints(pace.Pace)),
}


def parse(text: str, name: str = "settings") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the recipe's changes and the pace's from lines of `name = value`; ValueError names the line, the
    field and the remedy.

    A name may carry its section, as on the command line: method.eta, train.slots. A colon does for the sign
    of equality, for the recipe's own errors advise so: objective: clip. Blank lines and those that start with
    # are skipped. Lists are written 1, 2; a field that may be empty takes none.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters; at most {MAX_CHARACTERS} are allowed")
    changes: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, *given = (part.strip() for part in re.split("[=:]", line, maxsplit=1))
        if not given or not given[0]:
            raise ValueError(
                f"{name}, line {number}: {line[:80]!r} has no value; write name = value, such as eta = 0.5"
            )
        section, key = _place(key, f"{name}, line {number}")
        fields, hints = SECTIONS[section]
        changes[section][key] = _value(given[0], hints[key], fields[key], f"{name}, line {number}: {key}")
    return changes["method"], changes["train"]


def _place(key: str, place: str) -> tuple[str, str]:
    """Find the section of a field."""
    dotted = {
        f"{section}.{field}": (section, field)
        for section, (fields, _) in SECTIONS.items()
        for field in fields
    }
    if key in dotted:
        return dotted[key]
    found = [name for name, (_, field) in dotted.items() if field == key]
    if len(found) > 1:
        raise ValueError(f"{place}: {key!r} may mean two things; write {' or '.join(found)}")
    if not found:
        bare = [field for _, field in dotted.values()]
        raise ValueError(
            f"{place}: {key[:80]!r} is unknown{nearest(key, bare)}; all names are in docs/options.md, and "
            "g2rpo options lists them"
        )
    return dotted[found[0]]


def _value(text: str, kind: Any, field: Field[Any], place: str) -> Any:
    """Read one value by the field's type and check its bounds."""
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if text.lower() == "none" and (type(None) in options or field.metadata["may_be_empty"]):
        return None if type(None) in options else ()
    kind = next(option for option in options if option is not type(None))
    many = get_origin(kind) is tuple
    parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()] if many else [text]
    one = get_args(kind)[0] if many else kind
    read: Sequence[Any] = [_scalar(part, one, field.metadata, place) for part in parts]
    if not read:
        raise ValueError(f"{place} is empty; list at least one, such as 1, 2")
    return tuple(read) if many else read[0]


def _scalar(text: str, kind: Any, rule: Mapping[str, Any], place: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{place} is {text[:80]!r}; write true or false")
        return text.lower() == "true"
    if kind is str:
        check_value(place, text, choices=rule["choices"])
        return text
    try:
        value = kind(text)
    except ValueError as error:
        raise ValueError(
            f"{place} is {text[:80]!r}; it must be {'a whole number' if kind is int else 'a number'}"
        ) from error
    check_value(place, value, rule["low"], rule["high"])
    return value
