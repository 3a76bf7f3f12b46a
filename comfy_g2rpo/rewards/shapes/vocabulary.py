"""The toy world of coloured shapes: its vocabulary, its prompts and what a prompt asks for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...prompts import columns_of
from ..protocol import RewardError

BACKGROUND = (235, 235, 235)
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 85, 220),
    "yellow": (240, 200, 30),
    "purple": (150, 60, 190),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
# The unit step (x, y) from the second thing towards the first; y grows downwards.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) ({_COLOUR}) ({_SHAPE})(s?)")
_TWO = re.compile(rf"a ({_COLOUR}) ({_SHAPE}) (and|{'|'.join(RELATIONS)}) a ({_COLOUR}) ({_SHAPE})")


MAX_COUNT = 8
WORDS = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "relation": tuple(RELATIONS),
    "other_colour": tuple(COLOURS),
    "other_shape": SHAPES,
}
COLUMNS = ("target_count", *WORDS)


@dataclass(frozen=True)
class Thing:
    """Name one kind of object; None is any colour, or any shape."""

    colour: str | None
    shape: str | None


@dataclass(frozen=True)
class Scene:
    """List the objects that a prompt asks for; a relation holds from the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None


def scene_of(prompt: str) -> Scene | None:
    """Read what a prompt asks for from its columns where it has any of COLUMNS, else from its words; None
    where neither says it.

    `target_count` (1 if it is not given) things of `colour` and `shape`, or one of them in `relation` to one
    of `other_colour` and `other_shape`; a colour or shape that is not given is not judged.
    """
    columns = columns_of(prompt)
    if not any(name in columns for name in COLUMNS):
        return parse(prompt)
    for name, values in WORDS.items():
        if name in columns and columns[name] not in values:
            raise RewardError(
                f"column {name} of {prompt[:80]!a} is {columns[name]!r:.40}; choose one of: "
                f"{', '.join(values)}"
            )
    first, relation = Thing(columns.get("colour"), columns.get("shape")), columns.get("relation")
    others = [name for name in ("other_colour", "other_shape") if name in columns]
    if relation is None and others:
        raise RewardError(
            f"column {others[0]} of {prompt[:80]!a} needs a relation; choose one of: {', '.join(RELATIONS)}"
        )
    if relation is not None:
        second = Thing(columns.get("other_colour"), columns.get("other_shape"))
        if "target_count" in columns or first == second:
            remedy = "leave target_count out, and give other_colour or other_shape"
            raise RewardError(
                f"column relation of {prompt[:80]!a} is between one thing and another; {remedy}"
            )
        return Scene((first, second), relation)
    count = columns.get("target_count", 1)
    if isinstance(count, bool) or count not in range(1, MAX_COUNT + 1):
        raise RewardError(
            f"column target_count of {prompt[:80]!a} is {count!r:.40}; it must be a whole number from "
            f"1 to {MAX_COUNT}"
        )
    return Scene((first,) * int(count))


def readable(prompt: str) -> bool:
    """Return whether a prompt asks for a scene that the rules know."""
    return scene_of(prompt) is not None


def check_columns(prompts: Sequence[str]) -> None:
    """Refuse prompts whose columns ask for what cannot be judged."""
    for prompt in prompts:
        scene_of(prompt)


def parse(prompt: str) -> Scene | None:
    """Read a prompt of the toy grammar; None when it lies outside of it."""
    text = prompt.strip().lower().removesuffix(".")
    if match := _COUNT.fullmatch(text):
        number, colour, shape, plural = match.groups()
        return Scene((Thing(colour, shape),) * NUMBERS[number]) if bool(plural) == (number != "a") else None
    if match := _TWO.fullmatch(text):
        first, joint, second = Thing(match[1], match[2]), match[3], Thing(match[4], match[5])
        return Scene((first, second), None if joint == "and" else joint) if first != second else None
    return None


def describe(scene: Scene) -> str:
    """Write the prompt that asks for a scene: the inverse of `parse`."""
    first, last = scene.things[0], scene.things[-1]
    if first != last:
        return f"a {first.colour} {first.shape} {scene.relation or 'and'} a {last.colour} {last.shape}"
    number = next(word for word, count in NUMBERS.items() if count == len(scene.things))
    return f"{number} {first.colour} {first.shape}{'s' if len(scene.things) > 1 else ''}"
