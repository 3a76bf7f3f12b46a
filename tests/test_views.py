"""The heat map and the curve, drawn without ComfyUI: what their colours mean, what is left out, and that
nothing makes them fail.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from view_tools import load, pixels, rgb, where

drawing, views, curve = load("views.drawing"), load("views.tables"), load("views.curve")
Table = views.Table
SHARES = np.linspace(-1, 1, 401)


def count(picture: np.ndarray, colour: Sequence[int] | str) -> int:
    """Count the pixels of exactly one colour."""
    return len(where(picture, colour))


def make_table(z: np.ndarray, tied: np.ndarray | None = None, advantage: np.ndarray | None = None) -> object:
    """Make a table of z-scores [K, G, L]."""
    steps, _, levels = z.shape
    return Table(
        advantage=np.nan_to_num(z).sum(2) if advantage is None else advantage,
        z=z,
        tied=np.zeros((steps, levels), bool) if tied is None else tied,
        spread=np.full((steps, levels), 0.25),
        steps=tuple(range(steps)),
        sigmas=tuple(np.linspace(1, 0.5, steps)),
        strides=tuple(range(1, levels + 1)),
    )


# colours


def test_no_difference_has_a_neutral_colour() -> None:
    assert len(set(drawing.diverging(0.0))) == 1


def test_both_directions_brighten_alike() -> None:
    light = np.array([drawing.luminance(drawing.diverging(share)) for share in SHARES])
    assert (np.diff(light[200:]) >= 0).all()
    assert (np.diff(light[:201]) <= 0).all()
    assert min(light[0], light[-1]) > light[200] + 0.3
    assert np.abs(light - light[::-1]).max() < 0.06


def test_up_is_bluer_and_down_is_redder() -> None:
    assert all(
        drawing.diverging(s)[2] > drawing.diverging(s)[0]
        and drawing.diverging(-s)[0] > drawing.diverging(-s)[2]
        for s in SHARES[201:]
    )


def test_what_lies_beyond_the_scale_takes_its_end() -> None:
    assert drawing.diverging(7.0) == drawing.diverging(1.0)
    assert drawing.diverging(-7.0) == drawing.diverging(-1.0)


def test_letters_stand_out_on_every_colour() -> None:
    for share in SHARES:
        colour = drawing.diverging(share)
        light, dark = sorted(
            (drawing.luminance(colour), drawing.luminance(drawing.ink_on(colour))), reverse=True
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5


# numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "n/a"),
        (0.5, "0.500"),
        (-12.345, "-12.35"),
        (123.45, "123.5"),
        (1e-5, "1.0e-05"),
        (0.0, "0.000"),
        (-1e30, "-1.0e+30"),
    ],
)
def test_scores_are_short(value: float, text: str) -> None:
    assert drawing.number(value) == text


def test_every_colour_stands_out_on_the_ground() -> None:
    ground = drawing.luminance(rgb(drawing.PAPER))
    for colour in (drawing.INK, drawing.PALE, drawing.UP, drawing.DOWN, *drawing.COLOURS):
        assert (drawing.luminance(rgb(colour)) + 0.05) / (ground + 0.05) >= 4.5


@pytest.mark.parametrize(
    ("stride", "words"),
    [
        (1, "every step"),
        (2, "every 2nd step"),
        (3, "every 3rd step"),
        (4, "every 4th step"),
        (11, "every 11th step"),
        (22, "every 22nd step"),
        (113, "every 113th step"),
    ],
)
def test_a_granularity_is_said_in_words(stride: int, words: str) -> None:
    assert drawing.stride_words(stride) == words


# heat map


def test_scale_of_the_heat_map_is_symmetric() -> None:
    z = np.random.default_rng(0).uniform(0.5, 3.2, (3, 4, 2))
    up, down = (pixels(views.heatmap(make_table(sign * z, advantage=np.zeros((3, 4))))) for sign in (1, -1))
    assert (up[-130:] == down[-130:]).all()
    assert (up[:-130] != down[:-130]).any()


def test_cells_have_the_colours_of_their_values() -> None:
    z = np.zeros((2, 2, 1))
    z[1, :, 0] = (2.0, -2.0)
    winner = pixels(views.heatmap(make_table(z)))
    outvoted = pixels(views.heatmap(make_table(z, advantage=np.array([[0.0, 0.0], [-1.0, 1.0]]))))
    for picture, colour in ((winner, drawing.diverging(1.0)), (outvoted, drawing.diverging(-1.0))):
        assert count(picture[:-130], colour) > 5000
        assert count(picture[:-130], drawing.diverging(0.0)) > 5000
    assert (
        count(winner[:-130], drawing.diverging(-1.0)) == count(outvoted[:-130], drawing.diverging(1.0)) == 0
    )


def test_the_summary_shows_the_winner_as_each_granularity_sees_it() -> None:
    z = np.array([[[1.5, -0.5], [-0.5, 0.2], [-1.0, 0.3]]])
    rows = views.winner_rows(make_table(z), [0])
    assert [(label, cells[0][0], cells[0][2]) for label, cells in rows] == [
        ("every step", "+1.5", 1.5),
        ("every 2nd step", "-0.5", -0.5),
    ]


@pytest.mark.parametrize("per_branch", [False, True])
def test_groups_that_teach_nothing_are_hatched(per_branch: bool) -> None:
    z = np.random.default_rng(0).normal(size=(3, 3, 2))
    tied = np.zeros((3, 2), bool)
    tied[1] = True
    stripe = (drawing.STRIPE,) * 3
    without, with_tie = (
        count(pixels(views.heatmap(make_table(z, t), per_branch)), stripe) for t in (None, tied)
    )
    assert without > 0
    assert with_tie > without + 500


def test_per_branch_has_a_row_for_every_branch_of_every_granularity() -> None:
    blocks = views.branch_blocks(make_table(np.random.default_rng(0).normal(size=(4, 5, 3))), range(4))
    assert [len(rows) for _, rows in blocks] == [5] * 4
    assert all(len(cells) == 4 for _, rows in blocks for _, cells in rows)


def test_what_does_not_fit_is_counted() -> None:
    assert views.left_out(20, 12, "branch steps") == ["12 of 20 branch steps are shown."]
    assert views.left_out(12, 12, "branch steps") == []
    assert views.chosen(20, 12)[0] == 0 and views.chosen(20, 12)[-1] == 19 and len(views.chosen(20, 12)) == 12


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 40), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_any_table_can_be_drawn_and_is_drawn_the_same_again(
    steps: int, branches: int, levels: int, per_branch: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    z = random.normal(size=(steps, branches, levels)) * 10.0 ** random.integers(-9, 9)
    z[random.random(z.shape) < 0.2] = np.nan
    table = make_table(z, random.random((steps, levels)) < 0.2)
    first = pixels(views.heatmap(table, per_branch))
    assert first.shape[0] <= (3300 if per_branch else 1100)
    assert (first == pixels(views.heatmap(table, per_branch))).all()


# curve


def make_rows(steps: int, rise: float = 0.5, every: int = 5) -> list[dict[str, float]]:
    """Write metrics of a reward that rises evenly."""
    rows = []
    for step in range(steps + 1):
        mean = 0.2 + rise * step / max(steps, 1)
        row: dict[str, float] = {"step": step}
        if step:
            row |= {"reward/taste/mean": mean, "reward/taste/std": 0.1}
        if step % every == 0:
            row |= {"heldout/taste/mean": mean, "heldout/taste/ci95": 0.02}
        rows.append(row)
    return rows


def line_height(rows: list[dict[str, float]], left: int, right: int) -> float:
    """Return the mean row of the curve's own colour between two columns."""
    plot = (pixels(curve.reward_curve(rows))[170:, left:right] == rgb(curve.COLOURS[0])).all(-1)
    return float(np.argwhere(plot)[:, 0].mean())


