"""Training in a real ComfyUI: one block, or the graph as the loop.

Stopped, killed, continued; and what it leaves for core's loaders.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from comfy_host import EVERY, Answer, make_base, run_script, server
from program import leave
from safetensors.torch import load_file

from comfy_g2rpo import lora
from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import run as headless
from g2rpo_trainer.config.file_checks import read_prompts
from g2rpo_trainer.config.reading import Config, from_dict, make_recipe
from g2rpo_trainer.reports.progress import Silent

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("training in comfyui")]

ROOT = Path(__file__).parent.parent

PROMPTS = ["a red circle", "two blue squares", "a green triangle above a red square", "three yellow circles"]
HELDOUT = ["a yellow circle and a blue square", "two red triangles"]
CHANGES = (
    "num_steps = 4\ngroup_size = 4\ngranularities = 1, 2\nshift = 3\ncheckpoint_every = 1\neval_noises = "
)
TRAIN = {
    "recipe": "g2rpo",
    "steps": 4,
    "prompts": "\n".join(PROMPTS),
    "heldout_prompts": "\n".join(HELDOUT),
    "negative": "",
    "guidance": 1.0,
    "width": 64,
    "height": 64,
    "learning_rate": 1e-3,
    "rank": 4,
    "alpha": 8.0,
    "targets": "attention",
    "prompts_per_step": 2,
    "slots": 16,
    "eval_every": 2,
    "seed": 0,
    "run": "",
    "changes": f"{CHANGES}1",
}
STOPS = [1, 14, 19, 34, 46]  # looks at the stop button; the 19th and 46th are in updates
THINGS = [
    f"a {colour} {shape}"
    for colour in ("red", "green", "blue", "yellow", "purple")
    for shape in ("circle", "square", "triangle")
]
GAMED = {
    "heldout_prompts": "\n".join(thing for thing in THINGS if thing not in PROMPTS),
    "changes": f"{CHANGES}2\npatience = 1",
}
LOADERS = {
    "1": {"class_type": "G2RPO_TinyDemoLoader", "inputs": {}},
    "2": {"class_type": "G2RPO_LoadReward", "inputs": {"reward": "agreement"}},
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    # Only newer cores know the widget.
    bypass = {} if "0.3." in (comfyui / "comfyui_version.py").read_text() else {"bypass": False}
    data = {"train": TRAIN, "stops": STOPS, "bypass": bypass, "gamed": GAMED}
    data |= {"root": str(ROOT), "python": sys.executable}
    return run_script(comfyui, Path(__file__).with_name("comfy_child_training.py"), base, data)


def test_a_run_ends_with_model_lora_loss_and_curve(done: Answer) -> None:
    assert done.data["whole"] == [True, "", {}]
    assert done.data["run"] == "whole" and done.tensors["curve"].shape[-1] == 3
    assert len(done.data["losses"]) == 4 and all(-1 <= loss <= 0 for loss in done.data["losses"])
    assert [row["step"] for row in done.data["rows"]] == [0, 1, 2, 2, 3, 4, 4]


def test_the_monitor_waits_for_the_first_run(done: Answer) -> None:
    assert done.data["unborn"] == [True, "There is no run yet; train one with Train LoRA on a Reward."]


def test_the_wires_and_every_saved_file_draw_the_trained_picture(done: Answer) -> None:
    assert set(done.data["loras"]) == {
        "g2rpo/whole.safetensors",
        "g2rpo/saved.safetensors",
        "g2rpo/split.safetensors",
    }
    assert done.data["patched"][0] == done.data["patched"][1] > 0
    for name in done.data["loras"]:
        assert (done.tensors[f"image {name}"] - done.tensors["tuned"]).abs().max() <= 1e-5, name


def test_files_say_where_they_come_from(done: Answer, base: Path) -> None:
    # The run went on after that: its file is of the step that it has now.
    for name, step in {"whole": "5", "saved": "4"}.items():
        file = lora.read(base / f"models/loras/g2rpo/{name}.safetensors")
        assert (
            file.style == "native"
            and file.metadata["g2rpo.recipe"] == "g2rpo"
            and file.metadata["g2rpo.step"] == step
        )
        assert file.metadata["g2rpo.rewards"] == "1 agreement"
    assert lora.read(base / "models/loras/g2rpo/split.safetensors").style == "diffusers"


def test_events_are_few_and_tell_the_end(done: Answer) -> None:
    events = done.data["events"]
    assert (
        events[-1]["phase"] == "done"
        and events[-1]["step"] == events[-1]["total"] == 4
        and events[-1]["run"] == "whole"
    )
    assert {event["phase"] for event in events} <= {"rollout", "update", "evaluate", "done", "stopped"}
    assert all(event["node"] == "3" for event in events)


@pytest.mark.parametrize("call", STOPS)
def test_stopped_anywhere_and_run_again_is_as_if_never_stopped(done: Answer, call: int) -> None:
    stop = done.data["stops"][str(call)]
    assert "nterrupt" in stop["stopped"]
    assert stop == {
        "stopped": stop["stopped"],
        "phase": stop["phase"],
        "picture": True,
        "again": [True, ""],
        "same": True,
    }


def test_the_stops_were_in_every_phase(done: Answer) -> None:
    assert {stop["phase"] for stop in done.data["stops"].values()} == {"evaluate", "rollout", "update"}


def test_a_gamed_reward_stops_the_run_and_the_best_lora_comes_out(done: Answer) -> None:
    ok, error, summary, unchanged = done.data["gamed"]
    assert ok, error
    assert (summary["stopped_by"], summary["steps"], summary["best_step"]) == ("watch", 4, 0)
    assert "held-out agreement fell" in summary["alarms"][0]["text"]
    # The untrained model is the best: its LoRA changes nothing.
    assert unchanged and done.data["gamed loras"] == ["g2rpo/gamed.safetensors"]


def test_a_run_that_the_watch_stopped_is_announced_as_stopped(done: Answer) -> None:
    ok, texts, same = done.data["gamed again"]
    assert ok and same
    words = "nothing left to do: the watch stopped the run at step 4; watch = warn in changes goes on"
    assert texts[0] == words and not any("steps cost" in text for text in texts)


def test_more_steps_continue_a_run_and_other_settings_are_refused(done: Answer) -> None:
    assert done.data["longer"] == [True, "", 5]
    assert "run: whole was made with other settings (rank: 4 → 2)" in done.data["other"]
    first, again, other = done.data["names"]
    assert first == again != other


def test_a_graph_leaves_a_run_that_another_process_writes_alone(done: Answer, base: Path) -> None:
    for named, error, untouched in done.data["held"]:
        assert named and ": run: " in error and " is being written by" in error and untouched
        assert str(base) not in error
    assert done.data["after"]


def test_command_lines_leave_a_run_that_a_graph_writes_alone(done: Answer) -> None:
    ok, error, others, same = done.data["met"]
    assert ok and same, error
    assert len(others) == 2
    for code, lines in others:
        assert code == 2 and "is being written by process" in lines[0]


def test_every_run_of_the_loop_graph_is_one_update_and_no_wire_changes(done: Answer) -> None:
    steps = [(old, new) for _, _, old, new, _, _ in done.data["loop"]]
    assert steps == [(0, 1), (1, 2), (2, 3)] and all(ok for ok, *_ in done.data["loop"])
    for (_, _, _, _, _, new), (_, _, _, _, old, _) in zip(
        done.data["loop"], done.data["loop"][1:], strict=False
    ):
        assert new == old
    assert len({row[4] for row in done.data["loop"]}) == 3
    assert done.data["loop rows"] == [1, 2, 3]
    assert done.data["monitor"][0] and "reward/agreement/mean" in done.data["monitor"][2]


def command_line_recipe(place: Path) -> Config:
    """Return the recipe of the graph's training, as people write one."""
    (place / "train.txt").write_text("\n".join(PROMPTS))
    (place / "heldout.txt").write_text("\n".join(HELDOUT))
    tree = {
        "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
        "lora": {"rank": 4, "alpha": 8},
        "method": {
            "name": "g2rpo",
            "num_steps": 4,
            "group_size": 4,
            "granularities": [1, 2],
            "learning_rate": 1e-3,
        },
        "rewards": [{"name": "agreement"}],
        "prompts": {"train": str(place / "train.txt"), "heldout": str(place / "heldout.txt")},
        "train": {"steps": 1, "prompts_per_step": 2, "eval_noises": 1},
    }
    return from_dict(tree)


