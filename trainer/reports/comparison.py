"""Before and after: pairs of pictures with their scores, what changed and how sure that is. Prompts, not
pictures, are what is drawn from.

A prompt's pictures resemble each other, so that each prompt counts once, by its mean; the interval is a
paired bootstrap over prompts (Efron and Tibshirani, "An introduction to the bootstrap", 1993, §10.3 and
§14.3).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comfy_g2rpo.files.picture_files import listed
from comfy_g2rpo.files.safe import finite
from comfy_g2rpo.run.evaluation import Evaluation
from comfy_g2rpo.run.folder import RunFolder, is_run
from comfy_g2rpo.run.summary import best_evaluation

RESAMPLES, CONFIDENCE = 9999, 0.95
# units from which on the plain percentile interval replaces the accelerated one, which leaves each of them
# out once
MANY = 2000
LABEL = 40  # characters of the name of what is compared


class ComparisonError(ValueError):
    """Two things that cannot be compared, in one line."""


@dataclass(frozen=True)
class Pair:
    """The same thing before and after: scores by reward, and where the two pictures lie."""

    label: str
    prompt: str
    scores: Mapping[str, tuple[float, float]]
    before: Path | None = None
    after: Path | None = None


@dataclass(frozen=True)
class Change:
    """One reward: means, mean gain and win rate with their 95 % intervals, over `count` prompts."""

    reward: str
    count: int
    before: float
    after: float
    gain: float
    gain_interval: tuple[float, float]
    win_rate: float
    win_interval: tuple[float, float]

    def row(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return finite(dict(vars(self)))


@dataclass(frozen=True)
class Comparison:
    """All that a report shows."""

    before: str
    after: str
    pairs: tuple[Pair, ...]
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = field(default=())


def change(reward: str, pairs: Sequence[Pair]) -> Change:
    """Sum the pairs of one reward up; those that could not be judged on both sides are left out."""
    units: dict[str, list[tuple[float, float]]] = {}
    for pair in pairs:
        found = pair.scores.get(reward, (math.nan, math.nan))
        if not any(map(math.isnan, found)):
            units.setdefault(pair.prompt or pair.label, []).append(found)
    table = np.array([np.mean(rows, axis=0) for rows in units.values()]).reshape(-1, 2)
    gains = table[:, 1] - table[:, 0]
    wins = np.array(
        [
            np.mean([(after > before) + (after == before) / 2 for before, after in rows])
            for rows in units.values()
        ]
    )
    means = table.mean(0).tolist() if len(table) else [math.nan] * 2
    gain, win = (float(values.mean()) if len(values) else math.nan for values in (gains, wins))
    return Change(reward, len(table), *means, gain, interval(gains), win, interval(wins))


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of the mean of values [n]; NaN below two values."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return (math.nan, math.nan)
    if np.ptp(values) == 0:
        return (float(values[0]), float(values[0]))
    batch = max(10**7 // len(values), 1)
    method = "BCa" if len(values) < MANY else "percentile"
    draws = {
        "n_resamples": RESAMPLES,
        "confidence_level": CONFIDENCE,
        "random_state": np.random.default_rng(0),
        "batch": batch,
    }
    found = bootstrap((values,), np.mean, method=method, **draws).confidence_interval
    return (float(found.low), float(found.high))


def changes(pairs: Sequence[Pair]) -> tuple[Change, ...]:
    """Sum up every reward."""
    return tuple(
        change(name, pairs) for name in dict.fromkeys(name for pair in pairs for name in pair.scores)
    )


def of_runs(first: Path, second: Path, best: bool = False) -> Comparison:
    """Pair two runs by held-out prompts at their newest evaluation; a run with itself, first with last.

    `best` takes the best evaluation by held-out rewards instead of the newest.
    """
    one, other = RunFolder.open(first), RunFolder.open(second)
    itself = first.resolve() == second.resolve()
    steps = [evaluated(run) for run in (one, other)]
    last = [best_evaluation(run) if best else step[-1] for run, step in zip((one, other), steps, strict=True)]
    chosen = (steps[0][0], last[1]) if itself else (last[0], last[1])
    if itself and best and chosen[0] == chosen[1]:
        raise ComparisonError(f"{first}: no evaluation beats the first one; compare without --best")
    if itself and chosen[0] == chosen[1]:
        raise ComparisonError(
            f"{first} has a single evaluation; let it train on, or give another run to compare with"
        )
    names = [f"{name}, step {step}" for name, step in zip(labels(first, second), chosen, strict=True)]
    measured = scored_pairs(one, other, chosen)
    if not measured:
        raise ComparisonError(
            f"{first} and {second} share no held-out prompt and reward; compare runs with the same "
            "prompts.heldout"
        )
    seeds = [run.config().get("config", {}).get("train", {}).get("seed") for run in (one, other)]
    notes = (
        ("the runs drew their noises from different seeds: pictures of a prompt do not start alike",)
        if seeds[0] != seeds[1]
        else ()
    )
    return Comparison(*names, tuple(shown_pairs(one, other, chosen)), changes(measured), notes)


def labels(first: Path, second: Path) -> tuple[str, str]:
    """Name two places as shortly as tells them apart: by their last folders, long names cut around that."""
    parts = [Path(os.path.abspath(place)).parts for place in (first, second)]
    depths = range(1, max(map(len, parts)) + 1)
    depth = next((depth for depth in depths if parts[0][-depth:] != parts[1][-depth:]), 1)
    whole = [str(Path(*each[-depth:])) for each in parts]
    apart = (i for i, (one, other) in enumerate(zip(*whole, strict=False)) if one != other)
    place = next(apart, min(map(len, whole)))
    cut = [around(text, place) for text in whole]
    return tuple(whole if cut[0] == cut[1] and whole[0] != whole[1] else cut)


def around(text: str, place: int) -> str:
    """Cut a text to LABEL characters that hold the one at `place`, the end where it can be."""
    if len(text) <= LABEL:
        return text
    start = max(min(place - LABEL // 4, len(text) - LABEL), 0)
    kept = text[start : start + LABEL]
    return f"{'…' if start else ''}{kept}{'…' if start + LABEL < len(text) else ''}"


def evaluated(run: RunFolder) -> list[int]:
    """List the steps that were evaluated."""
    steps = [
        step
        for step in run.sampled_steps()
        if (run.path / "images" / f"{step:06d}" / "scores.json").is_file()
    ]
    if not steps:
        raise ComparisonError(f"{run.path} has no evaluation yet; let it train on")
    return steps


def scored_pairs(one: RunFolder, other: RunFolder, steps: tuple[int, int]) -> list[Pair]:
    """Pair the scores of all held-out prompts; pictures are not kept of all of them."""
    looks = [Evaluation.read(run, step) for run, step in zip((one, other), steps, strict=True)]
    names = [name for name in looks[0].names if name in looks[1].names]
    rows = [{prompt: row for row, prompt in enumerate(look.prompts)} for look in looks]
    noises = min(look.scores.shape[2] for look in looks)
    pairs = []
    for prompt in (prompt for prompt in rows[0] if prompt in rows[1] and names):
        for noise in range(noises):
            places = [(look, look.names, rows[i][prompt]) for i, look in enumerate(looks)]
            scores = {
                name: tuple(float(look.scores[own.index(name), row, noise]) for look, own, row in places)
                for name in names
            }
            pairs.append(Pair(f"start noise {noise}", prompt, scores))
    return pairs


def shown_pairs(one: RunFolder, other: RunFolder, steps: tuple[int, int]) -> list[Pair]:
    """Pair the pictures that both evaluations have kept."""
    found = []
    for run, step in zip((one, other), steps, strict=True):
        folder = run.path / "images" / f"{step:06d}"
        # The index is a file like any other: of its names only the last part counts.
        found.append(
            {
                (sample.prompt, sample.seed): (sample, folder / sample.path.name)
                for sample in run.samples(step)
            }
        )
    pairs = []
    for key in (key for key in found[0] if key in found[1]):
        (before, file_before), (after, file_after) = found[0][key], found[1][key]
        names = [name for name in before.scores if name in after.scores]
        scores = {name: (known(before.scores[name]), known(after.scores[name])) for name in names}
        pairs.append(Pair(f"start noise {key[1]}", key[0], scores, file_before, file_after))
    return pairs


def known(score: float | None) -> float:
    """Read a score that may be null."""
    return math.nan if score is None else float(score)


def same_names(first: Path, second: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pair the pictures of two folders by their names, whatever their kind; say what has no partner."""
    sides = [
        {path.relative_to(folder).with_suffix(""): path for path in listed(folder, deep=True)}
        for folder in (first, second)
    ]
    names = [name for name in sides[0] if name in sides[1]]
    if not names:
        raise ComparisonError(
            f"{first} and {second} hold no pictures of the same name; name those alike that belong together"
        )
    alone = sum(len(side) - len(names) for side in sides)
    return [(sides[0][name], sides[1][name]) for name in names], [
        f"{alone} pictures have no partner of their name"
    ] if alone else []


def kind_of(place: Path) -> str:
    """Tell a run from a folder of pictures."""
    if not place.is_dir():
        raise ComparisonError(f"{place} is no folder; give a run folder or a folder of pictures")
    return "run" if is_run(place) else "pictures"


def to_show(pairs: Sequence[Pair], reward: str, most: int) -> list[Pair]:
    """Choose pairs evenly from the greatest gain to the greatest loss; those without a score come last."""
    found = [pair.scores.get(reward, (math.nan, math.nan)) for pair in pairs]
    gains = [after - before for before, after in found]
    order = sorted(range(len(pairs)), key=lambda i: math.inf if math.isnan(gains[i]) else -gains[i])
    places = (
        sorted({round(place) for place in np.linspace(0, len(order) - 1, min(most, len(order)))})
        if order
        else []
    )
    return [pairs[order[place]] for place in places]
