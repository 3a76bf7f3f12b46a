"""The scoring blocks and Advantages inside the real ComfyUI: right numbers, per image, and a named error
for whatever is wrong.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from comfy_host import COMFYUIS, Answer, make_base, run_script

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.plan import singular
from comfy_g2rpo.rewards import load, score_all
from comfy_g2rpo.rewards.mixing import ranking_scores
from comfy_g2rpo.run.diversity import pixel_features, shaping
from comfy_g2rpo.run.scorer import to_8_bit

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_scoring.py")
PROMPT, SCENE = "two red circles", "a red square"
LINES = "a red square\n\nno scene at all\na blue square"
THRESHOLD = 60.0
WEIGHTS = (1.0, -0.01)
CLAMP = 2.0
BEST_ORDER = [3, 1, 4, 0, 2, 5]
COMPARED = "a red circle\na blue square\ntwo green triangles"
# Prompts, noises and how many pictures there is room for; of how many prompts and noises they are kept.
KEPT = {
    (3, 4, 1000): (3, 4),
    (10, 4, 40): (10, 4),
    (10, 4, 20): (10, 2),
    (100, 64, 8): (8, 1),
    (5, 2, 0): (1, 1),
}

# The widget that each hostile input must be blamed on.
HOSTILE = {
    "images of no batch": "images",
    "images without pixels": "images",
    "images of five channels": "images",
    "images of three axes": "images",
    "images of whole numbers": "images",
    "images of text": "images",
    "images from -1": "images",
    "images to 255": "images",
    "images without end": "images",
    "images of a huge size": "images",
    "prompt too long": "prompt has 100000",
    "prompt with NUL": "prompt holds U+0000",
    "prompt with half a character": "prompt holds U+D800",
    "prompt line too long": "prompt, line 2",
    "prompt list of another length": "prompt",
    "prompt of a number": "prompt",
    "k of none": "k is 0",
    "k of too many": "k is 1000000000",
    "scores of another length": "scores",
    "scores of nan": "scores",
    "scores of infinity": "scores",
    "scores of text": "scores",
    "threshold above all": "threshold",
    "threshold of nan": "threshold",
    "how of another word": "how",
    "temperature of nan": "temperature",
    "temperature of 0": "temperature",
    "seed of less than none": "seed",
    "rollout without latents": "rollout",
    "rollout of two prompts": "rollout",
    "rollout of video": "rollout",
    "vae of another model": "vae",
    "vae of video": "vae",
    "vae of one channel": "vae",
    "rollout prompt too long": "prompt",
    "votes missing": "votes",
    "votes too few": "votes",
    "votes of words": "votes, number 1",
    "votes of infinity": "votes, number 1",
    "votes beyond float": "votes",
    "votes without end": "votes",
    "votes and values": "votes and values",
    "values of infinity": "values",
    "pictures of another count": "pictures",
    "scores of another rollout": "scores holds 19 images and the rollout 20",
    "scores that judge nothing": "scores are all nan",
    "infinite scores": "scores",
    "rollout without branches": "rollout has no branches",
    "clamp of nan": "clamp",
    "clamp below zero": "clamp",
    "std_floor without end": "std_floor",
    "diversity of nan": "diversity",
    "diversity below zero": "diversity",
    "diversity above ten": "diversity",
    "diversity of text": "diversity",
    "diversity without pictures": "diversity is 0.1, but scores hold no pictures",
    "diversity of too few pictures": "diversity compares all 20 pictures of the rollout",
    "weights of zero": "weight",
    "weights that cancel": "weight",
    "weight of nan": "weight_1",
    "weight without end": "weight_2",
    "reward of a path": "reward",
}


def make_images() -> dict[str, torch.Tensor]:
    """Make images whose colourfulness is known beforehand to fall in BEST_ORDER.

    The third and the last are broken.
    """
    generator = torch.Generator().manual_seed(0)
    strength = torch.tensor([0.2, 0.9, 0.6, 1.0, 0.5, 0.7])[:, None, None, None]
    images = torch.rand(6, 16, 16, 3, generator=generator) * strength
    images[2, 3, 4, 0], images[5, 3, 4, 0] = torch.nan, torch.inf
    images[4, 0, 0, 0], images[0, 0, 0, 0] = 1.02, -0.02
    scenes = torch.full((3, 64, 64, 3), 235 / 255)
    for scene, colour in enumerate(((220, 40, 40), (220, 40, 40), (45, 85, 220))):
        scenes[scene, 20:40, 20:40] = torch.tensor(colour) / 255
    sizes = {"wide": (1, 8, 20, 3), "tall": (2, 20, 8, 3), "grey": (1, 8, 8, 1), "alpha": (1, 8, 8, 4)}
    return {
        "images": images,
        "scenes": scenes,
        **{name: torch.rand(size, generator=generator) for name, size in sizes.items()},
    }


IMAGES = make_images()
DIVERSITY = 0.3
# What pictures of one group are, by letter, and their credit over λ by hand: of n pictures of which one
# differs, that one has z = (n−1)/√n, the others −1/√n, whatever the difference is.
ALIKE = {
    "aab": [-1 / 3**0.5, -1 / 3**0.5, 2 / 3**0.5],
    "baaa": [1.5, -0.5, -0.5, -0.5],
    "aaaa": [0.0] * 4,
    "ab": [0.0] * 2,
    "aabb": [0.0] * 4,
}
PAINTED = {letter: torch.rand(3, generator=torch.Generator().manual_seed(ord(letter))) for letter in "ab"}
ALIKE_PICTURES = {
    f"alike {names}": torch.stack([PAINTED[name].expand(16, 16, 3) for name in names]) for names in ALIKE
}


@pytest.fixture(scope="module", params=COMFYUIS)
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    given = {"prompt": PROMPT, "threshold": THRESHOLD, "lines": LINES, "scene": SCENE, "random": 400}
    given |= {"compared": COMPARED, "kept": list(KEPT), "diversity": DIVERSITY}
    sent = IMAGES | ALIKE_PICTURES
    return run_script(request.param, CHILD, make_base(tmp_path_factory.mktemp("scoring")), given, sent)


# any images


def test_every_image_gets_the_score_of_its_saved_file(core: Answer) -> None:
    expected = score_all([load("colourfulness")], to_8_bit(IMAGES["images"]), [""] * 6)[0]
    scores, sound = torch.tensor(core.data["free"]["score"]["0"]), [0, 1, 3, 4]
    assert scores[[2, 5]].isnan().all()
    assert torch.allclose(scores[sound], expected[sound], atol=1e-5)


def test_order_is_best_first_and_the_unjudged_last(core: Answer) -> None:
    assert core.data["free"]["score"]["1"] == BEST_ORDER


def test_select_best_keeps_the_best_in_order(core: Answer) -> None:
    assert core.data["free"]["kept"] == BEST_ORDER[:2]
    assert torch.equal(core.tensors["free_best"], IMAGES["images"][BEST_ORDER[:2]])


def test_select_best_draws_by_score(core: Answer) -> None:
    assert core.data["free"]["surely_kept"] == BEST_ORDER[:2]
    kept = core.data["free"]["drawn_kept"]
    assert len(kept) == 2 and kept == [i for i in BEST_ORDER if i in kept]
    assert torch.equal(core.tensors["free_drawn"], IMAGES["images"][kept])


def test_threshold_drops_the_rest_and_what_was_not_judged(core: Answer) -> None:
    scores = core.data["free"]["score"]["0"]
    kept = [i for i in BEST_ORDER if scores[i] >= THRESHOLD]
    assert 1 < len(kept) < 4
    assert core.data["free"]["above_kept"] == kept
    assert torch.equal(core.tensors["free_above"], IMAGES["images"][kept])


def test_images_in_a_list_may_differ_in_size_and_channels(core: Answer) -> None:
    pictures = [
        *IMAGES["wide"],
        *IMAGES["tall"],
        IMAGES["grey"][0].expand(8, 8, 3),
        IMAGES["alpha"][0, ..., :3],
    ]
    expected = [
        score_all([load("colourfulness")], to_8_bit(picture[None]), [""])[0].item() for picture in pictures
    ]
    assert core.data["free"]["mixed_sizes"]["0"] == pytest.approx(expected, abs=1e-4)
    assert "alpha was ignored" in core.data["free"]["tables"]["mixed_sizes"]
    assert "grey" in core.data["free"]["tables"]["mixed_sizes"]
    best = [*IMAGES["wide"], *IMAGES["tall"], *IMAGES["grey"], *IMAGES["alpha"]][
        max(range(5), key=expected.__getitem__)
    ]
    assert torch.equal(core.tensors["one_of_sizes"], best[None])


def test_one_prompt_judges_all_and_lines_judge_one_each(core: Answer) -> None:
    every, lines = (core.data["free"][name]["0"] for name in ("all", "lines"))
    assert every[0] == every[1] > every[2]
    assert lines[0] == lines[2] == every[0]
    assert math.isnan(lines[1])
    assert "1 could not be judged" in core.data["free"]["tables"]["lines"]


def listed(table: str) -> list[list[str]]:
    """Return the words of every line of a table's list."""
    return [line.split() for line in table.splitlines() if line.startswith("    ")]


