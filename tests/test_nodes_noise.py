"""Optimize Noise in a real ComfyUI: scores rise, the NOISE draws the image again, nothing else changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from comfy_host import Answer, run_script

pytestmark = [pytest.mark.comfyui, pytest.mark.long, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_noise.py")
WAYS = ["reward", "estimated", "auto estimates", "guided", "guided estimated", "image to image", "dark"]
REFUSED = {
    "steps 0": ({"steps": 0}, "steps"),
    "steps 501": ({"steps": 501}, "steps"),
    "a rate of 0": ({"learning_rate": 0.0}, "learning_rate"),
    "a far rate": ({"learning_rate": 11.0}, "learning_rate"),
    "no probes": ({"probes": 0}, "probes"),
    "65 probes": ({"probes": 65}, "probes"),
    "another gradient": ({"gradient": "luck"}, "gradient"),
    "less than nothing": ({"regularise": -1.0}, "regularise"),
}
TOLD = {
    "no slope": "vae: its decoder has no gradient; connect the model's ordinary VAE",
    "no network": "vae: its decoder has no gradient; connect the model's ordinary VAE",
    "long": "sigmas: it holds 17 steps, and the gradient goes back through every one; at most 16",
    "none": "gradient is reward, and jpeg has none; choose estimated, or auto",
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    changes = {name: changes for name, (changes, _) in REFUSED.items()}
    return run_script(comfyui, CHILD, base, {"prompt": "three green squares", "refused": changes})


def number(pattern: str, report: str) -> float:
    """Read a number of a report."""
    found = re.search(pattern, report)
    assert found, report
    return float(found[1])


@pytest.mark.parametrize("name", WAYS)
def test_an_ordinary_sampler_draws_the_image_again(name: str, done: Answer) -> None:
    made = done.data[name]
    assert made["apart"] <= 1e-4 and made["seed"] == 5
    assert 0.95 - 1e-4 <= made["length"] <= 1.05 + 1e-4


@pytest.mark.parametrize("name", ["reward", "guided", "image to image", "dark"])
def test_a_reward_with_a_gradient_rises(name: str, done: Answer) -> None:
    made = done.data[name]
    best, given = (number(rf"{word} (-?[\d.]+)", made["report"]) for word in ("best", "sampling:"))
    assert best > given + 0.005
    assert "the reward's gradient: " in made["report"] and made["moved"] > 0.01


@pytest.mark.parametrize("name", ["i2i", "guided"])
def test_the_gradient_is_that_of_finite_differences(name: str, done: Answer) -> None:
    """Through guidance, sampler, decoder and reward; images are judged in 8 bits."""
    own, measured = done.data["slopes"][name]
    assert own == pytest.approx(measured, rel=0.15) and own > 0.01


@pytest.mark.parametrize("name", ["estimated", "auto estimates", "guided estimated"])
def test_an_estimate_is_no_worse_than_ordinary_sampling(name: str, done: Answer) -> None:
    report = done.data[name]["report"]
    assert number(r"best (-?[\d.]+)", report) >= number(r"sampling: (-?[\d.]+)", report)
    assert "a gradient estimated from 2 probes: " in report


def test_the_same_run_gives_the_same(done: Answer) -> None:
    assert (done.tensors["reward image"] == done.tensors["again image"]).all()


@pytest.mark.parametrize(
    ("name", "price", "plain", "back"),
    [("reward 1", 1, 3, 2), ("estimated 1", 1, 3 + 2 * 3, 2), ("reward 2", 2, 3, 2)],
)
def test_it_spends_the_forwards_that_it_says(
    name: str, price: int, plain: int, back: int, done: Answer
) -> None:
    """Of 4 steps each: plain walks and walks back, and at the end the image once more."""
    made = done.data[f"counted {name}"]
    assert made["rows"] == [4 * price * (plain + 1), 4 * price * back]
    assert f": {4 * price * (plain + 1 + 2 * back)} forwards (a backward counts 2)" in made["report"]
    assert f"{plain} images judged" in made["report"]


def test_the_report_says_whether_the_noise_is_still_one(done: Answer) -> None:
    report = done.data["reward"]["report"]
    assert 2.77 < number(r"noise: ([\d.]+) unlikely", report) < 3.5
    assert 0.95 <= number(r"length ([\d.]+)", report) <= 1.05
    assert len(re.search("scores by step: (.*)", report)[1].split(", ")) == 7


def test_what_ends_it_early_is_said_and_the_best_so_far_returned(done: Answer) -> None:
    broken, abstains = (done.data[name]["report"] for name in ("broken", "abstains"))
    assert "ended early: the gradient was not finite any more" in broken
    assert "ended early: an image could not be judged" in abstains
    for report in (broken, abstains):
        assert number(r"best (-?[\d.]+)", report) > number(r"sampling: (-?[\d.]+)", report)


def test_notes_on_the_reward_are_there(done: Answer) -> None:
    assert "zscore compares images of a group" in done.data["two rewards"]["report"]
    assert "prompt is empty, and agreement reads it" in done.data["unread"]["report"]


def test_a_stopped_run_gives_the_best_so_far_and_goes_all_the_way_next_time(done: Answer) -> None:
    *stopped, whole = done.data["stopped"]
    assert all("stopped by you" in report for report in stopped)
    assert "stopped" not in whole and "13 images judged" in whole
    assert "interrupted" in done.data["nothing yet"].lower()


def test_a_noise_is_for_its_own_latent(done: Answer) -> None:
    assert "connect the same latent" in done.data["other size"]


def test_ordinary_sampling_stays_as_it_was(done: Answer) -> None:
    assert done.data["unchanged"]


@pytest.mark.parametrize("name", [*REFUSED, *TOLD])
def test_what_cannot_be_is_refused_by_its_name(name: str, done: Answer) -> None:
    told = TOLD.get(name) or REFUSED[name][1]
    assert told in done.data["refused"][name]
