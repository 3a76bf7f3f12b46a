"""What the watch notices, from evaluations made by hand: each sign, what is no sign, patience, and the
best step.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.run.evaluation import Evaluation, interval
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.watch import (
    SIGNS,
    Seen,
    best_step,
    blind_spots,
    evaluated,
    gained,
    rising,
    sign_row,
    signs,
    together,
    unit,
)

PROMPTS = 16
WIGGLE = torch.linspace(-1, 1, PROMPTS)  # its standard deviation is .635


def evaluation(proxy=0.0, held=0.0, proxy_wiggle=0.0, held_wiggle=0.0, **rest):
    """Make an evaluation of a trained reward and one that only measures: base scores spread by prompt,
    plus a change of that mean.
    """
    change = torch.stack([proxy + proxy_wiggle * WIGGLE.flip(0), held + held_wiggle * WIGGLE.flip(0)])
    scores = (WIGGLE + change)[:, :, None].repeat(1, 1, 2)
    return Evaluation(("proxy", "held"), tuple(map(str, range(PROMPTS))), scores, **rest)


def seen(now, best=None, best_step=0, weights=None, rows=(), base=None, **pace):
    base = base or evaluation()
    return Seen(base, best or base, now, best_step, weights or {"proxy": 1.0}, Pace(**pace), rows)


def steps(first, last, count=20):
    """Write training rows whose reward goes evenly from first to last, with a little noise."""
    noise = [0.01 * (-1) ** i for i in range(count)]
    return [
        {"step": i + 1, "nfe": 1, "reward/proxy/mean": first + (last - first) * i / (count - 1) + noise[i]}
        for i in range(count)
    ]


def test_the_interval_is_students():
    mean, width = interval(torch.tensor([1.0, 2.0, 3.0, torch.nan]))
    assert mean == 2 and width == pytest.approx(4.302653 * 1 / math.sqrt(3))
    assert math.isnan(interval(torch.tensor([1.0]))[1])


def test_changes_are_measured_in_standard_deviations_of_the_untrained_model():
    base = evaluation()
    assert unit(base, "held") == pytest.approx(WIGGLE.std().item())
    assert gained(seen(base), base, evaluation(proxy=0.5)).mean == pytest.approx(0.5 / WIGGLE.std().item())
    flat = Evaluation(("r",), ("a", "b"), torch.ones(1, 2, 1))
    assert unit(flat, "r") == 1


def test_trained_rewards_count_by_their_weights_and_a_negative_one_turns_round():
    change = torch.tensor([[1.0] * PROMPTS, [2.0] * PROMPTS])
    std = WIGGLE.std().item()
    assert together(evaluation(), {"proxy": 3.0, "held": -1.0}, change)[0] == pytest.approx(
        (3 * 1 - 1 * 2) / std / 4
    )


def test_a_held_out_fall_while_the_trained_reward_rises_is_hacking():
    found = signs(seen(evaluation(proxy=0.5, held=-0.4, proxy_wiggle=0.1, held_wiggle=0.1)))
    assert found.keys() == {"hacking"}
    assert found["hacking"] == (
        "held-out held fell by 0.4 ± 0.034 against the untrained model while what is trained on, "
        "proxy, rose: the model games its reward"
    )


def test_a_fall_since_the_best_step_is_hacking_even_above_the_untrained_model():
    best = evaluation(proxy=0.5, held=0.8)
    now = evaluation(proxy=0.9, held=0.4, held_wiggle=0.1)
    assert "since step 40" in signs(seen(now, best, 40))["hacking"]


@pytest.mark.parametrize(
    ("what", "now"),
    [
        ("both rise", {"proxy": 0.5, "held": 0.3}),
        ("nothing changes", {}),
        ("the fall is small", {"proxy": 0.5, "held": -0.03}),
        ("the fall may be chance", {"proxy": 0.5, "held": -0.3, "held_wiggle": 1.5}),
        ("the rise may be chance", {"proxy": 0.3, "proxy_wiggle": 1.5, "held": -0.4}),
        ("the trained reward falls a little, too", {"proxy": -0.03, "held": -0.4}),
    ],
)
def test_it_is_no_sign_if(what, now):
    assert signs(seen(evaluation(**now))) == {}


def test_a_fall_must_be_as_large_as_min_fall():
    now = evaluation(proxy=0.5, held=-0.4)
    assert signs(seen(now, min_fall=0.62)) and not signs(seen(now, min_fall=0.64))


def test_two_prompts_are_too_few_to_be_sure():
    base, now = (
        dataclasses.replace(e, prompts=("a", "b"), scores=e.scores[:, :2])
        for e in (evaluation(), evaluation(0.5, -0.4, 0.1, 0.5))
    )
    assert signs(seen(now, base=base)) == {}


def test_a_reward_that_is_trained_against_may_fall():
    weights = {"proxy": 1.0, "held": -1.0}
    assert signs(seen(evaluation(proxy=0.5, held=-0.5), weights=weights)) == {}
    assert signs(seen(evaluation(held=0.5), weights={"held": -1.0}, rows=steps(0, -1))).keys() == {
        "unlearning"
    }


def test_a_reward_that_only_measures_may_have_no_say_or_be_better_when_it_falls():
    fallen, risen = evaluation(proxy=0.5, held=-0.4), evaluation(proxy=0.5, held=0.4)
    assert signs(dataclasses.replace(seen(fallen), measures={"held": 0.0})) == {}
    assert signs(dataclasses.replace(seen(fallen), measures={"held": -2.0})) == {}
    assert (
        "held-out held rose by 0.4"
        in signs(dataclasses.replace(seen(risen), measures={"held": -2.0}))["hacking"]
    )
    rows = [look(0, proxy=0.0, held=0.5), look(1, proxy=0.2, held=0.4), look(2, proxy=0.1, held=0.6)]
    assert [best_step(rows, {"proxy": 1.0}, {"held": say}) for say in (1.0, 0.0, -1.0)] == [2, 1, 1]


def test_a_rise_in_training_with_a_fall_on_held_out_prompts_is_memorising():
    fallen = evaluation(proxy=-0.3)
    assert signs(seen(fallen, rows=steps(0, 1))).keys() == {"memorising"}
    assert signs(seen(fallen, rows=steps(0, -1))).keys() == signs(seen(fallen)).keys() == {"unlearning"}


def test_a_trend_needs_ten_steps_and_more_than_noise():
    assert rising(steps(0, 1), {"proxy": 1.0}) and not rising(steps(0, 1), {"proxy": -1.0})
    assert not rising(steps(0, 1, 9), {"proxy": 1.0}) and not rising(steps(0, 0), {"proxy": 1.0})


def test_a_rise_with_exploration_noise_alone_is_a_sign():
    flat, gap = torch.zeros(2, PROMPTS), torch.full((2, PROMPTS), 0.4)
    base = evaluation(noisy=flat)
    assert signs(seen(evaluation(noisy=gap), base=base)).keys() == {"noise"}
    assert signs(seen(evaluation(proxy=0.5, noisy=gap), base=base)) == {}
    assert signs(seen(evaluation(noisy=flat), base=base)) == {}


@pytest.mark.parametrize("key", ["pixels/group", "pixels/set", "embed/set"])
def test_pictures_that_have_become_alike_are_a_sign(key):
    base = evaluation(spread={key: torch.full((PROMPTS,), 0.5) + 0.1 * WIGGLE})
    left = {share: evaluation(spread={key: share * base.spread[key]}) for share in (0.4, 0.6)}
    assert "40% of the untrained model's diversity is left" in signs(seen(left[0.4], base=base))["collapse"]
    assert signs(seen(left[0.6], base=base)) == {} == signs(seen(left[0.4], base=base, min_diversity=0))
    assert signs(seen(left[0.6], base=base, min_diversity=0.7)).keys() == {"collapse"}


def test_a_rise_at_the_training_size_with_a_fall_at_the_preview_size_is_a_sign():
    base = evaluation(preview=evaluation())
    assert signs(seen(evaluation(proxy=0.5, preview=evaluation(proxy=-0.3)), base=base)).keys() == {"size"}
    assert signs(seen(evaluation(proxy=0.5, preview=evaluation(proxy=0.3)), base=base)) == {}


@given(
    st.lists(st.sampled_from([(), ("hacking",), ("collapse",), ("hacking", "collapse")]), max_size=8),
    st.integers(1, 4),
)
def test_an_alarm_is_a_sign_that_has_lasted(history, patience):
    row = {}
    for i, kinds in enumerate(history):
        row = sign_row(dict.fromkeys(kinds, "words"), row, patience)
        recent = history[max(i - patience + 1, 0) : i + 1]
        lasting = len(recent) == patience and any(all(kind in kinds for kinds in recent) for kind in SIGNS)
        assert ("alarm" in row) == lasting and ("sign" in row) == bool(kinds)


@pytest.mark.long
def test_chance_alone_hardly_ever_raises_an_alarm():
    """Nothing changes but noise, as large as the prompts' own spread: ten evaluations of a hundred runs."""
    alarms, seen_signs = 0, 0
    for run in range(100):
        generator = torch.Generator().manual_seed(run)
        base, history, row = None, [], {}
        for _ in range(10):
            now = Evaluation(
                ("proxy", "held"), tuple(map(str, range(32))), torch.randn(2, 32, 1, generator=generator)
            )
            base = base or now
            best = max([base, *history], key=lambda e: e.means()["held"])
            row = (
                sign_row(signs(Seen(base, best, now, 1, {"proxy": 1.0}, Pace())), row, Pace().patience)
                if history
                else {}
            )
            alarms, seen_signs = alarms + ("alarm" in row), seen_signs + ("sign" in row)
            history.append(now)
    assert alarms <= 5 and 0 < seen_signs < 100