def test_a_block_shows_the_five_best_and_its_output_holds_all(core: Answer) -> None:
    whole, shown = core.data["many"]["many"]
    rows, best = listed(whole), listed(shown)
    assert len(rows) == 64 and "more" not in whole
    assert best == [*rows[:5], ["…"]]
    lowest = rows[-1][-1]
    assert shown.endswith(
        f"\n59 more, down to {lowest}. The whole list is the output table; Save Scored Images writes it "
        "as a CSV file"
    )


def test_no_name_becomes_markup_and_columns_stand_below_each_other(core: Answer) -> None:
    for text in core.data["many"]["many"]:
        head, blank, *rows = (line.rstrip() for line in text.splitlines())
        assert (head, blank) == ("64 images, best first", "")
        rows = [row for row in rows if row.startswith("    ") and "…" not in row]
        assert not set("*`<>|") & set(text)
        # Four spaces make a list of code of it in Markdown: nothing in there is taken for markup.
        assert all(re.fullmatch(r"     ?\d+\. .*\.png: +\d+\.\d+", row) for row in rows)
        assert len({len(row) for row in rows}) == 1


def test_a_reward_that_reads_no_prompt_needs_none(core: Answer) -> None:
    whole, _ = core.data["many"]["blank"]
    assert "Note" not in whole + core.data["many"]["many"][0]


