"""`g2rpo compare`: paired by prompt, with honest intervals, in one page that needs nothing from elsewhere
and trusts no text.
"""

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import leave

from comfy_g2rpo.run.evaluation import Evaluation
from comfy_g2rpo.run.folder import RunFolder, Sample
from g2rpo_trainer.reports.comparison import (
    LABEL,
    Pair,
    change,
    interval,
    labels,
    of_runs,
    same_names,
    to_show,
)
from g2rpo_trainer.reports.comparison_page import pair

EVIL = '<script>alert("x")</script> & \u202e "quoted"'


def make_run(
    place: Path, gains: dict[int, float], seed: int = 0, prompts: tuple[str, ...] = ("a cat", "a dog", EVIL)
) -> Path:
    """Make a run folder whose evaluation at each step lies by a gain above a fixed table."""
    run = RunFolder.create(place, {"config": {"train": {"seed": seed}}})
    table = torch.arange(2.0 * len(prompts) * 2).reshape(2, len(prompts), 2) / 10
    for step, gain in gains.items():
        scores = table + gain * torch.tensor([1.0, -1.0])[:, None, None]
        scores[1, 0, 0] = torch.nan
        image = torch.full((8, 8, 3), 0.2 + gain / 10)
        samples = tuple(
            Sample(
                prompt,
                noise,
                {"jpeg": float(scores[0, i, noise]), "strict": float(scores[1, i, noise])},
                image,
            )
            for i, prompt in enumerate(prompts)
            for noise in range(2)
        )
        Evaluation(("jpeg", "strict"), prompts, scores, samples).save(run, step)
    return place


class Page(HTMLParser):
    """Collect what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Take a tag."""
        self.tags.append(tag)
        self.links += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "action", "style") or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        """Take text."""
        self.text += data


# The statistics


def test_a_prompt_counts_once_however_many_pictures_it_has() -> None:
    pairs = [Pair(str(i), "a", {"r": (0.0, 1.0)}) for i in range(9)] + [Pair("x", "b", {"r": (1.0, 0.0)})]
    made = change("r", pairs)
    assert (made.count, made.gain, made.win_rate, made.before, made.after) == (2, 0.0, 0.5, 0.5, 0.5)


def test_ties_are_half_wins_and_what_was_not_judged_is_left_out() -> None:
    pairs = [
        Pair("0", "", {"r": (0.0, 1.0)}),
        Pair("1", "", {"r": (1.0, 1.0)}),
        Pair("2", "", {"r": (math.nan, 9.0)}),
        Pair("3", "", {}),
    ]
    made = change("r", pairs)
    assert (made.count, made.gain, made.win_rate) == (2, 0.5, 0.75)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    inside = 0
    for _ in range(60):
        low, high = interval(random.exponential(1.0, 40) - 1)
        inside += low <= 0 <= high
    assert 50 <= inside <= 60


def test_the_interval_is_the_same_every_time_and_knows_its_limits() -> None:
    values = np.random.default_rng(0).normal(1, 1, 30)
    low, high = interval(values)
    assert (low, high) == interval(values)
    assert low < values.mean() < high
    # Near the normal interval, for values that are normal.
    assert (high - low) / 2 == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(30), rel=0.1)
    assert all(map(math.isnan, interval(np.array([1.0]))))
    assert interval(np.full(5, 2.0)) == (2.0, 2.0)
    assert interval(np.random.default_rng(0).normal(1, 1, 5000))[0] > 0.9


def test_shown_pairs_go_from_the_best_to_the_worst() -> None:
    pairs = [Pair(str(i), "", {"r": (0.0, float(i))}) for i in range(100)] + [
        Pair("nan", "", {"r": (0.0, math.nan)})
    ]
    assert [pair.label for pair in to_show(pairs, "r", 3)] == ["99", "49", "nan"]
    assert len(to_show(pairs, "r", 1000)) == 101
    assert to_show([], "r", 5) == [] == to_show(pairs, "r", 0)


# Runs


