"""Train LoRA run again in a real ComfyUI: on a model that something else was done with, or that carries
LoRAs.
"""

from pathlib import Path

import pytest
from comfy_host import COMFYUIS, Answer, make_base, run_script
from test_nodes_training import TRAIN

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("training in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_continuing.py")
CHANGES = "num_steps = 2\ngroup_size = 2\ngranularities = 1\nshift = 3\neval_noises = 1"
SHORT = {"steps": 1, "eval_every": 0, "slots": 8, "rank": 2, "prompts_per_step": 1, "changes": CHANGES}
DATA = {"train": {**TRAIN, **SHORT}, "lora": "g2rpo/first_000001.safetensors"}
LONGER = [0, 1, 1, 2, 2]  # steps of the rows of a run that a second step continues


@pytest.fixture(scope="module", params=COMFYUIS)
def comfyui(request: pytest.FixtureRequest) -> Path:
    """Name a ComfyUI."""
    return request.param


@pytest.fixture(scope="module")
def base(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make its base directory."""
    return make_base(tmp_path_factory.mktemp(comfyui.name))


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
    for name, said in done.data["others"].items():
        assert "was made with model.patches = '" in said, name
    assert "not 'none'" in done.data["others"]["base"]


def test_runs_of_an_earlier_version_go_on_and_note_the_patches(done: Answer) -> None:
    assert len(done.data["old"]) == 6
    for name, (former, longer, steps) in done.data["old"].items():
        assert (longer, steps) == (former, LONGER), name
    assert "not 'none'" in done.data["then"]


def test_patches_are_the_same_after_a_restart(comfyui: Path, base: Path, done: Answer) -> None:
    again = run_script(comfyui, CHILD, base, {**DATA, "again": True})
    assert again.data == done.data["carried"]
