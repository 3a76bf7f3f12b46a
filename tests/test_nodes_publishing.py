"""Where Train LoRA and Save LoRA put their files in a real ComfyUI: one file per run, a picture beside it."""

import json
from io import BytesIO
from pathlib import Path

import pytest
from comfy_host import Answer, run_script
from PIL import Image
from test_nodes_training import TRAIN

from comfy_g2rpo import lora
from comfy_g2rpo.files.picture_files import texts
from comfy_g2rpo.lora.preview import MAX_BYTES

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("training in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_publishing.py")
CHANGES = "num_steps = 2\ngroup_size = 2\ngranularities = 1\nshift = 3\neval_noises = 1"
SHORT = {"steps": 1, "eval_every": 0, "slots": 8, "rank": 2, "prompts_per_step": 1, "changes": CHANGES}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, {"train": {**TRAIN, **SHORT}})


def both(name: str) -> list[str]:
    """Name a LoRA file and its picture."""
    return [f"{name}.preview.png", f"{name}.safetensors"]


def told(name: str) -> list[str]:
    """Return what the page is told of a file."""
    return [f"g2rpo/{name}.safetensors"]


def test_a_run_and_a_saved_lora_leave_one_file_and_one_picture_each(done: Answer) -> None:
    assert done.data["first"] == ["", told("pub"), told("kept")]
    assert done.data["files"] == [*both("kept"), *both("pub")]


def test_a_rerun_with_nothing_left_to_do_writes_nothing(done: Answer) -> None:
    assert done.data["again"] == [["", told("pub"), told("kept")], []]


def test_a_crash_between_file_and_picture_is_made_good(done: Answer) -> None:
    error, changed, hidden = done.data["crashed"]
    assert error[0] == "" and changed == [".others.safetensors.abcd1234", "pub.preview.png"]
    assert hidden == [".others.safetensors.abcd1234"]


def test_a_run_that_goes_on_replaces_its_file_and_a_saved_one_gets_a_number(done: Answer) -> None:
    error, changed, step = done.data["longer"]
    assert error == ["", told("pub"), told("kept_00002")] and step == "2"
    assert changed == sorted([*both("kept_00002"), *both("pub")])
    assert done.data["kept"] == ["1", "2"]


def test_core_shows_the_picture_and_what_the_file_says(done: Answer, base: Path) -> None:
    picture, notes, folders = done.data["asked"]
    assert picture[:2] == [200, "image/webp"]
    image = Image.open(BytesIO(bytes.fromhex(picture[2])))
    assert image.size == (320, 320)
    found = json.loads(bytes.fromhex(notes[2]))
    assert (found["modelspec.title"], found["ss_output_name"], found["g2rpo.run"]) == ("pub", "pub", "pub")
    assert found["modelspec.architecture"] == "stable-diffusion-v3-medium/lora"
    assert (found["modelspec.resolution"], found["ss_network_dim"], found["ss_steps"]) == ("64x64", "2", "2")
    assert found["modelspec.implementation"].endswith("ComfyUI") and found["modelspec.date"] >= "2025"
    # The page puts the whole path together from what core itself hands out.
    loras = next(each for each in json.loads(bytes.fromhex(folders[2])) if each["name"] == "loras")
    assert (Path(loras["folders"][0]) / "g2rpo/kept.safetensors").is_file()


def test_the_picture_is_small_and_ours(done: Answer, base: Path) -> None:
    for name in ("kept", "kept_00002", "lora_00002"):
        place = base / f"models/loras/g2rpo/{name}.preview.png"
        if name != "lora_00002":
            assert place.stat().st_size <= MAX_BYTES
        note = json.loads(texts(place)["g2rpo_preview"])
        assert note["step"] in (1, 2) and note["prompt"] and note["scores"].keys() == {"agreement"}


@pytest.mark.parametrize("name", ["lora", "word", "half", "gone"])
def test_a_strangers_file_of_the_runs_name_stays(done: Answer, name: str) -> None:
    short, long, changed, step = done.data["taken"][name]
    assert short == long == ["", told(f"{name}_00002"), None]
    assert changed == both(f"{name}_00002") and step == "2"


def test_another_run_of_the_same_name_gets_a_number(done: Answer) -> None:
    assert done.data["another"] == [["", told("pub_00002"), None], both("pub_00002")]


def test_a_file_of_an_earlier_version_stays(done: Answer) -> None:
    again, untouched, longer, changed = done.data["older"]
    assert again == ["", told("older_000001"), None] and untouched == []
    assert longer == ["", told("older"), None] and changed == both("older")


def test_a_file_that_cannot_be_replaced_does_not_cost_the_runs_lora(done: Answer) -> None:
    assert done.data["held"] == [["", told("held_00002"), None], both("held_00002")]


def test_a_picture_of_the_users_own_stays(done: Answer) -> None:
    assert done.data["mine"] == [["", told("mine"), None], "their own", True]


def test_a_run_without_held_out_prompts_has_no_picture(done: Answer) -> None:
    assert done.data["unseen"] == [["", told("unseen"), None], ["unseen.safetensors"]]
    assert done.data["hidden"] == []


def test_the_files_are_loras_as_before(done: Answer, base: Path) -> None:
    for place in (base / "models/loras/g2rpo").glob("*.safetensors"):
        if place.stem not in ("word", "half"):
            assert lora.read(place).pairs, place.name
