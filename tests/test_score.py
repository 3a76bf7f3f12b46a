"""`g2rpo score`: any pictures, their own prompts, one score of several rewards, a journal that outlives a
kill, nothing overwritten.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_pictures import colourful, growing
from judge_host import JudgeHost
from program import leave
from reward_folders import clip_folder, clip_model

from comfy_g2rpo.files import picture_files
from comfy_g2rpo.files.csv_table import csv_bytes
from comfy_g2rpo.rewards import Reward, RewardError, load
from comfy_g2rpo.rewards.mixing import ranking_scores
from comfy_g2rpo.rewards.models.installed import load_installed
from g2rpo_trainer.reports.ranking import Journal, Judge, copy_best, examine, fill, kept, order

TABLE, JOURNAL = Path("scores/scores.csv"), Path("scores/scores.jsonl")
Score = Callable[..., tuple[int, str, str]]


def rows_of(path: Path = TABLE) -> list[dict[str, str]]:
    """Read a table."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the pictures of the command's rows, without their folder and ending."""
    return [Path(row["image"]).stem for row in rows]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of pictures that grow more colourful from a1 to a10, and work beside it."""
    monkeypatch.chdir(tmp_path)
    return growing(tmp_path / "pictures")


@pytest.fixture
def score(folder: Path, capsys: pytest.CaptureFixture[str]) -> Score:
    """Run `g2rpo score` beside the folder; return its exit code and what it printed."""
    return lambda *words: leave(capsys, "score", *words)


# Pictures and prompts


HUGE = b"\x01\x00\x18\x00" + bytes(24)
BROKEN = {
    "text.png": b"not a picture",
    "cut.png": None,
    "empty.jpg": b"",
    "magic.webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "huge.bmp": b"BM" + bytes(8) + b"".join(n.to_bytes(4, "little") for n in (54, 40, 60_000, 60_000)) + HUGE,
}


def test_broken_pictures_are_named_and_skipped(folder: Path, score: Score) -> None:
    for name, content in BROKEN.items():
        (folder / name).write_bytes((folder / "a9.png").read_bytes()[:300] if content is None else content)
    code, _, errors = score(folder, "--reward", "colourfulness")
    assert code == 0
    assert sorted(name for name in BROKEN if f"skipped: {folder / name} " in errors) == sorted(BROKEN)
    rows = rows_of()
    assert len(rows) == 10 + len(BROKEN)
    assert {Path(row["file"]).name for row in rows if row["problem"]} == set(BROKEN)
    assert all(row["score"] == "" for row in rows if row["problem"])


def test_prompts_come_from_the_command_a_list_or_the_picture(folder: Path, score: Score) -> None:
    (folder / "a1.txt").write_text("from the text")
    Path("list.jsonl").write_text('{"file": "a2.png", "prompt": "from the list"}\n', "utf-8")
    assert score(folder, "--reward", "jpeg", "--prompts", "list.jsonl")[0] == 0
    found = {Path(row["file"]).name: (row["prompt"], row["prompt_from"]) for row in rows_of()}
    assert found["a1.png"] == ("from the text", "txt")
    assert found["a2.png"] == ("from the list", "list")
    assert found["a3.png"] == ("", "")
    score(folder, "--reward", "jpeg", "--prompt", "for all")
    assert {row["prompt"] for row in rows_of(TABLE.with_name("scores-2.csv"))} == {"for all"}


# Scores and order


def test_a_folder_is_ranked_best_first(folder: Path, score: Score) -> None:
    code, text, _ = score(folder, "--reward", "colourfulness", "--json")
    assert code == 0
    assert names(json.loads(text)) == [f"a{i}" for i in range(10, 0, -1)]
    expected = load("colourfulness").score(picture_files.read(folder / "a10.png")[None], [""]).item()
    assert json.loads(text)[0]["score"] == pytest.approx(expected, abs=1e-4)
    assert [row["rank"] for row in rows_of()] == [str(i) for i in range(1, 11)]


def test_the_former_form_still_works_and_writes_nothing(folder: Path, score: Score) -> None:
    worst, best = folder / "a9.png", folder / "a1.png"
    code, text, _ = score("jpeg,colourfulness", worst, best, "--prompt", "x")
    assert code == 0
    assert [line.split()[-2] for line in text.splitlines()] == [str(best), str(worst)]
    assert not Path("scores").exists()


def test_several_rewards_become_one_score(folder: Path, score: Score) -> None:
    images = torch.stack([picture_files.read(path) for path in picture_files.listed(folder)])
    table = torch.stack([load(name).score(images, [""] * 10) for name in ("colourfulness", "jpeg")])
    z = (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True)

    def found(*words: str) -> list[dict[str, Any]]:
        return json.loads(
            score(folder, "--reward", "colourfulness", "--reward", "jpeg=2", "--json", *words)[1]
        )

    by_file = ("--sort", "file")
    mixed = [row["score"] for row in found(*by_file)]
    assert mixed == pytest.approx((z[0] + 2 * z[1]).tolist(), abs=1e-4)
    summed = [row["score"] for row in found(*by_file, "--mix", "sum")]
    assert summed == pytest.approx((table[0] + 2 * table[1]).tolist(), abs=1e-3)
    # Nearly grey pictures lie below the gate and come last, however small their files are.
    gated = found("--sort", "score", "--mix", "sum", "--gate", "colourfulness=40")
    grey = [row for row in gated if row["scores"]["colourfulness"] < 40]
    assert set(names(grey)) == set(names(gated[-len(grey) :]))


def test_one_reward_keeps_its_units_and_what_is_not_judged_has_no_score() -> None:
    nan = torch.nan
    assert ranking_scores(torch.tensor([[3.0, 1.0]]), [1.0]).tolist() == [3.0, 1.0]
    made = ranking_scores(torch.tensor([[3.0, 1.0, 2.0], [nan, 1.0, 1.0]]), [1.0, 1.0])
    assert made.isnan().tolist() == [True, False, False]
    # A reward that judges nobody has no say.
    assert not ranking_scores(torch.tensor([[3.0, 1.0], [nan, nan]]), [1.0, 1.0]).isnan().any()
    assert ranking_scores(torch.full((2, 3), nan), [1.0, 1.0]).isnan().all()


def test_a_mix_that_cannot_be_computed_is_refused() -> None:
    with pytest.raises(RewardError, match=r"weights \[nan\] must be finite"):
        ranking_scores(torch.ones(1, 2), [torch.nan])
    with pytest.raises(RewardError, match="mix is rank_product for 8193 pictures; at most 8192 are ranked"):
        ranking_scores(torch.ones(2, 8193), [1.0, 1.0], "rank_product")


def test_prompts_are_compared_by_themselves_where_asked() -> None:
    scores = torch.tensor([[1.0, 2.0, 101.0, 102.0], [0.0, 1.0, 0.0, 1.0]])
    apart = ranking_scores(scores, [1.0, 1.0], "zscore", (), ["a", "a", "b", "b"])
    assert apart[:2].tolist() == pytest.approx(apart[2:].tolist())
    assert kept(order(apart.tolist(), list("abcd")), apart.tolist(), ["a", "a", "b", "b"], 1, None) == [1, 3]


def test_top_threshold_and_copies(folder: Path, score: Score) -> None:
    arguments = [folder, "--reward", "colourfulness", "--top", 2, "--copy-best", "best"]
    assert score(*arguments)[0] == score(*arguments)[0] == 0
    assert sorted(path.name for path in Path("best").iterdir()) == ["0001_a10.png", "0002_a9.png"]
    assert Path("best/0001_a10.png").read_bytes() == (folder / "a10.png").read_bytes()
    _, text, _ = score(folder, "--reward", "colourfulness", "--threshold", 60, "--json")
    assert len(json.loads(text)) > 1
    assert all(row["score"] >= 60 for row in json.loads(text))


def test_a_copy_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"new")
    (tmp_path / "best").mkdir()
    (tmp_path / "best/0001_a.png").write_bytes(b"mine")
    assert copy_best([tmp_path / "a.png"], tmp_path / "best") == [tmp_path / "best/0001_a_2.png"]
    assert (tmp_path / "best/0001_a.png").read_bytes() == b"mine"


def test_a_former_table_is_kept(folder: Path, score: Score) -> None:
    TABLE.parent.mkdir()
    TABLE.write_text("my,own\n")
    second, third = TABLE.with_name("scores-2.csv"), TABLE.with_name("scores-3.csv")
    said = [score(folder, "--reward", name)[2] for name in ("jpeg", "jpeg", "sharpness")]
    # The same scores once more make no new table.
    assert [text.splitlines()[-1] for text in said] == [
        f"all scores: {place} (earlier tables are kept)" for place in (second, second, third)
    ]
    assert TABLE.read_text() == "my,own\n"
    assert ["jpeg" in rows_of(second)[0], "sharpness" in rows_of(third)[0]] == [True, True]
    assert len(list(TABLE.parent.glob("*.csv"))) == 3


def test_a_place_that_takes_no_table_is_refused_first(folder: Path, score: Score) -> None:
    Path("scores").write_text("a file")
    code, _, error = score(folder, "--reward", "jpeg")
    assert code == 2 and "cannot write scores/scores.csv: not a directory" in error


NEEDS = (
    'agreement judged none of 10 images: it needs coloured shapes in the prompt, such as "two red circles"; '
)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "they have no prompt (--prompt, --prompts)"),
        (("--prompt", "a lighthouse"), 'a prompt of theirs is "a lighthouse"'),
        (("--reward", "jpeg"), "they have no prompt (--prompt, --prompts)"),
    ],
)
def test_a_rule_that_can_judge_nothing_says_why(
    folder: Path, score: Score, words: tuple[str, ...], why: str
) -> None:
    code, _, said = score(folder, "--reward", "agreement", *words)
    assert code == 0 and f"{NEEDS}{why}" in said.splitlines()


def test_a_rule_of_ones_own_that_judges_nothing_is_named(folder: Path, score: Score) -> None:
    Path("own.py").write_text(
        "def never(images, prompts):\n    return images.mean((1, 2, 3)) * float('nan')\n"
    )
    said = score(folder, "--reward", "own.py:never")[2]
    assert "never judged none of 10 images: it gave no score for any" in said.splitlines()


def test_a_table_starts_no_formula() -> None:
    made = csv_bytes(["file", "x"], [["=1+1", -1.5], ["@a", float("nan")], ['"b", c', 1e-9]])
    assert made.decode() == 'file,x\n\'=1+1,-1.5\n\'@a,\n"""b"", c",1e-09\n'


