"""The command line: what it prints, what it refuses, how it leaves."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from program import call, leave
from rich.console import Console

from comfy_g2rpo.files.captions import CHUNK, caption_of
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import cli
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.cost import estimate
from g2rpo_trainer.reports.progress import (
    History,
    Lines,
    LiveDisplay,
    clock,
    for_terminal,
    outcome,
    panel,
    sparkline,
)
from g2rpo_trainer.reports.report import curves, reward_groups

pytestmark = pytest.mark.xdist_group("cli")  # one process makes what they share

MODEL = os.environ.get("TINY", "models/tiny")
SMALL = [
    *("--set", f"model.path={MODEL}"),
    *("--set", "method.num_steps=4"),
    *("--set", "method.group_size=2"),
    *("--set", "method.granularities=[1,2]"),
    *("--set", "train.prompts_per_step=1"),
    *("--set", "method.learning_rate=0.05"),
    *("--set", "rewards=[{name: jpeg}]"),
    *("--set", "train.steps=2"),
    *("--set", "train.eval_prompts=2"),
    *("--set", "train.eval_noises=2"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run of two small steps."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", "demo", "--out", out, "--quiet", *SMALL) == 0
    return out


def test_help_answers_without_loading_pytorch() -> None:
    probe = (
        "import sys; from g2rpo_trainer import cli; print(sorted({'torch', 'diffusers', 'pydantic'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    from comfy_g2rpo import __version__

    assert leave(capsys, "version") == (0, f"{__version__}\n", "")


def test_options_explain_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "options")
    assert code == 0
    assert re.search(r"^train\.slots = 64 .*\n +Images in one forward", text, re.MULTILINE)
    assert re.search(r"^rewards\.0\.weight = 1 .*\n +Weight", text, re.MULTILINE)


def test_a_run_leaves_all_its_files(run: Path) -> None:
    folder = RunFolder.open(run)
    for name in ("config.json", "metrics.jsonl", "summary.json", "curves.png", "before_after.png"):
        assert (run / name).is_file()
    wanted = {"heldout_before", "heldout_after", "reward_before", "reward_after", "seconds", "forwards"}
    wanted |= {"seed", "lora", "steps"}
    assert wanted <= set(folder.summary())
    assert (run / folder.summary()["lora"]).is_file()


def test_an_existing_run_is_not_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    code, _, error = leave(capsys, "train", "demo", "--out", run, *SMALL)
    assert code == 2
    said = r"error: .*run already holds a run; continue it \(g2rpo resume\), start over .*\n"
    assert re.fullmatch(said, error)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_pictures_are_drawn_with_a_runs_newest_lora(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, base = tmp_path / "tuned.png", tmp_path / "base.png"
    assert leave(capsys, "sample", run, "--prompt", "a red circle", "--out", tuned)[0] == 0
    assert leave(capsys, "sample", "demo", *SMALL, "--prompt", "a red circle", "--out", base)[0] == 0
    with Image.open(tuned) as one, Image.open(base) as other:
        assert one.size == other.size == (64, 64)
        assert one.tobytes() != other.tobytes()
        note, plain = (json.loads(each.info[CHUNK]) for each in (one, other))
    newest = str(RunFolder(run).latest() / "lora.safetensors")
    made = {"prompt": "a red circle", "seed": 0, "guidance": 1.0, "tail": 0.0}
    made["lora"] = "/".join(Path(newest).parts[-4:])
    assert note.items() >= made.items() and note["steps"] == plain["steps"] == 4
    assert plain["lora"] is None and caption_of(tuned) == ("a red circle", "note")


def test_a_runs_own_pictures_are_scored_by_their_prompts(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(run)
    drawn = [sample for step in folder.sampled_steps() for sample in folder.samples(step)]
    (drawn[0].path.with_name("000-start.png")).write_bytes(drawn[0].path.read_bytes())
    index = drawn[0].path.with_name("index.json")
    rows = json.loads(index.read_text())
    index.write_text(json.dumps([rows[0] | {"start": "000-start.png"}, *rows[1:]]))
    words = ("score", run, "--reward", "agreement", "--out", tmp_path, "--sort", "file", "--json")
    code, text, _ = leave(capsys, *words)
    found = {row["image"]: (row["prompt"], row["score"]) for row in json.loads(text)}
    assert code == 0 and found.keys() == {str(sample.path) for sample in drawn}
    for sample in drawn:
        prompt, score = found[str(sample.path)]
        assert prompt == sample.prompt
        assert score == pytest.approx(sample.scores["agreement"], abs=0.02)


@pytest.mark.parametrize("negative", ["two blue squares", "", 'a "quoted": # 🦊 text', "null"])
def test_a_negative_prompt_changes_the_picture(
    negative: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--prompt", "a red circle", "--set", "model.guidance=4", "--out"]
    for name, more in (("plain", ()), ("other", ("--negative", negative))):
        code, _, error = leave(capsys, *words, tmp_path / f"{name}.png", *more)
        assert code == 0, error
    with Image.open(tmp_path / "plain.png") as one, Image.open(tmp_path / "other.png") as other:
        assert (one.tobytes() == other.tobytes()) == (negative == "")
        assert json.loads(other.info[CHUNK])["negative"] == negative


def test_a_negative_prompt_that_cannot_count_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--prompt", "a red circle", "--out", tmp_path / "a.png", "--negative"]
    for negative, says in (("blur", "model.guidance 1; set it above 1"), ("x" * 2001, "at most 2000")):
        code, _, error = leave(capsys, *words, negative)
        assert code == 2 and says in error and "model.negative_prompt" in error


def test_an_existing_picture_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("mine")
    code, _, error = leave(capsys, "sample", "--prompt", "a red circle", "--out", tmp_path / "a.png")
    assert (code, error) == (
        2,
        f"error: {tmp_path / 'a.png'} exists; choose another --out, or give --replace\n",
    )


def test_a_lora_of_another_model_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"not a file of tensors")
    arguments = [
        "sample",
        run,
        "--lora",
        tmp_path / "bad.safetensors",
        "--prompt",
        "a red circle",
        "--out",
        tmp_path / "a.png",
    ]
    code, _, error = leave(capsys, *arguments)
    assert code == 2
    assert error.startswith(f"error: {tmp_path / 'bad.safetensors'} is not a safetensors file")


def test_pictures_are_judged_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(tmp_path / "busy.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "blank.png")
    code, text, _ = leave(
        capsys,
        "score",
        "jpeg,agreement",
        tmp_path / "busy.png",
        tmp_path / "blank.png",
        "--prompt",
        "something else",
        "--json",
    )
    rows = json.loads(text)
    assert code == 0
    assert [Path(row["image"]).name for row in rows] == ["blank.png", "busy.png"]
    assert rows[0]["scores"]["agreement"] is None


def test_a_report_is_drawn_again_from_the_run_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "curves.png").unlink()
    code, text, _ = leave(capsys, "report", run)
    assert code == 0
    assert text.split() == [str(run / "curves.png"), str(run / "before_after.png")]


def test_the_price_is_counted_and_measured(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "plan", "demo", *SMALL)
    assert code == 0
    # T=4, k=0, 1, G=2, Λ={1, 2}: two anchor states, then per branch 1, 2, 3 and 2, 3.
    assert re.search(r"forwards per prompt group +12\n", text)
    assert re.search(r"time in all +about ", text)


def test_the_price_equals_what_a_run_does(run: Path) -> None:
    config = load("demo", SMALL[1::2])
    rows = [row for row in RunFolder.open(run).metrics() if "nfe" in row]
    assert estimate.count(config).step_forwards == rows[0]["nfe"]


def test_the_price_is_told_without_the_model_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = leave(capsys, "plan", "demo", "--set", f"model.path={tmp_path}")
    assert code == 0
    assert "forwards per prompt group" in text
    assert "time and memory are unknown, because the model cannot be loaded here" in text


MISTAKES = {
    "unknown recipe": (
        ["train", "dmeo"],
        "recipe 'dmeo' is neither a file nor bundled (did you mean 'demo'?)",
    ),
    "unknown key": (
        ["train", "demo", "--set", "train.stepz=1"],
        "train.stepz is unknown (did you mean train.steps?)",
    ),
    "unknown reward": (["score", "agrement", "a.png", "--prompt", "x"], "reward 'agrement' is unknown"),
    "missing picture": (
        ["score", "jpeg", "nowhere.png", "--prompt", "x"],
        "cannot read nowhere.png: no such file",
    ),
    "missing prompts": (
        ["train", "demo", "--set", "prompts.train=nowhere.txt"],
        "prompts.train is 'nowhere.txt', which does not exist",
    ),
    "missing run": (["report", "nowhere"], "nowhere holds no run"),
    "nothing to resume": (["resume", "nowhere"], "cannot read nowhere/config.json"),
    "contradiction": (
        ["train", "demo", "--resume", "--replace"],
        "--resume and --replace exclude each other",
    ),
    "prompt count": (
        ["score", "jpeg", "a", "b", "c", "--prompt", "x", "--prompt", "y"],
        "2 prompts for 3 pictures",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, words = MISTAKES[name]
    code, _, error = leave(capsys, *arguments)
    assert code == 2
    assert error.startswith(f"error: {words}")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())


BAD_PROMPTS = {
    "empty": (b"\n", "holds no prompt"),
    "long": (b"x" * 100_000, "has 100000 characters; at most 2000"),
    "latin-1": ("zürich".encode("latin-1"), "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts_cost_no_former_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, words = BAD_PROMPTS[name]
    (tmp_path / "a.txt").write_bytes(content)
    before = (run / "metrics.jsonl").read_bytes()
    code, _, error = leave(
        capsys,
        "train",
        "demo",
        "--out",
        run,
        "--replace",
        *SMALL,
        "--set",
        f"prompts.train={tmp_path / 'a.txt'}",
    )
    assert code == 2
    assert words in error
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_corrupt_model_is_one_line_and_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{")
    code, _, error = leave(
        capsys, "train", "demo", "--out", tmp_path / "run", "--set", f"model.path={tmp_path / 'model'}"
    )
    assert code == 2
    assert "model_index.json" in error
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    code, _, error = leave(capsys, "train", "demo", *SMALL, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert re.match(r"error: cannot write .*; make room or choose another folder \(--out\)", error)


def test_an_error_of_a_library_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal") as foreign:
        json.loads("1", parse_int=lambda text: int("x"))
    assert not cli.ours(foreign.tb)


def test_ctrl_c_says_how_to_go_on_and_the_run_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Lines.step

    def press(lines: Lines, row: dict[str, float]) -> None:
        """Press Ctrl-C when the second step is shown."""
        shown(lines, row)
        if row["step"] == 2 and "nfe" in row:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Lines, "step", press)
    code, _, errors = leave(
        capsys, "train", "demo", "--out", tmp_path / "run", *SMALL, "--set", "train.steps=9"
    )
    assert code == 130, errors
    hint = re.search(r"interrupted; continue with: g2rpo (resume \S+)", errors).group(1)
    assert RunFolder.open(tmp_path / "run").latest().name == "000002"
    assert leave(capsys, *shlex.split(hint), "--set", "train.steps=3")[0] == 0
    assert RunFolder.open(tmp_path / "run").summary()["steps"] == 3


ROWS = [{"step": 0, "heldout/agreement/mean": 0.5, "heldout/agreement/ci95": 0.1}] + [
    {
        "step": step,
        "reward/agreement/mean": step / 10,
        "reward/jpeg/mean": -3.0,
        "time/rollout": 3.0,
        "time/update": 1.0,
        "grad_norm": None,
    }
    for step in range(1, 5)
]


def test_lines_name_rewards_as_they_come(tmp_path: Path) -> None:
    with open(tmp_path / "out.txt", "w+") as file:
        lines = Lines(Console(file=file, soft_wrap=True))
        lines.start(4, 0, "12 forwards per step")
        for row in ROWS:
            lines.step(row)
        summary = {"heldout_before": {"agreement": 0.5}, "heldout_after": {"agreement": 0.75}}
        lines.finish(summary | {"seconds": 61, "steps": 4, "forwards": 48})
        file.seek(0)
        text = file.read().splitlines()
    assert text[0] == "12 forwards per step"
    assert text[1].startswith("step 0/4  heldout agreement 0.500")
    assert text[2].startswith("step 1/4  reward agreement 0.100  reward jpeg -3.000")
    assert text[-2:] == ["held-out agreement: 0.500 → 0.750 (+0.250)", "1:01 for 4 steps, 48 forwards"]


def test_the_panel_shows_progress_rewards_and_where_time_goes() -> None:
    history = History(4, 0)
    for row in ROWS:
        history.add(row)
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(panel(history))
    text = console.export_text()
    assert "step 4/4" in text
    assert "0.100 → 0.250" in text
    assert "rollout 75%" in text


def test_the_live_display_gives_the_terminal_back(tmp_path: Path) -> None:
    with open(tmp_path / "out.txt", "w") as file:
        display = LiveDisplay(Console(file=file, force_terminal=True, width=100))
        display.start(4, 0, "plan")
        display.step(ROWS[1])
        display.close()
        assert not display.live.is_started


def test_a_quiet_display_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    display = for_terminal(quiet=True)
    display.start(1, 0, "plan")
    display.step(ROWS[0])
    display.note("note")
    display.finish({})
    display.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (float("nan"), "–:––")]
)
def test_durations_read_as_clocks(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("values", "text"), [([], ""), ([1, 1], "▁▁"), ([0, 1], "▁█"), (list(range(64)), None)]
)
def test_a_sparkline_goes_from_low_to_high(values: list[float], text: str | None) -> None:
    drawn = sparkline(values)
    assert drawn == text if text is not None else len(drawn) == 32


def test_an_outcome_leaves_out_what_was_not_judged() -> None:
    assert outcome({"heldout_before": {"jpeg": None}, "heldout_after": {"jpeg": 1.0}}) == []


def test_rewards_of_different_scale_get_panels_of_their_own(tmp_path: Path) -> None:
    assert reward_groups(ROWS) == [["agreement"], ["jpeg"]]
    curves(ROWS, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height
