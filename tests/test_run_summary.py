"""A run ends with its summary, whatever rewards answered and whatever lies in its folder; and says which
evaluation was best.
"""

from __future__ import annotations

import filecmp
import json
import math
import shutil
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from program import Notes, leave
from some_cases import some
from test_run import config
from test_run import training as host
from test_run_safety import stop_after_two, train_whole

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.rewards import RewardError
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.summary import best_checkpoint, best_lines
from comfy_g2rpo.run.watch import best_step
from g2rpo_trainer.reports.progress import Lines, Silent
from g2rpo_trainer.rewards.own import custom

pytestmark = pytest.mark.xdist_group("run summary")

ANSWERS = {
    "abstains": "return [None] * len(prompts)",
    "abstains for one prompt": "return [None if 'red' in p else 1.0 * i for i, p in enumerate(prompts)]",
    "1e38": "return [1e38] * len(prompts)",
    "up to 3e38": "return [3e38 * float(x) for x in images.mean((1, 2, 3))]",
    "down to -3e38": "return [-3e38 * float(x) for x in images.mean((1, 2, 3))]",
    "tiny": "return [1e-38 * float(x) for x in images.mean((1, 2, 3))]",
    "always the same": "return [0.25] * len(prompts)",
}


def with_reward(path: Path, body: str, trained: bool, **more: object) -> object:
    """Configure a run with an own reward beside agreement."""
    (path / "own.py").write_text(f"import sys, time\n\ndef own(images, prompts):\n    {body}\n")
    own = {"name": "own", "path": str(path / "own.py:own"), **more}
    both = {"rewards": [{"name": "agreement"}, own]} if trained else {"heldout_rewards": [own]}
    return config(path, train={"max_dropped": 1, "eval_every": 0}, **both)


