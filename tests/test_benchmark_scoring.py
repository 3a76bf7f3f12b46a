"""The scoring benchmark times what it says: every picture in every way, and a judge elsewhere beside the
decoder.
"""

from collections.abc import Sequence

import torch
from scoring import BATCH, CONTEXT, VOCABULARY, Elsewhere, Words, rate
from torch import Tensor

from comfy_g2rpo.rewards import Reward


class Costly(Reward):
    """A reward that takes a second per call and one per picture, on a clock of its own."""

    name, licence, compares_across_prompts = "costly", "", True

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, int]] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Let time pass."""
        self.calls.append((len(images), len(set(prompts))))
        self.now += 1 + len(images)
        return images.mean((1, 2, 3))


def test_a_rate_is_pictures_by_the_clock_in_every_way() -> None:
    reward = Costly()
    found = rate("costly", reward, torch.zeros(2 * BATCH, 1, 1, 3), 2, lambda: reward.now)
    assert (found.alone, found.group, found.prompts) == (0.5, BATCH / (BATCH + 1), BATCH / (BATCH + 1))
    assert set(reward.calls) == {(2, 1), (1, 1), (BATCH, 1), (BATCH, BATCH)}
    assert sum(count for count, _ in reward.calls[1:]) == 2 * 3 * 2 * BATCH
    assert "1.94×" in found.line()


def test_words_are_tokens_that_end_with_the_highest() -> None:
    tokens = Words()(["a red circle", "x " * 200]).input_ids
    assert tokens.shape == (2, CONTEXT)
    assert tokens.max(1).values.tolist() == [VOCABULARY - 1] * 2
    assert tokens.argmax(1).tolist() == [4, CONTEXT - 1]


def test_the_judge_elsewhere_says_where_it_is() -> None:
    assert Elsewhere(True).runs_elsewhere
    assert not Elsewhere(False).runs_elsewhere