@pytest.mark.parametrize("name", ["unread", "both"])
def test_a_reward_that_reads_prompts_asks_for_one_in_one_line(core: Answer, name: str) -> None:
    for text in core.data["many"][name]:
        notes = [line.rstrip() for line in text.splitlines() if line.startswith("Note")]
        assert notes[0] == (
            "Note: prompt is empty, and agreement reads it; write in prompt what the images show"
        )
        assert len(notes) == 1 or name == "both"
        assert "judged none" not in text


def test_inputs_are_not_changed(core: Answer) -> None:
    assert core.data["free"]["unchanged"]


# two models


def test_compare_lora_gives_all_pictures_of_both_models_in_one_order(core: Answer) -> None:
    before, after = core.tensors["before"], core.tensors["after"]
    assert before.shape == after.shape == (12, 64, 64, 3)
    assert all((one != other).any() for one, other in zip(before, after, strict=True))
    old, new = (
        score_all([load("colourfulness")], batch, [""] * 12).mean().item() for batch in (before, after)
    )
    assert f"{old:.3f} → {new:.3f}" in core.data["gains"]
    assert core.tensors["sheet"].shape[0] == 1 and core.tensors["sheet"].shape[1] <= 2048


def test_the_pictures_that_are_given_out_fit_into_memory(core: Answer) -> None:
    assert core.data["kept"] == [list(kept) for kept in KEPT.values()]


