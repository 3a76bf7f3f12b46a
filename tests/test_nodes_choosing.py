"""Train LoRA that drops branches and chooses prompts, in a real ComfyUI: by lines in `changes`."""

from pathlib import Path

import pytest
from comfy_host import Answer, newest_comfyui, run_script  # noqa: F401
from test_nodes_continuing import QUIET, SHORT
from test_nodes_training import TRAIN

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_choosing.py")
DATA = {
    "train": {**TRAIN, **SHORT, "width": 32, "height": 32},
    "ways": {
        "pruned": f"{QUIET}\nexpand = 2\nprune_at = 0.2, 0.6",
        "signal": f"{QUIET}\nprompt_choice = signal",
        "curriculum": f"{QUIET}\nprompt_choice = curriculum\ncandidates = 2\nglobal_advantage = 1",
    },
    "refused": {
        "expand": f"{QUIET}\nexpand = 0.5",
        "step_share": f"{QUIET}\nstep_share = 1, 2, 3, 4, 5, 6, 7",
        "prompt_choice": f"{QUIET}\nprompt_choice = sigal",
    },
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, DATA)


@pytest.mark.parametrize("way", DATA["ways"])
def test_pressed_twice_a_run_is_the_one_of_a_single_press(way: str, done: Answer) -> None:
    pressed, equal, remembers, learned = done.data[way]
    assert pressed == [f"{way}-whole", *[f"{way}-parts"] * 2] and equal and learned
    assert remembers == (way != "pruned")


@pytest.mark.parametrize("field", DATA["refused"])
def test_what_cannot_be_is_refused_by_the_fields_name(field: str, done: Answer) -> None:
    assert f"{field} " in done.data["refused"][field]