def test_a_rising_reward_rises_on_paper() -> None:
    assert line_height(make_rows(40), 120, 300) > line_height(make_rows(40), 800, 980) + 50
    assert line_height(make_rows(40, -0.1), 120, 300) < line_height(make_rows(40, -0.1), 800, 980) - 50


def test_heldout_is_dashed_and_training_is_not() -> None:
    def gaps(kind: str) -> int:
        rows = [{"step": 0, f"{kind}/taste/mean": 0.5}, {"step": 10, f"{kind}/taste/mean": 0.5}]
        plot = (pixels(curve.reward_curve(rows))[140:, 150:950] == rgb(curve.COLOURS[0])).all(-1)
        row = plot[plot.sum(1).argmax()]
        return int((np.diff(row.astype(int)) == -1).sum())

    assert gaps("reward") == 0
    assert gaps("heldout") > 10


def test_the_newest_evaluations_alarm_stands_over_the_curve() -> None:
    look = {"step": 4, "heldout/a/mean": 0.5, "alarm": "held-out a fell: the model games its reward"}
    assert curve.alarm_of([look]) == "Alarm at step 4: held-out a fell: the model games its reward"
    assert curve.alarm_of([look, {"step": 5, "reward/a/mean": 0.1}]) and not curve.alarm_of(
        [look, {"step": 8, "heldout/a/mean": 0.6}]
    )
    assert not curve.alarm_of([]) and not curve.alarm_of([{**look, "alarm": 7}])
    plain, alarmed = (
        pixels(curve.reward_curve([row])) for row in ({k: v for k, v in look.items() if k != "alarm"}, look)
    )
    assert alarmed.shape[0] == plain.shape[0] + drawing.LINE


def test_smoothing_keeps_what_is_even_and_is_not_pulled_by_the_start() -> None:
    assert curve.smooth(np.full(9, 0.7)) == pytest.approx(0.7)
    assert curve.smooth(np.array([1.0, 0.0]))[0] == 1.0


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.booleans())
def test_ticks_are_few_round_and_inside(low: float, span: float, whole: bool) -> None:
    found = curve.ticks(low, low + span, 5, whole)
    assert len(found) <= 7
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in found)
    assert not whole or all(tick == round(tick) for tick in found)


def test_rewards_in_unit_range_share_a_panel() -> None:
    rows = [
        {"step": i, "reward/a/mean": 0.1 * i, "reward/b/mean": 0.5, "heldout/jpeg/mean": -3.0 * i}
        for i in range(4)
    ]
    assert curve.panels(rows) == ([["a", "b"], ["jpeg"]], 0)


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=2)
)
KEYS = st.sampled_from(
    [
        "step",
        "reward/a/mean",
        "reward/a/std",
        "heldout/a/mean",
        "heldout/a/ci95",
        "reward/b/mean",
        "heldout/c/mean",
        "x",
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.dictionaries(KEYS, VALUES, max_size=6), max_size=12),
    st.text(max_size=300),
    st.none() | st.integers(0, 10**6),
)
def test_any_metrics_can_be_drawn(rows: list[dict[str, object]], title: str, total: int | None) -> None:
    assert pixels(curve.reward_curve(rows, title, total)).shape[0] < 2500


def test_a_long_run_is_drawn() -> None:
    rows = make_rows(20_000, every=500)
    assert (pixels(curve.reward_curve(rows)) == pixels(curve.reward_curve(rows))).all()