# rollouts


def test_a_rollout_is_scored_as_its_decoded_pictures_are(core: Answer) -> None:
    pictures, decoded = core.tensors["pictures"], core.tensors["decoded"]
    assert pictures.std() > 0.05
    assert (pictures - to_8_bit(decoded)).abs().max() <= 1.01 / 255
    expected = score_all([load("agreement"), load("colourfulness")], pictures, [PROMPT] * len(pictures))
    assert torch.allclose(core.tensors["scores"], expected, atol=1e-5)
    assert core.data["judged"]["names"] == ["agreement", "colourfulness"]
    assert core.data["judged"]["weights"] == list(WEIGHTS)
    assert core.data["judged"]["prompt"] == PROMPT


def test_advantages_are_the_engines(core: Answer) -> None:
    rewards = singular(6, [0, 2], 5, (1, 2)).values(core.tensors["scores"])
    assert torch.equal(core.tensors["rewards"], rewards)
    assert torch.allclose(core.tensors["table"], integrate(rewards, WEIGHTS, CLAMP, 1e-8), atol=1e-6)
    assert not torch.allclose(core.tensors["table"], integrate(rewards, WEIGHTS, 5.0, 1e-8), atol=1e-3)
    assert core.data["judged"]["learnable"]


def test_without_diversity_advantages_are_as_before(core: Answer) -> None:
    assert torch.equal(core.tensors["same"], core.tensors["table"])
    assert core.data["judged"]["same_summary"] == core.data["judged"]["summary"]


def test_diversity_adds_what_training_adds(core: Answer) -> None:
    plan = singular(6, [0, 2], 5, (1, 2))
    features = plan.values(pixel_features(core.tensors["pictures"]).T).movedim(0, -1)
    credit = shaping(features, plan.values(core.tensors["scores"]), DIVERSITY, CLAMP)
    assert credit.abs().mean() > 0.1
    assert torch.allclose(core.tensors["diverse"], core.tensors["table"] + credit, atol=1e-6)
    said = f"diversity moves a branch's advantage by {credit.abs().mean():.2f} on average"
    assert said in core.data["judged"]["diverse_summary"]


@pytest.mark.parametrize(("names", "expected"), ALIKE.items())
def test_where_votes_tie_unlikeness_alone_decides(core: Answer, names: str, expected: list[float]) -> None:
    found = core.tensors[f"alike {names}"]
    assert found.flatten().tolist() == pytest.approx([DIVERSITY * z for z in expected], rel=1e-4, abs=1e-6)


def test_any_graph_can_be_the_judge(core: Answer) -> None:
    assert torch.allclose(
        core.tensors["voted_scores"][0], ranking_scores(core.tensors["scores"], WEIGHTS), atol=0.02
    )
    expected = integrate(singular(6, [0, 2], 5, (1, 2)).values(core.tensors["voted_scores"]), None, 5.0, 1e-8)
    assert torch.allclose(core.tensors["voted_table"], expected, atol=1e-6)
    assert torch.equal(core.tensors["voted_pictures"], core.tensors["decoded"])


def test_the_best_completions_can_be_kept(core: Answer) -> None:
    order = core.tensors["voted_scores"][0].argsort(descending=True, stable=True)[:3]
    assert torch.equal(core.tensors["best"], core.tensors["decoded"][order])


