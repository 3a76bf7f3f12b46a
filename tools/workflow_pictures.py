"""The .jpg beside every workflow: what comes out of it, drawn for a card of 300 pixels from what the tiny
model makes.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import comfy_host
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from workflow_parts import FAMILIES, TINY, training
from workflow_topics import GRAPHS

from comfy_g2rpo.rewards import REWARDS

SIDE, MAX_BYTES = 600, 60_000
STEPS = 240
RUN = Path(comfy_host.__file__).with_name("comfy_child_workflows.py")
GROUND, DIM, LIGHT = "#17181c", "#5b5f6b", "#f2f2f2"
GREEN, CYAN, PURPLE, BLUE = "#4fc26b", "#46c1c9", "#b06fd0", "#6f8df0"
UP, DOWN = "#62b5f0", "#ff9a5c"  # as the sheets have them
PROMPT = TINY.prompt
PAIRS = ("two red circles", "a yellow triangle above a green circle")


@dataclass(frozen=True)
class Material:
    """What the tiny model made: a batch for PROMPT, best first, with its scores; pictures of PAIRS before
    and after training; and the curve.
    """

    batch: list[Image.Image]
    scores: list[float]
    before: list[Image.Image]
    after: list[Image.Image]
    trained: list[float]
    heldout: list[tuple[int, float]]


def make(comfyui: Path, folder: Path) -> None:
    """Make all pictures."""
    material = gather(comfyui)
    for subject in GRAPHS:
        for family in FAMILIES:
            canvas = Image.new("RGB", (SIDE, SIDE), GROUND)
            pen = ImageDraw.Draw(canvas)
            DRAWN[subject](canvas, pen, material)
            badge(pen, family.label)
            keep(canvas, folder / f"{subject} - {family.label}.jpg")


def gather(comfyui: Path) -> Material:
    """Train the tiny model for a minute and draw with it."""
    graph: dict[str, Any] = {"m": node("G2RPO_TinyDemoLoader")}
    graph["r"] = node("G2RPO_LoadReward", reward="agreement")
    wires = {"model": ["m", 0], "clip": ["m", 1], "vae": ["m", 2], "reward": ["r", 0]}
    settings = training(TINY, STEPS) | {"run": "cards", "seed": 0, "targets": "attention"}
    settings |= {"eval_every": 20}
    graph["t"] = node("G2RPO_TrainLoRA", **wires, **settings)
    want = {}
    for i, prompt in enumerate((PROMPT, *PAIRS)):
        graph[f"c{i}"] = node("CLIPTextEncode", clip=["m", 1], text=prompt)
        for model, name in (("m", "before"), ("t", "after")):
            graph[f"{name}{i}"] = drawn(graph, model, f"c{i}", 8)
            want[f"{name}{i}"] = [f"{name}{i}", 0]
    with tempfile.TemporaryDirectory() as place:
        base = comfy_host.make_base(Path(place), "comfy_g2rpo")
        job = {"name": "cards", "graph": graph, "want": want}
        answer = comfy_host.run_script(comfyui, RUN, base, [job], timeout=1800)
        if answer.data[0]["error"] or answer.data[0]["problems"]:
            raise RuntimeError(f"the tiny model did not train: {answer.data}")
        lines = (base / "output/g2rpo/cards/metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return sorted_out(answer.tensors, rows)


def node(kind: str, **inputs: object) -> dict[str, Any]:
    """Return a node of an API graph."""
    return {"class_type": kind, "inputs": inputs}


def drawn(graph: dict[str, Any], model: str, conditioning: str, count: int) -> dict[str, Any]:
    """Add a sampler for some pictures; return the node that decodes them."""
    name, both = f"k{len(graph)}", [conditioning, 0]
    graph["latent"] = node("EmptySD3LatentImage", width=TINY.size, height=TINY.size, batch_size=count)
    settings = {"seed": 7, "steps": TINY.num_steps, "cfg": 1.0, "denoise": 1.0}
    settings |= {"sampler_name": "euler", "scheduler": "simple", "latent_image": ["latent", 0]}
    graph[name] = node("KSampler", model=[model, 0], positive=both, negative=both, **settings)
    return node("VAEDecode", samples=[name, 0], vae=["m", 2])


def sorted_out(tensors: dict[str, Tensor], rows: Sequence[dict[str, Any]]) -> Material:
    """Choose the pictures that the cards show: for every pair the noise that training helped most."""
    judge = REWARDS["agreement"]
    scores = judge.score(tensors["before0"], [PROMPT] * len(tensors["before0"]))
    order = scores.argsort(descending=True)
    before, after = [], []
    for i, prompt in enumerate(PAIRS, 1):
        first, then = tensors[f"before{i}"], tensors[f"after{i}"]
        gain = judge.score(then, [prompt] * len(then)) - judge.score(first, [prompt] * len(first))
        best = int(gain.argmax())
        before.append(picture(first[best]))
        after.append(picture(then[best]))
    steps = [row for row in rows if row.get("step")]
    return Material(
        [picture(tensors["before0"][i]) for i in order.tolist()],
        scores[order].tolist(),
        before,
        after,
        [row["reward/agreement/mean"] for row in steps if "reward/agreement/mean" in row],
        [(row["step"], row["heldout/agreement/mean"]) for row in steps if "heldout/agreement/mean" in row],
    )


def picture(image: Tensor) -> Image.Image:
    """Return an image [H, W, 3] in [0, 1] as a picture."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def tile(
    canvas: Image.Image, image: Image.Image, at: tuple[int, int], side: int, frame: str = DIM, width: int = 4
) -> None:
    """Put a picture on the canvas, with a frame around it."""
    x, y = at
    canvas.paste(image.resize((side, side), Image.Resampling.BICUBIC), at)
    ImageDraw.Draw(canvas).rectangle(
        (x - width, y - width, x + side + width, y + side + width), None, frame, width
    )


