"""Rewards without weights: pictures by themselves, pictures like a reference, pictures as a prompt's
columns ask.
"""

import re
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from drawn import blank, circles, draw
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.rewards import REWARDS, RewardError, check_prompts, checked
from comfy_g2rpo.rewards.clips import OfFrames
from comfy_g2rpo.rewards.likeness import KINDS, Likeness, colour_histogram, lab, reference_reward

RANDOM = torch.rand(4, 48, 64, 3, generator=torch.Generator().manual_seed(3))
RANDOM = (RANDOM * 255).round() / 255
PALETTE = ["#dc2828", "#ebebeb"]


def score(name: str, images: Tensor) -> list[float]:
    """Judge images by a built-in reward."""
    return checked(REWARDS[name], images, [""] * len(images)).tolist()


def like(kind: str, reference: object, images: Tensor) -> list[float]:
    """Judge images by their likeness to a reference."""
    return checked(reference_reward(kind, reference), images, [""] * len(images)).tolist()


def test_webp_is_the_size_of_the_file_in_kilobytes():
    buffer = BytesIO()
    Image.fromarray((RANDOM[0].numpy() * 255).round().astype(np.uint8)).save(buffer, "WEBP", quality=80)
    assert score("webp", RANDOM[:1]) == [pytest.approx(-len(buffer.getvalue()) / 1000)]
    assert score("webp", blank())[0] > score("webp", circles(4))[0] > score("webp", RANDOM)[0]


def test_webp_refuses_what_the_format_cannot_hold():
    with pytest.raises(RewardError, match="16384x1; WebP allows 16383 pixels a side"):
        score("webp", torch.zeros(1, 1, 16384, 3))


def test_exposure_is_1_at_mid_grey_and_next_to_0_where_clipped():
    grey, black, white = score(
        "exposure", torch.stack([torch.full((8, 8, 3), level) for level in (0.5, 0.0, 1.0)])
    )
    assert grey == pytest.approx(1)
    assert black == white == pytest.approx(np.exp(-3 * 0.5**2 / (2 * 0.2**2)))


def test_exposure_multiplies_the_channels_and_averages_the_pixels():
    picture = torch.full((1, 1, 2, 3), 0.5)
    picture[0, 0, 0] = torch.tensor([0.7, 0.5, 0.3])
    assert score("exposure", picture) == [pytest.approx((np.exp(-1) + 1) / 2)]


def test_symmetry_is_the_correlation_with_the_mirror_image():
    half = RANDOM[:, :, :32]
    mirrored, odd = torch.cat([half, half.flip(2)], 2), torch.cat([half, 1 - half.flip(2)], 2)
    assert min(score("symmetry", mirrored)) > 0.999
    assert max(score("symmetry", odd)) < -0.99
    assert max(map(abs, score("symmetry", RANDOM))) < 0.1


def test_a_blank_picture_has_no_symmetry_and_horizontal_stripes_have_it_all():
    stripes = RANDOM[:1, :, :1].expand(1, 48, 64, 3)
    assert score("symmetry", blank())[0] == pytest.approx(0, abs=1e-6)
    assert score("symmetry", stripes)[0] > 0.999


@pytest.mark.parametrize(
    "name", ["jpeg", "webp", "sharpness", "colourfulness", "exposure", "symmetry", *KINDS]
)
def test_what_a_reward_ends_in_is_said(name: str):
    reward = REWARDS.get(name) or reference_reward(name, PALETTE if name == "palette" else RANDOM[0])
    assert reward.note


@pytest.mark.parametrize("kind", KINDS)
def test_a_likeness_does_not_depend_on_the_batch_and_drops_broken_images(kind: str):
    images = torch.cat([RANDOM, RANDOM[:1] ** 2])
    reward = reference_reward(kind, PALETTE if kind == "palette" else RANDOM[1])
    together = checked(reward, images, [""] * 5)
    assert torch.equal(together, torch.cat([checked(reward, image[None], [""]) for image in images]))
    assert checked(reward, torch.zeros(0, 64, 64, 3), []).shape == (0,)
    images[2, 0, 0, 0] = torch.nan
    assert checked(reward, images, [""] * 5).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("kind", ["phash", "histogram", "ssim"])
def test_the_reference_itself_scores_1_and_nothing_scores_more(kind: str):
    scores = like(kind, RANDOM[2], torch.cat([RANDOM, circles(3)[:, :48]]))
    assert scores[2] == pytest.approx(1)
    assert max(scores[:2] + scores[3:]) < 1


@pytest.mark.parametrize("kind", ["phash", "histogram", "ssim"])
def test_a_reference_of_another_size_is_stretched(kind: str):
    pictures = torch.cat([draw(("red", "circle", 32, 32, 30)), draw(("blue", "square", 16, 16, 14))])
    larger = pictures[:1].repeat_interleave(3, 1).repeat_interleave(2, 2)
    same, other = like(kind, larger, pictures)
    assert same > 0.9 and other < same - 0.1


