"""Text in pictures: what a prompt asks for, how near it is, and what is read of drawn words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from program import leave

from comfy_g2rpo.rewards import RewardError, checked
from g2rpo_trainer.config.reward_checks import check_reward
from g2rpo_trainer.config.sections import RewardSection
from g2rpo_trainer.rewards import ocr
from g2rpo_trainer.rewards.build import build

pytestmark = pytest.mark.xdist_group("ocr")  # one process makes what they share

SIZE = 512
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSans-Oblique")
SIZES = (20, 28, 40, 60)
WORDS = ("OPEN", "Coffee", "Library", "2024", "Welcome", "Dragon")


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ('a sign that says "OPEN"', ["open"]),
        ("a sign that says 'Open Late!'", ["openlate"]),
        ("two signs, “Hello” and “New York”", ["hello", "newyork"]),
        ("a poster ‘Don’t panic’ beside «Café»", ["dontpanic", "café"]),
        ("ein Schild „Bäckerei“ und „Straße”", ["bäckerei", "strasse"]),
        ("看板に「営業中」と『休み』", ["営業中", "休み"]),
        ("the dogs' bowl says 'Rex' and it's the cat's", ["rex"]),
        ("'tis the season, with a banner 'SALE'", ["sale"]),
        ("""a mug that says "Don't" and a sign 'STOP'""", ["dont", "stop"]),
        ('a 5" pipe and a 6" tube', []),
        ('an empty sign "" and one with "!?"', []),
        ("a sign that says OPEN", []),
        ("", []),
        ('a full-width "ＯＰＥＮ ２４"', ["open24"]),
        ('an unclosed "quote', []),
    ],
)
def test_what_is_asked_for_stands_in_quotes(prompt, asked):
    assert ocr.quoted(prompt) == asked


@pytest.mark.parametrize(
    ("read", "asked", "score"),
    [
        ("open", ["open"], 1.0),
        ("opan", ["open"], 0.75),
        ("ope", ["open"], 0.75),
        ("", ["open"], 0.0),
        ("weareopentoday", ["open"], 1.0),
        ("closedforever", ["open"], 0.0),
        ("worldhello", ["hello", "world"], 1.0),
        ("worldhell", ["hello", "world"], 0.9),
        ("hello", ["hello", "world"], 0.5),
        ("abcd", ["a", "b", "c", "d", "e"], 0.8),
    ],
)
def test_the_score_is_one_less_the_edits_per_letter(read, asked, score):
    pytest.importorskip("rapidfuzz", reason="needs rapidfuzz: pip install 'g2rpo[ocr]'")
    assert ocr.likeness(read, asked) == pytest.approx(score)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ocr, "NEEDS", ("rapidocr_of_nobody",))
    with pytest.raises(
        RewardError, match=r"needs rapidocr_of_nobody; install with: pip install 'g2rpo\[ocr\]'"
    ):
        check_reward(RewardSection(name="ocr"))


def test_its_name_is_taken():
    with pytest.raises(RewardError, match="'ocr' is built in"):
        check_reward(RewardSection(name="ocr", url="http://127.0.0.1:8765"))


def font(name, size):
    """Load a font that matplotlib brings."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf"), size)


def drawn(words, name="DejaVuSans", size=40):
    """Draw words below each other: an image [SIZE, SIZE, 3] in [0, 1]."""
    sheet = Image.new("RGB", (SIZE, SIZE), (236, 230, 218))
    pen = ImageDraw.Draw(sheet)
    for row, word in enumerate(words):
        pen.text((40 + 60 * (row % 3), 12 + 82 * row), word, font=font(name, size), fill=(24, 32, 60))
    return torch.from_numpy(np.asarray(sheet).copy()).float() / 255


@pytest.fixture(scope="module")
def reward():
    for name in ocr.NEEDS:
        pytest.importorskip(name, reason=f"text is read with {name}: pip install 'g2rpo[ocr]'")
    return build(RewardSection(name="ocr"))


@pytest.mark.long
def test_drawn_words_are_read_in_five_fonts_and_four_sizes(reward):
    exact = {}
    for name in FONTS:
        for size in SIZES:
            found = list(map(ocr.plain, reward.lines(drawn(WORDS, name, size))))
            exact[name, size] = sum(ocr.plain(word) in found for word in WORDS)
    count = len(FONTS) * len(SIZES) * len(WORDS)
    print(f"{sum(exact.values())} of {count} words exact: {exact}")
    assert sum(exact.values()) >= 0.95 * count


def test_pictures_are_scored_by_their_own_prompts(reward):
    images = torch.stack(
        [drawn(["OPEN"]), drawn(["CLOSED"]), drawn([]), drawn(["OPEN"]), drawn(["Hello", "you"])]
    )
    images[3] = torch.nan
    prompts = ['says "Open!"', 'says "CLOUDED"', "says 'open'", 'says "open"', "“you” and “hello”"]
    scores = checked(reward, images, prompts)
    assert scores[[0, 4]].tolist() == [1, 1] and scores[1] == pytest.approx(5 / 7) and scores[2] == 0
    assert scores[3].isnan()
    assert checked(reward, images[:1], ["a sign that says OPEN"]).isnan().all() and reward.may_abstain


def test_prompts_that_ask_for_no_text_are_refused_before_anything_runs(reward):
    reward.check_prompts(["a cat", 'a sign "x"'])
    with pytest.raises(RewardError, match="no prompt asks for text in quotes"):
        reward.check_prompts(["a cat", "a dog's bowl"])


def test_nothing_is_fetched_while_it_reads(reward, monkeypatch):
    import socket

    def refuse(*given):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    ocr.reader.cache_clear()
    assert checked(build(RewardSection(name="ocr")), drawn(["OPEN"])[None], ['"open"']) == 1


def test_a_run_that_stops_does_not_wait_for_all_pictures(reward, monkeypatch):
    seen = []
    monkeypatch.setattr(reward, "lines", lambda image: seen.append(1) or reward.cancel() or [])
    with pytest.raises(RewardError, match="broken off"):
        reward.score(torch.zeros(3, 8, 8, 3), ['"a"'] * 3)
    assert len(seen) == 1


def test_a_folder_of_pictures_is_scored_from_the_command_line(reward, tmp_path, capsys):
    for name, word in (("a.png", "OPEN"), ("b.png", "SHUT")):
        Image.fromarray(drawn([word]).mul(255).byte().numpy()).save(tmp_path / name)
    words = ["score", "ocr", str(tmp_path), "--prompt", 'a sign "open"', "--json"]
    code, printed, _ = leave(capsys, *words, "--out", tmp_path / "out")
    assert code == 0
    assert printed.index("a.png") < printed.index("b.png") and '"score": 1.0' in printed