def say(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str = LIGHT) -> None:
    """Write a text around a point."""
    pen.text(at, text, colour, ImageFont.load_default(size), anchor="mm")


def badge(pen: ImageDraw.ImageDraw, label: str) -> None:
    """Write the model's name into the lower right corner."""
    font = ImageFont.load_default(34)
    width = font.getlength(label) + 36
    box = (SIDE - width - 14, SIDE - 66, SIDE - 14, SIDE - 14)
    pen.rounded_rectangle(box, 14, "#2b2d36", "#8a8f9e", 2)
    pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), label, LIGHT, font, anchor="mm")


def pick(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw the best picture large, and the others below it."""
    tile(canvas, made.batch[0], (40, 40), 330, GREEN, 8)
    say(pen, (485, 120), "best", 64, GREEN)
    say(pen, (485, 200), "of 8", 64)
    say(pen, (485, 290), f"{made.scores[0]:.2f}", 52, GREEN)
    for i, place in enumerate((1, 3, 5)):
        x = 40 + 128 * i
        tile(canvas, made.batch[place], (x, 420), 104)
        say(pen, (x + 52, 556), f"{made.scores[place]:.2f}", 32, "#b9bdc8")


def why(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw what is pushed up above what is pushed down."""
    for row, (colour, places, sign) in enumerate(((UP, (0, 1, 2), 1), (DOWN, (7, 6, 5), -1))):
        y = 44 + 250 * row
        for i, place in enumerate(places):
            tile(canvas, made.batch[place], (150 + 146 * i, y), 126, colour, 6)
            mean = sum(made.scores) / len(made.scores)
            say(pen, (213 + 146 * i, y + 160), f"{made.scores[place] - mean:+.2f}", 34, colour)
        arrow(pen, (74, y + 63), 56, sign, colour)


def arrow(pen: ImageDraw.ImageDraw, at: tuple[int, int], size: int, sign: int, colour: str) -> None:
    """Draw an arrow up (1) or down (-1)."""
    x, y = at
    pen.polygon([(x - size, y), (x + size, y), (x, y - sign * size)], colour)
    ends = sorted((y, y + sign * size))
    pen.rectangle((x - size // 3, ends[0], x + size // 3, ends[1]), colour)


def train(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw the curve of a run, and a picture at both of its ends."""
    smooth = smoothed(made.trained)
    values = smooth + [value for _, value in made.heldout]
    low, high = min(values), max(values)

    def at(step: float, value: float) -> tuple[float, float]:
        return 60 + 480 * step / len(smooth), 500 - 290 * (value - low) / (high - low)

    for y in (210, 307, 404, 500):
        pen.line((60, y, 540, y), "#2e313b", 2)
    dashes(pen, [at(step, value) for step, value in made.heldout])
    pen.line([at(i + 1, value) for i, value in enumerate(smooth)], GREEN, 9, "curve")
    tile(canvas, made.before[0], (60, 36), 130)
    tile(canvas, made.after[0], (410, 36), 130, GREEN, 6)
    pen.line((220, 101, 350, 101), LIGHT, 8)
    pen.polygon([(350, 78), (390, 101), (350, 124)], LIGHT)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return running means, as the page draws them."""
    made, level = [], values[0]
    for value in values:
        level = 0.85 * level + 0.15 * value
        made.append(level)
    return made


def dashes(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]]) -> None:
    """Draw a dashed line."""
    for (x0, y0), (x1, y1) in pairwise(points):
        parts = max(1, round(math.dist((x0, y0), (x1, y1)) / 14))
        for i in range(0, parts, 2):
            a, b = i / parts, min(1, (i + 1) / parts)
            ends = (x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0))
            pen.line(ends, CYAN, 7)


def vote(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw pictures to choose from, three of them chosen."""
    order = [3, 0, 6, 1, 7, 4, 5, 2]
    chosen = {0: "1", 1: "2", 2: "3"}
    for i, place in enumerate(order[:8]):
        x, y = 34 + 180 * (i % 3), 34 + 180 * (i // 3)
        tile(
            canvas,
            made.batch[place],
            (x, y),
            156,
            PURPLE if place in chosen else DIM,
            7 if place in chosen else 3,
        )
        if place in chosen:
            pen.ellipse((x - 16, y - 16, x + 48, y + 48), PURPLE)
            say(pen, (x + 16, y + 15), chosen[place], 42)


def again(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw a voted pair, and the circle of epochs that turns on it."""
    for i, (place, colour, word) in enumerate(((3, PURPLE, "1"), (5, DIM, "2"))):
        x = 60 + 270 * i
        tile(canvas, made.batch[place], (x, 60), 210, colour, 7 if colour == PURPLE else 3)
        if colour == PURPLE:
            pen.ellipse((x - 22, 38, x + 42, 102), PURPLE)
            say(pen, (x + 10, 69), word, 42)
    for start in (200, 20):
        pen.arc((180, 310, 420, 550), start, start + 140, GREEN, 14)
        angle = math.radians(start + 148)
        x, y = 300 + 120 * math.cos(angle), 430 + 120 * math.sin(angle)
        ahead, aside = (-math.sin(angle), math.cos(angle)), (math.cos(angle), math.sin(angle))
        tip = (x + 22 * ahead[0], y + 22 * ahead[1])
        sides = [(x - 16 * ahead[0] + k * aside[0], y - 16 * ahead[1] + k * aside[1]) for k in (26, -26)]
        pen.polygon([tip, *sides], GREEN)
    say(pen, (300, 430), "again", 50, GREEN)


def loop(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw four stations on a ring around a picture."""
    centre, ring = (300, 270), 205
    for quarter in range(4):
        start = 90 * quarter - 90 + (24, 18, 30, 18)[quarter]
        box = (centre[0] - ring, centre[1] - ring, centre[0] + ring, centre[1] + ring)
        pen.arc(box, start, start + 34, LIGHT, 10)
        tip = math.radians(start + 38)
        x, y = centre[0] + ring * math.cos(tip), centre[1] + ring * math.sin(tip)
        ahead, aside = (-math.sin(tip), math.cos(tip)), (math.cos(tip), math.sin(tip))
        pen.polygon(
            [
                (x + 18 * ahead[0], y + 18 * ahead[1]),
                (x - 14 * ahead[0] + 20 * aside[0], y - 14 * ahead[1] + 20 * aside[1]),
                (x - 14 * ahead[0] - 20 * aside[0], y - 14 * ahead[1] - 20 * aside[1]),
            ],
            LIGHT,
        )
    stations = (("draw", BLUE), ("judge", PURPLE), ("compare", CYAN), ("learn", GREEN))
    for quarter, (word, colour) in enumerate(stations):
        angle = math.radians(90 * quarter - 90)
        x, y = centre[0] + ring * math.cos(angle), centre[1] + ring * math.sin(angle)
        width = 24 + ImageFont.load_default(38).getlength(word) / 2
        x = min(max(x, width + 8), SIDE - width - 8)
        pen.rounded_rectangle((x - width, y - 34, x + width, y + 34), 18, "#22242c", colour, 5)
        say(pen, (x, y), word, 38, colour)
    tile(canvas, made.after[0], (228, 198), 144, GREEN, 5)


def compare(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw pairs, before on the left and after on the right."""
    for column, (word, pictures, colour) in enumerate(
        (("before", made.before, DIM), ("after", made.after, GREEN))
    ):
        say(pen, (165 + 270 * column, 36), word, 44, LIGHT if column else "#b9bdc8")
        for i, each in enumerate(pictures):
            tile(canvas, each, (55 + 270 * column, 70 + 234 * i), 214, colour, 6)


def search(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw an ordinary image, and a better one under a looking glass."""
    say(pen, (150, 52), "same model", 40, "#b9bdc8")
    tile(canvas, made.batch[5], (50, 90), 200)
    for i, place in enumerate((6, 7, 4, 3, 2)):
        tile(canvas, made.batch[place], (50 + 104 * i, 430), 84)
    centre, ring = (410, 230), 150
    tile(canvas, made.batch[0], (centre[0] - 106, centre[1] - 106), 212, GREEN, 6)
    box = (centre[0] - ring, centre[1] - ring, centre[0] + ring, centre[1] + ring)
    pen.ellipse(box, None, LIGHT, 14)
    pen.line((centre[0] + 106, centre[1] + 106, centre[0] + 178, centre[1] + 178), LIGHT, 30)


def beside(canvas: Image.Image, pen: ImageDraw.ImageDraw, made: Material) -> None:
    """Draw a graph that hands its work to a machine of its own, and gets the picture back."""
    pen.rounded_rectangle((50, 70, 270, 250), 18, "#22242c", BLUE, 6)
    say(pen, (160, 160), "graph", 46, BLUE)
    pen.rounded_rectangle((330, 330, 550, 510), 18, "#22242c", GREEN, 6)
    say(pen, (440, 420), "worker", 46, GREEN)
    for path, tip in (
        (((270, 160), (440, 160), (440, 310)), ((414, 300), (466, 300), (440, 338))),
        (((330, 420), (160, 420), (160, 408)), ((134, 418), (186, 418), (160, 380))),
    ):
        pen.line(path, LIGHT, 12)
        pen.polygon(tip, LIGHT)
    tile(canvas, made.after[0], (95, 280), 92, GREEN, 5)


DRAWN: dict[str, Callable[[Image.Image, ImageDraw.ImageDraw, Material], None]] = dict(
    zip(GRAPHS, (pick, why, train, vote, again, loop, compare, search, beside), strict=True)
)


def keep(canvas: Image.Image, place: Path) -> None:
    """Write a JPEG of at most MAX_BYTES."""
    for quality in range(90, 30, -6):
        canvas.save(place, "JPEG", quality=quality, optimize=True)
        if place.stat().st_size <= MAX_BYTES:
            return
    raise ValueError(f"{place.name} does not fit into {MAX_BYTES} bytes")