def test_the_graph_itself_is_that_recipe_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wires = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "reward": ["2", 0]}
    graph = {**LOADERS, "3": {"class_type": "G2RPO_TrainLoRA", "inputs": {**wires, **TRAIN}}}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    code, shown, errors = leave(capsys, "run", tmp_path / "graph.json", "--print", "--set", "train.steps=1")
    assert (code, errors) == (0, "")
    made, written = from_dict(yaml.safe_load(shown)), command_line_recipe(tmp_path)
    assert make_recipe(made) == make_recipe(written)
    assert (made.model, made.lora, made.rewards) == (written.model, written.lora, written.rewards)
    assert read_prompts(made) == read_prompts(written)
    for name in ("steps", "prompts_per_step", "seed", "eval_noises"):
        assert getattr(made.train, name) == getattr(written.train, name), name


def test_graph_and_command_line_make_the_same_steps(done: Answer, tmp_path: Path) -> None:
    """Same prompts, seeds and model: the same pictures, scores and gradients, step by step, to the
    rounding of batches.
    """
    headless.train(command_line_recipe(tmp_path), tmp_path / "run", progress=Silent())
    rows = RunFolder.open(tmp_path / "run").metrics()
    for name in ("heldout/agreement/mean",):
        assert done.data["rows"][0][name] == pytest.approx(rows[0][name], abs=1e-3)
    for name in ("reward/agreement/mean", "reward/agreement/std", "advantage/abs_mean"):
        assert done.data["rows"][1][name] == pytest.approx(rows[1][name], abs=2e-3)


