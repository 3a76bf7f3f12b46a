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
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_host import JudgeHost
from PIL import Image, PngImagePlugin
from reward_folders import clip_folder, clip_model

from comfy_g2rpo.files import picture_files
from comfy_g2rpo.files.captions import caption_of, of_graph
from comfy_g2rpo.files.csv_table import csv_bytes
from comfy_g2rpo.rewards import RewardError, load
from comfy_g2rpo.rewards.mixing import standing
from comfy_g2rpo.rewards.models.installed import load_installed
from g2rpo_trainer import cli
from g2rpo_trainer.reports.ranking import Journal, Judge, copy_best, examine, fill, kept, order

GRAPH = {
    "1": {
        "class_type": "KSampler",
        "inputs": {"model": ["4", 0], "positive": ["5", 0], "negative": ["3", 0], "seed": 1},
    },
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": ["6", 0]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "ugly"}},
    "5": {"class_type": "FluxGuidance", "inputs": {"conditioning": ["2", 0], "guidance": 3.5}},
    "6": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a lighthouse"}},
}


def leave(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command; return its exit code and what it printed."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return int(exit_.value.code or 0), printed.out, printed.err


def colourful(strength: int, size: tuple[int, int] = (16, 16), seed: int = 0) -> Image.Image:
    """Make noise whose colourfulness grows with its strength."""
    return Image.fromarray(
        (np.random.default_rng(seed).random((size[1], size[0], 3)) * strength).astype(np.uint8)
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a table."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of pictures that grow more colourful from a1 to a10, and work beside it."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(1, 11):
        colourful(20 * i, seed=i).save(place / f"a{i}.png")
    monkeypatch.chdir(tmp_path)
    return place


# Pictures of every kind


def test_every_mode_is_read_as_it_looks(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray((ramp * 255).round().astype(np.uint8)).save(tmp_path / "grey.png")
    for name in ("deep.png", "float.tif", "grey.png"):
        assert np.abs(picture_files.read(tmp_path / name).numpy() - ramp[..., None]).max() <= 1 / 255
    red = {"RGBA": (255, 0, 0, 10), "CMYK": (0, 255, 255, 0), "P": 0, "LA": (255, 9), "1": 1}
    for mode, colour in red.items():
        place = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (3, 2), colour).save(place)
        assert picture_files.read(place).shape == (2, 3, 3)
    assert picture_files.read(tmp_path / "RGBA.png")[0, 0].tolist() == [1, 0, 0]
    assert picture_files.read(tmp_path / "CMYK.tif")[0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[picture_files.ORIENTATION] = 6
    for name in ("turned.jpg", "turned.png"):
        colourful(200, (20, 10)).save(tmp_path / name, exif=exif)
        assert picture_files.size_of(tmp_path / name) == (10, 20)
        assert picture_files.read(tmp_path / name).shape == (20, 10, 3)


BROKEN = {
    "text.png": b"not a picture",
    "cut.png": None,
    "empty.jpg": b"",
    "magic.webp": b"RIFF\x00\x00\x00\x00WEBPVP8 ",
    "huge.bmp": b"BM" + bytes(8) + (54).to_bytes(4, ("little")) + (40).to_bytes(4, "little") + (60_000).to_bytes(4, "little") * 2  # noqa: E501
    + b"\x01\x00\x18\x00" + bytes(24),
}  # fmt: skip


def test_broken_pictures_are_named_and_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in BROKEN.items():
        (folder / name).write_bytes((folder / "a9.png").read_bytes()[:300] if content is None else content)
    code, _, errors = leave(capsys, "score", folder, "--reward", "colourfulness")
    assert code == 0
    assert sorted(name for name in BROKEN if f"skipped: {folder / name} " in errors) == sorted(BROKEN)
    rows = rows_of(Path("scores/scores.csv"))
    assert len(rows) == 10 + len(BROKEN)
    assert {Path(row["file"]).name for row in rows if row["problem"]} == set(BROKEN)
    assert all(row["score"] == "" for row in rows if row["problem"])


def test_what_cannot_be_read_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colourful(9).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(
        picture_files.PictureError,
        match=r"cannot read .*gone\.png: no such file or directory; check the path",
    ):
        picture_files.read(tmp_path / "gone.png")
    with pytest.raises(
        picture_files.PictureError, match=r"b\.png is not a picture that can be read; save it as PNG or JPEG"
    ):
        picture_files.size_of(tmp_path / "b.png")
    assert picture_files.texts(tmp_path / "b.png") == {}
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 255)
    with pytest.raises(picture_files.PictureError, match=r"a\.png has 16 × 16 pixels; at most 0 megapixels"):
        picture_files.read(tmp_path / "a.png")


def test_links_out_of_the_folder_and_hidden_files_are_left_out(folder: Path) -> None:
    (folder.parent / "elsewhere.png").write_bytes((folder / "a1.png").read_bytes())
    (folder / "link.png").symlink_to(folder.parent / "elsewhere.png")
    (folder / ".hidden.png").write_bytes((folder / "a1.png").read_bytes())
    (folder / "deep").mkdir()
    (folder / "deep/b1.png").write_bytes((folder / "a1.png").read_bytes())
    assert [path.name for path in picture_files.listed(folder)] == [f"a{i}.png" for i in range(1, 11)]
    assert picture_files.listed(folder, deep=True)[-1] == folder / "deep/b1.png"


def test_batches_hold_one_size_and_few_pixels() -> None:
    sizes = [(8, 8), (4, 4), (8, 8), (8, 8), (100, 100), (4, 4)]
    assert picture_files.batches(sizes, 2, 200) == [[0, 2], [3], [1, 5], [4]]


# Prompts


def test_a_prompt_is_found_where_it_was_written(tmp_path: Path) -> None:
    def save(name: str, **chunks: str) -> Path:
        info = PngImagePlugin.PngInfo()
        for key, value in chunks.items():
            info.add_itxt(key, value) if key == "g2rpo" else info.add_text(key, value, zip=True)
        colourful(99).save(tmp_path / name, pnginfo=info)
        return tmp_path / name

    assert caption_of(save("graph.png", prompt=json.dumps(GRAPH))) == ("a lighthouse", "comfyui")
    assert caption_of(save("web.png", parameters="a cat,\nred\nNegative prompt: dog\nSteps: 3")) == (
        "a cat,\nred",
        "parameters",
    )
    assert caption_of(save("note.png", g2rpo='{"prompt": "ein Schiff – 船"}', prompt=json.dumps(GRAPH))) == (
        "ein Schiff – 船",
        "note",
    )
    beside = save("beside.png", prompt=json.dumps(GRAPH))
    beside.with_suffix(".txt").write_text("\ufeff  a ship \n", "utf-8")
    assert caption_of(beside) == ("a ship", "txt")
    assert caption_of(save("none.png", prompt="{not json", parameters="")) == ("", "")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/mine").write_text("not yours")
    save("link.png").with_suffix(".txt").symlink_to(tmp_path / "secrets/mine")
    assert caption_of(tmp_path / "link.png") == ("", "")


@pytest.mark.parametrize(
    "graph",
    [
        [],
        {"1": None, "2": {"inputs": 3}},
        {"1": {"inputs": {"model": 1, "positive": ["1", 0]}}},  # a loop
        {"1": {"inputs": {"model": 1, "positive": ["9", 0]}}},
        # Two samplers with different prompts: which one, nobody can say.
        GRAPH | {"7": {"inputs": {"model": ["4", 0], "positive": ["3", 0]}}},
    ],
)
def test_a_graph_that_says_no_one_prompt_says_nothing(graph: object) -> None:
    assert of_graph(graph) == ""


def test_prompts_come_from_the_command_a_list_or_the_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a1.txt").write_text("from the text")
    Path("list.jsonl").write_text('{"file": "a2.png", "prompt": "from the list"}\n', "utf-8")
    assert leave(capsys, "score", folder, "--reward", "jpeg", "--prompts", "list.jsonl")[0] == 0
    found = {
        Path(row["file"]).name: (row["prompt"], row["prompt_from"])
        for row in rows_of(Path("scores/scores.csv"))
    }
    assert found["a1.png"] == ("from the text", "txt")
    assert found["a2.png"] == ("from the list", "list")
    assert found["a3.png"] == ("", "")
    leave(capsys, "score", folder, "--reward", "jpeg", "--prompt", "for all")
    assert {row["prompt"] for row in rows_of(Path("scores/scores.csv"))} == {"for all"}


# Scores and order


def test_a_folder_is_ranked_best_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "score", folder, "--reward", "colourfulness", "--json")
    assert code == 0
    assert [Path(row["image"]).stem for row in json.loads(text)] == [f"a{i}" for i in range(10, 0, -1)]
    expected = load("colourfulness").score(picture_files.read(folder / "a10.png")[None], [""]).item()
    assert json.loads(text)[0]["score"] == pytest.approx(expected, abs=1e-4)
    assert [row["rank"] for row in rows_of(Path("scores/scores.csv"))] == [str(i) for i in range(1, 11)]


def test_the_former_form_still_works_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = leave(
        capsys, "score", "jpeg,colourfulness", folder / "a9.png", folder / "a1.png", "--prompt", "x"
    )
    assert code == 0
    assert [line.split()[-2] for line in text.splitlines()] == [
        str(folder / "a1.png"),
        str(folder / "a9.png"),
    ]
    assert not Path("scores").exists()


def test_several_rewards_become_one_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = torch.stack([load(name).score(torch.stack([picture_files.read(path) for path in picture_files.listed(folder)]), [""] * 10) for name in ((((((("colourfulness")))))), "jpeg")])  # fmt: skip  # noqa: E501
    z = (table - table.mean(1, keepdim=True)) / table.std(1, keepdim=True)
    arguments = [
        "score",
        folder,
        "--reward",
        "colourfulness",
        "--reward",
        "jpeg=2",
        "--json",
        "--sort",
        "file",
    ]
    found = [row["score"] for row in json.loads(leave(capsys, *arguments)[1])]
    assert found == pytest.approx((z[0] + 2 * z[1]).tolist(), abs=1e-4)
    found = [row["score"] for row in json.loads(leave(capsys, *arguments, "--mix", "sum")[1])]
    assert found == pytest.approx((table[0] + 2 * table[1]).tolist(), abs=1e-3)
    # Nearly grey pictures lie below the gate and come last, however small their files are.
    gated = json.loads(
        leave(capsys, *arguments[:-1], "score", "--mix", "sum", "--gate", "colourfulness=40")[1]
    )
    assert {Path(row["image"]).stem for row in gated if row["scores"]["colourfulness"] < 40} == {
        Path(row["image"]).stem for row in gated[-sum(row["scores"]["colourfulness"] < 40 for row in gated) :]
    }


def test_one_reward_keeps_its_units_and_what_is_not_judged_has_no_score() -> None:
    nan = torch.nan
    assert standing(torch.tensor([[3.0, 1.0]]), [1.0]).tolist() == [3.0, 1.0]
    made = standing(torch.tensor([[3.0, 1.0, 2.0], [nan, 1.0, 1.0]]), [1.0, 1.0])
    assert made.isnan().tolist() == [True, False, False]
    # A reward that judges nobody has no say.
    assert not standing(torch.tensor([[3.0, 1.0], [nan, nan]]), [1.0, 1.0]).isnan().any()
    assert standing(torch.full((2, 3), nan), [1.0, 1.0]).isnan().all()


def test_a_mix_that_cannot_be_computed_is_refused() -> None:
    with pytest.raises(RewardError, match=r"weights \[nan\] must be finite"):
        standing(torch.ones(1, 2), [torch.nan])
    with pytest.raises(RewardError, match="mix is rank_product for 8193 pictures; at most 8192 are ranked"):
        standing(torch.ones(2, 8193), [1.0, 1.0], "rank_product")


def test_prompts_are_compared_by_themselves_where_asked() -> None:
    scores = torch.tensor([[1.0, 2.0, 101.0, 102.0], [0.0, 1.0, 0.0, 1.0]])
    apart = standing(scores, [1.0, 1.0], "zscore", (), ["a", "a", "b", "b"])
    assert apart[:2].tolist() == pytest.approx(apart[2:].tolist())
    assert kept(order(apart.tolist(), list("abcd")), apart.tolist(), ["a", "a", "b", "b"], 1, None) == [1, 3]


def test_top_threshold_and_copies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["score", folder, "--reward", "colourfulness", "--top", 2, "--copy-best", "best"]
    assert leave(capsys, *arguments)[0] == leave(capsys, *arguments)[0] == 0
    assert sorted(path.name for path in Path("best").iterdir()) == ["0001_a10.png", "0002_a9.png"]
    assert Path("best/0001_a10.png").read_bytes() == (folder / "a10.png").read_bytes()
    _, text, _ = leave(capsys, "score", folder, "--reward", "colourfulness", "--threshold", 60, "--json")
    assert len(json.loads(text)) > 1
    assert all(row["score"] >= 60 for row in json.loads(text))


def test_a_copy_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"new")
    (tmp_path / "best").mkdir()
    (tmp_path / "best/0001_a.png").write_bytes(b"mine")
    assert copy_best([tmp_path / "a.png"], tmp_path / "best") == [tmp_path / "best/0001_a_2.png"]
    assert (tmp_path / "best/0001_a.png").read_bytes() == b"mine"


