"""Resuming as people do it: by the run's folder, or by the command that began it, with or without its
settings.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from program import leave
from some_cases import some
from test_run import outcome

from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.run.folder import RunFolder

pytestmark = pytest.mark.xdist_group("resume")

SMALL = [
    word
    for setting in (
        "method.num_steps=4",
        "method.group_size=3",
        "train.prompts_per_step=1",
        "train.eval_prompts=2",
        "train.eval_noises=1",
        "train.eval_every=0",
    )
    for word in ("--set", setting)
]
MADE = ["--set", "method.eta=0.5", "--set", "rewards.0.weight=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a run of one step with settings of its own, and one of two."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parent.parent)
        for name, steps in (("one", 1), ("two", 2)):
            words = ["train", "demo", "--quiet", "--out", root / name, *SMALL, *MADE]
            code = run_quietly(*words, "--set", f"train.steps={steps}")
            assert code == 0
    return root


def run_quietly(*words: object) -> int:
    """Run a command; return its exit code."""
    from program import call

    return call(*words)


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "one", tmp_path / "run"))


WAYS = {
    "resume": ["resume", "RUN"],
    "the command without its settings": ["train", "demo", "--resume", "--out", "RUN"],
    "the command with one of them": ["train", "demo", "--resume", "--out", "RUN", *MADE[:2]],
    "the whole command": ["train", "demo", "--resume", "--out", "RUN", *SMALL, *MADE],
}


@pytest.mark.parametrize("way", some(WAYS, 2))
def test_a_run_goes_on_with_its_own_settings(
    way: str, run: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run if word == "RUN" else word for word in WAYS[way]]
    code, _, errors = leave(capsys, *words, "--quiet", "--set", "train.steps=2")
    assert code == 0, errors
    ours, whole = outcome(run), outcome(runs / "two")
    assert all(torch.equal(ours[0][name][i], whole[0][name][i]) for name in whole[0] for i in (0, 1))
    assert [row for row in ours[2] if "nfe" in row] == [row for row in whole[2] if "nfe" in row]
    assert RunFolder(run).config()["config"]["method"]["eta"] == 0.5


@pytest.mark.parametrize("way", ["resume", "the command without its settings"])
@pytest.mark.parametrize(
    ("setting", "was"),
    [
        ("method.eta=0.6", "method.eta = 0.5, not 0.6"),
        ("rewards.0.weight=3", "rewards.0.weight = 2.0, not 3.0"),
        ("train.seed=7", "train.seed = 0, not 7"),
        ("lora.rank=2", "lora.rank = "),
    ],
)
def test_what_may_not_change_is_refused_by_name(
    way: str, setting: str, was: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [run if word == "RUN" else word for word in WAYS[way]]
    code, _, error = leave(capsys, *words, "--set", setting)
    assert code == 2 and f"was made with {was}" in error


def test_a_folder_without_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = leave(capsys, "resume", tmp_path)
    assert code == 2 and "is this a run folder?" in error
    (tmp_path / "config.json").write_text(json.dumps({"other": 1}))
    code, _, error = leave(capsys, "resume", tmp_path)
    assert code == 2 and "holds no run of this program" in error


def test_a_run_of_an_earlier_version_goes_on(
    run: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "config.json").read_text())
    for name in ("lr_schedule", "warmup_steps"):
        del config["config"]["method"][name], config["recipe"][name]
    (run / "config.json").write_text(json.dumps(config))
    state = run / "checkpoints/000001/state.json"
    kept = json.loads(state.read_text())
    del kept["sha256"]
    state.write_text(json.dumps(kept))
    code, _, errors = leave(capsys, "resume", run, "--quiet", "--set", "train.steps=2")
    assert code == 0, errors
    ours, whole = outcome(run)[1], outcome(runs / "two")[1]
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("way", "method", "then"),
    some(
        [
            ("resume", "g2rpo", {"granularities": [1]}),
            ("resume", "mix_grpo", {"steps": "all"}),
            ("resume", "flow_grpo", {"kl_form": "velocity"}),
            ("the command without its settings", "dance_grpo", {"steps": "all", "train_share": 0.5}),
        ],
        2,
    ),
)
def test_a_run_keeps_what_its_methods_name_meant(
    way: str, method: str, then: dict[str, object], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe may be mended; a run that an earlier version began goes on as it was."""
    strides = [1] if way != "resume" else None  # the recipe file names them
    config = json.loads((run / "config.json").read_text())
    config["config"]["method"] |= {"name": method, "granularities": strides}
    config["settings"] += [f"method.name={method}", "method.granularities=[1]"]
    made = recipe(method, num_steps=4, group_size=3, eta=0.5, learning_rate=1e-3)
    config["recipe"] = dataclasses.asdict(made) | then
    if method == "flow_grpo":
        del config["recipe"]["kl_form"]  # a field that came later, and is as its default says
    (run / "config.json").write_text(json.dumps(config))
    words = [run if word == "RUN" else word for word in WAYS[way]]
    code, _, errors = leave(capsys, *words, "--quiet", "--set", "train.steps=2")
    assert code == 0, errors
    found = RunFolder(run).config()["recipe"]
    assert {name: found[name] for name in then} == then
    name, value = next(iter(then.items()))
    today = json.dumps(getattr(recipe(method), name))
    code, _, error = leave(capsys, *words, "--set", f"method.{name}={today}")
    assert code == 2 and f"was made with method.{name} = {value!r}" in error


@pytest.mark.parametrize("value", ["far", [], {}, -1, 1e9])
def test_a_damaged_recipe_of_a_run_is_one_line(
    value: object, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "config.json").read_text())
    config["recipe"]["kl"] = value
    (run / "config.json").write_text(json.dumps(config))
    code, _, error = leave(capsys, "resume", run, "--quiet", "--set", "train.steps=2")
    assert code == 2 and "config.json is damaged, in recipe: kl is" in error and error.count("\n") == 1


def test_a_schedule_over_another_length_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "method.lr_schedule=linear", "--set", "train.steps=1"]
    assert leave(capsys, "train", "demo", "--quiet", "--out", tmp_path / "run", *SMALL, *words)[0] == 0
    code, said, _ = leave(capsys, "resume", tmp_path / "run", "--set", "train.steps=2")
    assert code == 0 and "from here on the learning rate falls over 2 steps" in said
    rows = [row["lr"] for row in RunFolder(tmp_path / "run").metrics() if "nfe" in row]
    assert rows == pytest.approx([1e-3, 5e-4])