@pytest.mark.skipif(not EVERY, reason="two more starts of ComfyUI: with G2RPO_EVERY_COMFYUI=1")
def test_a_killed_server_goes_on_from_the_last_finished_step(
    comfyui: Path, done: Answer, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_base(tmp_path_factory.mktemp("killed"))
    inputs = {
        "model": ["1", 0],
        "clip": ["1", 1],
        "vae": ["1", 2],
        "reward": ["2", 0],
        **TRAIN,
        "run": "killed",
    }
    graph = {**LOADERS, "3": {"class_type": "G2RPO_TrainLoRA", "inputs": inputs}}
    run = other / "output/g2rpo/killed"
    with server(comfyui, other) as first:
        first.post_prompt(graph)
        end = time.monotonic() + 120
        while not (run / "checkpoints/000002/state.json").exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
    assert (run / "checkpoints").is_dir() and not (run / "summary.json").exists()
    with server(comfyui, other) as second:
        entry = second.wait(second.post_prompt(graph))
        assert entry["status"]["status_str"] == "success", entry["status"]
    one = load_file(run / "checkpoints/000004/lora.safetensors")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    kept = {k: v for k, v in rows[-2].items() if not k.startswith(("time/", "memory/"))}
    assert kept == done.data["rows"][-2]
    uninterrupted = load_file(base / "output/g2rpo/stop1/checkpoints/000004/lora.safetensors")
    assert one.keys() == uninterrupted.keys() and all(
        torch.equal(one[key], uninterrupted[key]) for key in one
    )
