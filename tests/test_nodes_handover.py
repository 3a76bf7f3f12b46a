"""A real ComfyUI hands a training over, and a worker in another process trains it, whoever is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import native_files
import pytest
import torch
from comfy_host import Answer, make_base, run_script
from safetensors.torch import load_file
from some_cases import ALL

from comfy_g2rpo.files.spool import Spool
from comfy_g2rpo.run.folder import RunFolder

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("training in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_handover.py")
CHANGES = "num_steps = 2\ngroup_size = 2\ngranularities = 1\neval_noises = 1\ncheckpoint_every = 1"
SUBMIT: dict[str, Any] = {
    **{"model": "tiny demo model", "text_encoder_1": "none", "text_encoder_2": "none"},
    **{"text_encoder_3": "none", "vae": "none", "recipe": "g2rpo", "steps": 3, "negative": ""},
    **{"prompts": "a red circle\ntwo blue squares", "heldout_prompts": "a green circle", "guidance": 1.0},
    **{"width": 64, "height": 64, "learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "targets": "attention"},
    **{"prompts_per_step": 1, "slots": 8, "eval_every": 0, "seed": 0, "changes": CHANGES},
}
BLOCKED = ["curve", "state"]
ALL_OUTPUTS = ["curve", "image", "lora", "samples", "state", "tuned"]
WAIT = 300.0
ENCODERS = {1: "", 2: "_2", 3: "_3"}


def work(base: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Let a worker run all that waits."""
    words = [sys.executable, "-m", "g2rpo_trainer.cli", "worker", "--comfyui", str(base), "--once", *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=own_environment())


def kill_worker(base: Path, rows: int, least: float = 0.0) -> None:
    """Start a worker, and kill it after so long and so many rows of the first run, or at that one's end."""
    words = [sys.executable, "-m", "g2rpo_trainer.cli", "worker", "--comfyui", str(base)]
    metrics, deadline = base / "output/g2rpo/hand/metrics.jsonl", time.monotonic() + WAIT
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, env=own_environment()) as worker:
        time.sleep(least)
        while time.monotonic() < deadline and spool_of(base).ended("hand") is None:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") > rows:
                break
            time.sleep(0.1)
        worker.kill()


def own_environment() -> dict[str, str]:
    """Return the environment of a worker: one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def spool_of(base: Path) -> Spool:
    """Return the spool of a ComfyUI."""
    return Spool(base / "output/g2rpo/spool")


def steps_of(base: Path, run: str) -> list[int]:
    """List the steps whose rows are in a run's metrics."""
    return [row["step"] for row in RunFolder(base / "output/g2rpo" / run).metrics() if "nfe" in row]


@pytest.fixture(scope="module")
def before(comfyui: Path, base: Path) -> Answer:
    """Hand trainings over, and look before there is a worker."""
    looks = {
        "first": ("hand", {}),
        "again": ("hand", {}),
        "other": ("hand", {"submit": {"rank": 4}}),
        "asked": ("hand", {"submit": {"rank": 4, "if_settings_changed": "ask"}}),
        "stopped": ("unwanted", {"stop": True}),
        "newest": ("hand", {"newest_checkpoint": True}),
        "away": ("away", {"submit": {"model": "gone.safetensors"}}),
    }
    return run_script(comfyui, CHILD, base, {"submit": SUBMIT, "looks": looks, "refusals": True})


@pytest.fixture(scope="module")
def worked(before: Answer, base: Path) -> subprocess.CompletedProcess[str]:
    """Have a worker train that is killed, and another one, with a job that nobody may submit among them."""
    spool = spool_of(base)
    spool.submit("evil", {**spool.job("hand"), "settings": ["rewards.0.path=evil.py:run"]})
    kill_worker(base, rows=1)
    return work(base)


@pytest.fixture(scope="module")
def after(comfyui: Path, base: Path, worked: subprocess.CompletedProcess[str]) -> Answer:
    """Look again, in a ComfyUI that was started anew."""
    looks = {
        "first": ("hand", {}),
        "other": ("hand", {"submit": {"rank": 4}}),
        "stopped": ("unwanted", {}),
        "evil": ("evil", {"stop": True}),
    }
    return run_script(comfyui, CHILD, base, {"submit": SUBMIT, "looks": looks})


