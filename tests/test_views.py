"""The views, drawn without ComfyUI: what their colours mean, what is left out, and that nothing makes them
fail.
"""

import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    """Import a module of nodes/ as part of a pack whose door, which needs a ComfyUI, stays shut."""
    if "g2rpo_pack_for_views" not in sys.modules:
        package = ModuleType("g2rpo_pack_for_views")
        package.__path__ = [str(ROOT / "nodes")]
        sys.modules["g2rpo_pack_for_views"] = package
    return importlib.import_module(f"g2rpo_pack_for_views.{name}")


drawing, views, curve = load("views.drawing"), load("views.tables"), load("views.curve")
Tile, Pair, Table = views.Tile, views.Pair, views.Table
SHARES = np.linspace(-1, 1, 401)


def pixels(sheet: torch.Tensor) -> np.ndarray:
    """Check a view's form and return its 8-bit pixels [H, W, 3]."""
    assert sheet.dtype == torch.float32
    assert sheet.ndim == 4
    assert sheet.shape[0] == 1
    assert sheet.shape[2:] == (1024, 3)
    assert sheet.min() >= 0 and sheet.max() <= 1
    return (sheet[0].numpy() * 255).round().astype(np.uint8)


def count(picture: np.ndarray, colour: Sequence[int] | str) -> int:
    """Count the pixels of exactly one colour."""
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)] if isinstance(colour, str) else list(colour)
    return int((picture == rgb).all(-1).sum())


def plain_image(red: float, green: float, blue: float, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.tensor([red, green, blue]).expand(height, width, 3)


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


def test_both_directions_darken_alike() -> None:
    light = np.array([drawing.luminance(drawing.diverging(share)) for share in SHARES])
    assert (np.diff(light[200:]) < 0).all()
    assert (np.diff(light[:201]) > 0).all()
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


# letters


@given(st.text(max_size=80), st.floats(20, 600))
def test_any_text_becomes_letters_of_the_font_and_fits(text: str, width: float) -> None:
    assert all(" " <= letter <= "~" for letter in drawing.plain(text))
    cut = drawing.fitted(text, 20, width)
    assert drawing.length(cut, 20) <= max(width, drawing.length("...", 20))
    assert cut == drawing.plain(text) or cut.endswith("...")


def test_accents_are_dropped_and_other_scripts_marked() -> None:
    assert drawing.plain("Ein schöner Café–Tag, 日本\n\0x") == "Ein schoner Cafe-Tag, ?? x"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("fell by 0.02 ± 0.01", "fell by 0.02 +/- 0.01"),
        ("α ≠ 1, β ≥ 2", "? != 1, ? >= 2"),
        ("≤ 3 × 4", "<= 3 x 4"),
    ],
)
def test_signs_of_a_message_are_spelt_out(text: str, shown: str) -> None:
    assert drawing.plain(text) == shown


def test_a_broken_up_text_keeps_its_words_and_its_lines_fit() -> None:
    text = "four purple triangles left of a very long description " * 3
    lines = drawing.wrapped(text, 24, 400, 20)
    assert " ".join(lines).split() == text.split()
    assert all(drawing.length(line, 24) <= 400 for line in lines)
    assert len(drawing.wrapped(text, 24, 400, 2)) == 2


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
        ("stride 1", "+1.5", 1.5),
        ("stride 2", "-0.5", -0.5),
    ]


@pytest.mark.parametrize("per_branch", [False, True])
def test_groups_that_teach_nothing_are_hatched(per_branch: bool) -> None:
    z = np.random.default_rng(0).normal(size=(3, 3, 2))
    tied = np.zeros((3, 2), bool)
    tied[1] = True
    stripe = (168, 168, 168)
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
    assert first.shape[0] <= 8000
    assert (first == pixels(views.heatmap(table, per_branch))).all()


# ranked grid


def test_the_best_picture_comes_first_and_the_unjudged_one_last() -> None:
    scores, images = (0.2, math.nan, 0.9), (plain_image(1, 0, 0), plain_image(0, 1, 0), plain_image(0, 0, 1))
    picture = pixels(
        views.ranked_grid([Tile(image, score) for image, score in zip(images, scores, strict=True)])
    )
    places = [
        np.argwhere((picture == colour).all(-1))[:, 1].mean()
        for colour in ((0, 0, 255), (255, 0, 0), (0, 255, 0))
    ]
    assert places == sorted(places)