@pytest.mark.parametrize(("answer", "trained"), some(product(ANSWERS, (True, False)), 3))
def test_a_run_ends_whatever_a_reward_answers(answer: str, trained: bool, tmp_path: Path) -> None:
    made = with_reward(tmp_path, ANSWERS[answer], trained)
    summary = host.train(made, tmp_path / "run", progress=Lines())
    folder = RunFolder(tmp_path / "run")
    assert summary["steps"] == 3 and folder.summary()["steps"] == 3
    assert math.isfinite(folder.metrics()[-1]["heldout/agreement/mean"])
    (norm,) = {math.isfinite(row["grad_norm"]) for row in folder.metrics() if "nfe" in row}
    assert norm
    json.loads((tmp_path / "run/summary.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "run/curves.png").exists() and (tmp_path / "run/before_after.png").exists()


@pytest.mark.parametrize("place", ["when it is asked", "when it is imported"])
def test_a_reward_that_ends_the_program_ends_the_run_with_a_sentence(place: str, tmp_path: Path) -> None:
    made = with_reward(tmp_path, "sys.exit(3)" if "asked" in place else "return None", True)
    if "imported" in place:
        (tmp_path / "own.py").write_text("raise SystemExit(3)")
    with pytest.raises(RewardError, match=r"own.* called sys\.exit\(3\); let it raise an error instead"):
        host.train(made, tmp_path / "run", progress=Silent())


@pytest.mark.parametrize("member", ["check_prompts", "can_judge", "noise", "settle", "embed"])
def test_no_part_of_a_reward_ends_the_program(member: str, tmp_path: Path) -> None:
    source = f"""
import sys
from comfy_g2rpo.rewards import Reward

class Own(Reward):
    name, licence, compares_across_prompts = "own", "MIT", True

    def {member}(self, *given):
        sys.exit(0)

own = Own()
"""
    (tmp_path / "own.py").write_text(source)
    reward = custom("own", f"{tmp_path / 'own.py'}:own", 5)
    given = {"check_prompts": [["a"]], "can_judge": ["a"], "embed": [None]}.get(member, [])
    with pytest.raises(RewardError, match=r"reward 'own' called sys\.exit\(0\); let it raise an error"):
        getattr(reward, member)(*given)
    assert reward.cancel is None and (member == "embed" or reward.embed is None)


@pytest.mark.parametrize(
    "how", ["time.sleep(60)", "while True: pass", "import threading; threading.Event().wait()"]
)
def test_a_reward_that_hangs_is_given_up_after_its_timeout(how: str, tmp_path: Path) -> None:
    made = with_reward(tmp_path, how, True, timeout=0.2)
    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'own' did not answer within 0\.2 s; .*timeout"):
        host.train(made, tmp_path / "run", progress=Silent())
    assert time.monotonic() - begin < 60


def test_an_import_that_hangs_is_given_up_too(tmp_path: Path) -> None:
    made = with_reward(tmp_path, "return None", True, timeout=0.2)
    (tmp_path / "own.py").write_text("import time\ntime.sleep(60)")
    with pytest.raises(RewardError, match=r"the import of .*own\.py .*did not answer within 0\.2 s"):
        host.train(made, tmp_path / "run", progress=Silent())


@pytest.mark.long
def test_what_belongs_to_a_thread_stays_with_a_reward(tmp_path: Path) -> None:
    made = with_reward(tmp_path, "return None", True)
    lines = (
        "import sqlite3, torch",
        "base = sqlite3.connect(':memory:')",
        "def own(images, prompts):",
        "    assert not torch.is_grad_enabled()",
        "    return [float(base.execute('select 1').fetchone()[0])] * len(prompts)",
    )
    (tmp_path / "own.py").write_text("\n".join(lines))
    assert host.train(made, tmp_path / "run", progress=Silent())["steps"] == 3


# What lies in the folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return stop_after_two(whole, tmp_path)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "index is no JSON": ("images/000000/index.json", lambda file: file.write_text("{")),
    "index is a table": ("images/000000/index.json", lambda file: file.write_text("{}")),
    "index of numbers": ("images/000000/index.json", lambda file: file.write_text("[1, 2]")),
    "index without scores": (
        "images/000000/index.json",
        lambda file: file.write_text('[{"file": "000.png", "prompt": "x", "seed": 0}]'),
    ),
    "picture is gone": ("images/000000/000.png", Path.unlink),
    "picture is cut": ("images/000000/000.png", lambda file: file.write_bytes(file.read_bytes()[:200])),
    "picture is text": ("images/000000/000.png", lambda file: file.write_text("no")),
    "scores are gone": ("images/000000/scores.json", Path.unlink),
    "scores are a list": ("images/000000/scores.json", lambda file: file.write_text("[]")),
    "scores lack prompts": ("images/000000/scores.json", lambda file: file.write_text('{"scores": {}}')),
    "scores are text": (
        "images/000000/scores.json",
        lambda file: file.write_text('{"scores": {"agreement": "x"}, "prompts": ["a"]}'),
    ),
}


@pytest.mark.parametrize("what", some(DAMAGE, 2))
def test_a_run_ends_whatever_was_damaged_in_its_folder(what: str, whole: Path, run: Path) -> None:
    name, damage = DAMAGE[what]
    damage(run / name)
    notes = Notes()
    summary = host.train(config(whole), run, resume=True, progress=notes)
    assert summary["steps"] == 3 and RunFolder(run).summary()["lora"] == "checkpoints/000003/lora.safetensors"
    said = [line for line in notes.said if Path(name).name in line]
    assert said and all(len(line.splitlines()) == 1 for line in said)


# The best evaluation

LOOK = "heldout/strict/mean"


def looks(*values: float | None) -> list[dict]:
    return [{"step": 10 * i, LOOK: v, "heldout/strict/ci95": 0.1} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((0.1, 0.3, 0.2), 10),
        ((0.1, math.nan, 0.2), 20),
        ((None, 0.3, 0.2), 0),
        ((0.3, 0.1), 0),
        ((0.1, math.inf, 0.2), 20),
    ],
)
def test_the_best_step_counts_what_could_be_judged(values: tuple, best: int) -> None:
    assert best_step(looks(*values), {"agreement": 1.0}) == best