def test_what_is_handed_over_waits_and_nothing_below_it_fails(before: Answer) -> None:
    first = before.data["first"]
    assert first["error"] == "" and first["came"] == BLOCKED
    assert first["state"].startswith("hand waits for a worker; start one where ComfyUI runs: g2rpo worker")
    assert first["said"] == ["hand is handed over: 3 steps cost 18 forwards and 6 pictures of 64×64"]
    assert first["curve"][0] == 1 and first["curve"][-1] == 3
    assert before.data["newest"]["came"] == BLOCKED


def test_run_again_hands_nothing_over_twice_and_other_settings_take_a_number(
    before: Answer, base: Path
) -> None:
    assert before.data["again"]["said"][0].startswith("hand was handed over before:")
    assert before.data["other"]["said"][0].startswith("hand-2 is handed over, because hand was handed over")
    assert "(rank: 2 → 4); give another name" in before.data["asked"]["error"]
    assert {"hand", "hand-2", "unwanted"} <= set(spool_of(base).ids())


def test_what_no_worker_could_run_is_refused_by_name(before: Answer, base: Path) -> None:
    assert "model" in before.data["away"]["error"]
    assert "reward: palette-" in before.data["made in the graph"] and str(base) not in str(before.data)
    assert "run: there is no job nobody; known are: " in before.data["no job"]
    assert not {"away", "unsaid"} & set(spool_of(base).ids())


def test_train_lora_does_not_take_the_name_of_a_job_that_waits(before: Answer) -> None:
    assert before.data["train hand"].startswith("run: hand is handed over to a worker (Submit Training)")
    assert before.data["train unwanted"] is None and before.data["train nobody"] is None


def test_the_time_that_is_left_counts_a_second_once(before: Answer) -> None:
    assert before.data["left"] == ", about 40 s left"


def test_a_job_that_is_stopped_before_a_worker_comes_has_ended(before: Answer, after: Answer) -> None:
    assert before.data["stopped"]["state"] == "unwanted was stopped before it began"
    assert after.data["stopped"]["state"] == "unwanted was stopped before it began"
    assert after.data["stopped"]["came"] == BLOCKED


def test_the_worker_trains_each_once_and_names_what_it_refuses(
    worked: subprocess.CompletedProcess[str], base: Path
) -> None:
    assert worked.returncode == 0, worked.stderr
    expected = {"hand": "done", "hand-2": "done", "unwanted": "cancelled", "evil": "failed"}
    assert {name: spool_of(base).ended(name)["status"] for name in expected} == expected
    assert steps_of(base, "hand") == steps_of(base, "hand-2") == [1, 2, 3]
    assert "evil: failed, the job brings settings" in worked.stdout
    assert not (base / "output/g2rpo/evil").exists() and not (base / "output/g2rpo/unwanted").exists()
    # Nothing is left to do, and nothing is done.
    assert "begins" not in work(base).stdout


def test_the_lora_arrives_on_the_wire_on_the_model_and_among_the_loras(after: Answer, base: Path) -> None:
    for key, name, rank in (("first", "hand", 2), ("other", "hand-2", 4)):
        done = after.data[key]
        assert done["error"] == "" and done["came"] == ALL_OUTPUTS and done["patches"] > 0
        assert done["state"] == f"{name} is done, step 3 of 3"
        assert done["file"] == [f"g2rpo/{name}.safetensors"]
        assert done["result"] == [{"run": name, "state": "done", "lora": f"g2rpo/{name}.safetensors"}]
        assert done["samples"][1:] == [64, 64, 3]
        sent = {
            weight.removeprefix(f"{key} "): tensor
            for weight, tensor in after.tensors.items()
            if weight.startswith(f"{key} ")
        }
        made = load_file(base / f"output/g2rpo/{name}/checkpoints/000003/lora.safetensors")
        kept = load_file(base / f"models/loras/g2rpo/{name}.safetensors")
        assert made.keys() == sent.keys() == kept.keys()
        assert all(torch.equal(made[weight], sent[weight]) for weight in made)
        assert all(torch.equal(made[weight], kept[weight]) for weight in made)
        assert {len(tensor) for weight, tensor in made.items() if "lora_A" in weight} == {rank}
        assert any(tensor.abs().max() > 0 for weight, tensor in made.items() if "lora_B" in weight)
        assert (base / f"models/loras/g2rpo/{name}.preview.png").is_file()


