"""Objects, counts, colours and places: what a prompt asks for, and how much of it boxes show."""

import pytest
import torch
from reward_folders import owlv2_folder, owlv2_model, pictures

from comfy_g2rpo.rewards import RewardError, checked
from comfy_g2rpo.rewards.models import owlv2
from comfy_g2rpo.rewards.models.geneval import COLOURS, Scene, Seen, Thing, parse, places, score
from comfy_g2rpo.rewards.models.installed import load_installed

pytestmark = pytest.mark.xdist_group("detection")  # one process makes what they share

pytest.importorskip("transformers", reason="OWLv2 needs transformers: pip install '.[rewards]'")


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a photo of a sheep", Scene((Thing("sheep"),))),
        ("a photo of an airplane.", Scene((Thing("airplane"),))),
        ("a photo of two red apples", Scene((Thing("apple", 2, True, "red"),))),
        ("a photo of four wine glasses", Scene((Thing("wine glass", 4, True),))),
        ("A picture of 3 black buses", Scene((Thing("bus", 3, True, "black"),))),
        ("a photo of a carrot left of an orange", Scene((Thing("carrot"), Thing("orange")), "left of")),
        ("a photo of an orange cat", Scene((Thing("cat", colour="orange"),))),
        ("a photo of a bowl and a pizza", Scene((Thing("bowl"), Thing("pizza")))),
        (
            "a photo of a black bottle and a white refrigerator",
            Scene((Thing("bottle", colour="black"), Thing("refrigerator", colour="white"))),
        ),
        ("a photo of a dog left of a cat", Scene((Thing("dog"), Thing("cat")), "left of")),
        ("a photo of a dog to the right of a cat", Scene((Thing("dog"), Thing("cat")), "right of")),
        ("a photo of a laptop below a sports ball", Scene((Thing("laptop"), Thing("sports ball")), "below")),
        ("a photo of one dining table", Scene((Thing("dining table", 1, True),))),
        (
            "a photo of two cats, a dog, and three mice",
            Scene((Thing("cat", 2, True), Thing("dog"), Thing("mouse", 3, True))),
        ),
    ],
)
def test_prompts_in_geneval_s_form_are_read(prompt, scene):
    assert parse(prompt) == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a dog",
        "a photo of dogs",
        "a photo of a dog on a beach",
        "a photo of a dog running",
        "a photo of a black and white cat",
        "a photo of a cat wearing a hat",
        "a photo of a red",
        "a photo of zero cats",
        "a photo of 99 cats",
        "a photo of a cat left of a dog above a cow",
        "a photo of a cat and a cat",
        "a photo of a very old and dusty house, oil on canvas",
        "masterpiece, a photo of a cat",
    ],
)
def test_what_says_more_or_less_is_left_alone(prompt):
    assert parse(prompt) is None


@pytest.mark.parametrize(
    ("plural", "noun"),
    [
        ("couches", "couch"),
        ("berries", "berry"),
        ("toothbrushes", "toothbrush"),
        ("potatoes", "potato"),
        ("people", "person"),
        ("sheep", "sheep"),
        ("boxes", "box"),
        ("vases", "vase"),
        ("knives", "knife"),
    ],
)
def test_several_are_looked_for_as_one(plural, noun):
    assert parse(f"a photo of two {plural}").things[0].noun == noun


LEFT, RIGHT, TOP = (0.1, 0.4, 0.3, 0.6), (0.7, 0.4, 0.9, 0.6), (0.4, 0.0, 0.6, 0.2)


def seen(*boxes, colours=None):
    """Say what was seen of a thing."""
    return Seen(torch.tensor(boxes).reshape(-1, 4), tuple(colours or [None] * len(boxes)))


@pytest.mark.parametrize(
    ("prompt", "found", "expected"),
    [
        ("a photo of a dog", [seen(LEFT)], 1.0),
        ("a photo of a dog", [seen(LEFT, RIGHT)], 1.0),
        ("a photo of a dog", [seen()], 0.0),
        ("a photo of one dog", [seen(LEFT, RIGHT)], 0.0),
        ("a photo of four dogs", [seen(LEFT, RIGHT, TOP)], 0.75),
        ("a photo of two dogs", [seen(LEFT, RIGHT, TOP)], 0.5),
        ("a photo of two red cars", [seen(LEFT, RIGHT, colours=["red", "blue"])], 0.75),
        ("a photo of a red car", [seen(LEFT, RIGHT, colours=["blue", "red"])], 0.5),
        ("a photo of a red car", [seen(colours=[])], 0.0),
        ("a photo of a dog and a cat", [seen(LEFT), seen()], 0.5),
        ("a photo of a dog left of a cat", [seen(LEFT), seen(RIGHT)], 1.0),
        ("a photo of a dog right of a cat", [seen(LEFT), seen(RIGHT)], 2 / 3),
        ("a photo of a dog above a cat", [seen(TOP), seen(RIGHT)], 1.0),
        ("a photo of a dog below a cat", [seen(TOP), seen()], 1 / 3),
    ],
)
def test_the_score_is_the_share_of_what_holds(prompt, found, expected):
    assert score(parse(prompt), found) == pytest.approx(expected)