@pytest.mark.parametrize(
    ("heldout", "judges", "pace", "words"),
    [
        (8, ["proxy", "held"], {"eval_every": 10}, []),
        (0, ["proxy", "held"], {"eval_every": 10}, ["without held-out prompts"]),
        (8, ["proxy", "held"], {}, ["start and the end alone"]),
        (8, ["proxy"], {"eval_every": 10}, ["no reward only measures"]),
        (8, ["proxy", "told"], {}, ["start and the end alone", "no reward only measures"]),
        (0, ["proxy"], {"watch": "off"}, []),
    ],
)
def test_what_the_watch_will_not_see_is_said_beforehand(heldout, judges, pace, words):
    found = blind_spots(Pace(**pace), heldout, judges, {"proxy": 1.0}, {"told": 0.0})
    assert len(found) == len(words) and all(word in line for word, line in zip(words, found, strict=True))


def look(step, **means):
    return (
        {"step": step}
        | {f"heldout/{n}/mean": m for n, m in means.items()}
        | {f"heldout/{n}/ci95": 0.1 for n in means}
    )


def test_the_best_step_goes_by_the_rewards_that_only_measure():
    rows = [
        look(0, proxy=0.0, held=0.5),
        {"step": 1, "nfe": 1},
        look(1, proxy=0.5, held=0.7),
        look(2, proxy=0.9, held=0.6),
    ]
    assert best_step(rows, {"proxy": 1.0}) == 1
    assert best_step(rows, {"proxy": 1.0, "held": 1.0}) == 2
    assert best_step(rows[1:2], {"proxy": 1.0}) is None and len(evaluated(rows)) == 3


