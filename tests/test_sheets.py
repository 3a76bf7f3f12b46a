"""The sheets of ranked pictures and of pairs, drawn without ComfyUI, and the letters on them."""

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_cases import some
from view_tools import load, pixels, plain_image, rgb, where

drawing, letters = load("views.drawing"), load("views.letters")
ranked, paired = load("views.ranked_sheet"), load("views.pair_sheet")
Tile, Pair = ranked.Tile, paired.Pair
BOXES = "桜の下で、読и"


def forget() -> None:
    """Let the letters look for fonts again."""
    letters.font.cache_clear()
    letters.bearer.cache_clear()


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(letters, "SYSTEM", ())
    forget()
    yield
    forget()


@pytest.fixture
def a_font(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Install a font that has the letters of BOXES alone, each a square."""
    builder = pytest.importorskip("fontTools.fontBuilder").FontBuilder(1000, isTTF=True)
    pen = pytest.importorskip("fontTools.pens.ttGlyphPen").TTGlyphPen
    names = [".notdef", *(f"u{ord(letter):04x}" for letter in BOXES)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(BOXES, names[1:], strict=True)})
    glyphs = {}
    for name, (low, high) in (dict.fromkeys(names, (100, 900)) | {".notdef": (400, 500)}).items():
        drawn = pen(None)
        drawn.moveTo((low, low))
        for corner in ((high, low), (high, high), (low, high)):
            drawn.lineTo(corner)
        drawn.closePath()
        glyphs[name] = drawn.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "boxes.ttf")
    monkeypatch.setattr(letters, "SYSTEM", ("missing.ttf", str(tmp_path / "boxes.ttf")))
    forget()
    yield
    forget()


# letters


@given(st.text(max_size=80), st.floats(20, 600))
def test_any_text_becomes_letters_of_a_font_and_fits(text: str, width: float) -> None:
    assert all(letters.bearer(letter) is not None for letter in letters.plain(text))
    cut = letters.fitted(text, 20, width)
    assert letters.length(cut, 20) <= max(width, letters.length("...", 20))
    assert cut == letters.plain(text) or cut.endswith("...")


@pytest.mark.usefixtures("no_fonts")
def test_accents_are_dropped_and_scripts_without_a_font_marked() -> None:
    assert letters.plain("Ein schöner Café–Tag, 日本\n\0x") == "Ein schoner Cafe-Tag, ?? x"


@pytest.mark.usefixtures("a_font")
def test_a_font_of_the_system_draws_what_pillow_s_own_cannot() -> None:
    assert letters.plain("桜の下で, 本 и é") == "桜の下で, ? и e"
    assert letters.plain("で") == "で", "a letter and its mark are one letter"
    assert letters.length("a桜", 20) == letters.length("a", 20) + 20
    sheet, pen = drawing.sheet(80, "桜", [])
    letters.write(pen, (400, 40), "桜", drawing.INK, 20, "mm")
    box = where(np.asarray(sheet), drawing.INK)
    box = box[box[:, 1] > 300]
    assert len(box) > 150 and abs(box[:, 1].mean() - 400) < 2 and abs(box[:, 0].mean() - 40) < 5


@pytest.mark.parametrize("text", ["שלום", "مرحبا", "नमस्ते", "ภาษา"])
def test_scripts_that_want_shaping_are_never_drawn_wrongly(text: str) -> None:
    assert set(letters.plain(text)) <= {"?"}


@pytest.mark.usefixtures("a_font")
def test_lines_of_east_asia_break_anywhere_but_before_a_comma() -> None:
    text = "桜の下で、読" * 4
    lines = letters.wrapped(text, 20, 105, 9)
    assert "".join(lines) == text and len(lines) > 4
    assert all(letters.length(line, 20) <= 105 for line in lines)
    assert not any(line.startswith("、") for line in lines)


@pytest.mark.usefixtures("no_fonts")
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("fell by 0.02 ± 0.01", "fell by 0.02 +/- 0.01"),
        ("α ≠ 1, β ≥ 2", "? != 1, ? >= 2"),
        ("≤ 3 × 4", "<= 3 x 4"),
    ],
)
def test_signs_of_a_message_are_spelt_out(text: str, shown: str) -> None:
    assert letters.plain(text) == shown


def test_a_broken_up_text_keeps_its_words_and_its_lines_fit() -> None:
    text = "four purple triangles left of a very long description " * 3
    lines = letters.wrapped(text, 24, 400, 20)
    assert " ".join(lines).split() == text.split()
    assert all(letters.length(line, 24) <= 400 for line in lines)
    assert len(letters.wrapped(text, 24, 400, 2)) == 2


# ranked sheet


def tile(score: float, *lines: str, height: int = 8, width: int = 8) -> object:
    """Make a tile whose colour is its own."""
    return Tile(plain_image(0.2, 0.5, 0.8, height, width), score, lines=lines)


def said(monkeypatch: pytest.MonkeyPatch, module: object) -> list[tuple[str, tuple[float, float]]]:
    """Collect what a sheet writes, and where."""
    found: list[tuple[str, tuple[float, float]]] = []
    real = module.write

    def write(pen: object, place: tuple[float, float], text: str, *rest: object) -> None:
        found.append((text, place))
        real(pen, place, text, *rest)

    monkeypatch.setattr(module, "write", write)
    return found


def test_the_best_picture_comes_first_and_the_unjudged_one_last() -> None:
    scores, images = (0.2, math.nan, 0.9), (plain_image(1, 0, 0), plain_image(0, 1, 0), plain_image(0, 0, 1))
    picture = pixels(
        ranked.ranked_grid([Tile(image, score) for image, score in zip(images, scores, strict=True)])
    )
    places = [where(picture, colour)[:, 1].mean() for colour in ((0, 0, 255), (255, 0, 0), (0, 255, 0))]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("count", "shown", "between"),
    [(1, 1, 0), (2, 2, 0), (10, 10, 0), (11, 10, 1), (64, 10, 54), (1024, 10, 1014)],
)
def test_of_more_than_ten_the_best_and_the_worst_five_are_shown(
    monkeypatch: pytest.MonkeyPatch, count: int, shown: int, between: int
) -> None:
    found = said(monkeypatch, ranked)
    picture = pixels(ranked.ranked_grid([tile(-i / 8, f"no {i}") for i in range(count)]))
    ranks = [int(text[:-1]) for text, _ in found if text.endswith(".") and text[:-1].isdigit()]
    assert ranks == [*range(1, min(count, 5) + 1), *range(max(count - 4, 6), count + 1)][:shown]
    assert len(ranks) == shown
    ends = [text for text, _ in found if "in between" in text]
    words = f"from -0.625 to {drawing.number(-(count - 6) / 8)}" if between > 1 else "with -0.625"
    assert ends == [f"{between} in between, {words}"] * bool(between)
    assert picture.shape[0] <= 1024


def test_pictures_without_a_score_are_counted_and_not_among_the_worst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = said(monkeypatch, ranked)
    scores = [*(float(i) for i in range(12)), *[math.nan] * 3]
    ranked.ranked_grid([tile(score) for score in scores])
    assert "15." not in [text for text, _ in found] and "12." in [text for text, _ in found]
    assert ranked.counted(10, 15, 12) == [
        "The 5 best and the 5 worst of 12 with a score.",
        "3 could not be judged.",
    ]
    assert ranked.counted(10, 12, 4) == ["10 of 12 are shown.", "8 could not be judged."]
    assert ranked.counted(3, 3, 3) == []


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (64, 96), (400, 20), (20, 400)])
@pytest.mark.parametrize("count", some([1, 2, 3, 5, 6, 9, 24], 3))
def test_no_tile_lies_over_another_or_beyond_the_sheet(count: int, height: int, width: int) -> None:
    colours = [(i + 1, 255 - i, 7) for i in range(count)]
    tiles = [
        Tile(torch.tensor(rgb) / 255 * torch.ones(height, width, 1), -float(i), 1.0, ("a" * 99,) * 3)
        for i, rgb in enumerate(colours)
    ]
    picture = pixels(ranked.ranked_grid(tiles))
    boxes = [where(picture, colour) for colour in colours]
    boxes = [box for box in boxes if len(box)]
    assert len(boxes) == min(count, 10)
    corners = [(box.min(0), box.max(0)) for box in boxes]
    assert all(len(box) == np.prod(high - low + 1) for box, (low, high) in zip(boxes, corners, strict=True))
    assert picture.shape[0] <= 2048


def test_frames_tell_up_from_down_without_colour() -> None:
    def top_edge(advantage: float, colour: str) -> np.ndarray:
        picture = pixels(ranked.ranked_grid([Tile(plain_image(0, 0, 0), 0.5, advantage)]))
        # A row through the upper edge of the frame; the letters are elsewhere.
        return (picture[drawing.heading([""]) + 2, 28 : 28 + ranked.LARGEST] == rgb(colour)).all(-1)

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
    picture = pixels(ranked.ranked_grid(tiles))
    assert picture.shape[0] <= 1500
    assert (picture == pixels(ranked.ranked_grid(tiles))).all()


def test_a_picture_is_not_changed_by_being_shown() -> None:
    image = torch.rand(5, 7, 3)
    before = image.clone()
    ranked.ranked_grid([Tile(image, 0.5)])
    assert torch.equal(image, before)


# before and after


def make_pair(prompt: str, seed: int = 0, gain: float = 0.0, **more: tuple[float, float]) -> object:
    """Make a pair whose one reward rises by `gain`."""
    return Pair(
        prompt, seed, plain_image(1, 0, 0), plain_image(0, 0, 1), {"taste": (0.25, 0.25 + gain), **more}
    )


def test_base_is_above_and_tuned_below() -> None:
    picture = pixels(paired.before_after([make_pair("a red circle", gain=0.5)]))
    red, blue = (where(picture, colour)[:, 0] for colour in ((255, 0, 0), (0, 0, 255)))
    assert len(red) == len(blue) > 10_000
    assert red.max() < blue.min()


def test_four_prompts_stand_in_a_row() -> None:
    def columns(count: int) -> tuple[int, int]:
        red = where(pixels(paired.before_after([make_pair(str(i)) for i in range(count)])), (255, 0, 0))
        gaps = [(np.diff(np.unique(red[:, axis])) > 1).sum() + 1 for axis in (1, 0)]
        return gaps[0], gaps[1]

    assert [columns(count) for count in (1, 2, 4, 5, 8)] == [(1, 1), (2, 1), (4, 1), (4, 2), (4, 2)]


def test_a_change_is_worded_and_coloured() -> None:
    assert paired.delta(0.25, 0.75) == ("+0.500", drawing.UP)
    assert paired.delta(0.75, 0.25) == ("-0.500", drawing.DOWN)
    assert paired.delta(0.5, 0.5)[1] == drawing.PALE
    assert paired.delta(math.nan, 0.5) == ("not judged", drawing.PALE)


def test_the_heading_sums_the_changes_up() -> None:
    assert (
        paired.gain_line("taste", [(0.0, 1.0), (0.5, 0.25), (math.nan, 1.0)])
        == "taste: mean 0.250 -> 0.625 (+0.375), better in 1 of 2"
    )


def test_of_many_prompts_the_highest_and_the_lowest_changes_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gains = [0.1 * ((7 * i) % 30 - 15) for i in range(30)]
    pairs = [make_pair(f"p{i}", gain=gain) for i, gain in enumerate(gains)]
    chosen = paired.choose(pairs, 8, {})
    assert [round(gains[i], 1) for i in chosen] == [1.4, 1.3, 1.2, 1.1, -1.2, -1.3, -1.4, -1.5]
    assert paired.choose(pairs, 8, {"taste": -1.0}) == chosen[::-1], "a penalty counts the other way"
    assert paired.choose(pairs[:8], 8, {}) == list(range(8)), "all of a few stay in order"
    captions: list[list[str]] = []
    real = paired.sheet
    monkeypatch.setattr(paired, "sheet", lambda *given: (captions.append(given[2]), real(*given))[1])
    for drawn in (0, 100):
        paired.before_after(pairs, drawn=drawn)
    assert [said[-1] for said in captions] == [
        f"Shown: 4 highest changes, then 4 lowest; {more} more pairs are not shown." for more in (22, 92)
    ]


def test_a_prompt_is_shown_once_while_there_are_others() -> None:
    pairs = [make_pair(f"p{i}", seed, gain=0.1 * i - 0.45 + seed) for i in range(10) for seed in range(3)]
    chosen = [(pairs[i].prompt, pairs[i].seed) for i in paired.choose(pairs, 8, {})]
    assert chosen == [*((f"p{i}", 2) for i in (9, 8, 7, 6)), *((f"p{i}", 0) for i in (3, 2, 1, 0))]
    alone = paired.choose([make_pair("p", seed, gain=seed / 10) for seed in range(20)], 8, {})
    assert alone == [19, 18, 17, 16, 3, 2, 1, 0]
    two = [make_pair(f"p{i}", seed, gain=seed / 10 + i / 100) for i in range(2) for seed in range(10)]
    assert [two[i].seed for i in paired.choose(two, 8, {})] == [9, 9, 8, 8, 1, 1, 0, 0]


def test_changes_count_each_in_its_own_spread_and_by_its_weight() -> None:
    fine = [0.001, -0.001, 0.003, 0.0]
    pairs = [make_pair(str(i), gain=100.0 * (i == 3), fine=(0.0, value)) for i, value in enumerate(fine)]
    assert np.argmax(paired.changes_of(pairs, {"taste": 0.0})) == 2
    assert np.argmax(paired.changes_of(pairs, {"fine": 0.0})) == 3
    unjudged = [Pair("p", 0, plain_image(0, 0, 0), plain_image(0, 0, 0), {"taste": (math.nan, 1.0)})]
    assert paired.changes_of(unjudged, {}).tolist() == [0.0]


SIDES = [(64, 64), (96, 64), (64, 96), (500, 20), (20, 500)]
COUNTS = [(1, 1), (2, 1), (4, 2), (64, 1), (1, 64), (100, 3)]


@pytest.mark.parametrize(("size", "count", "rewards"), some(product(SIDES, COUNTS, (0, 2, 9)), 20))
def test_a_sheet_is_never_taller_than_twice_its_width(
    size: tuple[int, int], count: tuple[int, int], rewards: int
) -> None:
    (height, width), (prompts, seeds) = size, count
    image = plain_image(0.5, 0.5, 0.5, height, width)
    scores = {f"a reward with a long name {i}": (0.0, 1.0) for i in range(rewards)}
    text = "a prompt that goes on and on " * 60
    pairs = [Pair(f"{p} {text}", s, image, image, scores) for p in range(prompts) for s in range(seeds)]
    assert pixels(paired.before_after(pairs)).shape[0] <= 2048


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
    picture = pixels(paired.before_after(pairs))
    assert (picture == pixels(paired.before_after(pairs))).all()
