"""Pictures of coloured shapes with captions: the seeded data set of the bundled tiny model.

Run it to rewrite the prompt lists of the toy world: `python tools/shapes_data.py`.
"""

from itertools import chain, count
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from comfy_g2rpo.rewards.shapes.vocabulary import (
    BACKGROUND,
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    describe,
    parse,
)

SIDE = 64  # pixels
SUPERSAMPLING = 4
MARGIN, GAP = 2, 3  # pixels to the border, between bounding boxes
LARGE, SMALL = (14, 24), (12, 17)  # bounding boxes in pixels, for up to two objects and for more
MIN_ALONG, MAX_ACROSS = 18, 16  # pixels between centres, along and across the axis of a relation
KINDS = {"count": 0.35, "pair": 0.20, "relation": 0.45}
PROMPT_LISTS = {"train": 240, "tune": 96, "heldout": 96}
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Box = tuple[float, float, float]  # centre x, centre y, size


def sample_thing(rng: np.random.Generator) -> Thing:
    """Draw a colour and a shape."""
    return Thing(str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)))


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw what a picture shows, by the shares of `KINDS`."""
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    first, second = sample_thing(rng), sample_thing(rng)
    if kind == "count":
        return Scene((first,) * int(rng.choice(list(NUMBERS.values()))))
    while second == first:
        second = sample_thing(rng)
    return Scene((first, second), str(rng.choice(list(RELATIONS))) if kind == "relation" else None)


def sample_prompts(count: int, rng: np.random.Generator) -> list[str]:
    """Draw prompts, repetitions included."""
    return [describe(sample_scene(rng)) for _ in range(count)]


def is_apart(box: Box, others: list[Box]) -> bool:
    """Say whether a bounding box keeps its distance from all others."""
    x, y, size = box
    return all(max(abs(x - x2), abs(y - y2)) >= (size + size2) / 2 + GAP for x2, y2, size2 in others)


def is_related(first: Box, second: Box, relation: str) -> bool:
    """Say whether the first box lies to the second as the relation asks."""
    step_x, step_y = RELATIONS[relation]
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = (dx * step_x, dy) if step_x else (dy * step_y, dx)
    return along >= MIN_ALONG and abs(across) <= MAX_ACROSS


def place(scene: Scene, rng: np.random.Generator) -> list[Box]:
    """Draw centres and sizes by rejection, on a grid of 1/SUPERSAMPLING pixels."""
    small, large = LARGE if len(scene.things) <= 2 else SMALL
    while True:
        boxes: list[Box] = []
        for _ in scene.things:
            size = int(rng.integers(small * SUPERSAMPLING, large * SUPERSAMPLING + 1)) / SUPERSAMPLING
            reach = (MARGIN + size / 2, SIDE - MARGIN - size / 2)
            x, y = (float(np.round(c * SUPERSAMPLING) / SUPERSAMPLING) for c in rng.uniform(*reach, size=2))
            if not is_apart((x, y, size), boxes):
                break
            boxes.append((x, y, size))
        if len(boxes) == len(scene.things) and (
            scene.relation is None or is_related(boxes[0], boxes[1], scene.relation)
        ):
            return boxes


def draw_shape(canvas: ImageDraw.ImageDraw, thing: Thing, box: Box) -> None:
    """Draw one flat shape into its bounding box on the supersampled canvas."""
    x, y, half = box[0] * SUPERSAMPLING, box[1] * SUPERSAMPLING, box[2] * SUPERSAMPLING / 2
    left, top, right, bottom = x - half, y - half, x + half - 1, y + half - 1
    fill = COLOURS[thing.colour]
    if thing.shape == "circle":
        canvas.ellipse((left, top, right, bottom), fill=fill)
    elif thing.shape == "square":
        canvas.rectangle((left, top, right, bottom), fill=fill)
    else:
        canvas.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=fill)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene at random places, anti-aliased, as uint8 [64, 64, 3]."""
    picture = Image.new("RGB", (SIDE * SUPERSAMPLING,) * 2, BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    for thing, box in zip(scene.things, place(scene, rng), strict=True):
        draw_shape(canvas, thing, box)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))


def make_pictures(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Make the data set: pictures as uint8 [count, 64, 64, 3] and their prompts."""
    rng = np.random.default_rng(seed)
    prompts = sample_prompts(count, rng)
    return np.stack([render(parse(prompt), rng) for prompt in prompts]), prompts


def meaning(prompt: str) -> Scene:
    """Return one scene for all prompts that ask for the same picture: A left of B is B right of A."""
    scene = parse(prompt)
    swapped = Scene(scene.things[::-1], OPPOSITES.get(scene.relation))
    return min(scene, swapped, key=str)


def split_prompts(seed: int = 7) -> dict[str, list[str]]:
    """Draw lists of distinct prompts for training, tuning and held-out evaluation.

    No held-out prompt means the same as another, or as one that was trained or tuned on.
    """
    rng = np.random.default_rng(seed)
    distinct: dict[str, None] = {}
    while len(distinct) < sum(PROMPT_LISTS.values()):
        distinct.update(dict.fromkeys(sample_prompts(1, rng)))
    prompts = rng.permutation(list(distinct)).tolist()
    ends = np.cumsum(list(PROMPT_LISTS.values())).tolist()
    lists = {
        name: prompts[end - size : end] for (name, size), end in zip(PROMPT_LISTS.items(), ends, strict=True)
    }
    heldout, known = [], {meaning(prompt) for prompt in (*lists["train"], *lists["tune"])}
    drawn = chain(lists["heldout"], (sample_prompts(1, rng)[0] for _ in count()))
    while len(heldout) < PROMPT_LISTS["heldout"]:
        prompt = next(drawn)
        if meaning(prompt) not in known:
            known.add(meaning(prompt))
            heldout.append(prompt)
    return {**lists, "heldout": heldout}


def more_heldout(lists: dict[str, list[str]], size: int = 288, seed: int = 8) -> list[str]:
    """Draw more held-out prompts, none of which means the same as another: those of the list first."""
    rng = np.random.default_rng(seed)
    known = {meaning(prompt) for prompts in lists.values() for prompt in prompts}
    found = list(lists["heldout"])
    while len(found) < size:
        prompt = sample_prompts(1, rng)[0]
        if meaning(prompt) not in known:
            known.add(meaning(prompt))
            found.append(prompt)
    return found


def main() -> None:
    """Write the prompt lists."""
    root, lists = Path(__file__).resolve().parent.parent, split_prompts()
    files = {f"prompts/shapes_{name}.txt": prompts for name, prompts in lists.items()}
    files["benchmarks/more_heldout.txt"] = more_heldout(lists)
    for name, prompts in files.items():
        (root / name).write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