def test_other_settings_than_those_of_a_foreign_job_take_a_number_too(after: Answer) -> None:
    assert after.data["evil"]["said"][0].startswith("evil-2 is handed over, because evil")
    assert after.data["evil"]["state"] == "evil-2 was stopped before it began"


@pytest.mark.long
def test_files_that_are_chosen_by_name_are_trained(comfyui: Path, tmp_path: Path) -> None:
    base, more = make_base(tmp_path / "base"), tmp_path / "more"
    files = native_files.write(tmp_path / "sd3", "sd3")
    for name, kind, root in (
        ("checkpoint", "checkpoints", base / "models"),
        ("transformer", "diffusion_models", base / "models"),
        *((f"text_encoder{end}", "text_encoders", base / "models") for end in ("", "_2", "_3")),
        ("vae", "vae", base / "models"),
    ):
        place = root / kind / "mine" / f"{name}.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[name], place)
    names = {f"text_encoder_{i}": f"mine/text_encoder{end}.safetensors" for i, end in ENCODERS.items()}
    small = {"changes": CHANGES, "steps": 1}
    looks = {
        "whole": ("whole", {"submit": {**small, "model": "mine/checkpoint.safetensors (checkpoint)"}}),
        "split": (
            "split",
            {
                "submit": {
                    **small,
                    **names,
                    "model": "mine/transformer.safetensors",
                    "vae": "mine/vae.safetensors",
                }
            },
        ),
        "no model": ("none", {"submit": {**small, "model": "mine/vae.safetensors"}}),
    }
    (base / "models/diffusion_models/mine/vae.safetensors").write_bytes(files["vae"].read_bytes())
    given = {"submit": SUBMIT, "looks": looks}
    before = run_script(comfyui, CHILD, base, given)
    assert "holds no flow model that a worker can train" in before.data["no model"]["error"]
    assert spool_of(base).job("split")["recipe"]["model"]["family"] == "sd3"
    # What the worker's owner keeps elsewhere is found where he says so.
    (more / "vae").mkdir(parents=True)
    shutil.move(base / "models/vae/mine", more / "vae/mine")
    done = work(base, "--set", f"model.tokenizers={files['folder']}", "--models", str(more))
    assert done.stdout.count(": done, ") == 2, done.stdout
    for name in ("whole", "split"):
        assert steps_of(base, name) == [1]


@pytest.mark.long
@pytest.mark.parametrize("rounds", [2, 12] if ALL else [2])
def test_whoever_is_killed_the_training_ends_once(comfyui: Path, tmp_path: Path, rounds: int) -> None:
    chance, base = random.Random(rounds), make_base(tmp_path / "base")
    given = {"submit": {**SUBMIT, "steps": 6}, "looks": {"hand": ("hand", {})}}
    for _ in range(rounds):
        # A ComfyUI that takes longer is killed, whatever it is about.
        with suppress(AssertionError):
            run_script(comfyui, CHILD, base, given, timeout=chance.uniform(1, 30))
        if spool_of(base).ids():
            kill_worker(base, chance.randrange(6), chance.uniform(0, 20))
    run_script(comfyui, CHILD, base, given)
    assert work(base).returncode == 0
    done = run_script(comfyui, CHILD, base, given).data["hand"]
    assert done["state"] == "hand is done, step 6 of 6" and done["came"] == ALL_OUTPUTS
    assert steps_of(base, "hand") == [1, 2, 3, 4, 5, 6]
    names = sorted(path.name for path in spool_of(base).path.glob("*.json"))
    assert names == ["hand.end.json", "hand.job.json"]
    assert (base / "models/loras/g2rpo/hand.safetensors").is_file()
    end = spool_of(base).path / "hand.end.json"
    stamp = end.stat().st_mtime_ns
    assert work(base).returncode == 0 and end.stat().st_mtime_ns == stamp
    assert json.loads(end.read_text("utf-8"))["step"] == 6
