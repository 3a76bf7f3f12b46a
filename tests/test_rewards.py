import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import blank, circles, draw
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter
from torch import Tensor

from comfy_g2rpo.rewards import REWARDS, MixedReward, RewardError, Rule, checked, load, mix, score_all
from comfy_g2rpo.rewards.shapes.vocabulary import (
    BACKGROUND,
    COLOURS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    describe,
    parse,
)

SCENES = 600
AGREEMENT, STRICT = REWARDS["agreement"], REWARDS["strict"]
every_reward = pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)

things = st.builds(Thing, st.sampled_from(list(COLOURS)), st.sampled_from(SHAPES))
counts = st.builds(
    lambda thing, number: Scene((thing,) * number), things, st.sampled_from(list(NUMBERS.values()))
)
twos = st.builds(
    Scene,
    st.tuples(things, things).filter(lambda two: two[0] != two[1]),
    st.none() | st.sampled_from(list(RELATIONS)),
)


def graded(images: Tensor, prompt: str) -> float:
    """Grade one picture."""
    return checked(AGREEMENT, images, [prompt]).item()


def passes(images: Tensor, prompt: str) -> bool:
    """Say whether one picture passes the strict reward."""
    return checked(STRICT, images, [prompt]).item() == 1.0


@pytest.fixture(scope="module")
def rendered() -> tuple[Tensor, list[str]]:
    path = Path(__file__).parent.parent / "tools" / "shapes_data.py"
    spec = importlib.util.spec_from_file_location("shapes_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pictures, prompts = module.make_pictures(SCENES, seed=11)
    return torch.from_numpy(pictures) / 255, prompts


def asked(prompt: str) -> tuple:
    """Return what a prompt asks for, whichever thing it names first."""
    scene = parse(prompt)
    turned = {"right of": "left of", "below": "above"}
    if scene.relation is None:
        return None, frozenset(scene.things), len(scene.things)
    things = scene.things[::-1] if scene.relation in turned else scene.things
    return turned.get(scene.relation, scene.relation), things


def test_no_heldout_prompt_means_the_same_as_one_that_was_trained_or_tuned_on():
    folder = Path(__file__).parent.parent / "prompts"
    lists = {
        name: [asked(line) for line in (folder / f"shapes_{name}.txt").read_text().splitlines()]
        for name in ("train", "tune", "heldout")
    }
    assert len(set(lists["heldout"])) == len(lists["heldout"]) == 96
    assert not set(lists["heldout"]) & {*lists["train"], *lists["tune"]}


@given(counts | twos)
def test_a_prompt_reads_back_as_the_scene_that_it_describes(scene):
    assert parse(describe(scene)) == scene


def test_a_relation_binds_the_first_thing_to_the_second():
    assert parse("a green square left of a blue triangle") == Scene(
        (Thing("green", "square"), Thing("blue", "triangle")), "left of"
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red",
        "two red circle",
        "a red circles",
        "five red circles",
        "a pink circle",
        "a red circle and a red circle",
        "red " * 25_000,
    ],
    ids=lambda prompt: prompt[:20],
)
def test_a_prompt_outside_the_grammar_cannot_be_judged(prompt):
    assert parse(prompt) is None
    assert np.isnan(graded(circles(1), prompt))


def test_rendered_scenes_are_judged_right(rendered):
    assert score_all([STRICT], *rendered).mean() >= 0.99
    assert score_all([AGREEMENT], *rendered).min() > 0.95


def test_right_pictures_tie_at_one_so_that_they_teach_nothing(rendered):
    assert (score_all([AGREEMENT], *rendered) == 1).float().mean() > 0.98


def test_soft_edges_and_small_colour_errors_are_forgiven(rendered):
    images, prompts = rendered
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    decoded = torch.from_numpy(gaussian_filter(images.numpy(), (0, 0.8, 0.8, 0))) + 0.03 * noise
    assert score_all([STRICT], decoded.clamp(0, 1), prompts).mean() >= 0.98


