"""What a run remembers of prompts and scores, and what it chooses by that; formulas written out again."""

import math
import random
import threading
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_run import config, prepare

from comfy_g2rpo.curriculum.prompt_choice import choice_cost, choose_prompts, process_order
from comfy_g2rpo.curriculum.prompt_history import (
    History,
    by_signal,
    check_baseline,
    global_advantages,
    nearest,
    spreads,
)
from comfy_g2rpo.methods.step_choice import drawn_steps
from comfy_g2rpo.prompts import Prompt, PromptCursor
from comfy_g2rpo.recipes import RECIPES, chosen_steps, recipe
from comfy_g2rpo.run.setup import World, make_learner

WORDS = [f"prompt {i}" for i in range(7)]


def published(rewards, mean, variance, clamp):
    """AdaGRPO's published advantage of one group against the baseline, in numpy."""
    z = (np.asarray(rewards, dtype=np.float64) - mean) / (math.sqrt(max(variance, 1e-8)) + 1e-8)
    up, down = z[z > 0].sum(), np.abs(z[z < 0]).sum()
    one_sided = up < 1e-6 or down < 1e-6
    return np.clip(z - z.mean() if one_sided else np.where(z > 0, z / up, z / down), -clamp, clamp)


@pytest.mark.parametrize("decay", [0.8, 0.0, 0.99])
def test_the_baseline_moves_as_published(decay):
    batches = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(1)) * 3 + 1
    history, mean, variance = History(), None, None
    for batch in batches:
        history = history.with_scores(batch, decay)
        for_numpy = batch.double().flatten(1).numpy()
        found = for_numpy.mean(1), for_numpy.var(1)
        mean = found[0] if mean is None else decay * mean + (1 - decay) * found[0]
        variance = found[1] if variance is None else decay * variance + (1 - decay) * found[1]
        assert history.mean == pytest.approx(mean, abs=1e-12)
        assert history.variance == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("missing", [[0], [0, 1, 2]])
def test_scores_that_are_missing_move_nothing(missing):
    first = History().with_scores(torch.tensor([[1.0, 2.0, 3.0]]), 0.8)
    scores = torch.tensor([[5.0, 6.0, 7.0]])
    scores[0, missing] = torch.nan
    known = [5.0, 6.0, 7.0][len(missing) :]
    moved = first.with_scores(scores, 0.8)
    assert moved.mean[0] == pytest.approx(0.8 * 2 + 0.2 * np.mean(known) if known else 2.0)


