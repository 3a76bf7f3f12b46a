import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch

from comfy_g2rpo.rewards import Reward, RewardError, Rule
from comfy_g2rpo.run import scorer as scoring
from comfy_g2rpo.run.scorer import Scorer, to_8_bit

BRIGHTNESS = Rule("brightness", lambda images, prompts: images.mean((1, 2, 3)), True)
LENGTH = Rule("length", lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]), True)


def decode(latents):
    return latents.sigmoid().permute(0, 2, 3, 1)


def test_scores_land_at_their_prompt_and_image():
    scorer = Scorer(decode, [BRIGHTNESS, LENGTH], ["ab", "abcd"], 3, batch=2)
    latents = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scorer([0, 1, 1], [2, 0, 1], latents)
    assert scorer.scores[1].isnan().sum() == 3 and scorer.scores[1, 0, 2] == 2 and scorer.scores[1, 1, 0] == 4
    assert torch.equal(scorer.scores[0, 1, 1], to_8_bit(decode(latents[2:])).mean())


def test_only_wanted_pictures_are_kept():
    scorer = Scorer(decode, [BRIGHTNESS], ["a", "b"], 1, keep={1})
    scorer([0, 1], [0, 0], torch.zeros(2, 3, 4, 4))
    assert list(scorer.pictures) == [(1, 0)] and scorer.pictures[1, 0].shape == (4, 4, 3)


def test_what_is_judged_is_what_a_file_would_hold():
    images = to_8_bit(torch.tensor([-0.1, 0.5, 1.2]))
    assert torch.equal(images, torch.tensor([0.0, 128 / 255, 1.0]))


def test_a_batch_that_is_not_finite_is_not_judged():
    scorer = Scorer(lambda latents: latents.permute(0, 2, 3, 1), [BRIGHTNESS], ["a"], 1)
    scorer([0], [0], torch.full((1, 3, 4, 4), torch.nan))
    assert scorer.scores.isnan().all()


def test_the_check_runs_before_every_batch():
    count = []
    Scorer(decode, [BRIGHTNESS], ["a"] * 3, 1, batch=1, check=lambda: count.append(1))(
        [0, 1, 2], [0, 0, 0], torch.zeros(3, 3, 4, 4)
    )
    assert len(count) == 3


class Elsewhere(Reward):
    """A reward on another device: each call waits until it is let go, and notes its thread."""

    name, licence, compares_across_prompts, runs_elsewhere = "elsewhere", "", True, True

    def __init__(self, free=True):
        self.go, self.entered, self.threads = threading.Event(), threading.Event(), set()
        if free:
            self.go.set()

    def cancel(self):
        self.go.set()

    def score(self, images, prompts):
        self.threads.add(threading.current_thread())
        self.entered.set()
        self.go.wait(30)
        assert not torch.is_grad_enabled()
        return images.mean((1, 2, 3))


@dataclass
class Rank(Reward):
    """A reward that must see a whole group: each picture's place by brightness."""

    runs_elsewhere: bool = False
    name, licence, compares_across_prompts, needs_group = "rank", "", False, True
    seen: list = field(default_factory=list)

    def score(self, images, prompts):
        self.seen.append((tuple(prompts), images.clone()))
        return images.mean((1, 2, 3)).argsort().argsort().float()


def latents_of(count, seed=0):
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_a_reward_that_runs_elsewhere_scores_beside_the_decoding():
    slow = Elsewhere(free=False)
    with Scorer(decode, [BRIGHTNESS, slow], ["a", "b"], 3, batch=2) as scorer:
        scorer([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2], latents_of(6))
        assert scorer.scores[0].isfinite().all() and scorer.scores[1].isnan().all()
        slow.go.set()
    assert torch.equal(scorer.scores[0], scorer.scores[1])
    assert threading.current_thread() not in slow.threads and len(slow.threads) == 1
    assert not any(thread.is_alive() for thread in slow.threads)


def test_without_a_block_every_reward_answers_at_once():
    scorer = Scorer(decode, [Elsewhere(), Rank(runs_elsewhere=True)], ["a"], 2)
    before = threading.active_count()
    scorer([0, 0], [0, 1], latents_of(2))
    assert scorer.scores.isfinite().all() and threading.active_count() == before


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_group_comes_whole_and_in_order_however_it_arrives(elsewhere):
    latents, rank = latents_of(6), Rank(elsewhere)
    with Scorer(decode, [rank], ["a", "b"], 3, batch=2) as scorer:
        scorer([0, 1, 1, 0, 0, 1], [2, 0, 1, 0, 1, 2], latents)
    expected = {"a": latents[[3, 4, 0]], "b": latents[[1, 2, 5]]}
    for prompts, images in rank.seen:
        assert torch.equal(images, to_8_bit(decode(expected[prompts[0]]))) and prompts == (prompts[0],) * 3
    assert len(rank.seen) == 2 and torch.equal(
        scorer.scores[0].sort(1).values, torch.tensor([[0.0, 1, 2]] * 2)
    )
    assert scorer.scores[0, 0].argmax() == decode(expected["a"]).mean((1, 2, 3)).argmax()


