"""Find flat coloured shapes in 64x64 pictures by their pixels alone, for a whole batch at once.

Every number here is in pixels of a 64x64 picture, or in 8-bit levels where it is a colour.
A pixel is explained as `background + coverage · (colour - background)`, so that soft edges and washed-out
colours are fractions of a colour and never another one. A shape is the closeness (intersection over union) of
a component to the ideal shape of its own moments.
"""

from dataclasses import dataclass

import numpy as np

from .vocabulary import BACKGROUND, COLOURS

MAX_OBJECTS = 8
INK = 50.0  # levels from the background at which a pixel counts as drawn
COLOUR_TOLERANCE = (
    70.0  # levels off the line from background to colour at which a pixel is no longer of that colour
)
SPECK = 20  # pixels below which a component is dirt, not an object
FULL_AREA, FULL_SIDE = (
    70.0,
    28.0,
)  # an object counts in full from this area on and up to this side, and not at all at 1.5 times the side
CLEAR = 0.95  # of a shape score: from here on a shape is as good as drawn
TEMPERATURE = 0.02  # in units of intersection over union; circle and square of equal moments are 0.09 apart

_BACKGROUND = np.array(BACKGROUND, np.float32)
_DIRECTIONS = np.array(list(COLOURS.values()), np.float32) - _BACKGROUND


@dataclass(frozen=True)
class Objects:
    """Hold the largest objects of each picture, padded to `MAX_OBJECTS`.

    area, presence, vividness, x, y: [B, N], 0 = no object; colour: [B, N] palette index, -1 = no object;
    shape: [B, N, S] closeness to each of `SHAPES` in [0, 1]; count: [B] objects, by their presence in [0, 1];
    ink: [B] drawn pixels.
    """

    area: np.ndarray
    presence: np.ndarray
    vividness: np.ndarray
    x: np.ndarray
    y: np.ndarray
    colour: np.ndarray
    shape: np.ndarray
    count: np.ndarray
    ink: np.ndarray


def detect(images: np.ndarray) -> Objects:
    """Find the objects in images [B, H, W, 3] in [0, 1]."""
    batch, height, width, _ = images.shape
    drawn = (
        sum((images[..., channel] * np.float32(255) - _BACKGROUND[channel]) ** 2 for channel in range(3))
        > INK**2
    )
    image, y, x = np.nonzero(drawn)
    colour, coverage = unmix(images[drawn] * np.float32(255) - _BACKGROUND)
    plane = np.where(coverage > 0, image * len(COLOURS) + colour, -1)
    number = components(plane, x, y, coverage, height, width)
    size = np.bincount(number, minlength=1)
    size[0] = 0
    inside = size[number] >= SPECK
    component = (np.cumsum(size >= SPECK) - 1)[number[inside]]
    area = size[size >= SPECK]
    x, y, coverage = (values[inside].astype(np.float64) for values in (x, y, coverage))
    home = np.zeros(len(area), int)
    home[component] = plane[inside]
    image_of, colour_of = np.divmod(home, len(COLOURS))

    centre, side = boxes(component, x, y, len(area))
    presence = np.clip((area - SPECK / 2) / (FULL_AREA - SPECK / 2), 0, 1) * np.clip(
        3 - 2 * side.max(0) / FULL_SIDE, 0, 1
    )
    cell, order = _cells(image_of, area)

    def laid_out(values: np.ndarray, empty: int = 0) -> np.ndarray:
        grid = np.full((batch, MAX_OBJECTS, *values.shape[1:]), empty, values.dtype)
        grid[cell] = values[order]
        return grid

    return Objects(
        area=laid_out(area),
        presence=laid_out(presence),
        vividness=laid_out(vividness(component, coverage, len(area))),
        x=laid_out(centre[0]),
        y=laid_out(centre[1]),
        colour=laid_out(colour_of, -1),
        shape=laid_out(shape_scores(component, x, y, coverage, len(area))),
        count=np.bincount(image_of, presence, batch),
        ink=np.bincount(image, minlength=batch),
    )