def test_objects_joined_by_a_faint_bridge_stay_two():
    pair = draw(("blue", "square", 20, 32, 18), ("blue", "square", 41, 32, 18))
    pair[0, 38:40, 28:33] = 0.4 * pair[0, 32, 20] + 0.6 * blank()[0, 0, 0]
    assert passes(pair, "two blue squares")


def test_another_scene_s_picture_does_not_pass(rendered):
    images, prompts = rendered
    foreign = images.roll(1, 0)
    differs = torch.tensor(
        [
            set(parse(a).things) != set(parse(b).things)
            for a, b in zip(prompts, prompts[-1:] + prompts, strict=False)
        ]
    )
    assert differs.sum() > 500
    assert score_all([STRICT], foreign, prompts)[0, differs].max() == 0
    assert score_all([AGREEMENT], foreign, prompts)[0, differs].mean() < 0.35


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_only_the_drawn_kind_passes(colour, shape):
    picture = draw((colour, shape, 32, 32, 14))
    assert {(c, s) for c in COLOURS for s in SHAPES if passes(picture, f"a {c} {s}")} == {(colour, shape)}


@pytest.mark.parametrize("asked", [1, 2, 3, 4])
def test_the_asked_count_scores_best_and_nearer_counts_score_better(asked):
    prompt = describe(Scene((Thing("red", "circle"),) * asked))
    scores = [graded(circles(number), prompt) for number in range(1, 7)]
    assert scores[asked - 1] == pytest.approx(1, abs=1e-3)
    assert scores[:asked] == sorted(scores[:asked])
    assert scores[asked - 1 :] == sorted(scores[asked - 1 :], reverse=True)


@pytest.mark.parametrize(("relation", "step"), RELATIONS.items())
def test_a_relation_holds_on_its_own_side_only(relation, step):
    x, y = step
    picture = draw(
        ("red", "circle", 32 + 12 * x, 32 + 12 * y, 14), ("blue", "square", 32 - 12 * x, 32 - 12 * y, 14)
    )
    holds = [other for other in RELATIONS if passes(picture, f"a red circle {other} a blue square")]
    assert holds == [relation]


def test_agreement_grows_steadily_with_the_distance_along_the_relation():
    def at(distance: float) -> float:
        picture = draw(
            ("red", "circle", 32 + distance / 2, 18, 14), ("blue", "square", 32 - distance / 2, 34, 14)
        )
        return graded(picture, "a red circle right of a blue square")

    steps = np.diff([at(distance) for distance in range(-18, 20, 4)])
    assert (steps > 0.02).all() and (steps < 0.12).all()


def test_each_thing_that_is_put_right_raises_agreement():
    prompt = "a red circle left of a blue square"
    right, other = ("red", "circle", 18, 32, 14), ("blue", "square", 46, 32, 14)
    pictures = [blank(), draw(right), draw(right, ("blue", "circle", 46, 32, 14)), draw(right, other)]
    scores = [graded(picture, prompt) for picture in pictures]
    assert scores == sorted(scores) and min(np.diff(scores)) > 0.1


@pytest.mark.parametrize(
    "surplus",
    [("blue", "square", 32, 50, 14), ("red", "circle", 50, 50, 14)],
    ids=["another kind", "the same kind"],
)
def test_a_surplus_object_costs_as_much_as_a_missing_one(surplus):
    kept = [("red", "circle", 12, 14, 14), ("red", "circle", 32, 14, 14), ("red", "circle", 52, 14, 14)]
    more, fewer = (
        graded(draw(*kept, surplus), "three red circles"),
        graded(draw(*kept[:2]), "three red circles"),
    )
    assert more < 0.85 and more == pytest.approx(fewer, abs=0.15)


