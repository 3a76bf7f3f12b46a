"""The watch in whole runs on the bundled model: a planted reward is caught and kept out of the result, and
runs go on bit for bit.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from comfy_g2rpo import lora
from comfy_g2rpo.rewards import RewardError
from comfy_g2rpo.run import setup as run_setup
from comfy_g2rpo.run.evaluation import Evaluation
from comfy_g2rpo.run.folder import PREVIEW, RunFolder, read_state
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.reports.progress import GO_ON, Silent, outcome

pytestmark = pytest.mark.xdist_group("watch_run")  # one process makes what they share

ROOT = Path(__file__).parent.parent
VARYING = ("time/", "memory/")


def saturation(images, prompts):
    """Measure what one flat colour and no shapes maximise."""
    return (images.amax(-1) - images.amin(-1)).mean((1, 2))


def half_blind(images, prompts):
    """Refuse to judge about half of the pictures."""
    scores = saturation(images, prompts)
    return torch.where((scores * 1e4).floor() % 2 == 0, scores, torch.nan)


def config(place, reward="saturation", prompts=12, **sections):
    """Configure a run in which the planted reward is soon gamed."""
    held = (ROOT / "prompts/shapes_heldout.txt").read_text().splitlines()
    (place / "held.txt").write_text("\n".join(held[:prompts]))
    tree = {
        "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
        "method": {
            "name": "g2rpo",
            "num_steps": 4,
            "group_size": 6,
            "granularities": [1],
            "learning_rate": 4e-3,
        },
        "rewards": [{"name": reward, **({"path": f"{__file__}:{reward}"} if reward in globals() else {})}],
        "heldout_rewards": ["agreement"],
        "prompts": {"train": "prompts/shapes_train.txt", "heldout": str(place / "held.txt")},
        "train": {"steps": 18, "prompts_per_step": 1, "eval_every": 4, "checkpoint_every": 3, "slots": 64},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_dict(tree)


class Notes(Silent):
    """Keep what was said; press Ctrl-C when a step is shown."""

    def __init__(self, stop_at=-1):
        self.said, self.stop_at = [], stop_at

    def note(self, text):
        self.said.append(text)

    def step(self, metrics):
        if metrics["step"] == self.stop_at and "nfe" in metrics:
            os.kill(os.getpid(), signal.SIGINT)


def rows_of(folder):
    return [{k: v for k, v in row.items() if not k.startswith(VARYING)} for row in folder.metrics()]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Train on the planted reward under the watch."""
    place, notes = tmp_path_factory.mktemp("watched"), Notes()
    summary = training.train(config(place), place / "run", progress=notes)
    return RunFolder(place / "run"), summary, notes.said


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    """Train on it without."""
    place = tmp_path_factory.mktemp("unwatched")
    summary = training.train(config(place, train={"watch": "off"}), place / "run", progress=Silent())
    return RunFolder(place / "run"), summary


def test_a_gamed_reward_is_caught_and_the_run_stops(watched):
    folder, summary, said = watched
    assert summary["stopped_by"] == "watch" and summary["steps"] < 18 and summary["steps"] % 4 == 0
    assert re.search(
        r"^ALARM, step \d+: held-out agreement fell by .*: the model games its reward",
        "\n".join(said),
        re.MULTILINE,
    )
    assert said[-1].startswith(f"stopped by the watch at step {summary['steps']}; watch = warn goes on")
    looks = [row for row in folder.metrics() if "nfe" not in row]
    assert (
        [row.get("alarm/hacking") for row in looks][-2:] == [1, 2]
        and "alarm" in looks[-1]
        and "alarm" not in looks[-2]
    )
    assert summary["alarms"] == [{"step": summary["steps"], "text": looks[-1]["alarm"]}]


def test_the_best_checkpoint_by_held_out_rewards_is_kept_and_is_the_result(watched):
    folder, summary, _ = watched
    best, last = (
        Evaluation.read(folder, step).means()["agreement"]
        for step in (summary["best_step"], summary["steps"])
    )
    assert best > last and summary["heldout_after"]["agreement"] == best
    assert folder.outcome().name == f"{summary['best_step']:06d}" == summary["lora"].split("/")[1]
    assert folder.latest().name == f"{summary['steps']:06d}"
    assert lora.read(folder.path / summary["lora"]).metadata["g2rpo.step"] == str(summary["best_step"])


