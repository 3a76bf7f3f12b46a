"""The headless loop on the bundled model: whole runs of a few small steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import PureWindowsPath

import pytest
import torch
from accelerate import Accelerator
from program import StopAt
from some_cases import some

from comfy_g2rpo import lora
from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.prompts import PromptCursor
from comfy_g2rpo.rewards import RewardError
from comfy_g2rpo.run import iteration
from comfy_g2rpo.run import setup as run_setup
from comfy_g2rpo.run.evaluation import Evaluation, compare
from comfy_g2rpo.run.folder import RunFolder, read_state
from comfy_g2rpo.run.optimizers import optimizer_tensors
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import dump, from_dict
from g2rpo_trainer.families.sd3 import SD3
from g2rpo_trainer.reports.progress import Silent

pytestmark = pytest.mark.xdist_group("run")  # one process makes what they share

VARYING = ("time/", "memory/")
FEW = {"eval_every": 0, "eval_prompts": 1, "eval_noises": 1, "watch": "off"}
"""What a run evaluates where that is not in question: one picture at the start, one at the end."""


def config(tmp_path, **sections):
    """Configure a run of three quick steps."""
    (tmp_path / "train.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    (tmp_path / "heldout.txt").write_text("a yellow circle\na red square above a blue circle\n")
    tree = {
        "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
        "lora": {"rank": 4, "alpha": 8},
        "method": {"name": "g2rpo", "num_steps": 4, "group_size": 3, "learning_rate": 1e-3},
        "rewards": [{"name": "agreement"}],
        "prompts": {"train": str(tmp_path / "train.txt"), "heldout": str(tmp_path / "heldout.txt")},
        "train": {
            "steps": 3,
            "prompts_per_step": 2,
            "eval_noises": 2,
            "checkpoint_every": 1,
            "eval_every": 2,
        },
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return from_dict(tree)


def prepare(made):
    return training.prepare(made, Accelerator(cpu=True))


def outcome(path):
    """Return all that must be equal: LoRA, state and the metrics that are not clocks."""
    folder = RunFolder.open(path)
    rows = [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in folder.metrics()]
    return lora.read(folder.latest() / "lora.safetensors").pairs, read_state(folder.latest())[0], rows


def assert_equal(one, two):
    for a, b in ((one[0], two[0]),):
        assert all(torch.equal(a[name][i], b[name][i]) for name in a for i in (0, 1))
    assert one[1].keys() == two[1].keys() and all(torch.equal(one[1][k], two[1][k]) for k in one[1])
    assert one[2] == two[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run once without interruption."""
    path = tmp_path_factory.mktemp("whole")
    summary = training.train(config(path), path / "run", progress=Silent())
    return path / "run", summary


@pytest.mark.parametrize("steps, resume", some([(2, False), (6, True), (6, False)], 2))
def test_the_metrics_are_read_at_most_once_in_a_run_however_long(tmp_path, monkeypatch, steps, resume):
    made = config(tmp_path, train={"steps": steps, "eval_every": 1, "eval_noises": 1})
    if resume:
        first = config(tmp_path, train={"steps": 3, "eval_every": 1, "eval_noises": 1})
        training.train(first, tmp_path / "run", progress=Silent())
    reads, read = [], RunFolder._read_metrics
    monkeypatch.setattr(RunFolder, "_read_metrics", lambda folder: reads.append(1) or read(folder))
    training.train(made, tmp_path / "run", progress=Silent(), resume=resume)
    # Going on, also to drop the rows after the checkpoint.
    assert len(reads) == 1 + resume


def test_a_run_leaves_what_the_readme_promises(whole):
    path, summary = whole
    for name in ("config.json", "metrics.jsonl", "summary.json", "before_after.png", "curves.png"):
        assert (path / name).stat().st_size > 0
    saved = json.loads((path / "summary.json").read_text())
    expected = {
        "heldout_before",
        "heldout_after",
        "reward_before",
        "reward_after",
        "seconds",
        "forwards",
        "seed",
        "lora",
        "steps",
        "recipe",
        "heldout_gain",
    }
    assert expected <= set(saved) and saved["steps"] == 3
    assert (path / saved["lora"]).is_file() and summary["lora"] == saved["lora"]