def test_a_foreign_table_is_not_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("scores").mkdir()
    Path("scores/scores.csv").write_text("my,own\n")
    code, _, error = leave(capsys, "score", folder, "--reward", "jpeg")
    assert (code, Path("scores/scores.csv").read_text()) == (2, "my,own\n")
    assert "exists and is no table of this program" in error


def test_a_table_starts_no_formula() -> None:
    assert csv_bytes(["file", "x"], [["=1+1", -1.5], ["@a", float("nan")], ['"b", c', 1e-9]]).decode() == (
        "file,x\n'=1+1,-1.5\n'@a,\n" + '"""b"", c",1e-09\n'
    )


# The journal


class Counting:
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


def test_judges_over_http_and_weights_come_from_a_recipe(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with JudgeHost() as host:
        Path("judges.yaml").write_text(RECIPE.replace("ADDRESS", host.url))
        code, text, _ = leave(
            capsys, "score", folder, "--recipe", "judges.yaml", "--prompt", "a lamp", "--json"
        )
    found = json.loads(text)
    assert code == 0
    assert [row["score"] for row in found] == sorted((row["score"] for row in found), reverse=True)
    for row in found:
        assert row["score"] == pytest.approx(0.5 * row["scores"]["jpeg"] + row["scores"]["bright"], abs=1e-4)
        assert row["scores"]["bright"] == pytest.approx(
            picture_files.read(Path(row["image"])).mean().item(), abs=0.02
        )


def test_an_installed_model_is_found_by_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_folder(Path("models"), "clipscore", "clipscore", clip_model())
    monkeypatch.setenv("G2RPO_REWARDS", "models")
    code, text, _ = leave(
        capsys, "score", folder, "--reward", "clipscore", "--prompt", "a red cube", "--json", "--quiet"
    )
    direct = load_installed(Path("models"), "clipscore")
    assert code == 0
    for row in json.loads(text)[:3]:
        assert row["score"] == pytest.approx(
            direct.score(picture_files.read(Path(row["image"]))[None], ["a red cube"]).item(), abs=1e-4
        )


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
    with pytest.raises(
        ValueError, match=r"scores\.jsonl is no journal of scores, or damaged; choose another --out"
    ):
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
def test_a_stopped_command_goes_on_where_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], blow: signal.Signals
) -> None:
    Path("taste.py").write_text(SLOW)
    arguments = ["score", str(folder), "--reward", "taste.py:slow", "--batch", "1"]
    # Where the tests run in the background, Ctrl-C is switched off and the child would inherit that.
    listens = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listens}; from g2rpo_trainer import cli; cli.main()", *arguments]
    journal = Path("scores/scores.jsonl")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as child:
        end = time.monotonic() + 60
        while time.monotonic() < end and (not journal.exists() or len(journal.read_text().splitlines()) < 4):
            time.sleep(0.05)
        child.send_signal(blow)
        try:
            _, errors = child.communicate(timeout=60)
        finally:
            child.kill()
    before = journal.read_text().splitlines()
    assert 4 <= len(before) < 11
    if blow == signal.SIGINT:
        assert child.returncode == 130
        assert "the same command goes on from there" in errors
    Path("go").touch()
    assert leave(capsys, *arguments)[0] == 0
    after = journal.read_text().splitlines()
    assert after[: len(before)] == before
    assert len(after) == 11
    assert len(rows_of(Path("scores/scores.csv"))) == 10


