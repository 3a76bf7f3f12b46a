"""Train LoRA with old forks in a real ComfyUI: lines in `changes`, runs that go on with what they kept."""

from pathlib import Path

import pytest
from comfy_host import Answer, newest_comfyui, run_script  # noqa: F401
from test_nodes_continuing import QUIET, SHORT
from test_nodes_training import TRAIN

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_replay.py")
CLIP = f"{QUIET}\nobjective = clip"
DATA = {
    "train": {**TRAIN, **SHORT},
    "ways": {
        "clip": f"{CLIP}\nreplay = 1",
        "drawn": f"{QUIET}\nobjective = vargrad\nvargrad_tau = 0.5\nreplay = 2\nreplay_by = draw",
    },
    "without": CLIP,
    "refused": {
        "on policy": f"{QUIET}\nreplay = 2",
        "too many": f"{CLIP}\nreplay = 2\nreplay_size = 100000",
        "too much": f"{CLIP}\nreplay = 17",
        "misspelt": f"{CLIP}\nreplay_sise = 7",
    },
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, DATA)


@pytest.mark.parametrize("way", DATA["ways"])
def test_pressed_three_times_a_run_is_the_one_of_a_single_press(way: str, done: Answer) -> None:
    pressed, equal = done.data["same"][way]
    assert pressed == [f"{way}-parts"] * 3 and equal
    assert any(name.startswith("replay.safetensors/") for name in done.data["files"][way])
    replayed = [rows for _, rows, _ in done.data["rows"][way]]
    assert replayed[0] == 0 and replayed[1] > 0 and replayed[2] > 0


def test_old_forks_may_be_turned_on_and_off_in_a_run_that_goes_on(done: Answer) -> None:
    *pressed, rows = done.data["turned on"]
    assert pressed == ["later"] * 3
    assert [step for step, *_ in rows] == [1, 2, 3, 4]
    # There is nothing to use again at first, and no trace of it at last.
    assert [replayed for _, replayed, _ in rows] == [None, 0, rows[2][1], None] and rows[2][1] > 0


def test_what_cannot_be_is_refused_with_the_remedy(done: Answer) -> None:
    refused = done.data["refused"]
    assert "replay is 2, but objective on_policy" in refused["on policy"]
    assert "choose objective: clip" in refused["on policy"]
    assert "replay_size is 100000: " in refused["too many"] and "set it to " in refused["too many"]
    assert "replay is 17; it must lie between 0 and 16" in refused["too much"]
    assert "did you mean 'replay_size'" in refused["misspelt"]
    assert not done.data["left"]