def test_places_are_geneval_s():
    one, other = torch.tensor(LEFT), torch.tensor(RIGHT)
    assert places(one, other) == {"left of"} and places(other, one) == {"right of"}
    assert places(one, one) == set() and places(torch.tensor(TOP), one) == {"above", "right of"}
    assert places(one, one + torch.tensor([0.03, 0.0, 0.03, 0.0])) == set()


def stub(*given):
    """Make a detector that knows these boxes: (box, words of its query, how sure)."""

    def find(features, queries):
        sure = torch.tensor([[s if q == f"a photo of a {w}" else 0.0 for q in queries] for _, w, s in given])
        boxes = torch.tensor([box for box, _, _ in given])
        return boxes.expand(len(features), -1, -1), sure.expand(len(features), -1, -1)

    return find


def scored(prompt, *given):
    """Score one picture whose boxes are known."""
    scene = parse(prompt)
    return score(scene, owlv2.look(scene, torch.zeros(1, 1), stub(*given))[0])


NEAR_LEFT = (0.11, 0.41, 0.31, 0.61)


def test_known_boxes_are_counted_coloured_and_placed():
    dog, cat = (LEFT, "dog", 0.6), (RIGHT, "cat", 0.5)
    assert scored("a photo of a dog left of a cat", dog, cat) == 1
    assert scored("a photo of a cat left of a dog", dog, cat) == pytest.approx(2 / 3)
    red, blue = (LEFT, "red car", 0.5), (RIGHT, "blue car", 0.7)
    assert scored("a photo of two red cars", red, blue) == 0.75
    assert (
        scored("a photo of a blue car", red, blue) == 1 and scored("a photo of a red car", red, blue) == 0.5
    )


def test_a_box_twice_an_unsure_one_and_one_of_something_else_do_not_count():
    given = (LEFT, "dog", 0.6), (NEAR_LEFT, "dog", 0.5), (RIGHT, "dog", 0.2)
    assert scored("a photo of one dog", *given) == 1
    both = (LEFT, "dog", 0.6), (LEFT, "cat", 0.4)
    assert scored("a photo of a dog and a cat", *both) == 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("rewards")
    owlv2_folder(place, "detection", owlv2_model())
    return place


QUERIES = ["a photo of a dog", "a photo of a red cat", "dog"]


@torch.no_grad()
def test_boxes_are_transformers_own(root):
    reward, model = load_installed(root, "detection"), owlv2_model()
    pixels = reward.pictures(pictures())
    words = reward.module.tokenizer(
        QUERIES, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    ids, mask = (words[name].repeat(len(pixels), 1) for name in ("input_ids", "attention_mask"))
    own = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
    boxes, sure = reward.module.find(reward.module.see(pixels), QUERIES)
    torch.testing.assert_close(sure, own.logits.sigmoid(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((boxes[..., :2] + boxes[..., 2:]) / 2, own.pred_boxes[..., :2])
    torch.testing.assert_close(boxes[..., 2:] - boxes[..., :2], own.pred_boxes[..., 2:])
    assert sure.std() > 1e-3


@pytest.mark.parametrize("size", [(40, 50), (64, 24), (28, 28), (200, 333)])
def test_pictures_are_prepared_as_transformers_does(root, size):
    original = pytest.importorskip(
        "transformers.models.owlv2.image_processing_pil_owlv2",
        reason="a processor without torchvision: transformers 5",
    )
    reward = load_installed(root, "detection")
    side = reward.pictures.size
    own = original.Owlv2ImageProcessorPil(size={"height": side, "width": side})
    images = pictures(2, *size)
    levels = [image.mul(255).round().byte().numpy() for image in images]
    expected = own(levels, return_tensors="pt").pixel_values
    torch.testing.assert_close(reward.pictures(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shrunk_detector_scores_by_the_prompt_and_abstains_from_others(root, dtype):
    reward = load_installed(root, "detection", dtype=dtype, batch=2)
    prompts = ["a photo of two red dogs", "a dog on the beach", "a photo of a dog left of a cat"]
    scores = checked(reward, pictures(3), prompts)
    assert scores.isnan().tolist() == [False, True, False] and reward.may_abstain
    assert ((scores[[0, 2]] >= 0) & (scores[[0, 2]] <= 1)).all() and reward.noise() == 0
    assert reward.embed(pictures(3)).norm(dim=1).allclose(torch.ones(3), atol=1e-4)


def test_prompts_of_which_none_can_be_read_are_refused(root):
    reward = load_installed(root, "detection")
    reward.check_prompts(["a dog on the beach", "a photo of a dog"])
    with pytest.raises(RewardError, match="reward 'detection' can read none of the prompts; write them like"):
        reward.check_prompts(["a dog on the beach"])


def test_every_colour_is_asked_about():
    assert owlv2.queries_for(Thing("car", colour="red")) == [f"a photo of a {c} car" for c in COLOURS]
