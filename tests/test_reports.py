"""What a run's pictures say: the trend, legends in words, prompts that can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.signal import lfilter

from g2rpo_trainer.reports.report import (
    BETTER,
    LINES,
    PALE,
    SMOOTHING,
    WORSE,
    diversity_label,
    draw_diversity,
    draw_optimizer,
    draw_time,
    font,
    gain,
    smooth,
    wrapped,
)


def weighted_means(values: np.ndarray) -> list[float]:
    """Average each start of a series by its definition: weights that fade into the past."""
    weights = (1 - SMOOTHING) ** np.arange(len(values))[::-1]
    starts = range(1, len(values) + 1)
    return [(values[:i] * weights[-i:]).sum() / weights[-i:].sum() for i in starts]


@pytest.mark.parametrize("count", [0, 1, 2, 50, 400])
def test_the_trend_is_the_fading_mean(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert smooth(values) == pytest.approx(weighted_means(values), abs=1e-12)


class Counted(float):
    """A number that counts the additions it comes into."""

    added = 0

    def __add__(self, other: float) -> float:
        Counted.added += 1
        return float(self) + other

    __radd__ = __add__


def test_the_trend_of_a_long_run_is_that_of_a_filter() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    kept = [1, SMOOTHING - 1]
    expected = lfilter([1], kept, values) / lfilter([1], kept, np.ones(len(values)))
    assert smooth(values) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_the_trend_takes_each_value_up_once(count: int) -> None:
    Counted.added = 0
    smooth(np.array([Counted(i) for i in range(count)], object))
    assert Counted.added == count - 1


ROWS: dict[str, list[dict[str, Any]]] = {
    "the demo": [{"diversity/group": 0.3, "diversity/pixels/set": 0.2, "grad_norm": 1.0}],
    "a reward model": [
        {f"diversity/{measure}/{of}": 0.3} for measure in ("pixels", "embed") for of in ("group", "set")
    ],
    "a distance": [{"kl/velocity": 1e-4, "kl/heldout": 1e-3, "grad_norm": 0.1}],
    "times": [{f"time/{phase}": 1.0 for phase in ("rollout", "decode", "reward", "update")}],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("draw", [draw_optimizer, draw_diversity, draw_time])
def test_legends_are_words_and_no_names_of_metrics(draw: Any, name: str) -> None:
    rows = [{"step": step, **row} for step, row in enumerate(ROWS[name])]
    axes = Figure().subplots()
    draw(axes, rows)
    texts = [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []
    assert len(set(texts)) == len(texts) == len(axes.lines) + len(axes.collections)
    for text in texts:
        assert "/" not in text and "_" not in text and " " in text


def test_what_pictures_are_compared_by_is_said_where_there_are_several_measures() -> None:
    assert diversity_label("diversity/pixels/set", False) == "of different held-out prompts"
    assert diversity_label("diversity/embed/group", True) == "of one held-out prompt, by the reward model"
    assert diversity_label("diversity/group", True) == "of one prompt, in training"


@pytest.mark.parametrize(
    "prompt, lines",
    [
        ("a cat", 1),
        ("a green triangle above a purple triangle", 2),
        ("a photograph " * 100, LINES),
        ("猫" * 300, 1),
        ("a\nb", 1),
    ],
)
def test_a_prompt_is_shown_as_far_as_there_is_room(prompt: str, lines: int) -> None:
    found = wrapped(prompt, 220)
    assert len(found) == lines
    assert all(font(18).getlength(line) <= 220 for line in found)
    whole = " ".join(prompt.split())
    assert " ".join(found) == whole or (found[-1].endswith("…") and whole.startswith(" ".join(found)[:-1]))


@pytest.mark.parametrize(
    "old, new, colour",
    [(0.394, 0.3851, PALE), (0.384, 0.386, BETTER), (0.386, 0.384, WORSE), (1, 1, PALE), (None, 1, PALE)],
)
def test_a_change_is_coloured_where_its_figures_show_one(old: float | None, new: float, colour: str) -> None:
    assert gain("strict", old, new)[1] == colour