@pytest.mark.long
def test_without_the_watch_the_result_is_worse(watched, unwatched):
    _, with_watch, _ = watched
    folder, without = unwatched
    assert without["stopped_by"] == "steps" and without["steps"] == 18 and without["alarms"] == []
    assert without["heldout_after"]["agreement"] < with_watch["heldout_after"]["agreement"] - 0.1
    assert not any(
        key.startswith(("alarm", "diversity", "noise_gap", "kl/")) for row in folder.metrics() for key in row
    )


@pytest.mark.long
def test_watching_does_not_change_what_is_learned(watched, unwatched):
    step = watched[1]["steps"]
    rewards = [
        [row["reward/saturation/mean"] for row in run.metrics() if "nfe" in row][:step]
        for run in (watched[0], unwatched[0])
    ]
    assert rewards[0] == rewards[1]


def test_what_came_out_names_the_alarm_the_step_and_the_way_on(watched):
    summary = watched[1]
    alarm = f"alarm at step {summary['steps']}: {summary['alarms'][0]['text']}"
    assert alarm in outcome(summary)
    better = outcome(summary | {"best_step": 4, "lora_step": 4})
    assert (
        f"stopped by the watch; the LoRA is that of step 4, the best by held-out rewards; {GO_ON}" in better
    )
    untrained = outcome(summary | {"best_step": 0, "lora_step": 0})
    assert (
        f"stopped by the watch; no step beat the untrained model: its LoRA does nothing; {GO_ON}" in untrained
    )
    went_on = outcome(summary | {"stopped_by": "steps", "best_step": 4, "lora_step": 18, "sign": "it games"})
    assert went_on[-3:-1] == [alarm, "seen at the end: it games"]


def test_the_rows_say_how_far_the_model_has_moved(watched):
    looks = [row for row in watched[0].metrics() if "nfe" not in row]
    assert looks[0]["kl/heldout"] < 1e-6 < looks[-1]["kl/heldout"]
    assert all(
        {"diversity/pixels/set", "noise_gap/saturation", "noise_gap/agreement"} <= row.keys() for row in looks
    )
    assert all(
        0 < row["diversity/group"] < 1 and row["dropped_share"] == 0
        for row in watched[0].metrics()
        if "nfe" in row
    )


def test_a_run_that_the_watch_stopped_stays_stopped_until_it_is_told_to_go_on(watched, tmp_path):
    place, run = watched[0].path.parent, tmp_path / "run"
    shutil.copytree(watched[0].path, run)
    before, again = rows_of(RunFolder(run)), Notes()
    summary = training.train(config(place), run, resume=True, progress=again)
    assert (
        summary["stopped_by"] == "watch"
        and rows_of(RunFolder(run)) == before
        and "watch = warn" in again.said[-1]
    )
    further = summary["steps"] + 1
    summary = training.train(
        config(place, train={"watch": "warn", "steps": further}), run, resume=True, progress=Notes()
    )
    assert summary["stopped_by"] == "steps" and summary["steps"] == further == summary["lora_step"]
    assert summary["alarms"][-1]["step"] == further