# The journal


class Counting(Reward):
    """A reward that counts what it is asked."""

    name, licence, compares_across_prompts = "counting", "none", True

    def __init__(self, fail_after: int = 10**9) -> None:
        self.asked, self.fail_after = 0, fail_after

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Give the mean."""
        if self.asked >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += len(images)
        return images.mean((1, 2, 3))


def test_only_what_is_new_is_scored_again(folder: Path) -> None:
    def score(reward: Counting, prompt: str = "x") -> list[float]:
        entries = examine(picture_files.listed(folder), [prompt], {})
        journal = Journal(Path("out/scores.jsonl"))
        judges = [Judge(reward, "counting 1")]
        return journal.table(fill(journal, entries, judges, 4, lambda count: None), judges)[0].tolist()

    stopped = Counting(fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        score(stopped)
    assert stopped.asked == 4
    rest, again = Counting(), Counting()
    whole = score(rest)
    assert (rest.asked, score(again), again.asked) == (6, whole, 0)
    # A renamed picture is the same, a changed one or another prompt is not.
    (folder / "a1.png").rename(folder / "a0.png")
    colourful(3, seed=99).save(folder / "a2.png")
    changed = Counting()
    score(changed)
    assert changed.asked == 1
    other = Counting()
    score(other, "y")
    assert other.asked == 10


class Elsewhere(Counting):
    """A judge that is not there at first."""

    runs_elsewhere = True
    absent = True

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Give nothing, or the mean."""
        scores = super().score(images, prompts)
        return scores * torch.nan if self.absent else scores


