"""Judge whether a picture of coloured shapes shows what its prompt, or the prompt's columns, ask for.

    graded = (colour · shape · count [· relation])^(1/checks) · tidiness^(1/2),  every check in [.05, 1]; what
    is not asked for is no check

The mean is geometric because an arithmetic one pays for a half-fixed picture. A missing object lowers colour,
shape and count at once; a surplus one lowers count and tidiness, by about as much. What no asked-for object
explains (surplus objects, specks, smears) is untidy. What is clearly right scores exactly 1: a group of right
pictures ties, where a z-score would blow differences of no meaning up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, from_numpy

from .detect import Objects, detect
from .vocabulary import COLOURS, RELATIONS, SHAPES, Scene, scene_of

MAX_THINGS = 4
FLOOR = 0.05  # of a check, so that one failure does not hide progress in the others
CLEAR_DISTANCE = (
    18.0  # pixels between centres at which a relation is clearly right, or clearly wrong on the other side
)
ACROSS = 16.0  # pixels off the axis that are forgiven, and over which the rest of the score is lost
PASS_SHAPE, PASS_RELATION, PASS_TIDINESS = 0.5, 0.84, 0.9  # for the strict score


@dataclass(frozen=True)
class Request:
    """Hold scenes as arrays.

    asked: [B, T], whether there is a thing at all; colour, shape: [B, T] palette and shape index, -1 = any;
    axis: [B, 2], 0 = no relation.
    """

    asked: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    axis: np.ndarray


@dataclass(frozen=True)
class Checks:
    """Hold what is right about each picture: all [B] in [0, 1], but `exact` which is boolean."""

    colour: np.ndarray
    shape: np.ndarray
    count: np.ndarray
    relation: np.ndarray
    tidiness: np.ndarray
    exact: np.ndarray


def agreement(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Grade colour, shape, count and relation of images [B, H, W, 3]: [B] in [0, 1], NaN if none is asked."""
    scenes = [scene_of(prompt) for prompt in prompts]
    request = request_of(scenes)
    checks = check(request, detect(images.cpu().numpy()))
    related, coloured, shaped = request.axis.any(1), (request.colour >= 0).any(1), (request.shape >= 0).any(1)
    colour, shape, count, relation = (
        np.log(FLOOR + (1 - FLOOR) * c) for c in (checks.colour, checks.shape, checks.count, checks.relation)
    )
    mean_log = (coloured * colour + shaped * shape + count + related * relation) / (
        1 + coloured + shaped + related
    )
    return _readable(np.exp(mean_log) * np.sqrt(checks.tidiness), scenes)


def strict(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Give 1 where everything is as asked and nothing else is there, else 0: [B], NaN as in `agreement`."""
    scenes = [scene_of(prompt) for prompt in prompts]
    return _readable(check(request_of(scenes), detect(images.cpu().numpy())).exact, scenes)


def request_of(scenes: list[Scene | None]) -> Request:
    """Lay scenes out as arrays."""
    colours, axis = list(COLOURS), np.zeros((len(scenes), 2))
    width = max([MAX_THINGS, *(len(scene.things) for scene in scenes if scene)])
    colour, shape = np.full((2, len(scenes), width), -1)
    asked = np.zeros((len(scenes), width), bool)
    for row, scene in enumerate(scenes):
        if scene is None:
            continue
        for column, thing in enumerate(scene.things):
            asked[row, column] = True
            colour[row, column] = colours.index(thing.colour) if thing.colour else -1
            shape[row, column] = SHAPES.index(thing.shape) if thing.shape else -1
        if scene.relation:
            axis[row] = RELATIONS[scene.relation]
    return Request(asked, colour, shape, axis)


def check(request: Request, found: Objects) -> Checks:
    """Compare what was asked for with what was found, thing by thing."""
    asked = request.asked
    number, related = asked.sum(1), request.axis.any(1)
    there, any_colour = (found.colour >= 0)[:, None, :], (request.colour < 0)[:, :, None]
    same_colour = (
        (any_colour | (request.colour[:, :, None] == found.colour[:, None, :])) & there & asked[:, :, None]
    )
    colour = same_colour * (found.vividness * found.presence)[:, None, :]
    asked_shape = np.take_along_axis(found.shape, np.maximum(request.shape, 0)[:, None, :], axis=2).swapaxes(
        1, 2
    )
    asked_shape = np.where((request.shape < 0)[:, :, None], there, asked_shape)
    shape = asked_shape * found.presence[:, None, :] * asked[:, :, None]
    likeness = 0.6 * colour + 0.4 * shape
    chosen = match(likeness)

    def of_chosen(values: np.ndarray) -> np.ndarray:
        return np.einsum("btn,btn->bt", np.broadcast_to(values, chosen.shape), chosen)

    tidiness = np.minimum(of_chosen(found.area[:, None]).sum(1) / np.maximum(found.ink, 1) / 0.95, 1)
    x, y = of_chosen(found.x[:, None]), of_chosen(found.y[:, None])
    place = relation(x[:, 0] - x[:, 1], y[:, 0] - y[:, 1], request.axis)
    things_right = (of_chosen(same_colour & (shape >= PASS_SHAPE)) > 0) == asked
    number_right = (found.presence > 0.5).sum(1) == number
    return Checks(
        colour=of_chosen(colour).sum(1) / np.maximum(number, 1),
        shape=of_chosen(shape).sum(1) / np.maximum(number, 1),
        count=np.minimum(found.count, number) / np.maximum(np.maximum(found.count, number), 1),
        relation=place * of_chosen(likeness)[:, :2].min(1),
        tidiness=tidiness,
        exact=things_right.all(1)
        & number_right
        & (tidiness >= PASS_TIDINESS)
        & (~related | (place >= PASS_RELATION)),
    )


def match(likeness: np.ndarray) -> np.ndarray:
    """Give each thing the most like object, best pair first: likeness [B, T, N] to booleans [B, T, N]."""
    batch, things, objects = likeness.shape
    left, chosen, everyone = likeness.copy(), np.zeros(likeness.shape, bool), np.arange(batch)
    for _ in range(things):
        thing, candidate = np.divmod(left.reshape(batch, things * objects).argmax(1), objects)
        chosen[everyone, thing, candidate] |= left[everyone, thing, candidate] > 0
        left[everyone, thing, :] = 0
        left[everyone, :, candidate] = 0
    return chosen


def relation(dx: np.ndarray, dy: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Grade how clearly an object at (dx, dy) [B] lies along the axis [B, 2] from another: [B] in [0, 1]."""
    along = dx * axis[:, 0] + dy * axis[:, 1]
    across = np.abs(dx * axis[:, 1] + dy * axis[:, 0])
    beyond = across - np.maximum(ACROSS, along)
    # Squared, because the mean of four logarithms then grows about evenly with the distance.
    return np.clip(0.5 + along / (2 * CLEAR_DISTANCE), 0, 1) ** 2 * np.clip(1 - beyond / ACROSS, 0, 1)


def _readable(scores: np.ndarray, scenes: list[Scene | None]) -> Tensor:
    """Withhold the scores [B] of pictures whose prompt could not be read."""
    readable = np.array([scene is not None for scene in scenes], bool)
    return from_numpy(np.where(readable, scores, np.nan).astype(np.float32))