# What is wrong

MISTAKES = {
    "no reward": (["score", "pictures"], "no reward is named; give --reward NAME"),
    "no picture": (["score", ".", "--reward", "jpeg"], ". holds no picture"),
    "no such reward": (
        ["score", "pictures", "--reward", "jpge"],
        "reward 'jpge' is unknown, did you mean 'jpeg'?",
    ),
    "twice": (
        ["score", "pictures", "--reward", "jpeg", "--reward", "jpeg=2"],
        "reward 'jpeg' is named twice",
    ),
    "weight": (["score", "pictures", "--reward", "jpeg=x"], "--reward is 'jpeg=x'; write NAME=NUMBER"),
    "weight of nan": (["score", "pictures", "--reward", "jpeg=nan"], "--reward is 'jpeg=nan'"),
    "gate": (["score", "pictures", "--reward", "jpeg", "--gate", "sharpness=1"], "--gate names 'sharpness'"),
    "mix": (["score", "pictures", "--reward", "jpeg", "--mix", "mean"], "--mix is 'mean'; choose one of"),
    "sort": (["score", "pictures", "--reward", "jpeg", "--sort", "size"], "--sort is 'size'; choose score"),
    "copy": (
        ["score", "pictures", "--reward", "jpeg", "--copy-best", "best"],
        "--copy-best needs to know what is best",
    ),
    "prompts": (
        ["score", "pictures", "--reward", "jpeg", "--prompts", "no.jsonl"],
        "cannot read prompt file no.jsonl",
    ),
    "prompt count": (
        ["score", "pictures", "--reward", "jpeg", "--prompt", "a", "--prompt", "b"],
        "2 prompts for 10 pictures",
    ),
    "prompt length": (
        ["score", "pictures", "--reward", "jpeg", "--prompt", "x" * 2001],
        "a prompt has 2001 characters",
    ),
    "own reward": (
        ["score", "pictures", "--reward", "no.py:taste"],
        "reward 'taste': path names 'no.py', which does not exist",
    ),
    "not installed": (["score", "pictures", "--reward", "pickscore"], "reward 'pickscore' is not installed"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_REWARDS", str(folder.parent / "nothing"))
    arguments, words = MISTAKES[name]
    code, _, error = leave(capsys, *arguments)
    assert code == 2
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["pictures"]