def test_a_judge_that_could_not_answer_is_asked_again(folder: Path) -> None:
    judge = Elsewhere()
    judges = [Judge(judge, "elsewhere")]
    entries = examine(picture_files.listed(folder), ["x"], {})
    fill(Journal(Path("out/scores.jsonl")), entries, judges, 4, lambda count: None)
    judge.absent = False
    journal = Journal(Path("out/scores.jsonl"))
    fill(journal, entries, judges, 4, lambda count: None)
    assert judge.asked == 20
    assert not journal.table(entries, judges).isnan().any()


RECIPE = """
model: {path: models/tiny}
prompts: {train: prompts/shapes_train.txt}
method: {mix: sum}
rewards:
  - {name: jpeg, weight: 0.5}
  - {name: bright, url: ADDRESS, protocol: yes_no, model: toy, retries: 0}
"""


def test_judges_over_http_and_weights_come_from_a_recipe(folder: Path, score: Score) -> None:
    with JudgeHost() as host:
        Path("judges.yaml").write_text(RECIPE.replace("ADDRESS", host.url))
        code, text, _ = score(folder, "--recipe", "judges.yaml", "--prompt", "a lamp", "--json")
    found = json.loads(text)
    assert code == 0
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    for row in found:
        assert row["score"] == pytest.approx(0.5 * row["scores"]["jpeg"] + row["scores"]["bright"], abs=1e-4)
        mean = picture_files.read(Path(row["image"])).mean().item()
        assert row["scores"]["bright"] == pytest.approx(mean, abs=0.02)


