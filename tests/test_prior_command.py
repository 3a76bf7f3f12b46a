"""`g2rpo prior`: what it prints and leaves, what it refuses, and that it can be stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from program import leave

from comfy_g2rpo.priors.noise_prior import Vectors, load_prior
from comfy_g2rpo.priors.prior_settings import PriorSettings
from comfy_g2rpo.priors.prior_training import PriorTraining
from g2rpo_trainer.commands.train_prior import Keeper
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.run import prepare

pytestmark = pytest.mark.xdist_group("prior command")  # one process makes the training that they share

FEW = ["train.steps=4", "train.eval_every=2", "train.eval_prompts=3", "train.eval_noises=2"]
FEW = [
    word for change in [*FEW, "method.group_size=4", "prior.learning_rate=0.01"] for word in ("--set", change)
]


def test_it_prints_every_look_and_leaves_the_best(tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    code, said, errors = leave(capsys, "prior", "demo", "--out", out, *FEW)
    assert code == 0 and errors.splitlines()[0] == "4 steps, each of 32 forwards and 8 images"
    lines = said.splitlines()
    assert lines[0].startswith("ordinary noise: agreement ") and ", diversity " in lines[0]
    assert [line.partition(":")[0] for line in lines[1:3]] == ["step 2", "step 4"]
    for line in lines[1:3]:
        assert line.count("±") == 4 and line.count("with another prompt's shift") == 2
        assert "; KL " in line and " long, diversity " in line
    assert lines[3].startswith("kept the best") and lines[4] == str(out)
    trained = load_prior(out)
    assert trained.notes["steps"] in ("2", "4") and "agreement" in trained.notes["gain"]
    assert trained.notes["model"] == "tiny" and float(trained.notes["kl"]) > 0
    again = tmp_path / "two.safetensors"
    assert leave(capsys, "prior", "demo", "--out", again, *FEW, "--quiet")[2] == ""
    assert again.read_bytes() == out.read_bytes()


def test_the_papers_own_estimator_learns_too(tmp_path, capsys):
    out = tmp_path / "value.safetensors"
    assert leave(capsys, "prior", "demo", "--out", out, *FEW, "--set", "prior.estimator=value")[0] == 0
    assert load_prior(out).notes["estimator"] == "value"


@pytest.fixture(scope="module")
def training() -> PriorTraining:
    """Load a training of the bundled model."""
    changes = ["train.eval_prompts=3", "train.eval_noises=2", "method.group_size=4", "train.seed=3"]
    return PriorTraining(prepare(load("demo", changes), Accelerator(cpu=True)), PriorSettings())


def test_a_prior_that_has_learned_nothing_gains_exactly_nothing(training):
    training = PriorTraining(training.setup, PriorSettings())
    heldout = training.heldout(1)
    look = training.look(heldout, 1)
    assert all(gain.mean == 0 for gain in [*look.gains.values(), *look.others.values()])
    assert (look.kl, look.length) == (0, 0) and look.diversity == heldout.diversity


def test_steps_learn_from_the_recipes_coarse_images(training):
    assert training.stride == 2 and training.price() == (32, 8)
    before = training.steps
    training.step()
    assert training.steps == before + 1 and training.prior.outer.bias.abs().sum() > 0


def test_stopping_keeps_a_whole_file_even_before_the_first_look(training, tmp_path):
    training.step()
    keeper = Keeper(training, load("demo", []), tmp_path / "a.safetensors")
    keeper.save_unmeasured()
    kept = load_prior(tmp_path / "a.safetensors")
    assert "gain" not in kept.notes
    kept.check_model(Vectors.of(training.setup.policy.transformer.named_parameters()))


def test_ctrl_c_ends_it_and_keeps_what_was_learned(tmp_path, capsys, monkeypatch):
    step = PriorTraining.step

    def stopping(self: PriorTraining) -> None:
        step(self)
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PriorTraining, "step", stopping)
    out = tmp_path / "a.safetensors"
    code, said, errors = leave(capsys, "prior", "demo", "--out", out, *FEW)
    assert code == 130 and "step 2: " in said and f"interrupted; what was learned is in {out}" in errors
    assert load_prior(out).notes["steps"] == "2"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "a.pt"], "--out is a.pt; a noise prior is a .safetensors file: name one"),
        (["--set", "prior.rank=0"], "prior.rank is 0; it must lie between 1 and 256"),
        (["--set", "prior.estimator=both"], "prior.estimator"),
        (["--set", "train.eval_prompts=1"], "held-out prompts: there is 1 to measure by"),
    ],
)
def test_what_cannot_be_is_refused(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, errors = leave(capsys, "prior", "demo", *words)
    assert code == 2 and says in errors and list(tmp_path.iterdir()) == []


def test_an_existing_file_stays_unless_it_may_go(tmp_path, capsys):
    out: Path = tmp_path / "a.safetensors"
    out.write_bytes(b"mine")
    code, _, errors = leave(capsys, "prior", "demo", "--out", out)
    assert code == 2 and f"{out} exists; choose another --out, or give --replace" in errors
    assert out.read_bytes() == b"mine"


def test_a_prior_repeats_itself(training):
    one, other = (training.noises(("a red circle",), 5) for _ in range(2))
    assert torch.equal(one, other) and not torch.equal(one, training.noises(("a red circle",), 6))