def test_frames_tell_up_from_down_without_colour() -> None:
    def top_edge(advantage: float, colour: str) -> np.ndarray:
        picture = pixels(views.ranked_grid([Tile(plain_image(0, 0, 0), 0.5, advantage)]))
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        # A row through the upper edge of the frame; the letters are elsewhere.
        return (picture[drawing.heading([""]) + 2, 28 : 28 + 330] == rgb).all(-1)

    assert top_edge(1.0, drawing.UP).all()
    dashes = top_edge(-1.0, drawing.DOWN)
    assert 0.3 < dashes.mean() < 0.8
    assert not top_edge(0.0, drawing.UP).any() and not top_edge(0.0, drawing.DOWN).any()


def test_small_pictures_keep_their_pixels() -> None:
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[..., None].expand(2, 2, 3)
    assert set(np.unique(np.asarray(drawing.picture(checks, 200, 200)))) == {0, 255}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 200), st.booleans(), st.integers(0, 2**32 - 1))
def test_any_number_of_pictures_of_any_size_can_be_ranked(number: int, taught: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    images = [
        torch.rand(*map(int, random.integers(1, 90, 2)), int(random.choice([1, 3, 4]))) for _ in range(5)
    ] + [None]
    images[0] = images[0] * torch.nan
    scores = random.normal(size=number) * 10.0 ** random.integers(-9, 9, number)
    scores[random.random(number) < 0.2] = np.nan
    tiles = [
        Tile(images[i % 6], float(score), float(score) if taught else None, ("image",) * (i % 4))
        for i, score in enumerate(scores)
    ]
    picture = pixels(views.ranked_grid(tiles))
    assert picture.shape[0] < 3200
    assert (picture == pixels(views.ranked_grid(tiles))).all()


def test_a_picture_is_not_changed_by_being_shown() -> None:
    image = torch.rand(5, 7, 3)
    before = image.clone()
    views.ranked_grid([Tile(image, 0.5)])
    assert torch.equal(image, before)


# before and after


def test_base_is_above_and_tuned_below() -> None:
    picture = pixels(
        views.before_after(
            [Pair("a red circle", 0, plain_image(1, 0, 0), plain_image(0, 0, 1), {"taste": (0.25, 0.75)})]
        )
    )
    red, blue = (np.argwhere((picture == colour).all(-1))[:, 0] for colour in ((255, 0, 0), (0, 0, 255)))
    assert len(red) == len(blue) > 10_000
    assert red.max() < blue.min()


def test_a_change_is_worded_and_coloured() -> None:
    assert views.delta(0.25, 0.75) == ("0.250 -> 0.750  +0.500", drawing.UP)
    assert views.delta(0.75, 0.25) == ("0.750 -> 0.250  -0.500", drawing.DOWN)
    assert views.delta(0.5, 0.5)[1] == drawing.PALE
    assert views.delta(math.nan, 0.5) == ("not judged", drawing.PALE)


def test_the_heading_sums_the_changes_up() -> None:
    assert (
        views.gain_line("taste", [(0.0, 1.0), (0.5, 0.25), (math.nan, 1.0)])
        == "taste: mean 0.250 -> 0.625 (+0.375), better in 1 of 2"
    )


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 12),
    st.integers(1, 12),
    st.integers(0, 6),
    st.text(max_size=300),
    st.integers(0, 2**32 - 1),
)
def test_any_number_of_pairs_can_be_compared(
    prompts: int, seeds: int, names: int, text: str, seed: int
) -> None:
    random = np.random.default_rng(seed)
    image = torch.rand(*map(int, random.integers(1, 90, 2)), 3)
    scores = {
        f"{text[:20]}{i}": (float(random.normal()), float(random.choice([np.nan, 1e20, -3.0])))
        for i in range(names)
    }
    pairs = [
        Pair(f"{text} {p}", s, image, image * random.random(), scores)
        for p in range(prompts)
        for s in range(seeds)
    ]
    picture = pixels(views.before_after(pairs))
    assert (picture == pixels(views.before_after(pairs))).all()


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
    rgb = [int(curve.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    plot = (pixels(curve.reward_curve(rows))[160:, left:right] == rgb).all(-1)
    return float(np.argwhere(plot)[:, 0].mean())


def test_a_rising_reward_rises_on_paper() -> None:
    assert line_height(make_rows(40), 120, 300) > line_height(make_rows(40), 800, 980) + 50
    assert line_height(make_rows(40, -0.1), 120, 300) < line_height(make_rows(40, -0.1), 800, 980) - 50


def test_heldout_is_dashed_and_training_is_not() -> None:
    def gaps(kind: str) -> int:
        rows = [{"step": 0, f"{kind}/taste/mean": 0.5}, {"step": 10, f"{kind}/taste/mean": 0.5}]
        rgb = [int(curve.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
        plot = (pixels(curve.reward_curve(rows))[140:, 150:950] == rgb).all(-1)
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
    assert alarmed.shape[0] == plain.shape[0] + 28


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
