"""Search Sampler in a real ComfyUI: it spends what it says, finds what the command line finds, and changes
nothing else.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from comfy_host import Answer, run_script

from comfy_g2rpo.sampling.prompt_search import Searcher
from comfy_g2rpo.sampling.search_methods import METHODS
from comfy_g2rpo.sampling.search_settings import SearchSettings
from comfy_g2rpo.schedule import shifted_sigmas
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.run import prepare

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("methods in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_search.py")
WAYS = {name: {"method": name.replace("_", " ")} for name in METHODS}
WAYS |= {"four": {"method": "coarse first", "keep": 4, "slots": 3}}
REFUSED = {
    "budget below an image": ({"budget": 7}, "budget is 7; one image takes 8 forwards (8 steps)"),
    "budget 0": ({"budget": 0}, "budget"),
    "an unknown method": ({"method": "luck"}, "method"),
    "no steps": ({"steps": ""}, "steps: it names 0 numbers"),
    "steps in words": ({"judge_at": "all"}, "judge_at: 'all' is not understood"),
    "a far eta": ({"eta": 1e9}, "eta"),
    "a gap without guidance": ({"score": "guidance_gap"}, "score is guidance_gap, which needs guidance"),
    "more than anyone means": ({"budget": 1_000_000, "slots": 0}, "slots"),
}
PROMPT = "three green squares"
DATA = {
    "prompt": PROMPT,
    "ways": WAYS,
    "sigmas": shifted_sigmas(8).tolist(),
    "refused": {name: changes for name, (changes, _) in REFUSED.items()},
}


@pytest.fixture(scope="module")
def done(comfyui: Path, base: Path) -> Answer:
    """Run the child script once."""
    return run_script(comfyui, CHILD, base, DATA)


@pytest.fixture(scope="module")
def searcher() -> Searcher:
    """Load what the command line searches with."""
    return Searcher(prepare(load("demo", []), Accelerator(cpu=True)))


@pytest.mark.parametrize("name", METHODS)
def test_it_finds_what_the_command_line_finds(name: str, done: Answer, searcher: Searcher) -> None:
    with torch.no_grad():
        found = searcher.find(name, SearchSettings(), 64, PROMPT, 5)
        latent = found.found[0].latent[None]
        image = searcher.images(latent)
    made = done.data[name]
    assert made["scores"] == pytest.approx([found.found[0].score], abs=1e-3)
    assert made["report"].splitlines()[0].endswith(found.found[0].name)
    # SD3's latent format: what goes over the wire is what the VAE decodes.
    assert (done.tensors[f"{name} latents"] - (latent / 1.5305 + 0.0609)).abs().max() < 1e-4
    assert (done.tensors[f"{name} images"] - image).abs().max() < 0.5 / 255 + 1e-3


@pytest.mark.parametrize("name", [*METHODS, "cfg 1", "cfg 2"])
def test_it_spends_the_forwards_that_it_says(name: str, done: Answer) -> None:
    said = re.search(r"(\d+) of 64 forwards, (\d+) images judged", done.data[name]["report"])
    assert said and int(said[1]) == done.data[name]["rows"] and 64 - 16 < int(said[1]) <= 64


def test_looks_by_the_gap_of_guidance_are_not_judged(done: Answer) -> None:
    """By the command line's model, too, they find the same."""
    made = done.data["gap"]
    assert "128 of 128 forwards, 3 images judged" in made["report"] and made["rows"] == 128
    guided = Searcher(prepare(load("demo", ["model.guidance=2"]), Accelerator(cpu=True)))
    with torch.no_grad():
        found = guided.find("coarse_first", SearchSettings(score="guidance_gap"), 128, PROMPT, 5)
    assert made["report"].splitlines()[0].endswith(found.found[0].name)
    assert (done.tensors["gap latents"] - (found.found[0].latent / 1.5305 + 0.0609)).abs().max() < 1e-4


def test_the_best_come_first(done: Answer) -> None:
    """Of four that were asked for, those that were finished: rough looks are no images to return."""
    made = done.data["four"]
    assert "3 images, not 4: no more were finished" in made["report"]
    assert done.tensors["four images"].shape == (3, 64, 64, 3)
    assert done.tensors["four latents"].shape == (3, 16, 8, 8)
    assert made["scores"] == sorted(made["scores"], reverse=True)
    assert made["scores"][0] == pytest.approx(done.data["coarse_first"]["scores"][0], abs=1e-3)


def test_an_image_to_change_is_changed_as_core_changes_it(done: Answer) -> None:
    assert done.data["image to image"] < 1e-4


def test_a_lora_on_the_wire_counts(done: Answer) -> None:
    assert done.data["lora"] < 1e-4 and done.data["what a lora changes"] > 0.01


def test_of_a_batch_each_image_is_searched_for(done: Answer) -> None:
    made = done.data["batch"]
    assert made["rows"] == 4 * 16 and len(made["scores"]) == 8
    pairs = list(zip(made["scores"][::2], made["scores"][1::2], strict=True))
    assert all(best >= other for best, other in pairs)
    reports = made["report"].split("\n\n")
    assert [text.splitlines()[0] for text in reports] == [f"image {i} of 4" for i in range(1, 5)]
    for i, report in enumerate(reports):
        given = re.search(r"ordinary sampling: ([\d.]+)", report)
        assert given and "16 of 16 forwards, 2 images judged" in report
        # Each row's own noise was looked at, and is one of the two.
        plain, two = done.tensors["batch plain"][i], done.tensors["batch latents"][2 * i : 2 * i + 2]
        assert (two - plain).abs().flatten(1).amax(1).min() < 1e-4


def test_a_stopped_search_gives_the_best_so_far_and_goes_all_the_way_next_time(done: Answer) -> None:
    *stopped, whole = done.data["stopped"]
    assert len(stopped) == 2
    for report in stopped:
        assert "stopped by you" in report and "of 640 forwards" in report and "640 of" not in report
    assert "stopped" not in whole and "640 of 640 forwards, 80 images" in whole


def test_a_search_that_is_stopped_before_its_first_image_ends(done: Answer) -> None:
    assert "interrupted" in done.data["nothing yet"].lower()


def test_the_report_says_what_was_not_judged_and_what_a_mix_becomes(done: Answer) -> None:
    assert "zscore compares images of a group; a search takes the sum of the scores" in done.data["mixed"]
    assert "zscore" not in done.data["coarse_first"]["report"]
    assert "prompt is empty, and agreement reads it" in done.data["unread"]


def test_ordinary_sampling_stays_as_it_was(done: Answer) -> None:
    assert done.data["unchanged"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_its_name(name: str, done: Answer) -> None:
    assert REFUSED[name][1] in done.data["refused"][name]
