"""Train LoRA run again in a real ComfyUI: on a model that something else was done with, or that carries
LoRAs.
"""

from pathlib import Path

import pytest
from comfy_host import Answer, run_script
from test_nodes_training import TRAIN

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("training in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_continuing.py")
CHANGES = "num_steps = 2\ngroup_size = 2\ngranularities = 1\nshift = 3\neval_noises = 1"
QUIET = f"{CHANGES}\nwatch = off"
"""For runs whose evaluations are not in question."""
SHORT = {"steps": 1, "eval_every": 0, "slots": 8, "rank": 2, "prompts_per_step": 1, "changes": CHANGES}
DATA = {"train": {**TRAIN, **SHORT}, "lora": "g2rpo/first.safetensors"}
SMALL = {"width": 32, "height": 32}
# Where memory runs out (a forward's number), and how the run is run again.
DATA["smaller"] = {
    "at-once": [1, SMALL],
    "rolling-out": [4, {**SMALL, "rank": 1, "learning_rate": 1e-4}],
    "updating": [9, {"width": 32}],
    "same": [4, {}],
    "stepped": [12, {**SMALL, "if_settings_changed": "ask"}],
    "voted": [4, {**SMALL, "if_settings_changed": "ask"}],
}
FALLING = {"changes": f"{CHANGES}\nlr_schedule = cosine"}
DATA["again and again"] = {
    "falling from its start": {"steps": 3, **FALLING},
    "falling finished": {"steps": 3, **FALLING},
    "falling shorter": {"steps": 1, **FALLING},
    "falling longer": {"steps": 5, **FALLING},
    "timed from its start": {"steps": 2, "changes": f"{CHANGES}\nminutes = 0.0001"},
    "timed finished": {"steps": 2, "changes": f"{CHANGES}\nminutes = 0.0001"},
}
LONGER = [0, 1, 1, 2, 2]  # steps of the rows of a run that a second step continues


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, DATA)


def test_a_run_goes_on_whatever_was_done_with_its_model_in_between(done: Answer) -> None:
    assert done.data["first"] == "first" and len(done.data["between"]) == 12
    for name, (before, longer, steps) in done.data["between"].items():
        assert (longer, steps) == (before, LONGER), name


def test_a_model_is_known_however_another_is_loaded_over_it(done: Answer) -> None:
    prints, (whole, in_place, partly) = done.data["known"]
    assert whole == in_place > partly > 0
    assert len(prints) == 7 and len(set(prints)) == 1


def test_patches_of_a_model_belong_to_what_a_run_trains_on(done: Answer) -> None:
    *named, blank = done.data["carried"]
    assert named == ["lora", "merge"] and blank != done.data["plain"]
    without, other = "without the LoRAs or merges that the run's has", "that the run's has otherwise"
    for name, what in (("base", without), ("weaker", other), ("merge", other)):
        said = done.data["others"][name]
        assert "run: lora was made with other settings (model: with" in said and what in said, name
        assert said.endswith("give another name, or put back model"), name


def test_runs_of_an_earlier_version_go_on_and_note_the_patches(done: Answer) -> None:
    assert len(done.data["old"]) == 6
    for name, (former, longer, steps) in done.data["old"].items():
        assert (longer, steps) == (former, LONGER), name
    assert "model: without the LoRAs or merges that the run's has" in done.data["then"]


def test_patches_are_the_same_after_a_restart(comfyui: Path, base: Path, done: Answer) -> None:
    again = run_script(comfyui, CHILD, base, {**DATA, "again": True})
    assert again.data == done.data["carried"]


def test_a_run_without_a_step_is_begun_anew_by_other_settings(done: Answer) -> None:
    large = done.data["large"]
    for name, size in (("at-once", 32), ("rolling-out", 32), ("updating", 32), ("same", 64)):
        first, held, again, steps, width = large[name]
        assert "no memory left" in first and not any(held), name
        assert (again, steps, width) == (name, [0, 1, 1], size), name
    assert (large["at-once"][1], large["updating"][1]) == ([], [0])
    assert large["loop"] == ["", "", 0]


@pytest.mark.parametrize("name", ["stepped", "voted"])
def test_what_was_trained_or_voted_on_is_never_replaced(done: Answer, name: str) -> None:
    first, held, again, steps, width = done.data["large"][name]
    assert "no memory left" in first
    assert f"run: {name} was made with other settings (width: 64 → 32; height: 64 → 32)" in again
    assert (steps, width, any(steps)) == (held, 64, name == "stepped")


def test_only_what_is_left_is_announced(done: Answer) -> None:
    said = {name: texts for name, (_, texts, _) in done.data["announced"].items()}
    for name, what in {
        "falling from its start": "3 steps cost 18 forwards and 6 pictures of 64×64",
        "falling finished": "nothing left to do: 3 of 3 steps are made; raise steps to make the run longer",
        "falling shorter": "nothing left to do: 3 steps are made, and steps is 1; a longer run needs more",
        "falling longer": "3 of 5 steps are made; 2 more steps cost 12 forwards and 4 pictures of 64×64",
        "timed from its start": "2 steps cost 12 forwards and 4 pictures of 64×64",
    }.items():
        assert said[name][-1] == what, name
    assert "and its time is used" in said["timed finished"][-1]
    assert [step for _, _, step in done.data["announced"].values()] == [3, 3, 3, 5, 1, 1]
    assert len(said["falling finished"]) == len(said["falling shorter"]) == 1