def unmix(offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explain pixels' offsets [P, 3] from the background: (palette index [P], coverage [P], 0 = none)."""
    r, g, b = np.ascontiguousarray(offset.T)
    best = np.full(len(r), np.float32(COLOUR_TOLERANCE**2))
    colour, coverage = np.zeros(len(r), int), np.zeros(len(r), np.float32)
    for index, (u, v, w) in enumerate(_DIRECTIONS):
        along = np.clip((r * u + g * v + b * w) / (u * u + v * v + w * w), 0, 1)
        squared = (r - along * u) ** 2 + (g - along * v) ** 2 + (b - along * w) ** 2
        closer = squared < best
        best[closer], colour[closer], coverage[closer] = squared[closer], index, along[closer]
    return colour, coverage * (1 - best / np.float32(COLOUR_TOLERANCE**2))


def components(
    plane: np.ndarray, x: np.ndarray, y: np.ndarray, coverage: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Number the 4-connected components of each plane's pixels [P], all in one call: [P], 0 = none.

    Pixels of at least half coverage connect; a softer one joins a neighbour, so that two objects may come as
    close as blurred edges touch.
    """
    from scipy.ndimage import label  # takes as long to import as the rest of this package

    used = np.bincount(plane + 1) >= SPECK
    used[:1] = False
    # An empty row below each plane and an empty column keep neighbours apart, so that all planes form one
    # tall picture.
    top = (np.cumsum(used) - 1) * (height + 1)
    inside = used[plane + 1]
    row = np.where(inside, top[plane + 1] + y, height)
    tall = np.zeros((max(int(used.sum()), 1) * (height + 1), width + 1), bool)
    tall[row, x] = inside & (coverage >= 0.5)
    number = label(tall)[0]
    beside = np.maximum(
        np.maximum(number[row, x - 1], number[row, x + 1]),
        np.maximum(number[row - 1, x], number[(row + 1) % len(tall), x]),
    )
    own = number[row, x]
    return np.where(inside, np.where(own > 0, own, beside), 0)


def boxes(component: np.ndarray, x: np.ndarray, y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Bound each of `count` components: (centre [2, C], side [2, C])."""
    if count == 0:
        return np.zeros((2, 0)), np.zeros((2, 0))
    order = np.argsort(component, kind="stable")
    starts = np.searchsorted(component[order], np.arange(count))
    position = np.stack([x, y])[:, order]
    low, high = np.minimum.reduceat(position, starts, axis=1), np.maximum.reduceat(position, starts, axis=1)
    return (low + high) / 2, high - low + 1


def vividness(component: np.ndarray, coverage: np.ndarray, count: int) -> np.ndarray:
    """Measure how full the colour of each component is: [C] in [0, 1]; soft edges are forgiven."""
    mass = np.bincount(component, coverage, count)
    return np.minimum(np.bincount(component, coverage * coverage, count) / np.maximum(mass, 1e-6) / 0.85, 1)


def shape_scores(
    component: np.ndarray, x: np.ndarray, y: np.ndarray, coverage: np.ndarray, count: int
) -> np.ndarray:
    """Score each component as circle, square and triangle: [C, S] in [0, 1].

    A score is the probability of that shape (softmax over the closeness to each ideal shape), times how well
    it is drawn and proportioned.
    """

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(component, values, count)

    mass = np.maximum(total(coverage), 1e-6)
    dx, dy = x - (total(coverage * x) / mass)[component], y - (total(coverage * y) / mass)[component]
    # Sampling coverage on a grid widens the variance by that of one pixel, 1/12.
    spread_x = np.sqrt(np.maximum(total(coverage * dx * dx) / mass - 1 / 12, 0.25))
    spread_y = np.sqrt(np.maximum(total(coverage * dy * dy) / mass - 1 / 12, 0.25))
    closeness, proportion = [], []
    for ideal in (_circle, _square, _triangle):
        width, height, area, drawn = ideal(dx, dy, spread_x, spread_y, component)
        shared = total(np.minimum(coverage, drawn))
        closeness.append(shared / (mass + area - shared))
        proportion.append(np.minimum(width, height) / np.maximum(width, height))
    closeness = np.stack(closeness, axis=1)
    likelihood = np.exp((closeness - closeness.max(1, keepdims=True)) / TEMPERATURE)
    quality = np.clip((closeness - 0.6) / 0.25, 0, 1) * np.clip(
        (np.stack(proportion, axis=1) - 0.5) / 0.3, 0, 1
    )
    return np.minimum(likelihood / likelihood.sum(1, keepdims=True) * quality / CLEAR, 1)


_Ideal = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _circle(
    dx: np.ndarray, dy: np.ndarray, spread_x: np.ndarray, spread_y: np.ndarray, component: np.ndarray
) -> _Ideal:
    """Draw the circle (ellipse) of given moments: (width, height, area [C], coverage [P])."""
    a, b = 2 * spread_x, 2 * spread_y
    inward = (1 - np.sqrt((dx / a[component]) ** 2 + (dy / b[component]) ** 2)) * np.sqrt(a * b)[component]
    return 2 * a, 2 * b, np.pi * a * b, _edge(inward)


def _square(
    dx: np.ndarray, dy: np.ndarray, spread_x: np.ndarray, spread_y: np.ndarray, component: np.ndarray
) -> _Ideal:
    """Draw the square (rectangle) of given moments: (width, height, area [C], coverage [P])."""
    width, height = np.sqrt(12) * spread_x, np.sqrt(12) * spread_y
    return (
        width,
        height,
        width * height,
        _edge(width[component] / 2 - np.abs(dx)) * _edge(height[component] / 2 - np.abs(dy)),
    )


def _triangle(
    dx: np.ndarray, dy: np.ndarray, spread_x: np.ndarray, spread_y: np.ndarray, component: np.ndarray
) -> _Ideal:
    """Draw the upright isosceles triangle of given moments: (width, height, area [C], coverage [P])."""
    width, height = np.sqrt(24) * spread_x, np.sqrt(18) * spread_y
    flank = (dy / height[component] + 2 / 3) * width[component] / 2 - np.abs(dx)
    slope = height / np.hypot(height, width / 2)
    return (
        width,
        height,
        width * height / 2,
        _edge(flank * slope[component]) * _edge(height[component] / 3 - dy),
    )


def _edge(inward: np.ndarray) -> np.ndarray:
    """Cover a pixel by how far, in pixels, its centre lies inside of an edge."""
    return np.clip(inward + 0.5, 0, 1)


def _cells(image: np.ndarray, area: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Place each image's components [C] in a row, largest first: ((image, rank), component) that fit."""
    order = np.lexsort((-area, image))
    rank = np.arange(len(image)) - np.searchsorted(image[order], image[order])
    fits = rank < MAX_OBJECTS
    return (image[order][fits], rank[fits]), order[fits]