def test_the_best_step_weighs_rewards_by_their_uncertainty():
    rows = [look(0, a=0.0, b=0.0), look(1, a=1.0, b=-1.0), look(2, a=-1.0, b=1.0)]
    rows[0]["heldout/a/ci95"] = 10.0
    assert best_step(rows, {}) == 2


def test_the_untrained_model_is_best_until_something_is_better():
    assert best_step([look(0, held=0.5), look(1, held=0.5), look(2, held=0.4)], {}) == 0


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {})
    scores = torch.tensor([[[0.1, torch.nan]], [[0.3, 0.4]]])
    spread = {"pixels/group": torch.tensor([0.2])}
    preview = Evaluation(("a",), ("p",), scores[:1])
    made = Evaluation(
        ("a", "b"), ("p",), scores, (), spread, torch.tensor([[0.1], [torch.nan]]), 0.5, preview
    )
    made.save(folder, 7)
    read = Evaluation.read(folder, 7)
    assert torch.equal(read.scores.nan_to_num(9), scores.nan_to_num(9)) and torch.equal(
        read.spread["pixels/group"], spread["pixels/group"]
    )
    assert (
        read.kl == 0.5 and read.noisy.isnan().tolist() == [[False], [True]] and read.preview.prompts == ("p",)
    )
    assert read.metrics()["kl/heldout"] == 0.5 and read.metrics()["diversity/pixels/group"] == pytest.approx(
        0.2
    )


def test_evaluations_of_earlier_versions_can_still_be_read():
    read = Evaluation.of({"prompts": ["p"], "scores": {"a": [[0.5]]}})
    assert (read.spread, read.noisy, read.kl, read.preview) == ({}, None, None, None)
