"""Rewards that take turns on a card: each comes once, judges all that waits for it, and leaves."""

from functools import partial

import pytest
import torch

from comfy_g2rpo.rewards import Reward
from comfy_g2rpo.rewards.clips import OfFrames
from comfy_g2rpo.rewards.protocol import embedder
from comfy_g2rpo.run import scorer as scorer_module
from comfy_g2rpo.run.diversity import describe
from comfy_g2rpo.run.scorer import Scorer
from g2rpo_trainer.model.placing import InTurn, Seat, in_turn


class Judge(Reward):
    """A reward with weights, which notes how much it is asked for at once."""

    licence, compares_across_prompts, runs_elsewhere = "Apache-2.0", True, True

    def __init__(self, name: str = "judge", group: bool = False, embeds: bool = True) -> None:
        self.name, self.needs_group, self.depends_on_batch = name, group, True
        self.module = torch.nn.Linear(3, 1)
        self.asked: list[int] = []
        self.seen: list[int] = []
        if embeds:
            self.embed = lambda images: self.module(images.mean((1, 2)))

    def score(self, images, prompts):
        self.asked.append(len(images))
        self.seen.append(self.module.weight.data_ptr())
        return self.module(images.mean((1, 2)))[:, 0]


def pictures(latents):
    return latents.movedim(1, -1)


def test_rewards_take_turns_on_the_card():
    """Each comes once for all the pictures, the one with the features last; nothing is copied back."""
    seat = Seat(torch.device("cpu"))
    judges = Judge("first"), Judge("compares", group=True, embeds=False), Judge("other")
    alone = [InTurn(judge, seat) for judge in judges]
    homes = [[home.data_ptr() for home in each.homes] for each in alone]
    assert all(each.takes_turns and not each.runs_elsewhere for each in alone)
    latents = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    places = [p for p in range(3) for _ in range(4)], [*range(4)] * 3
    found = []
    for rewards in (judges, alone):
        look = partial(describe, embed=embedder(rewards))
        with Scorer(pictures, rewards, ["a", "b", "c"], 4, batch=2, describe=look) as scorer:
            scorer(*places, latents)
        found.append(scorer)
    assert torch.allclose(found[0].scores, found[1].scores, atol=1e-6) and not found[1].scores.isnan().any()
    assert torch.allclose(found[0].features["embed"], found[1].features["embed"], atol=1e-6)
    assert [each.moves for each in alone] == [1, 1, 1] and seat.holder is None
    assert judges[0].asked[-1] == judges[2].asked[-1] == 12 and judges[1].asked[-3:] == [4, 4, 4]
    assert [[weight.data_ptr() for weight in each.weights] for each in alone] == homes
    # A copy judged.
    assert all(judge.seen[-1] not in home for judge, home in zip(judges, homes, strict=True))


def test_pictures_that_wait_for_a_turn_are_few(monkeypatch):
    monkeypatch.setattr(scorer_module, "MAX_WAITING", 3 * 4 * 4 * 3)
    monkeypatch.setattr(scorer_module, "AT_ONCE", 4 * 4 * 4 * 3 * 2)
    alone = InTurn(Judge(), Seat(torch.device("cpu")))
    with Scorer(pictures, [alone], ["a"] * 10, 1, batch=1) as scorer:
        scorer([*range(10)], [0] * 10, torch.rand(10, 3, 4, 4))
    assert alone.moves == 3 and alone.reward.asked == [2, 2, 2, 2, 2]


def test_a_reward_is_asked_for_so_many_pictures_at_most(monkeypatch):
    monkeypatch.setattr(scorer_module, "MOST_AT_ONCE", 4)
    alone = InTurn(Judge(), Seat(torch.device("cpu")))
    with Scorer(pictures, [alone], ["a"] * 10, 1, batch=3) as scorer:
        scorer([*range(10)], [0] * 10, torch.rand(10, 3, 4, 4))
    assert alone.moves == 1 and alone.reward.asked == [3, 3, 4]


def test_a_reward_that_took_its_turn_leaves_when_the_rollout_fails():
    seat = Seat(torch.device("cpu"))
    alone = InTurn(Judge(), seat)
    with pytest.raises(KeyboardInterrupt), Scorer(pictures, [alone], ["a"], 1):
        alone.score(torch.rand(1, 4, 4, 3), ["a"])
        raise KeyboardInterrupt
    assert seat.holder is None


def test_how_a_reward_judges_clips_outlives_its_turns():
    assert InTurn(OfFrames(Judge(), "min"), Seat(torch.device("cpu"))).frames == "min"


class OnCard(torch.nn.Linear):
    """Weights on a device that comes to the processor with new numbers, for want of a second one."""

    def to(self, device):
        return self.to_empty(device=device)


def test_a_reward_with_weights_on_a_card_takes_turns():
    judge = Judge()
    judge.module = OnCard(3, 1, device="meta")
    alone = in_turn(judge, Seat(torch.device("cpu")))
    assert isinstance(alone, InTurn) and alone.name == "judge"
    assert all(weight.device.type == "cpu" for weight in alone.weights)


def test_a_reward_without_weights_on_a_card_is_left_as_it_is():
    judge = Judge()
    assert in_turn(judge, Seat(torch.device("cpu"))) is judge


def test_how_far_scores_of_one_look_lie_apart_is_measured_on_the_card_once():
    seat, places = Seat(torch.device("cpu")), []
    judge = Judge()
    judge.noise = lambda: places.append(seat.holder) or 0.25
    alone = InTurn(judge, seat)
    assert alone.noise() == alone.noise() == 0.25
    assert places == [alone] and seat.holder is None


def test_a_measurement_that_fails_leaves_the_card():
    seat, judge = Seat(torch.device("cpu")), Judge()

    def fails() -> float:
        raise RuntimeError

    judge.noise = fails
    with pytest.raises(RuntimeError):
        InTurn(judge, seat).noise()
    assert seat.holder is None