def test_a_runs_file_names_are_legal_on_windows(whole):
    places = [PureWindowsPath(place.relative_to(whole[0])) for place in whole[0].rglob("*")]
    assert len(places) > 10 and max(len(str(place)) for place in places) < 100
    for name in {part for place in places for part in place.parts}:
        assert not re.search(r'[<>:"/\\|?*\x00-\x1f]|[ .]$', name), name
        assert not re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE), name


def test_metrics_have_the_fields_names(whole):
    rows = RunFolder.open(whole[0]).metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert {
        "reward/agreement/mean",
        "reward/agreement/std",
        "advantage/abs_mean",
        "zero_std_share",
        "grad_norm",
        "lr",
        "nfe",
    } <= set(rows[1])
    assert {"time/rollout", "time/decode", "time/reward", "time/update", "memory/peak"} <= set(rows[1])
    assert all("heldout/agreement/mean" in rows[i] for i in (0, 3, 5))


def test_the_adapter_has_learned_something_and_says_what_it_is(whole):
    file = lora.read(whole[0] / whole[1]["lora"])
    unused = "transformer_blocks.2.attn.add_q_proj"  # the last block drops what its text queries bring
    assert all(up.abs().max() > 0 for name, (_, up) in file.pairs.items() if name != unused)
    assert (
        file.metadata["g2rpo.base_model"] == "tiny"
        and file.metadata["g2rpo.rewards"] == "1 agreement"
        and file.metadata["g2rpo.step"] == "3"
    )


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupted_run_resumes_bit_for_bit(whole, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        training.train(config(tmp_path), tmp_path / "run", progress=StopAt(step))
    assert int(RunFolder.open(tmp_path / "run").latest().name) == step
    training.train(config(tmp_path), tmp_path / "run", resume=True, progress=Silent())
    assert_equal(outcome(whole[0]), outcome(tmp_path / "run"))


def test_a_killed_run_resumes_bit_for_bit_from_its_last_checkpoint(whole, tmp_path, monkeypatch):
    """A kill leaves rows and torn lines behind the last checkpoint; they are written again."""
    with pytest.raises(KeyboardInterrupt):
        training.train(config(tmp_path), tmp_path / "run", progress=StopAt(1))
    folder = RunFolder.open(tmp_path / "run")
    folder.append({"step": 2, "nfe": 5})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 3, "nf')
    training.train(config(tmp_path), tmp_path / "run", resume=True, progress=Silent())
    assert_equal(outcome(whole[0]), outcome(tmp_path / "run"))


@pytest.mark.long
def test_a_moving_average_a_schedule_and_the_clipped_objective_resume_too(tmp_path):
    method = {
        "name": "flow_grpo_fast",
        "num_steps": 4,
        "group_size": 3,
        "pick_size": 1,
        "ema": 0.9,
        "epochs": 2,
        "learning_rate": 1e-3,
        "lr_schedule": "linear",
        "warmup_steps": 1,
    }
    method = {"method": {**method, "kl": 0.1, "kl_reference": "start"}}
    training.train(config(tmp_path, **method), tmp_path / "a", progress=Silent())
    with pytest.raises(KeyboardInterrupt):
        training.train(config(tmp_path, **method), tmp_path / "b", progress=StopAt(2))
    training.train(config(tmp_path, **method), tmp_path / "b", resume=True, progress=Silent())
    assert_equal(outcome(tmp_path / "a"), outcome(tmp_path / "b"))
    rows = [row for row in RunFolder.open(tmp_path / "a").metrics() if "nfe" in row]
    assert [row["lr"] for row in rows] == [1e-3, 1e-3, 5e-4]
    assert (
        rows[0]["kl/velocity"] >= 0
        and "clip_share" in rows[0]
        and rows[0]["ratio/mean"] == pytest.approx(1, abs=1e-2)
    )


def test_a_host_that_decodes_after_rolling_learns_the_same(tmp_path):
    rows = []
    for streams in (True, False):
        setup = prepare(config(tmp_path, train={"slots": 4}))
        setup.policy.decodes_while_rolling = streams
        rows.append(iteration.iterate(setup, run_setup.make_learner(setup), lambda phase: None))
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-3)
    assert rows[0]["reward/agreement/mean"] == pytest.approx(rows[1]["reward/agreement/mean"], abs=1e-4)