@pytest.mark.long
def test_an_interrupted_run_is_stopped_at_the_same_step_with_the_same_numbers(watched, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        training.train(config(tmp_path), tmp_path / "run", progress=Notes(stop_at=5))
    summary = training.train(config(tmp_path), tmp_path / "run", resume=True, progress=Silent())
    folder = RunFolder(tmp_path / "run")
    assert summary["steps"] == watched[1]["steps"] and rows_of(folder) == rows_of(watched[0])
    one, two = (read_state(run.latest())[0] for run in (folder, watched[0]))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert folder.outcome().name == watched[0].outcome().name


@pytest.mark.long
def test_the_best_checkpoint_outlives_newer_ones(tmp_path):
    made = config(tmp_path, train={"watch": "warn", "keep_checkpoints": 1, "checkpoint_every": 1, "steps": 9})
    summary = training.train(made, tmp_path / "run", progress=Silent())
    saved = [int(place.name) for place in RunFolder(tmp_path / "run").saved()]
    assert summary["best_step"] < 9 and saved == [summary["best_step"], 8, 9]


def test_a_reward_that_drops_too_many_pictures_stops_the_run_which_can_go_on(tmp_path):
    made = {"reward": "half_blind", "prompts": 2, "train": {"steps": 2, "eval_every": 0}}
    words = (
        r"'half_blind' could not judge \d\d% of the \d+ pictures of step 1, and max_dropped allows 20%; .* "
        r"resume"
    )
    with pytest.raises(RewardError, match=words):
        training.train(config(tmp_path, **made), tmp_path / "run", progress=Silent())
    allowed = config(tmp_path, "half_blind", 2, train={**made["train"], "max_dropped": 1.0})
    assert training.train(allowed, tmp_path / "run", resume=True, progress=Silent())["steps"] == 2
    shares = [row["dropped_share"] for row in RunFolder(tmp_path / "run").metrics() if "nfe" in row]
    assert all(0.2 < share < 0.8 for share in shares)


def test_previews_are_drawn_and_scored_at_their_own_size(tmp_path):
    made = config(
        tmp_path, prompts=2, train={"steps": 1, "eval_every": 0, "preview_width": 96, "preview_height": 128}
    )
    training.train(made, tmp_path / "run", progress=Silent())
    folder = RunFolder(tmp_path / "run")
    assert folder.sampled_steps(PREVIEW) == folder.sampled_steps() == [0, 1]
    previews = folder.samples(1, PREVIEW)
    assert len(previews) == 2 and all(training_size(p.path) == (96, 128) for p in previews)
    assert training_size(folder.samples(1)[0].path) == (64, 64)
    assert {"preview/saturation/mean", "preview/agreement/mean"} <= folder.metrics()[0].keys()
    assert (folder.path / "preview.png").is_file()


def training_size(path):
    from PIL import Image

    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [(96, 0, "96×0; give both, or 0 for none"), (97, 96, "97×96, which the model cannot draw")],
)
def test_a_preview_size_that_cannot_be_drawn_is_refused_before_anything_runs(tmp_path, width, height, words):
    with pytest.raises(ValueError, match=words):
        training.train(
            config(tmp_path, train={"preview_width": width, "preview_height": height}),
            tmp_path / "run",
            progress=Silent(),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_diversity_shaping_raises_diversity(tmp_path):
    """The jpeg reward ends in blank pictures; beside it, shaping keeps them apart."""
    left = {}
    for weight in (0.0, 1.0):
        train = {"watch": "warn", "eval_noises": 3, "eval_every": 0, "steps": 14, "prompts_per_step": 2}
        method = {"diversity_weight": weight, "learning_rate": 2e-3}
        training.train(
            config(tmp_path, "jpeg", method=method, train=train), tmp_path / f"{weight}", progress=Silent()
        )
        first, last = (row for row in RunFolder(tmp_path / f"{weight}").metrics() if "nfe" not in row)
        left[weight] = [last[key] / first[key] for key in ("diversity/pixels/group", "diversity/pixels/set")]
        assert last["heldout/jpeg/mean"] > first["heldout/jpeg/mean"]
    assert all(shaped > 1.25 * plain for plain, shaped in zip(left[0.0], left[1.0], strict=True)), left


def test_shaping_needs_an_embedding_where_it_is_asked_for_one(tmp_path):
    setup = training.prepare(
        config(tmp_path, method={"diversity_weight": 1.0, "diversity_by": "embed"}), Accelerator(cpu=True)
    )
    with pytest.raises(ValueError, match="diversity_by is embed"):
        run_setup.make_learner(setup)


def test_a_run_folder_holds_the_evaluations_whole(watched):
    scores = json.loads((watched[0].path / "images/000000/scores.json").read_text())
    assert scores.keys() == {"prompts", "scores", "diversity", "noise_gap", "kl", "preview"}
