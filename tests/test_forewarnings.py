"""What is said before the first forward."""

import pytest

from comfy_g2rpo.prompts import Prompt, Prompts
from comfy_g2rpo.rewards import REWARDS, RewardError
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.watch import forewarnings

SHAPES = tuple(f"{number} red circles" for number in ("two", "three", "four"))
MANY = tuple(f"prompt {i}" for i in range(40))
RULE, ANY = REWARDS["agreement"], REWARDS["jpeg"]


def said(pace: dict, train: tuple[str, ...], held: tuple[str, ...], *rewards) -> list[str]:
    """Return the warnings of a run that measures by what it trains on."""
    return forewarnings(Pace(**pace), Prompts(train, held), rewards, rewards)


def test_a_sound_run_hears_nothing() -> None:
    assert said({"prompts_per_step": 3}, SHAPES, MANY, ANY) == []


@pytest.mark.parametrize(("per_step", "warned"), [(3, False), (4, True), (4096, True)])
def test_more_prompts_per_step_than_there_are(per_step: int, warned: bool) -> None:
    found = said({"prompts_per_step": per_step}, SHAPES, (), ANY)
    assert bool(found) is warned
    assert all(f"prompts_per_step is {per_step}, but there are 3 prompts" in text for text in found)


@pytest.mark.parametrize("odd", ["a cat", "", "a lighthouse at dusk, oil painting"])
def test_prompts_that_no_reward_can_judge_are_counted(odd: str) -> None:
    (text,) = said({}, (*SHAPES, odd, "two blue squares"), (), RULE)
    assert text.startswith(f"none of agreement can judge 1 of the 5 prompts to train on, such as {odd!r}")
    assert said({}, (*SHAPES, odd, "two blue squares"), (), RULE, ANY) == []


def test_a_run_that_nothing_can_judge_does_not_start() -> None:
    with pytest.raises(
        RewardError, match="none of agreement, strict can judge 5 of the 5 prompts to train on"
    ):
        said({}, ("a", "b", "c", "d", "e"), (), RULE, REWARDS["strict"])


def test_a_prompts_own_columns_count_as_readable() -> None:
    assert RULE.can_judge("a fox") is False
    assert RULE.can_judge(Prompt("a fox", {"note": "x"})) is False
    assert RULE.can_judge("a red circle left of a blue square") is True


@pytest.mark.parametrize(
    ("prompts", "pace", "warned"),
    [
        (12, {}, "0.8 spreads"),
        (12, {"eval_noises": 3}, ""),
        (40, {"eval_prompts": 4, "eval_noises": 2}, "1.0 spreads"),
        (31, {}, ""),
        (30, {}, "0.5 spreads"),
    ],
)
def test_too_few_held_out_images_are_told_with_what_they_show(prompts: int, pace: dict, warned: str) -> None:
    found = said({"prompts_per_step": 1, **pace}, SHAPES, MANY[:prompts], ANY)
    assert bool(found) is bool(warned)
    assert all(warned in text and "set eval_noises to" in text for text in found)