def test_the_hash_sees_light_and_dark_but_neither_contrast_nor_colour():
    picture = draw(("red", "circle", 24, 20, 20), ("blue", "square", 46, 46, 20))
    grey = (picture @ torch.tensor([0.299, 0.587, 0.114]))[..., None].expand_as(picture)
    assert like("phash", picture, torch.cat([0.5 * picture + 0.2, grey])) == [1, 1]
    # Every bit turns but that of the median itself.
    assert like("phash", picture, 1 - picture) == [pytest.approx(1 / 63)]
    noise = torch.rand(64, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert np.mean(like("phash", picture, noise)) == pytest.approx(0.5, abs=0.03)


def test_the_hash_of_a_blank_picture_has_no_bit():
    assert like("phash", blank(), torch.cat([blank((7, 90, 200)), blank((255, 255, 255))])) == [1, 1]


def test_the_histogram_sees_how_much_of_a_colour_and_not_where():
    picture = draw(("red", "circle", 20, 20, 20), ("blue", "square", 46, 46, 20))
    shuffled = picture.reshape(1, -1, 3)[
        :, torch.randperm(64 * 64, generator=torch.Generator().manual_seed(0))
    ].reshape_as(picture)
    assert like("histogram", picture, shuffled) == [pytest.approx(1)]
    halves = torch.cat([blank((255, 0, 0))[:, :, :32], blank((0, 0, 255))[:, :, :32]], 2)
    assert like("histogram", blank((255, 0, 0)), torch.cat([halves, blank((0, 0, 255))])) == pytest.approx(
        [0.5, 0]
    )


def test_a_colour_between_two_cells_is_shared_out():
    found = colour_histogram(torch.tensor([[[[2.25 / 7, 0.0, 1.0]]]]))[0].reshape(8, 8, 8)
    assert found.sum() == pytest.approx(1)
    assert found[2, 0, 7] == pytest.approx(0.75, abs=1e-6) and found[3, 0, 7] == pytest.approx(0.25, abs=1e-6)


def test_ssim_is_the_published_formula():
    pytest.importorskip("skimage")
    x, y = RANDOM[0].double().numpy(), gaussian_filter(RANDOM[0].double().numpy(), (1, 1, 0))

    def local(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (1.5, 1.5, 0), truncate=3.5)

    mx, my = local(x), local(y)
    vx, vy, vxy = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    full = (2 * mx * my + 0.01**2) * (2 * vxy + 0.03**2) / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2))
    # The border, half a window, is left out.
    expected = full[5:-5, 5:-5].mean()
    assert like("ssim", torch.from_numpy(y), RANDOM[:1]) == [pytest.approx(expected, abs=1e-5)]


def test_ssim_needs_a_window_and_scikit_image(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RewardError, match="got pictures of 64x10; they must have at least 11 pixels a side"):
        like("ssim", RANDOM[0], RANDOM[:, :10])
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(RewardError, match="needs scikit-image; install it with: pip install scikit-image"):
        like("ssim", RANDOM[0], RANDOM)


def test_colours_are_those_of_cielab():
    found = lab(np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]], float))
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
    assert np.abs(found - expected).max() < 0.02


def test_a_palette_is_met_by_all_its_colours_in_equal_shares():
    red, grey = blank((220, 40, 40)), blank((235, 235, 235))
    halves = torch.cat([red[:, :32], grey[:, :32]], 1)
    quarter = torch.cat([red[:, :16], grey[:, :48]], 1)
    assert like("palette", PALETTE, torch.cat([halves, red, quarter])) == pytest.approx(
        [1, 0.5, 0.75], abs=1e-4
    )


def test_a_colour_counts_less_the_farther_it_is_from_the_palette():
    scores = like(
        "palette",
        ["dc2828"],
        torch.cat([blank((220, 40, 40)), blank((200, 60, 50)), blank((90, 60, 50)), blank((45, 85, 220))]),
    )
    assert scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(1) and scores[-1] < 0.01


@pytest.mark.parametrize(
    ("kind", "reference", "words"),
    [
        ("psnr", RANDOM[0], "kind is 'psnr'; choose one of: phash, histogram, ssim, palette"),
        ("ssim", RANDOM, r"reference is \[4, 48, 64, 3\]; give one picture"),
        ("ssim", "a.png", "reference is str; give one picture"),
        ("phash", RANDOM[0] * 255, r"reference has values outside of \[0, 1\]"),
        ("histogram", RANDOM[0] * torch.nan, "or that are no numbers"),
        ("palette", "#ff8800", "give a list of 1 to 16 colours"),
        ("palette", [], "give a list of 1 to 16 colours"),
        ("palette", ["orange"], "palette has the colour 'orange'; write it as #ff8800"),
    ],
)
def test_a_reference_that_cannot_be_used_is_named(kind: str, reference: object, words: str):
    with pytest.raises(RewardError, match=words):
        reference_reward(kind, reference)