def test_an_installed_model_is_found_by_name(
    folder: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_folder(Path("models"), "clipscore", "clipscore", clip_model())
    monkeypatch.setenv("G2RPO_REWARDS", "models")
    words = ("--reward", "clipscore", "--prompt", "a red cube", "--json", "--quiet")
    code, text, _ = score(folder, *words)
    direct = load_installed(Path("models"), "clipscore")
    assert code == 0
    for row in json.loads(text)[:3]:
        expected = direct.score(picture_files.read(Path(row["image"]))[None], ["a red cube"]).item()
        assert row["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("content", [b"", b'{"sch', b'{"schema": "g2rpo-scores/1"}\n{"sha256": "a", "pro'])
def test_a_torn_line_is_dropped(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.jsonl").write_bytes(content)
    assert Journal(tmp_path / "scores.jsonl").scores == {}
    assert (tmp_path / "scores.jsonl").read_bytes() == content[: content.rfind(b"\n") + 1]


@pytest.mark.parametrize(
    "content",
    [b"{}\n", b"[1]\n", b"\xff\n", b'{"schema": "g2rpo-scores/1"}\n{"sha256": 1}\n', b"[" * 99_999 + b"\n"],
)
def test_a_foreign_or_damaged_journal_is_named_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.jsonl").write_bytes(content)
    says = r"scores\.jsonl is no journal of scores, or damaged; choose another --out"
    with pytest.raises(ValueError, match=says):
        Journal(tmp_path / "scores.jsonl")
    assert (tmp_path / "scores.jsonl").read_bytes() == content


SLOW = """
import time
from pathlib import Path
def slow(images, prompts):
    journal = Path("scores/scores.jsonl")
    while journal.exists() and len(journal.read_text().splitlines()) >= 4 and not Path("go").exists():
        time.sleep(0.05)
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_command_goes_on_where_it_was(folder: Path, score: Score, blow: signal.Signals) -> None:
    Path("taste.py").write_text(SLOW)
    arguments = [str(folder), "--reward", "taste.py:slow", "--batch", "1"]
    # Where the tests run in the background, Ctrl-C is switched off and the child would inherit that.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{listens}; from g2rpo_trainer import cli; cli.main()"
    command = [sys.executable, "-c", program, "score", *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread) as child:
        end = time.monotonic() + 60
        while time.monotonic() < end and (not JOURNAL.exists() or len(JOURNAL.read_text().splitlines()) < 4):
            time.sleep(0.05)
        child.send_signal(blow)
        try:
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    before = JOURNAL.read_text().splitlines()
    assert 4 <= len(before) < 11
    if blow == signal.SIGINT:
        assert child.returncode == 130
        assert "the same command goes on from there" in errors
    Path("go").touch()
    assert score(*arguments)[0] == 0
    after = JOURNAL.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 11
    assert len(rows_of()) == 10


# What is wrong

JPEG = "pictures --reward jpeg"
MISTAKES = {
    "no reward": ("pictures", "no reward is named; give --reward NAME"),
    "no picture": (". --reward jpeg", ". holds no picture"),
    "no such reward": ("pictures --reward jpge", "reward 'jpge' is unknown, did you mean 'jpeg'?"),
    "twice": (f"{JPEG} --reward jpeg=2", "reward 'jpeg' is named twice"),
    "weight": (f"{JPEG}=x", "--reward is 'jpeg=x'; write NAME=NUMBER"),
    "weight of nan": (f"{JPEG}=nan", "--reward is 'jpeg=nan'"),
    "gate": (f"{JPEG} --gate sharpness=1", "--gate names 'sharpness'"),
    "mix": (f"{JPEG} --mix mean", "--mix is 'mean'; choose one of"),
    "sort": (f"{JPEG} --sort size", "--sort is 'size'; choose score"),
    "copy": (f"{JPEG} --copy-best best", "--copy-best needs to know what is best"),
    "prompts": (f"{JPEG} --prompts no.jsonl", "cannot read prompt file no.jsonl"),
    "prompt count": (f"{JPEG} --prompt a --prompt b", "2 prompts for 10 pictures"),
    "prompt length": (f"{JPEG} --prompt {'x' * 2001}", "a prompt has 2001 characters"),
    "own reward": (
        "pictures --reward no.py:taste",
        "reward 'taste': path names 'no.py', which does not exist",
    ),
    "not installed": ("pictures --reward pickscore", "reward 'pickscore' is not installed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, folder: Path, score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REWARDS", str(folder.parent / "nothing"))
    arguments, words = MISTAKES[name]
    code, _, error = score(*arguments.split())
    assert code == 2
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["pictures"]
