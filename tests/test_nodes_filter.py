"""Early Filter Sampler in a real ComfyUI: it keeps the rows whose gap is largest, as Euler makes them, for
the forwards that it says.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_host import Answer, run_script
from torch import Tensor

from comfy_g2rpo.schedule import shifted_sigmas

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_filter.py")
PAIRS = ("plain", "cfg 1", "rescaled", "projected", "marked", "regional", "a prompt per row", "dual")
PAIRS += ("image to image", "inpaint", "one mask")
FACTORS = {"velocity": lambda s: 1 / s, "noise": lambda s: (1 - s) / s, "clean": lambda s: 1.0}
REFUSED = {
    "no negative": "connect CFGGuider",
    "momentum": "momentum of APG",
    "momentum, one": "momentum of APG",
    "no flow": "is not a flow model",
    "rising": "sigmas",
    "keep 0": "keep",
    "after 2": "after",
    "a measure": "measure",
    "an image per row": "ControlNet has 2 images",
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    data = {"prompt": "three green squares", "sigmas": shifted_sigmas(8).tolist()}
    return run_script(comfyui, CHILD, base, data)


def expected(done: Answer, name: str, steps: int, keep: int, measure: str = "velocity") -> list[int]:
    """Return the rows with the largest gaps, by what a patch saw of the predictions of a run by Euler."""
    seen = torch.tensor(done.data[name]["squares"][:steps], dtype=torch.float64)
    factors = torch.tensor([FACTORS[measure](sigma) for sigma in seen[:, 0].tolist()])
    return (factors[:, None] ** 2 * seen[:, 1:]).sum(0).argsort(descending=True)[:keep].tolist()


def where(done: Answer, name: str, among: str) -> list[int]:
    """Return which row of another run every row is; fail where it is none of them."""
    rows, all_rows = done.tensors[f"{name} samples"], done.tensors[f"{among} samples"]
    apart: Tensor = (rows[:, None] - all_rows[None]).abs().flatten(2).amax(2)
    assert (apart.amin(1) < 1e-4).all(), apart
    return apart.argmin(1).tolist()


@pytest.mark.parametrize("measure", FACTORS)
def test_the_rows_with_the_largest_gaps_are_kept_best_first(measure: str, done: Answer) -> None:
    name = "plain" if measure == "velocity" else measure
    count = len(done.tensors[f"{name} samples"])
    assert where(done, name, "plain, all") == expected(done, "plain, all", 3, count, measure)


@pytest.mark.parametrize("name", PAIRS)
def test_kept_rows_are_those_that_euler_makes(name: str, done: Answer) -> None:
    kept = where(done, name, f"{name}, all")
    assert len(set(kept)) == len(kept) == (4 if name == "marked" else 2)


def test_the_rows_of_a_batch_with_prompts_of_their_own_keep_them(done: Answer) -> None:
    assert where(done, "a prompt per row", "a prompt per row, all") == expected(
        done, "a prompt per row, all", 3, 2
    )


@pytest.mark.parametrize("name", ["keep all", "keep more"])
def test_nothing_changes_where_all_are_kept(name: str, done: Answer) -> None:
    for part in ("samples", "denoised"):
        assert torch.equal(done.tensors[f"{name} {part}"], done.tensors[f"plain, all {part}"])
    assert "all are kept" in done.data[name]["said"][0]
    assert done.data[name]["rows"] == done.data["plain, all"]["rows"]


def test_one_image_is_eulers(done: Answer) -> None:
    assert torch.equal(done.tensors["one of one samples"], done.tensors["one, all samples"])


def test_the_order_of_rows_does_not_matter(done: Answer) -> None:
    found, turned = (done.tensors[f"{name} samples"] for name in ("plain", "turned"))
    assert (found - turned).abs().max() < 1e-4


def test_forwards_are_counted_exactly(done: Answer) -> None:
    for name, rows in {
        "plain": 2 * (6 * 3 + 2 * 5),
        "noise": 2 * (6 * 3 + 3 * 5),
        "one step": 2 * (6 * 1 + 2 * 7),
        "to the end": 2 * 6 * 8,
        "cfg 1": 2 * 6 * 3 + 2 * 5,
        "dual": 3 * (6 * 3 + 2 * 5),
        "perp": 3 * (6 * 3 + 2 * 5),
    }.items():
        assert done.data[name]["rows"] == rows, name
        assert f"{rows} forwards" in done.data[name]["said"][0], name


def test_the_note_says_which_rows_and_what_guidance_1_adds(done: Answer) -> None:
    first, second = expected(done, "plain, all", 3, 2)
    said = done.data["plain"]["said"][0]
    assert "2 of 6 kept after 3 of 8 steps" in said
    assert f"gaps: {first} (" in said and f"), {second} (" in said
    assert "guidance is 1" not in said
    assert "guidance is 1: the first 3 steps take the negative prompt, too" in done.data["cfg 1"]["said"][0]


@pytest.mark.parametrize("name", ["rescaled", "projected"])
def test_patches_of_guidance_do_not_change_the_choice(name: str, done: Answer) -> None:
    assert where(done, name, f"{name}, all") == where(done, "one step", "plain, all")


def test_rows_that_the_prompt_does_not_move_are_dropped_first(done: Answer) -> None:
    assert not {0, 3} & set(where(done, "marked", "marked, all"))


@pytest.mark.parametrize("name", ["plain", "to the end", "inpaint"])
def test_the_denoised_output_has_the_same_rows(name: str, done: Answer) -> None:
    samples, denoised = (done.tensors[f"{name} {part}"] for part in ("samples", "denoised"))
    assert samples.shape == (2, 16, 8, 8)
    # The last step ends at the clean latent.
    assert (samples - denoised).abs().max() < 1e-4


def test_a_guider_without_negative_serves_where_nothing_is_dropped(done: Answer) -> None:
    assert done.data["basic, few"]["rows"] == 6 * 8


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused(name: str, done: Answer) -> None:
    assert REFUSED[name] in done.data["refused"][name]


def test_sampling_stays_as_it_was(done: Answer) -> None:
    assert torch.equal(done.tensors["plain, all samples"], done.tensors["plain again, all samples"])
    assert "disable_cfg1_optimization" not in done.data["options"]
    assert "sampler_pre_cfg_function" not in done.data["options"]
