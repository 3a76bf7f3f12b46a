"""The toy world of coloured shapes: its vocabulary, its prompts and what a prompt asks for."""

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Thing:
    """Name one kind of object."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """List the objects that a prompt asks for; a relation holds from the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None


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
