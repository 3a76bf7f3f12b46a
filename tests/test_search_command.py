"""`g2rpo search`: what it prints and leaves, what it refuses, and that it can be stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image
from program import leave

from comfy_g2rpo.files.captions import CHUNK
from comfy_g2rpo.sampling.search_settings import READS
from g2rpo_trainer.reports.search_table import Row, table

FEW = ["--prompts", 2, "--budgets", "16,32", "--methods", "best_of_n,coarse_first", "--quiet"]


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "search.csv").open()))


def test_it_leaves_the_best_images_and_a_row_for_each(tmp_path, capsys):
    code, said, errors = leave(capsys, "search", "demo", "--out", tmp_path / "one", *FEW)
    assert (code, errors) == (0, "")
    found = rows(tmp_path / "one")
    assert [(row["budget"], row["method"]) for row in found[:4]] == [
        ("16", "best_of_n"),
        ("16", "coarse_first"),
        ("32", "best_of_n"),
        ("32", "coarse_first"),
    ]
    assert len(found) == 8 and len({row["prompt"] for row in found}) == 2
    for row in found:
        assert 0 < int(row["forwards"]) <= int(row["budget"]) and int(row["scored"]) >= 2
        assert 0 <= float(row["agreement"]) <= 1 and row["strict"] in ("0", "1")
        picture = Image.open(tmp_path / "one" / row["picture"])
        note = json.loads(picture.text[CHUNK])
        assert picture.size == (64, 64) and note["prompt"] == row["prompt"]
        assert note["scores"]["agreement"] == pytest.approx(float(row["agreement"]), abs=1e-6)
    more = {row["prompt"]: float(row["agreement"]) for row in found if row["budget"] == "32"}
    less = {row["prompt"]: float(row["agreement"]) for row in found if row["budget"] == "16"}
    assert all(more[prompt] >= less[prompt] - 0.2 for prompt in more)
    lines = said.splitlines()
    assert lines[0].split() == ["budget", "method", "agreement", "strict", "forwards", "images", "seconds"]
    assert "±" in lines[2] and "±" not in lines[1] and lines[-1] == str(tmp_path / "one")
    leave(capsys, "search", "demo", "--out", tmp_path / "two", *FEW)
    for row, again in zip(found, rows(tmp_path / "two"), strict=True):
        assert {**row, "seconds": ""} == {**again, "seconds": ""}


def test_a_prompt_of_ones_own_and_several_seeds(tmp_path, capsys):
    words = ["--prompt", "two blue squares", "--seeds", 2, "--methods", "particles", "--budgets", "16"]
    code, _, errors = leave(capsys, "search", "demo", "--out", tmp_path, *words)
    assert code == 0 and "2 searches, up to 32 forwards" in errors and "2 of 2: " in errors
    assert [(row["prompt"], row["seed"]) for row in rows(tmp_path)] == [
        ("two blue squares", "0"),
        ("two blue squares", "1"),
    ]


def test_guidance_counts_two(tmp_path, capsys):
    words = ["--prompts", 1, "--budgets", "64", "--methods", "best_of_n", "--set", "model.guidance=2"]
    assert leave(capsys, "search", "demo", "--out", tmp_path, *words)[0] == 0
    (row,) = rows(tmp_path)
    assert (row["forwards"], row["scored"]) == ("64", "4")


def test_looks_by_the_gap_of_guidance_are_not_judged(tmp_path, capsys):
    words = ["--prompts", 1, "--budgets", "128", "--methods", "coarse_first", "--set", "model.guidance=2"]
    gap = ["--set", "search.score=guidance_gap"]
    assert leave(capsys, "search", "demo", "--out", tmp_path, *words, *gap)[0] == 0
    (row,) = rows(tmp_path)
    assert (row["forwards"], row["scored"]) == ("128", "3")


def test_settings_change_what_is_found(tmp_path, capsys):
    words = ["--prompts", 1, "--budgets", "32", "--methods", "coarse_first"]
    for name, stride in (("two", 2), ("four", 4)):
        change = ["--set", f"search.stride={stride}"]
        assert leave(capsys, "search", "demo", "--out", tmp_path / name, *words, *change)[0] == 0
    two, four = (rows(tmp_path / name)[0] for name in ("two", "four"))
    assert int(four["scored"]) > int(two["scored"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--methods", "best_of_m"], "--methods has 'best_of_m' (did you mean 'best_of_n'?)"),
        (["--methods", ","], "--methods is empty; choose from: best_of_n"),
        (["--budgets", "7"], "--budgets has 7; one image takes 8 forwards (8 steps)"),
        (
            ["--budgets", "8", "--set", "model.guidance=2"],
            "takes 16 forwards (8 steps, twice each with guidance)",
        ),
        (["--budgets", "0"], "--budgets is '0'; give whole numbers from 1 to 1000000, such as 32,64,128"),
        (["--budgets", "many"], "--budgets is 'many'"),
        (["--budgets", "64,"], "--budgets is '64,'"),
        (["--budgets", "9" * 400], "--budgets is '999"),
        (["--seeds", "0"], "--seeds"),
        (["--prompts", "-1"], "--prompts"),
        (["--prompt", "x" * 3000], "the prompt has 3000 characters; at most 2000"),
        (["--set", "search.eta=11"], "search.eta is 11"),
        (["--set", "search.stride=0"], "search.stride is 0"),
        (["--set", "search.judge_at=[]"], "search.judge_at"),
        (["--set", "search.luck=1"], "luck"),
        (["--set", "search.score=guidance_gap"], "score is guidance_gap, which needs guidance above 1"),
        (["--set", "rewards=[votes]"], "rewards has votes"),
        (["--out", "there"], "there/search.csv exists; choose another --out, or give --replace"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/search.csv").write_text("mine")
    code, _, errors = leave(capsys, "search", "demo", *words)
    assert code != 0 and says in errors.replace("\n", " ") and "Traceback" not in errors
    assert Path("there/search.csv").read_text() == "mine" and not Path("found").exists()


def test_ctrl_c_keeps_what_was_found(tmp_path, capsys, monkeypatch):
    from g2rpo_trainer.commands import search_images as command

    real = command.found

    def interrupted(*given):
        for number, row in enumerate(real(*given), start=1):
            yield row
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command, "found", interrupted)
    code, _, errors = leave(capsys, "search", "demo", "--out", tmp_path / "some", *FEW)
    assert code == 130 and f"interrupted; what was found so far is in {tmp_path / 'some'}" in errors
    assert len(rows(tmp_path / "some")) == 2


def test_gains_are_paired_by_prompt_and_seed():
    made = [
        Row(prompt, seed, method, 64, 60, 8, 1.0, "a.png", "start 1", {"r": base + gain})
        for prompt, base in (("a", 0.0), ("b", 10.0))
        for seed in (0, 1)
        for method, gain in (("best_of_n", 0.0), ("particles", 1.0 + seed))
    ]
    lines = list(table(made))
    assert lines[1].split()[:3] == ["64", "best_of_n", "5.000"]
    assert "6.500 (+1.500 ± 0.919)" in lines[2]
    assert lines[-1].startswith("means over 4 prompts and seeds")
    alone = list(table(made[:2]))
    assert "1.000 (+1.000)" in alone[2] and "nan" not in "".join(alone)  # one says nothing of its interval


def test_the_help_names_every_method(capsys):
    code, said, _ = leave(capsys, "search", "--help")
    assert code == 0 and all(name in said.replace("\n", " ") for name in READS)


@pytest.mark.long
def test_a_run_goes_on_whatever_the_section_search_says(tmp_path, capsys):
    few = ["train.steps=1", "train.eval_prompts=1", "train.eval_noises=1"]
    words = [word for text in few for word in ("--set", text)]
    run = tmp_path / "run"
    assert leave(capsys, "train", "demo", "--out", run, "--quiet", *words)[0] == 0
    more = ["--set", "train.steps=2", "--set", "search.eta=0.3", "--resume"]
    assert leave(capsys, "train", "demo", "--out", run, "--quiet", *words, *more)[0] == 0
    other = ["--set", "train.steps=3", "--set", "method.eta=0.3", "--resume"]
    code, _, errors = leave(capsys, "train", "demo", "--out", run, "--quiet", *words, *other)
    assert code != 0 and "method.eta" in errors