def test_a_run_says_which_evaluation_was_best(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunFolder(whole / "run").summary()
    best = summary["best"]
    rows = [row for row in RunFolder(whole / "run").metrics() if "heldout/agreement/mean" in row]
    top = max(rows, key=lambda row: row["heldout/agreement/mean"])
    assert best["step"] == top["step"] == summary["best_step"] and best["looks"] == len(rows) == 3
    assert best["scores"] == {
        "agreement": {"mean": top["heldout/agreement/mean"], "ci95": top["heldout/agreement/ci95"]}
    }
    assert (whole / "run" / best["checkpoint"] / "lora.safetensors").is_file()


BEST = {
    "step": 300,
    "looks": 9,
    "scores": {"strict": {"mean": 0.54, "ci95": 0.031}},
    "gains": {"strict": {"mean": 0.21, "ci95": 0.04, "p": 2e-5}},
    "checkpoint": "checkpoints/000300",
}


def test_the_lines_give_score_interval_p_place_and_bias() -> None:
    assert best_lines({"best": BEST}) == [
        "best by held-out: step 300 (strict 0.54 ± 0.031), checkpoints/000300",
        "  strict +0.210 ± 0.04 over the untrained model, p = 2e-05",
        "  the best of 9 evaluations looks better than it is: measure it on other prompts before you trust "
        "the last digits",
    ]
    assert best_lines({"best": BEST | {"step": 0}}) == [
        "best by held-out: step 0, the untrained model: none of 9 evaluations beat it"
    ]
    gone = best_lines({"best": BEST | {"checkpoint": None, "looks": 2}})
    assert gone[0].endswith("whose checkpoint is gone") and len(gone) == 2
    assert best_lines({}) == best_lines({"best": None}) == []


@pytest.mark.long
def test_the_best_checkpoint_is_kept_without_the_watch(tmp_path: Path) -> None:
    made = config(tmp_path, train={"steps": 5, "eval_every": 1, "keep_checkpoints": 2, "watch": "off"})
    summary = host.train(made, tmp_path / "run", progress=Silent())
    folder = RunFolder(tmp_path / "run")
    kept = [int(place.name) for place in folder.saved()]
    assert set(kept) == {4, 5, summary["best_step"]}
    assert int(best_checkpoint(folder).name) == summary["best_step"]


@pytest.mark.long
def test_best_picks_the_checkpoint_for_sample_export_and_compare(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        if "heldout/agreement/mean" in row:
            row["heldout/agreement/mean"] = 1.0 if row["step"] == 2 else 0.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = run / "checkpoints/000002/lora.safetensors"
    for words in (
        ("sample", run, "--prompt", "a red circle", "--out", tmp_path / "last.png"),
        ("sample", run, "--prompt", "a red circle", "--best", "--out", tmp_path / "best.png"),
        ("sample", run, "--prompt", "a red circle", "--out", tmp_path / "two.png", "--lora", two),
        # A file's title is its name.
        ("export", run, "--best", "--out", tmp_path / "best/lora.safetensors"),
        ("export", two, "--out", tmp_path / "two/lora.safetensors"),
    ):
        assert leave(capsys, *words)[0] == 0
    assert (tmp_path / "best.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "best.png").read_bytes() != (tmp_path / "last.png").read_bytes()
    assert filecmp.cmp(tmp_path / "best/lora.safetensors", tmp_path / "two/lora.safetensors", shallow=False)
    code, out, _ = leave(capsys, "compare", run, "--best", "--json", "--out", tmp_path / "a.html")
    assert code == 0 and json.loads(out)["after"].endswith("step 2")


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "demo", "--best", "--prompt", "x"),
        ("export", "FILE", "--best", "--out", "new.safetensors"),
        ("compare", "PICTURES", "PICTURES", "--best", "--out", "new.html"),
    ],
    ids=lambda words: words[0],
)
def test_best_is_for_runs(
    words: tuple, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "FILE": whole / "run/checkpoints/000002/lora.safetensors",
        "PICTURES": whole / "run/images/000000",
    }
    code, _, error = leave(capsys, *(given.get(word, word) for word in words))
    assert code == 2 and "--best is for runs" in error


def test_a_best_checkpoint_that_is_gone_is_named(whole: Path, tmp_path: Path) -> None:
    run = RunFolder(Path(shutil.copytree(whole / "run", tmp_path / "run")))
    shutil.rmtree(best_checkpoint(run))
    with pytest.raises(RunError, match="its checkpoint is gone; leave --best out"):
        best_checkpoint(run)


# Resumed


def test_nothing_left_to_do_is_said(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    notes = Notes()
    host.train(config(whole), run, resume=True, progress=notes)
    assert "nothing left to do: 3 of 3 steps are made; raise steps to make the run longer" in notes.said


def test_the_live_view_of_a_resumed_run_compares_with_the_untrained_model(whole: Path, run: Path) -> None:
    class Display(Lines):
        def close(self) -> None: ...

    display = Display()
    host.train(config(whole), run, resume=True, progress=display)
    means = [
        row["heldout/agreement/mean"] for row in RunFolder(run).metrics() if "heldout/agreement/mean" in row
    ]
    assert display.history.series["heldout/agreement/mean"] == pytest.approx(means)
    assert len(display.history.series["reward/agreement/mean"]) == 3
    assert len(display.history.series["time/update"]) == 1


@pytest.mark.long
def test_a_run_that_was_made_longer_stays_so(whole: Path, run: Path) -> None:
    host.train(config(whole, train={"steps": 4}), run, resume=True, progress=Silent())
    assert RunFolder(run).config()["config"]["train"]["steps"] == 4