def test_two_runs_are_compared_at_their_newest_evaluations(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one", {0: 0.0, 5: 1.0}), make_run(tmp_path / "other", {0: 0.0, 7: 3.0})
    found = of_runs(one, other)
    assert (found.before, found.after) == ("one, step 5", "other, step 7")
    gains = {each.reward: (each.count, pytest.approx(each.gain), each.win_rate) for each in found.changes}
    assert gains == {"jpeg": (3, 2.0, 1.0), "strict": (3, -2.0, 0.0)}
    assert found.notes == ()
    assert len(found.pairs) == 6
    assert found.pairs[0].before == one / "images/000005/000.png"


def test_a_run_by_itself_is_its_first_with_its_last_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {0: 0.0, 5: 1.0, 9: 2.0})
    found = of_runs(run, run)
    assert (found.before, found.after) == ("run, step 0", "run, step 9")
    with pytest.raises(ValueError, match="has a single evaluation; let it train on"):
        of_runs(*[make_run(tmp_path / "short", {0: 0.0})] * 2)


LONG = "a_very_long_name_of_an_experiment_with_everything_in_it"
PLACES = {
    "their names": ("runs/one", "runs/two", ("one", "two")),
    "the same name": ("one/run", "two/run", ("one/run", "two/run")),
    "the same last folders": ("a/x/runs/demo", "b/x/runs/demo", ("a/x/runs/demo", "b/x/runs/demo")),
    "one within the other": ("run", "sub/run", None),
    "the place itself": (".", "..", None),
    "a way around": ("x/../one", "two", ("one", "two")),
    "itself": ("one", "x/../one", ("one", "one")),
    "other beginnings": (f"lr1_{LONG}", f"lr2_{LONG}", None),
    "other ends": (f"{LONG}_seed1", f"{LONG}_seed2", None),
    "other middles": (f"{LONG}_lr1_{LONG}", f"{LONG}_lr2_{LONG}", None),
    "other folders, long names": (f"one/{LONG}", f"two/{LONG}", None),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_compared_has_a_short_name_that_tells_it_apart(name: str) -> None:
    first, second, expected = PLACES[name]
    found = labels(Path(first), Path(second))
    assert expected in (None, found)
    assert (found[0] == found[1]) == (name == "itself")
    for label, place in zip(found, (first, second), strict=True):
        assert 0 < len(label.strip("…")) <= LABEL
        assert label.strip("…") in str(Path(os.path.abspath(place)))


def test_names_that_no_cut_tells_apart_are_whole() -> None:
    assert labels(Path("a" * 50), Path("a" * 60)) == ("a" * 50, "a" * 60)


def test_page_and_text_say_which_run_is_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = make_run(tmp_path / "one/run", {5: 1.0}), make_run(tmp_path / "two/run", {7: 3.0})
    _, text, _ = leave(capsys, "compare", one, other, "--out", tmp_path / "a.html")
    assert text.splitlines()[0] == "one/run, step 5 → two/run, step 7"
    page = Page((tmp_path / "a.html").read_text("utf-8")).text
    assert "Left: one/run, step 5; right: two/run, step 7." in page


def test_runs_of_other_seeds_or_prompts_say_so(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", {5: 1.0})
    assert "different seeds" in of_runs(one, make_run(tmp_path / "two", {5: 1.0}, seed=1)).notes[0]
    assert of_runs(one, make_run(tmp_path / "three", {5: 1.0}, prompts=("a dog", "x"))).changes[0].count == 1
    with pytest.raises(ValueError, match="share no held-out prompt"):
        of_runs(one, make_run(tmp_path / "four", {5: 1.0}, prompts=("x", "y")))


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one", {5: 1.0}), make_run(tmp_path / "two", {5: 1.0})
    index = one / "images/000005/index.json"
    index.write_text(index.read_text().replace('"000.png"', '"../../../secret.png"'))
    assert of_runs(one, other).pairs[0].before == one / "images/000005/secret.png"


# The page


def test_the_page_needs_nothing_and_trusts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_run(tmp_path / "<b>one", {5: 1.0}), make_run(tmp_path / "other", {7: 3.0})
    code, text, _ = leave(capsys, "compare", one, other, "--out", tmp_path / "a.html")
    assert code == 0
    assert re.search(
        r"^jpeg  .* gain \+2 \[\+2, \+2\]  wins 100% \[100%, 100%\]  3 prompts$", text, re.MULTILINE
    )
    content = (tmp_path / "a.html").read_text("utf-8")
    page = Page(content)
    assert not {"script", "iframe", "object", "link", "form"} & set(page.tags)
    assert page.tags.count("img") == 12
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert "http" not in content.replace("http-equiv", "")
    assert EVIL in page.text and "<b>one" in page.text
    assert "default-src 'none'" in content


def test_folders_are_paired_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, strength in (("before", 60), ("after", 240)):
        (tmp_path / name).mkdir()
        for i in range(6):
            noise = np.random.default_rng(i).random((16, 16, 3)) * strength
            Image.fromarray(noise.astype(np.uint8)).save(
                tmp_path / name / f"{i}{'.png' if name == 'before' else '.bmp'}"
            )
    (tmp_path / "after/alone.png").write_bytes((tmp_path / "before/0.png").read_bytes())
    (tmp_path / "before/5.png").write_bytes(b"broken")
    arguments = [
        "compare",
        tmp_path / "before",
        tmp_path / "after",
        "--reward",
        "colourfulness",
        "--reward",
        "agreement",
        "--out",
        tmp_path / "x.html",
    ]
    code, text, errors = leave(capsys, *arguments, "--json")
    found = {each["reward"]: each for each in json.loads(text)["changes"]}
    assert code == 0
    assert (found["colourfulness"]["count"], found["colourfulness"]["win_rate"]) == (5, 1.0)
    assert found["colourfulness"]["gain_interval"][0] > 20
    assert found["agreement"]["gain"] is None
    page = Page((tmp_path / "x.html").read_text("utf-8"))
    assert "1 pictures have no partner" in page.text and "is not a picture that can be read" in page.text
    assert page.tags.count("img") == 11
    # Tiny pictures are enlarged, so that one sees anything.
    assert 'width="320"' in (tmp_path / "x.html").read_text("utf-8")
    assert "error" not in errors  # what people read goes there
    pairs, notes = same_names(tmp_path / "before", tmp_path / "after")
    assert (pairs[0][0].name, pairs[0][1].name) == ("0.png", "0.bmp")
    assert notes


@pytest.mark.parametrize("first, second", [("a", "a"), ("a", "b/../a"), ("a", "a/inner"), ("a/inner", "a")])
def test_folders_that_share_pictures_are_compared(
    first: str,
    second: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, colour in (("a", 0), ("a/inner", 200), ("b", 0)):
        Path(place).mkdir()
        noise = np.random.default_rng(colour).random((16, 16, 3)) * (55 + colour)
        Image.fromarray(noise.astype(np.uint8)).save(Path(place) / "0.png")
    code, text, _ = leave(capsys, "compare", first, second, "--reward", "colourfulness", "--json")
    (found,) = json.loads(text)["changes"]
    sign = ("inner" in second) - ("inner" in first)
    assert code == 0 and np.sign(found["gain"]) == sign and found["win_rate"] == (1 + sign) / 2


MISTAKES = {
    "nowhere": (["compare", "nowhere", "b"], "nowhere is no folder"),
    "no reward": (["compare", "a", "b"], "folders of pictures need a second folder B and --reward"),
    "one folder": (["compare", "a", "--reward", "jpeg"], "folders of pictures need a second folder B"),
    "two kinds": (["compare", "run", "a"], "run and a are a run and a folder of pictures"),
    "reward of runs": (["compare", "run", "--reward", "jpeg"], "--reward and prompts are for folders"),
    "no names": (["compare", "a", "b", "--reward", "jpeg"], "a and b hold no pictures of the same name"),
    "there already": (["compare", "a", "b", "--out", "mine.html"], "mine.html exists; choose another --out"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_no_report(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", {0: 0.0})
    for folder, file in (("a", "x.png"), ("b", "y.png")):
        Path(folder).mkdir()
        Image.new("RGB", (4, 4)).save(Path(folder, file))
    Path("mine.html").write_text("mine")
    arguments, words = MISTAKES[name]
    code, _, error = leave(capsys, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {words}")
    assert not Path("compare.html").exists()
    assert Path("mine.html").read_text() == "mine"


@pytest.mark.parametrize(
    "before, after, kind",
    [(0.89701, 0.89696, "pale"), (0.5, 0.5, "pale"), (0.25, 0.26, "up"), (20.5, 20.49, "down")],
)
def test_a_pair_is_coloured_where_its_figures_show_a_change(before: float, after: float, kind: str) -> None:
    assert f"<span class='{kind}'>jpeg " in pair(Pair("start noise 0", "a cat", {"jpeg": (before, after)}))