def test_a_broken_picture_is_left_out_of_its_group():
    latents, rank = latents_of(3), Rank()
    latents[1] = torch.nan
    scorer = Scorer(decode, [rank], ["a"], 3)
    scorer([0, 0, 0], [0, 1, 2], latents)
    assert [len(images) for _, images in rank.seen] == [2] and scorer.scores[0, 0].isnan().tolist() == [
        False,
        True,
        False,
    ]


def test_what_waits_for_a_group_is_held_in_a_quarter_of_the_memory():
    scorer = Scorer(decode, [Rank()], ["a"], 3)
    scorer([0, 0], [0, 1], latents_of(2))
    assert [levels.dtype for levels in scorer._whole.known[0, 0].values()] == [torch.uint8] * 2


def test_a_failure_elsewhere_surfaces_here_as_an_error_that_names_the_reward():
    broken = Elsewhere()
    broken.score = lambda images, prompts: 1 / 0
    with (
        pytest.raises(RewardError, match="reward 'elsewhere' failed with ZeroDivisionError"),
        Scorer(decode, [broken], ["a"], 1) as scorer,
    ):
        scorer([0], [0], latents_of(1))


@pytest.mark.parametrize("when", ["while rolling", "while waiting"])
def test_a_stop_breaks_the_call_off_and_leaves_no_thread(when):
    slow, before, calls = Elsewhere(free=False), threading.active_count(), []

    def check():
        calls.append(1)
        if len(calls) > 2 and slow.entered.wait(30):
            raise KeyboardInterrupt

    begin = time.perf_counter()
    scorer = Scorer(decode, [slow], ["a"] * 6, 1, batch=1, check=check)
    with pytest.raises(KeyboardInterrupt), scorer:
        count = 6 if when == "while rolling" else 2
        scorer(list(range(count)), [0] * count, latents_of(count))
    assert threading.active_count() == before and time.perf_counter() - begin < 10


def test_the_rollout_waits_when_too_many_pictures_do(monkeypatch):
    slow, decoded = Elsewhere(free=False), []
    monkeypatch.setattr(scoring, "MAX_WAITING", 2 * 4 * 4 * 3)
    with Scorer(
        lambda latents: decoded.append(1) or decode(latents), [slow], ["a"] * 6, 1, batch=1
    ) as scorer:
        thread = threading.Thread(target=scorer, args=(list(range(6)), [0] * 6, latents_of(6)))
        thread.start()
        slow.entered.wait(30)
        thread.join(0.5)
        assert thread.is_alive() and len(decoded) == 3
        slow.go.set()
        thread.join(30)
    assert scorer.scores.isfinite().all()


def test_time_elsewhere_counts_only_where_it_is_waited_for():
    slow = Elsewhere(free=False)
    threading.Timer(0.3, slow.go.set).start()
    with Scorer(decode, [slow], ["a"], 1) as scorer:
        scorer([0], [0], latents_of(1))
        time.sleep(0.5)
    assert scorer.seconds["reward"] < 0.25


def test_the_next_pictures_are_decoded_while_a_reward_judges_the_last():
    latents, scores, overlapped = latents_of(16), [], []
    for beside in (False, True):
        decoded, judged = [], []

        def decoding(part, decoded=decoded):
            decoded.append(len(part))
            return decode(part)

        def judging(images, prompts, decoded=decoded, judged=judged, beside=beside):
            judged.append(len(images))
            end = time.monotonic() + 30
            while beside and len(judged) < 8 and len(decoded) <= len(judged) and time.monotonic() < end:
                time.sleep(0.001)
            overlapped.append(len(decoded) > len(judged))
            return images.mean((1, 2, 3))

        far = Elsewhere()
        far.score = judging
        scorer = Scorer(decoding, [far], [""] * 16, 1, batch=2)
        with scorer if beside else nullcontext():
            scorer(list(range(16)), [0] * 16, latents)
        scores.append(scorer.scores)
    assert torch.equal(*scores)
    assert overlapped == [False] * 8 + [True] * 7 + [False]