def test_broken_latents_are_not_judged_and_not_shown(core: Answer) -> None:
    scores, pictures = core.tensors["broken_scores"][0], core.tensors["broken_pictures"]
    assert scores.isnan().nonzero().flatten().tolist() == [1, 2]
    assert (pictures[1:3] == 0).all()
    assert pictures.isfinite().all()


def test_equal_votes_are_shown_as_a_tie(core: Answer) -> None:
    assert "zero_std_share 100%" in core.data["tie"]
    assert "every advantage is 0" in core.data["tie"]
    stripes = [((core.tensors[name] * 255).round() == 118).all(-1).sum() for name in ("tie", "heatmap")]
    assert stripes[0] > 3 * stripes[1] > 0


def test_what_is_within_a_reward_s_noise_is_a_tie(core: Answer) -> None:
    assert core.tensors["noise_scores"].nan_to_num(0.0).std() > 0 and not core.tensors["noise_table"].any()
    assert "zero_std_share 100%" in core.data["noise"]


def test_views_are_images(core: Answer) -> None:
    for name in ("heatmap", "per_branch", "ranked", "image_ranked"):
        picture = core.tensors[name]
        assert picture.shape[0] == 1 and picture.shape[2:] == (1024, 3) and picture.shape[1] > 300
        assert 0.02 < picture.std() < 0.5
    assert core.tensors["per_branch"].shape[1] > core.tensors["heatmap"].shape[1]


def test_blocks_say_what_they_found(core: Answer) -> None:
    said = core.data["judged"]
    [shown], whole = said["ui"]["score"], said["score_table"]
    assert len(listed(whole)) == 20 and listed(shown) == [*listed(whole)[:5], ["…"]]
    assert shown.endswith("The whole list is the output table") and "15 more, down to" in shown
    assert said["ui"]["advantages"] == [said["summary"]]
    assert whole.startswith("20 completions, best first\n\n     1. image ")
    assert "agreement" in said["score_table"] and "colourfulness" in said["score_table"]
    assert "zero_std_share 0%" in said["summary"]
    assert "rank_agreement of every 2nd step with every step, agreement" in said["summary"]
    assert "likes" in said["about"] and "[B" not in said["about"]
    assert "Apache-2.0" in said["about"] and "only between images of one prompt" in said["about"]
    assert PROMPT not in said["score_table"] + said["image_table"]


def test_a_reward_that_judges_nothing_says_why_and_writes_no_markup(core: Answer) -> None:
    said = core.data["free"]["tables"]["none"]
    assert "Note: agreement judged none of" in said and "it needs coloured shapes in the prompt" in said
    assert "lighthouse" in said and "<" not in said


@pytest.mark.parametrize("name", ["images", "rollout"])
def test_the_stop_button_is_heard_between_two_batches(core: Answer, name: str) -> None:
    assert core.data[f"interrupted {name}"] == {"error": "interrupted:", "calls": 1}


# what is wrong


@pytest.mark.parametrize(("name", "blamed"), HOSTILE.items(), ids=list(HOSTILE))
def test_a_wrong_input_is_named_with_its_remedy(core: Answer, name: str, blamed: str) -> None:
    kind, _, words = core.data["hostile"][name].strip().partition(": ")
    assert kind.rpartition(".")[2] in ("ValueError", "RewardError")
    assert words.startswith(blamed) or (blamed == "weight" and "weight" in words)
    assert ";" in words
    assert "\n" not in words
    assert len(words) < 250


def test_every_hostile_input_was_tried(core: Answer) -> None:
    assert set(core.data["hostile"]) == set(HOSTILE)


def test_widgets_out_of_bounds_are_refused(core: Answer) -> None:
    assert core.data["refused"] == {"reward": True, "k": True, "clamp": True}


def test_random_inputs_give_a_result_or_a_named_error(core: Answer) -> None:
    assert core.data["random"]["strange"] == []
    assert core.data["random"]["ok"] > 40
    assert core.data["random"]["refused"] > 60