ALMOST_NOTHING = {
    "blank": blank(),
    "grey": blank((128, 128, 128)),
    "black": blank((0, 0, 0)),
    "all red": blank(COLOURS["red"]),
    "noise": torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0)),
    "one pixel": blank(size=1),
    "dust": draw(*[("red", "circle", 6 + 9 * (i % 6), 6 + 9 * (i // 6), 4) for i in range(36)]),
}


@pytest.mark.parametrize("picture", ALMOST_NOTHING.values(), ids=ALMOST_NOTHING)
def test_empty_and_full_pictures_earn_nothing(picture):
    for prompt in ("a red circle", "four red circles", "a red circle above a blue square"):
        assert graded(picture, prompt) < 0.01


def test_smudges_earn_less_than_crisp_shapes():
    crisp = circles(2)
    smudged = torch.from_numpy(gaussian_filter(crisp.numpy(), (0, 2.5, 2.5, 0)))
    pale = 0.4 * crisp + 0.6 * blank()
    assert max(graded(smudged, "two red circles"), graded(pale, "two red circles")) < 0.7


def test_a_shape_between_two_shapes_earns_less_than_either():
    angle = np.linspace(0, 2 * np.pi, 400)

    def superellipse(power: float) -> Tensor:
        picture = Image.new("RGB", (512, 512), BACKGROUND)
        points = [256 + 72 * np.sign(f(angle)) * np.abs(f(angle)) ** (2 / power) for f in (np.cos, np.sin)]
        ImageDraw.Draw(picture).polygon(list(zip(*points, strict=True)), fill=COLOURS["red"])
        return torch.from_numpy(np.asarray(picture.resize((64, 64), Image.Resampling.BOX)) / np.float32(255))[
            None
        ]

    as_circle = [graded(superellipse(power), "a red circle") for power in (2, 3, 4, 6, 20)]
    assert as_circle == sorted(as_circle, reverse=True) and as_circle[0] > 0.99 and as_circle[-1] < 0.4


@every_reward
def test_a_score_does_not_depend_on_the_batch(reward, rendered):
    images, prompts = rendered[0][:48], rendered[1][:48]
    together = checked(reward, images, prompts)
    alone = torch.cat([checked(reward, images[i : i + 1], prompts[i : i + 1]) for i in range(48)])
    planes = checked(reward, images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), prompts)
    assert torch.equal(together, alone) and torch.equal(together, planes)


@every_reward
def test_an_empty_batch_has_no_scores(reward):
    assert checked(reward, torch.zeros(0, 64, 64, 3), []).shape == (0,)


@every_reward
def test_a_broken_image_is_dropped_and_the_others_are_judged(reward):
    images = circles(1).repeat(3, 1, 1, 1)
    images[1, 5, 5, 0] = torch.nan
    scores = checked(reward, images, ["a red circle"] * 3)
    assert scores.isnan().tolist() == [False, True, False]
    assert scores.dtype == torch.float32 and scores[0] == checked(reward, circles(1), ["a red circle"])[0]


@every_reward
def test_a_reward_says_what_it_is(reward):
    assert load(reward.name) is reward
    assert reward.licence and isinstance(reward.compares_across_prompts, bool)


def test_an_unknown_reward_names_the_nearest_one():
    with pytest.raises(RewardError, match=r"did you mean 'agreement'.*strict"):
        load("agrement")


BAD_IMAGES = {
    "in [-1, 1]": (circles(1) * 2 - 1, r"\[0, 1\]"),
    "in [0, 255]": (circles(1) * 255, r"\[0, 1\]"),
    "channels first": (circles(1).permute(0, 3, 1, 2), r"\[B, H, W, 3\]"),
    "a single image": (circles(1)[0], r"\[B, H, W, 3\]"),
    "integers": ((circles(1) * 255).byte(), "floating-point"),
    "one too many": (circles(1).repeat(2, 1, 1, 1), "1 prompts for 2 images"),
}


@pytest.mark.parametrize(("images", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(RewardError, match=f"'jpeg'.*{message}"):
        checked(REWARDS["jpeg"], images, ["a red circle"])


def test_one_string_is_not_a_list_of_prompts():
    with pytest.raises(RewardError, match="one prompt per image"):
        checked(AGREEMENT, circles(1), "x")


BAD_ANSWERS = {
    "a float": (lambda images, prompts: 0.5, "returned float"),
    "a column": (lambda images, prompts: torch.zeros(2, 1), r"\[2, 1\].*\[2\]"),
    "a scalar": (lambda images, prompts: torch.tensor(1.0), r"\[\].*\[2\]"),
    "integers": (lambda images, prompts: torch.zeros(2, dtype=torch.long), "int64"),
    "infinity": (lambda images, prompts: torch.tensor([1.0, torch.inf]), "infinite"),
    "an exception": (lambda images, prompts: torch.zeros(2) / prompts[5], "failed with IndexError"),
    "an exit": (lambda images, prompts: sys.exit(), r"called sys\.exit\(None\)"),
    "an exit without fault": (lambda images, prompts: sys.exit(0), r"called sys\.exit\(0\)"),
    "an exit in words": (lambda images, prompts: sys.exit("no licence"), r"called sys\.exit\('no licence'\)"),
}


@pytest.mark.parametrize(("function", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_wrong_answer_names_the_reward(function, message):
    with pytest.raises(RewardError, match=f"'mine'.*{message}"):
        checked(Rule("mine", function, True), blank().repeat(2, 1, 1, 1), ["", ""])


def test_a_reward_may_be_unable_to_judge_anything():
    unable = Rule("mine", lambda images, prompts: torch.full((len(images),), torch.nan), True)
    assert checked(unable, blank(), [""]).isnan().all()


def test_scores_are_stacked_by_reward():
    scores = score_all([STRICT, REWARDS["jpeg"]], torch.cat([circles(1), circles(2)]), ["a red circle"] * 2)
    assert scores.shape == (2, 2) and scores[0].tolist() == [1, 0]


def test_scoring_by_no_reward_is_refused():
    with pytest.raises(RewardError, match="name at least one"):
        score_all([], blank(), [""])


def test_a_mixed_reward_is_the_weighted_sum():
    mixed = MixedReward((AGREEMENT, REWARDS["jpeg"]), (2.0, -0.5))
    prompt = ["two red circles"]
    parts = score_all([AGREEMENT, REWARDS["jpeg"]], circles(1), prompt)
    assert checked(mixed, circles(1), prompt) == 2 * parts[0] - 0.5 * parts[1]
    assert mixed.name == "2 agreement + -0.5 jpeg"
    assert mixed.licence == "Apache-2.0" and not mixed.compares_across_prompts


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0), (1.0, float("nan")), (float("inf"), 1.0)], ids=str)
def test_unusable_weights_are_refused(weights):
    with pytest.raises(RewardError, match="weights"):
        MixedReward((AGREEMENT, STRICT), weights)


def test_a_sample_that_one_reward_cannot_judge_has_no_mixed_score():
    assert mix(torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), [1, 1]).isnan().tolist() == [False, True]


def test_jpeg_prefers_blank_pictures():
    assert checked(REWARDS["jpeg"], torch.cat([blank(), circles(4)]), ["", ""]).argmax() == 0


def test_sharpness_falls_with_blur_and_is_zero_on_a_blank_picture():
    blurred = torch.from_numpy(gaussian_filter(circles(2).numpy(), (0, 1, 1, 0)))
    flat, soft, crisp = checked(REWARDS["sharpness"], torch.cat([blank(), blurred, circles(2)]), [""] * 3)
    assert flat == pytest.approx(0, abs=1e-6) and soft < crisp / 4


def test_colourfulness_is_zero_on_grey_and_known_on_a_flat_colour():
    grey, red = checked(
        REWARDS["colourfulness"], torch.cat([blank((128, 128, 128)), blank((255, 0, 0))]), ["", ""]
    )
    assert grey == pytest.approx(0, abs=1e-4)
    assert red == pytest.approx(0.3 * np.hypot(255, 127.5), rel=1e-4)


def test_images_of_another_precision_or_with_a_gradient_are_judged_all_the_same():
    assert checked(
        AGREEMENT, circles(1).bfloat16().requires_grad_(), ["a red circle"]
    ).item() == pytest.approx(1, abs=1e-2)


def test_rules_say_whether_they_read_the_prompt():
    assert [name for name, reward in REWARDS.items() if reward.reads_prompt] == ["agreement", "strict"]