@pytest.mark.parametrize("mean", [0.0, 0.4, -9.0, 9.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_global_advantage_is_the_published_one(mean, seed):
    rewards = torch.randn(1, 3, 6, 1, generator=torch.Generator().manual_seed(seed))
    history = History(mean=(mean,), variance=(0.5,))
    found = global_advantages(history, rewards, [1.0])
    expected = np.stack([published(group[:, 0], mean, 0.5, 5.0) for group in rewards[0]])
    assert np.abs(found.numpy() - expected).max() < 1e-6
    assert found.sum(1).abs().max() < 1e-6


def test_several_rewards_and_strides_add_up_and_what_is_missing_is_left_out():
    rewards = torch.randn(2, 1, 5, 2, generator=torch.Generator().manual_seed(3))
    history = History(mean=(0.1, -0.2), variance=(1.0, 4.0))
    parts = [
        weight * published(rewards[r, 0, :, level], history.mean[r], history.variance[r], 5.0)
        for r, weight in enumerate((1.0, 2.0))
        for level in range(2)
    ]
    assert np.abs(global_advantages(history, rewards, [1.0, 2.0])[0].numpy() - sum(parts)).max() < 1e-6
    rewards[:, :, 1] = torch.nan
    found = global_advantages(history, rewards, [1.0, 0.0])[0]
    rest = published(rewards[0, 0, [0, 2, 3, 4], 0], 0.1, 1.0, 5.0) + published(
        rewards[0, 0, [0, 2, 3, 4], 1], 0.1, 1.0, 5.0
    )
    assert found[1] == 0 and found[[0, 2, 3, 4]].numpy() == pytest.approx(rest, abs=1e-6)
    equal = torch.full((1, 1, 4, 1), 0.3)
    assert (global_advantages(History(mean=(0.0,), variance=(1.0,)), equal, [1.0]) == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_candidate_nearest_to_the_mean_is_taken(seed):
    scores = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(seed))
    history = History(mean=(0.3,), variance=(2.0,))
    expected = [int(np.argmin(np.abs(row.numpy() - 0.3))) for row in scores[0]]
    assert nearest(history, scores, [1.0]) == expected
    scores[0, 0, expected[0]] = torch.nan
    assert nearest(history, scores, [1.0])[0] != expected[0]


@pytest.mark.parametrize(("per_step", "count"), [(1, 5), (2, 7), (3, 7), (4, 2)])
def test_every_prompt_comes_though_half_are_drawn_by_their_signal(per_step, count):
    cursor, history, seen = PromptCursor(WORDS[:count], per_step, 3), History(), Counter()
    steps = -(-2 * count // per_step) + 1
    for step in range(steps):
        places = by_signal(cursor, step, history, [1.0])
        assert len(places) == per_step and places == by_signal(cursor, step, history, [1.0])
        spread = torch.tensor([[float(place == 1) for place in places]])
        history = history.with_spreads(places, spread)
        seen.update(places)
    assert set(seen) == set(range(count))


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("per_step", [2, 3, 5])
def test_a_step_takes_no_prompt_twice_while_there_are_others(per_step, spread):
    history, cursor = History({place: (spread,) for place in range(7)}), PromptCursor(WORDS, per_step, 1)
    for step in range(7 // per_step * 2):
        places = by_signal(cursor, step, history, [1.0])
        assert len(set(places)) == per_step
    assert by_signal(PromptCursor(WORDS[:1], 3, 1), 1, History({0: (spread,)}), [1.0]) == [0, 0, 0]


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, -2.0], [1.0, 1.0]])
def test_draws_by_signal_follow_the_spread(weights):
    table = {0: (1.0, 4.0), 3: (3.0, 4.0), 5: (0.0, 0.0)}
    history, cursor = History(table), PromptCursor(WORDS, 1, 0)
    odd = Counter(by_signal(cursor, step, history, weights)[0] for step in range(1, 8001, 2))
    scale = [sum(row[r] for row in table.values()) / 3 for r in range(2)]
    worth = {p: sum(abs(w) * row[r] / scale[r] for r, w in enumerate(weights)) for p, row in table.items()}
    for place, one in worth.items():
        assert odd[place] / 4000 == pytest.approx(one / sum(worth.values()), abs=0.03)
    even = [by_signal(cursor, step, history, weights)[0] for step in range(0, 14, 2)]
    assert sorted(even) == list(range(7))


def test_the_spread_of_a_group_is_its_standard_deviation():
    rewards = torch.tensor([[[[1.0], [3.0]], [[2.0], [2.0]]], [[[0.0], [0.1]], [[5.0], [5.1]]]])
    found = spreads([rewards, rewards * 2], [0.0, 1.0])
    assert found[0].tolist() == pytest.approx([2**0.5 / 2, 2**0.5])
    assert found[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "prompts", [WORDS, WORDS[::-1], [Prompt("a", {"image": "x"}), *WORDS[1:]], [*WORDS, "another"]]
)
def test_a_checkpoint_brings_it_back_bit_by_bit_for_the_same_prompts(prompts):
    import json

    history = History({0: (0.1, 1 / 3), 4: (2e-9, 0.0)}, (0.1, 0.7), (1 / 3, 2.0))
    table = json.loads(json.dumps(history.table(WORDS)))
    found = History.of(table, prompts, 2)
    assert found == (history if prompts is WORDS else replace(history, spread={}))
    assert History.of(table, WORDS, 1) == History()


@pytest.mark.parametrize(
    "table", [None, 3, {}, {"mean": [1], "variance": "x", "spread": 7}, {"spread": [[9e9]]}]
)
def test_a_checkpoint_without_it_begins_anew(table):
    assert History.of(table, WORDS, 1) == History()


@pytest.mark.parametrize("shares", [(0.017, 0.026, 0.009, 0.009), (1.0, 0.0, 0.0, 3.0), (5.0, 5.0, 5.0, 5.0)])
def test_steps_are_drawn_in_proportion_to_their_shares(shares):
    made = recipe("g2rpo", num_steps=8, pick="random", step_share=shares)
    drawn = Counter(chosen_steps(made, 0, random.Random(seed))[0] for seed in range(6000))
    for step, share in enumerate(shares):
        assert drawn[step] / 6000 == pytest.approx(share / sum(shares), abs=0.025)


def test_several_steps_are_drawn_without_putting_back():
    drawn = Counter(tuple(drawn_steps([0, 1, 2], 2, (1.0, 2.0, 3.0), random.Random(i))) for i in range(6000))
    # P{0,1} = 1/6·2/5 + 2/6·1/4, and so on.
    assert drawn[0, 1] / 6000 == pytest.approx(1 / 6 * 2 / 5 + 2 / 6 * 1 / 4, abs=0.02)
    assert drawn[1, 2] / 6000 == pytest.approx(2 / 6 * 3 / 4 + 3 / 6 * 2 / 3, abs=0.02)
    assert drawn_steps([3, 5, 7], 2, None, random.Random(1)) == sorted(random.Random(1).sample([3, 5, 7], 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step_share": (1.0, 1.0)}, "choose pick: random"),
        ({"pick": "random", "step_share": (1.0, 1.0)}, "2 numbers for 8 steps"),
        ({"pick": "random", "pick_size": 2, "step_share": (1.0, *[0.0] * 7)}, "1 numbers above 0"),
        ({"pick": "random", "step_share": (-1.0, *[0.0] * 7)}, "step_share is"),
        ({"prompt_choice": "best"}, "choose one of"),
        ({"candidates": 1}, "between 2 and 1024"),
        ({"baseline_decay": 1.0}, "baseline_decay is"),
        ({"global_advantage": 1.0, "credit": "gain", "granularities": (1,), "tree": "independent"}, "'gain'"),
        ({"objective": "pairs", "prompt_choice": "signal"}, "prompt_choice is signal"),
    ],
)
def test_what_cannot_be_chosen_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        recipe("g2rpo", **changes)


@pytest.mark.parametrize("changes", [{"prompt_choice": "curriculum"}, {"global_advantage": 1.0}])
def test_a_baseline_needs_a_reward_that_judges_single_pictures(changes):
    crowd, alone = (SimpleNamespace(name=n, needs_group=n == "crowd") for n in ("crowd", "alone"))
    with pytest.raises(ValueError, match="crowd judges whole groups only"):
        check_baseline(recipe("g2rpo", **changes), [crowd])
    check_baseline(recipe("g2rpo", **changes), [crowd, alone])
    check_baseline(recipe("g2rpo"), [crowd])


@pytest.mark.parametrize("name", RECIPES)
def test_only_a_curriculum_costs_anything(name):
    assert choice_cost(RECIPES[name]) == ((160, 10) if name == "ada_grpo" else (0, 0))


@pytest.mark.parametrize("choice", ["curriculum", "signal"])
def test_processes_choose_what_one_chooses(tmp_path, choice):
    """Two threads stand for two processes; each looks at its share of the candidates."""
    method = {"name": "g2rpo", "prompt_choice": choice, "candidates": 3}
    made = config(tmp_path, method=method, train={"prompts_per_step": 3})
    (tmp_path / "train.txt").write_text("\n".join(f"{i} red circles" for i in range(9)))
    remembered = History({i: (float(i),) for i in range(9)})
    setup = prepare(made)
    learner = make_learner(setup)
    learner.history = remembered
    alone = choose_prompts(setup, learner, lambda: None)
    meet, shared, found = threading.Barrier(2), {}, {}

    def part(index):
        def gather(scores):
            shared[index] = scores
            meet.wait(60)
            return torch.cat([shared[0], shared[1]], 1)

        own = replace(setups[index], world=World(index, 2, gather))
        mind = make_learner(own)
        mind.history = remembered
        found[index] = choose_prompts(own, mind, lambda: None)
        assert process_order(own) == [0, 2, 1]

    setups = [setup, prepare(made)]
    threads = [threading.Thread(target=part, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found.values():
        assert list(each.places) == list(alone.places)
        assert each.history.mean == pytest.approx(alone.history.mean, abs=1e-6)
    assert sum(each.nfe for each in found.values()) == alone.nfe