def agreement(image: Tensor, **columns: object) -> float:
    """Judge a picture by columns beside a prompt outside the grammar."""
    return checked(REWARDS["agreement"], image, [Prompt("a children's drawing", columns)]).item()


def strict(image: Tensor, **columns: object) -> bool:
    """Say whether a picture is all right by columns."""
    return checked(REWARDS["strict"], image, [Prompt("a children's drawing", columns)]).item() == 1


THREE = draw(("red", "circle", 14, 32, 14), ("red", "circle", 32, 14, 14), ("red", "circle", 50, 32, 14))
MOTLEY = draw(("red", "circle", 14, 32, 14), ("blue", "circle", 32, 14, 14), ("green", "circle", 50, 32, 14))
BESIDE = draw(("red", "circle", 16, 32, 14), ("blue", "square", 48, 32, 14))


def test_columns_are_judged_as_the_same_words_would_be():
    asked = {"target_count": 3, "colour": "red", "shape": "circle"}
    for picture in (THREE, MOTLEY, BESIDE, blank()):
        assert (
            agreement(picture, **asked)
            == checked(REWARDS["agreement"], picture, ["three red circles"]).item()
        )
    beside = {
        "colour": "red",
        "shape": "circle",
        "relation": "left of",
        "other_colour": "blue",
        "other_shape": "square",
    }
    assert (
        agreement(BESIDE, **beside)
        == checked(REWARDS["agreement"], BESIDE, ["a red circle left of a blue square"]).item()
        == 1
    )


def test_columns_go_before_the_words():
    prompt = Prompt("two blue squares", {"target_count": 3, "colour": "red", "shape": "circle"})
    assert checked(REWARDS["strict"], THREE, [prompt]).item() == 1


def test_what_no_column_says_is_not_judged():
    assert strict(THREE, target_count=3) and strict(MOTLEY, target_count=3)
    assert strict(MOTLEY, target_count=3, shape="circle") and not strict(MOTLEY, target_count=3, colour="red")
    assert strict(BESIDE, shape="circle", relation="left of", other_shape="square")
    assert not strict(BESIDE, shape="circle", relation="right of", other_shape="square")
    assert agreement(MOTLEY, target_count=3, shape="circle") == 1


@pytest.mark.parametrize("asked", [1, 2, 5, 8])
def test_the_asked_count_scores_best(asked: int):
    scores = [agreement(circles(number), target_count=asked) for number in range(1, 9)]
    assert np.argmax(scores) == asked - 1 and scores[asked - 1] == pytest.approx(1, abs=1e-3)


def test_a_batch_may_mix_words_columns_and_neither():
    prompts = ["three red circles", Prompt("?", {"target_count": 7}), "a fox", Prompt("a fox", {"tag": 1})]
    scores = checked(REWARDS["agreement"], THREE.repeat(4, 1, 1, 1), prompts)
    assert scores.isnan().tolist() == [False, False, True, True]
    assert scores[0] == checked(REWARDS["agreement"], THREE, prompts[:1])[0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"colour": "pink"},
            "column colour of 'a fox' is 'pink'; choose one of: red, green, blue, yellow, purple",
        ),
        (
            {"shape": ["circle"]},
            r"column shape of 'a fox' is \['circle'\]; choose one of: circle, square, triangle",
        ),
        ({"target_count": 0}, "column target_count of 'a fox' is 0; it must be a whole number from 1 to 8"),
        ({"target_count": "3"}, "is '3'; it must be a whole number"),
        ({"target_count": True}, "is True; it must be a whole number"),
        ({"other_shape": "square"}, "column other_shape of 'a fox' needs a relation; choose one of: left of"),
        ({"relation": "above"}, "give other_colour or other_shape"),
        (
            {"colour": "red", "relation": "above", "other_colour": "blue", "target_count": 2},
            "leave target_count out",
        ),
    ],
)
def test_a_column_that_cannot_be_judged_is_named_before_anything_runs(columns: dict[str, object], words: str):
    with pytest.raises(RewardError, match=words):
        check_prompts([REWARDS["jpeg"], REWARDS["agreement"]], ["two red circles", Prompt("a fox", columns)])


@pytest.mark.parametrize("name", [*REWARDS, *KINDS])
def test_a_reward_says_in_words_what_it_likes(name: str) -> None:
    reward = REWARDS.get(name) or Likeness(name, lambda prompt: None)
    assert reward.about.startswith("likes ") and ":" in reward.about and len(reward.about) <= 100
    assert not re.search(r"[\[\]\nΣ√∏Πσ²]", reward.about)
    assert OfFrames(reward).about == reward.about
