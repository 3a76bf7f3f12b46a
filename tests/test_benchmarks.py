"""The benchmarks measure what they say: the plain loops' cost and results, and the estimators."""

from multiprocessing.connection import Listener
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from credit import explained, nested
from graph import in_turn
from plain import PlainLoop
from rollout import ROOT, differences, load_policy
from stopwatch import Stopwatch
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.plan import singular
from comfy_g2rpo.rewards import Rule
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.schedule import shifted_sigmas

BRIGHTNESS = Rule("brightness", lambda images, prompts: images.mean((1, 2, 3)), compares_across_prompts=False)


def decode(latents):
    """Turn latents [B, 2, 3, 3] into pictures [B, 3, 3, 3]."""
    return latents[:, :1].sigmoid().permute(0, 2, 3, 1).expand(-1, 3, 3, 3)


def loop(plan):
    return PlainLoop(
        ToyPolicy(), decode, [BRIGHTNESS], plan, shifted_sigmas(plan.num_steps), "a prompt", 0.3, 11, SHAPE
    )


@pytest.mark.parametrize(
    "granularities, forwards", [((1,), 1216), ((1, 2), 1792), ((1, 3), 1612), ((1, 2, 3), 2188)]
)
def test_the_published_loop_spends_what_the_published_code_spends(granularities, forwards):
    plain = loop(singular(16, range(8), 12, granularities, terminal="published"))
    plain.as_published()
    assert plain.forwards == forwards


def test_the_batched_loop_shares_the_anchor_and_nothing_else():
    plain = loop(singular(16, range(8), 12, (1, 2), terminal="published"))
    plain.batched()
    assert plain.forwards == 8 + 1104 + 576
    assert set(plain.policy.calls) == {1, 12}


@pytest.mark.parametrize("terminal", ["published", "exact"])
def test_all_ways_score_alike(terminal):
    plan = singular(8, range(4), 5, (1, 2, 3), terminal=terminal)
    scorer = Scorer(decode, [BRIGHTNESS], ["a prompt"], len(plan.images))
    roll_out(ToyPolicy(), plan, shifted_sigmas(8), [0.3], [11], SHAPE, sink=scorer)
    for scores in (loop(plan).as_published(), loop(plan).batched()):
        assert torch.allclose(scores, scorer.scores[:, 0], atol=1e-5)


def test_in_float64_all_ways_of_the_rollout_benchmark_give_the_same_rewards():
    policy = load_policy(ROOT / "models/tiny", torch.float64)
    assert set(differences(policy, singular(4, range(2), 3, (1, 2))).values()) == {0.0}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_explained_share_of_made_up_rewards_is_found(share):
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(500, 8, 1, generator=generator), torch.randn(500, 8, 4, generator=generator)
    assert explained(share**0.5 * own + (1 - share) ** 0.5 * other).item() == pytest.approx(share, abs=0.03)


def test_repeats_share_the_noise_of_one_step_alone():
    plan = nested(4, 1, values=3, repeats=2)
    noise = [[plan.states[parent].noise for parent in path(plan, image)] for image in plan.images]
    for first, second in zip(noise[::2], noise[1::2], strict=True):
        assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True, False, True]


def path(plan, state):
    """List the states from the root to a state."""
    return (path(plan, plan.states[state].parent) if plan.states[state].parent >= 0 else []) + [state]


@pytest.mark.parametrize("lengths", [(2, 2), (1, 3), (3, 0)])
def test_two_runs_take_turns_update_by_update_and_report_what_each_cost(tmp_path, lengths):
    order = []

    def run(name, address, length):
        clock = Stopwatch(address)
        parts = {part: lambda part=part: order.append((name, part)) for part in ("iterate", "look", "save")}
        loop = SimpleNamespace(**parts)
        clock.watch(loop)
        loop.look()
        for _ in range(length):
            loop.iterate()
        loop.save()
        clock.close()

    with Listener(str(tmp_path / "a")) as one, Listener(str(tmp_path / "b")) as other:
        runs = [
            Thread(target=run, args=("ab"[i], line.address, lengths[i]))
            for i, line in enumerate((one, other))
        ]
        for each in runs:
            each.start()
        spans = in_turn(one.accept(), other.accept())
        for each in runs:
            each.join()
    kinds = [[what for what, _ in own] for own in spans]
    assert kinds == [["evaluation", *["update"] * length] for length in lengths]
    assert all(seconds >= 0 for own in spans for _, seconds in own)
    turns = [name for name, part in order if part != "save"]
    shared = 2 * (min(lengths) + 1)
    assert turns[:shared] == ["a", "b"] * (shared // 2)