def test_a_run_that_was_stopped_while_it_looked_looks_again(whole, tmp_path):
    class StopInTheSecondLook(Silent):
        def step(self, metrics):
            if metrics["step"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training.train(config(tmp_path), tmp_path / "run", progress=StopInTheSecondLook())
    assert [row["step"] for row in RunFolder.open(tmp_path / "run").metrics()] == [0, 1, 2]
    training.train(config(tmp_path), tmp_path / "run", resume=True, progress=Silent())
    assert_equal(outcome(whole[0]), outcome(tmp_path / "run"))


@pytest.mark.parametrize("update", ["accumulate", "per_step"])
def test_an_update_that_is_broken_off_leaves_the_last_finished_step(tmp_path, update):
    setup = prepare(
        config(
            tmp_path,
            method={"name": "g2rpo", "num_steps": 4, "group_size": 3, "objective": "clip", "update": update},
        )
    )
    learner = run_setup.make_learner(setup)
    forwards = []
    iteration.iterate(setup, learner, forwards.append)
    before = [p.detach().clone() for p in setup.policy.parameters()]
    state = {k: v.clone() for k, v in optimizer_tensors(learner.optimizer).items()}
    left = len(forwards) - 1

    def stop_at_the_last_forward(phase):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        iteration.iterate(setup, learner, stop_at_the_last_forward)
    assert learner.step == 1 and left == -1
    assert all(torch.equal(a, b) for a, b in zip(before, setup.policy.parameters(), strict=True))
    after = optimizer_tensors(learner.optimizer)
    assert after.keys() == state.keys() and all(torch.equal(after[k], state[k]) for k in state)


def test_a_resumed_run_must_be_the_same_run(whole, tmp_path):
    other = config(tmp_path, lora={"rank": 8})
    with pytest.raises(RunError, match=r"lora\.rank = 4, not 8"):
        training.reopen_run(other, dump(other), whole[0], False)


def test_a_run_of_an_earlier_version_is_resumed_where_its_missing_fields_are_at_their_defaults(
    whole, tmp_path
):
    older = json.loads((whole[0] / "config.json").read_text("utf-8"))
    del (
        older["config"]["model"]["schedule"],
        older["config"]["lora"]["init"],
        older["config"]["rewards"][0]["gate"],
    )
    shutil.copytree(whole[0], tmp_path / "old")
    (tmp_path / "old/config.json").write_text(json.dumps(older), "utf-8")
    again = from_dict(older["config"])
    training.reopen_run(again, dump(again), tmp_path / "old", False)
    smaller = {
        **older["config"],
        "memory": {"gradient_checkpointing": True},
        "train": {**older["config"]["train"], "slots": 2},
    }
    again = from_dict(smaller)
    training.reopen_run(again, dump(again), tmp_path / "old", False)
    for change, name in (
        ({"model": {"schedule": "comfyui"}}, r"model\.schedule"),
        ({"lora": {"rank": 4, "alpha": 2}}, r"lora\.alpha"),
    ):
        with pytest.raises(RunError, match=name):
            other = config(tmp_path, **change)
            training.reopen_run(other, dump(other), tmp_path / "old", False)


def test_a_longer_budget_continues_a_finished_run(tmp_path):
    short = config(tmp_path, train={"steps": 1})
    training.train(short, tmp_path / "run", progress=Silent())
    summary = training.train(
        config(tmp_path, train={"steps": 2}), tmp_path / "run", resume=True, progress=Silent()
    )
    assert summary["steps"] == 2


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_prompts_that_a_run_can_come_to_are_encoded_and_no_others(tmp_path, monkeypatch, steps):
    (tmp_path / "nine.txt").write_text("\n".join(f"{count} red circles" for count in range(9)))
    encode_one, encoded = SD3.encode_one, []
    monkeypatch.setattr(
        SD3, "encode_one", lambda policy, prompt: encoded.append(prompt) or encode_one(policy, prompt)
    )
    train = {"steps": steps, "prompts_per_step": 2, "eval_prompts": 1}
    setup = prepare(config(tmp_path, prompts={"train": str(tmp_path / "nine.txt")}, train=train))
    places = [PromptCursor(setup.prompts.train, 2, 0).batch(step) for step in range(steps)]
    drawn = {prompt for batch in places for prompt in batch}
    assert len(drawn) == min(2 * steps, 9)
    assert sorted(encoded) == sorted([*drawn, "a yellow circle"])


def test_an_existing_run_is_not_overwritten(whole, tmp_path):
    before = (whole[0] / "summary.json").read_bytes()
    with pytest.raises(RunError, match="g2rpo resume"):
        training.train(config(tmp_path), whole[0], progress=Silent())
    assert (whole[0] / "summary.json").read_bytes() == before


def test_training_goes_on_from_a_lora_file(whole, tmp_path):
    path = whole[0] / whole[1]["lora"]
    setup = prepare(config(tmp_path, lora={"rank": 4, "alpha": 16, "init": str(path)}))
    file = lora.read(path)
    for name, (down, up) in setup.policy.pairs().items():
        assert torch.equal(down, file.pairs[name][0]) and torch.allclose(
            16 / 4 * up @ down, file.delta(name), atol=1e-7
        )
    with pytest.raises(ValueError, match=r"lora\.init"):
        prepare(config(tmp_path, lora={"rank": 2, "init": str(path)}))


def test_a_reward_that_judges_nothing_stops_the_run_with_one_line(tmp_path):
    (tmp_path / "odd.txt").write_text("something else entirely\nand another thing\n")
    odd = config(tmp_path, prompts={"train": str(tmp_path / "odd.txt")})
    with pytest.raises(RewardError, match="none of agreement can judge 2 of the 2 prompts to train on"):
        training.train(odd, tmp_path / "run", progress=Silent())


def test_time_budgets_end_a_run(tmp_path):
    summary = training.train(config(tmp_path, train={"minutes": 1e-4}), tmp_path / "run", progress=Silent())
    assert summary["steps"] == 1


LAUNCH = ("launch", "--multi_gpu", "--num_processes", "2", "-m", "g2rpo_trainer")
"""What docs/first_real_run.md gives to accelerate; where there is no GPU, the processes take the CPU."""


def test_two_processes_learn_what_one_learns(tmp_path):
    """Each takes half of the step's prompts; gradients are averaged, scores gathered."""
    made = config(tmp_path, train={"steps": 2, "eval_every": 0})
    training.train(made, tmp_path / "one", progress=Silent())
    recipe = tmp_path / "two.yaml"
    recipe.write_text(made.model_dump_json())  # JSON is YAML
    program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *LAUNCH]
    subprocess.run([*program, "train", recipe, "--out", tmp_path / "two"], check=True, timeout=300)
    one, two = (outcome(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[0][name][i], two[0][name][i], atol=1e-5) for name in one[0] for i in (0, 1))
    nfe = [[row["nfe"] for row in run[2] if "nfe" in row] for run in (one, two)]
    assert nfe[0] == nfe[1]  # rows count what all processes did
    assert two[2][1]["reward/agreement/mean"] == pytest.approx(one[2][1]["reward/agreement/mean"], abs=1e-3)


def test_gains_are_paired_by_prompt():
    before = Evaluation(("r",), ("a", "b", "c"), torch.tensor([[[0.1, 0.3], [0.4, 0.4], [0.5, torch.nan]]]))
    after = Evaluation(("r",), ("a", "b", "c"), torch.tensor([[[0.3, 0.5], [0.5, 0.7], [0.8, 0.8]]]))
    gain = compare(before, after)["r"]
    assert gain["mean"] == pytest.approx((0.2 + 0.2 + 0.3) / 3) and gain["p"] < 0.05 and gain["ci95"] > 0
