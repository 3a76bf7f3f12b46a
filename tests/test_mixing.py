"""How several rewards become one advantage: every mix, its gates, and what must hold of all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.advantages import global_std, group_ranks, integrate
from comfy_g2rpo.options import MIXES
from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.rewards import REWARDS, MixedReward, RewardError, Rule, mix
from comfy_g2rpo.rewards.mixing import apply_gates, blend, mixed_advantages

every_mix = pytest.mark.parametrize("mode", MIXES)
NAN = torch.nan
HALF = 2**-0.5


def table(*rows):
    """Lay rewards out as [R, 1, G, 1]: a row per reward."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, :, None]


def advantage(rewards, weights=None, mode="zscore", gates=()):
    """Mix one group: [G]."""
    return mixed_advantages([rewards], weights or [1.0] * len(rewards), mode, gates)[0][0]


@st.composite
def problems(draw, gates=True, missing=True, least=2):
    """Draw rewards [R, K, G, L] of small whole numbers (so that ties are common), weights and gates."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(least, 6), st.integers(1, 2)))
    value = st.integers(-4, 4).map(float) | (st.just(NAN) if missing else st.nothing())
    count = torch.Size(shape).numel()
    rewards = torch.tensor(draw(st.lists(value, min_size=count, max_size=count))).reshape(shape)
    weights = draw(st.lists(st.sampled_from([1.0, 2.0, 0.5, -1.0]), min_size=shape[0], max_size=shape[0]))
    limit = (st.none() | st.sampled_from([-1.5, 0.5])) if gates else st.none()
    return rewards, weights, draw(st.lists(limit, min_size=shape[0], max_size=shape[0]))


@given(problems(gates=False), st.booleans())
def test_the_default_is_integrate_bit_for_bit(problem, everywhere):
    rewards, weights, _ = problem
    groups = [rewards, rewards * 3 + 1]
    std = global_std(groups) if everywhere else None
    made = mixed_advantages(groups, weights, clamp=2.0, floor=1e-3, everywhere=groups if everywhere else None)
    assert all(
        torch.equal(one, integrate(group, weights, 2.0, 1e-3, std))
        for one, group in zip(made, groups, strict=True)
    )


def test_the_recipe_s_default_is_zscore():
    assert recipe("g2rpo").mix == "zscore" and MIXES[0] == "zscore"


@given(problems(), st.sampled_from(MIXES), st.booleans())
def test_advantages_are_finite_and_sum_to_zero_over_the_group(problem, mode, everywhere):
    rewards, weights, gates = problem
    made = mixed_advantages(
        [rewards], weights, mode, gates, everywhere=[rewards, rewards + 1] if everywhere else None
    )[0]
    assert made.isfinite().all()
    assert made.sum(1).abs().max() < 1e-4


@given(problems(), st.sampled_from(MIXES), st.randoms(use_true_random=False))
def test_the_order_of_the_members_does_not_matter(problem, mode, random):
    rewards, weights, gates = problem
    order = random.sample(range(rewards.shape[2]), rewards.shape[2])
    made = mixed_advantages([rewards], weights, mode, gates)[0]
    assert torch.allclose(
        mixed_advantages([rewards[:, :, order]], weights, mode, gates)[0], made[:, order], atol=1e-4
    )


@given(problems(), st.sampled_from(MIXES))
def test_a_member_that_nobody_judges_gets_0_and_is_as_if_it_were_not_there(problem, mode):
    rewards, weights, gates = problem
    stranger = torch.full_like(rewards[:, :, :1], NAN)
    made = mixed_advantages([torch.cat([stranger, rewards], 2)], weights, mode, gates)[0]
    assert (made[:, 0] == 0).all()
    assert torch.allclose(made[:, 1:], mixed_advantages([rewards], weights, mode, gates)[0], atol=1e-5)


@given(problems(), st.sampled_from(MIXES), st.sampled_from([NAN, 3.0]))
def test_a_reward_that_judges_nobody_or_ties_has_no_say(problem, mode, value):
    rewards, weights, gates = problem
    mute = torch.full_like(rewards[:1], value)
    judged = ~rewards.isnan().all(0)
    mute = torch.where(judged, mute, NAN)
    made = mixed_advantages([torch.cat([rewards, mute])], [*weights, 1.0], mode, [*gates, None])[0]
    # A gate replaces scores of what fails it, so a tie is none any more: it then says what the gate says.
    if value != value or not any(gate is not None for gate in gates):
        assert torch.allclose(made, mixed_advantages([rewards], weights, mode, gates)[0], atol=1e-4)


@given(problems(gates=False, missing=False), st.sampled_from(["zscore", "minimum", "rank_product"]))
def test_the_units_of_a_reward_do_not_matter_but_to_the_sum(problem, mode):
    rewards, weights, _ = problem
    other = rewards * torch.tensor([7.0, 0.01, 300.0])[: len(rewards), None, None, None] + 5
    assert torch.allclose(
        mixed_advantages([other], weights, mode)[0], mixed_advantages([rewards], weights, mode)[0], atol=2e-2
    )


@given(problems(gates=False, missing=False))
def test_a_rank_product_asks_for_the_order_alone(problem):
    rewards, weights, _ = problem
    assert torch.equal(
        mixed_advantages([rewards**3 + rewards], weights, "rank_product")[0],
        mixed_advantages([rewards], weights, "rank_product")[0],
    )


@given(problems(gates=False), st.sampled_from(MIXES))
def test_a_negative_weight_is_the_reward_upside_down(problem, mode):
    rewards, weights, _ = problem
    flipped = mixed_advantages([-rewards], [-weight for weight in weights], mode)[0]
    assert torch.allclose(flipped, mixed_advantages([rewards], weights, mode)[0], atol=1e-4)


@every_mix
@pytest.mark.parametrize("weight", [0.5, 1.0, 30.0])
def test_of_two_members_one_wins_and_one_loses_by_the_same(mode, weight):
    made = advantage(table([0.2, 0.9], [-3.0, 50.0]), [weight, weight], mode)
    scale = 2 * weight if mode == "zscore" else 1
    assert torch.allclose(made, torch.tensor([-HALF, HALF]) * min(scale, 5 / HALF), atol=1e-4)


@pytest.mark.parametrize("mode", ["zscore", "minimum", "rank_product"])
def test_of_two_members_that_two_rewards_order_differently_nothing_is_learned(mode):
    assert advantage(table([0.0, 1.0], [8.0, 2.0]), mode=mode).abs().max() < 1e-6


def test_the_sum_is_in_the_rewards_own_units():
    rewards = table([1.0, 2.0, 3.0], [10.0, 0.0, 5.0])
    assert blend(rewards, [2.0, -0.1], "sum")[0, 0, :, 0].tolist() == pytest.approx([1.0, 4.0, 5.5])


def test_the_minimum_is_the_worst_z_score():
    # z of (0, 1, 2) is (−1, 0, 1); of (5, 5, 8) (−1, −1, 2)/√3.
    found = blend(table([0.0, 1.0, 2.0], [5.0, 5.0, 8.0]), [1.0, 1.0], "minimum")[0, 0, :, 0]
    assert found.tolist() == pytest.approx([-1.0, -(3**-0.5), 1.0], abs=1e-6)


def test_the_minimum_prefers_what_is_good_in_every_way_to_what_excels_in_one():
    rewards = table([0.0, 0.6, 1.0, 0.2], [1.0, 0.6, 0.0, 0.3])
    assert advantage(rewards, mode="minimum").argmax() == 1
    assert advantage(rewards * torch.tensor([5.0, 1.0])[:, None, None, None], mode="sum").argmax() == 2


def test_the_rank_product_is_the_geometric_mean_of_the_ranks():
    rewards = table([3.0, 1.0, 2.0], [0.1, 0.1, 0.7])
    found = blend(rewards, [1.0, 1.0], "rank_product")[0, 0, :, 0]
    assert found.tolist() == pytest.approx([(3 * 1.5) ** 0.5, (1 * 1.5) ** 0.5, (2 * 3) ** 0.5])
    found = blend(rewards, [2.0, -1.0], "rank_product")[0, 0, :, 0]
    assert found.tolist() == pytest.approx([(9 * 2.5) ** (1 / 3), (1 * 2.5) ** (1 / 3), (4 * 1) ** (1 / 3)])


def test_ranks_that_balance_exactly_teach_nothing():
    made = advantage(table([1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 1.0, 2.0]), mode="rank_product")
    assert made.abs().max() == 0


@pytest.mark.parametrize("mode", ["sum", "minimum", "rank_product"])
def test_the_rounding_of_equal_sums_teaches_nothing(mode):
    cycle = table([0.1, 1.3, 2.6], [1.3, 2.6, 0.1], [2.6, 0.1, 1.3])
    assert cycle[:, 0, :, 0].sum(0).unique().numel() > 1
    assert advantage(cycle, mode=mode).abs().max() == 0


def test_equal_scores_share_their_mean_rank():
    assert group_ranks(table([5.0, 1.0, 5.0, NAN, 9.0]))[0, 0, :, 0].tolist()[:3] == [2.5, 1.0, 2.5]


@pytest.mark.parametrize("mode", ["sum", "minimum", "rank_product"])
def test_a_member_that_lacks_a_score_is_left_out_and_not_taken_for_better(mode):
    rewards = table([1.0, 2.0, 9.0, 3.0], [1.0, 2.0, NAN, 3.0])
    made = advantage(rewards, mode=mode)
    assert made[2] == 0
    assert torch.allclose(made[[0, 1, 3]], advantage(rewards[:, :, [0, 1, 3]], mode=mode), atol=1e-5)


def test_in_z_scores_what_a_member_has_counts():
    assert advantage(table([1.0, 2.0, 9.0, 3.0], [1.0, 2.0, NAN, 3.0]))[2] > 0


@given(problems(missing=False, least=3), st.sampled_from(MIXES))
def test_what_fails_a_gate_is_never_above_what_passes(problem, mode):
    rewards, weights, gates = problem
    rewards = rewards[..., :1]
    failed = torch.zeros(rewards.shape[1:3], dtype=torch.bool)
    for row, weight, gate in zip(rewards[..., 0], weights, gates, strict=True):
        if gate is not None:
            failed |= (row > gate) if weight < 0 else (row < gate)
    made = mixed_advantages([rewards], weights, mode, gates, clamp=1000.0)[0]
    for group, bad in zip(made, failed, strict=True):
        if bad.any() and not bad.all():
            assert group[bad].max() < group[~bad].min()
        elif bad.all():
            assert group.abs().max() == 0


@every_mix
def test_what_else_a_failed_member_scored_neither_counts_nor_shifts_the_others(mode):
    gates, passed = [0.5, None], [[0.9, 0.6, 0.1, 0.7], [1.0, 3.0, 2.0, 5.0]]
    hacked = [passed[0], [1.0, 3.0, 1e6, 5.0]]
    made = advantage(table(*passed), mode=mode, gates=gates)
    assert torch.equal(made, advantage(table(*hacked), mode=mode, gates=gates))
    assert made.argmin() == 2


@every_mix
def test_a_gate_teaches_where_all_else_ties(mode):
    made = advantage(table([0.9, 0.2, 0.9], [4.0, 4.0, 4.0]), [0.0, 1.0], mode, [0.5, None])
    assert made[1] < made[0] == made[2]


@every_mix
def test_a_gate_of_weight_0_lets_the_others_order_what_passes(mode):
    made = advantage(table([0.9, 0.2, 0.6, 0.5], [1.0, 9.0, 2.0, 3.0]), [0.0, 1.0], mode, [0.5, None])
    assert made.argsort().tolist() == [1, 0, 2, 3]


@every_mix
def test_the_gate_of_a_negative_weight_is_an_upper_one(mode):
    made = advantage(table([0.1, 0.2, 0.8], [1.0, 2.0, 9.0]), [-1.0, 1.0], mode, [0.5, None])
    assert made.argmin() == 2
    assert advantage(table([0.1, 0.2, 0.8], [1.0, 2.0, 9.0]), [-1.0, 9.0], mode).argmax() == 2 or mode in (
        "minimum",
        "rank_product",
    )


@every_mix
def test_a_score_at_the_gate_passes(mode):
    made = advantage(table([0.5, 0.4], [0.0, 9.0]), [1.0, 1.0], mode, [0.5, None])
    assert made[0] > made[1]


@every_mix
def test_a_member_that_a_gate_cannot_judge_is_left_out_unless_it_judges_nobody(mode):
    rewards = table([0.9, NAN, 0.6, 0.7], [1.0, 9.0, 2.0, 3.0])
    made = advantage(rewards, mode=mode, gates=[0.5, None])
    assert made[1] == 0
    assert torch.allclose(
        made[[0, 2, 3]], advantage(rewards[:, :, [0, 2, 3]], mode=mode, gates=[0.5, None]), atol=1e-5
    )
    mute = table([NAN] * 4, [1.0, 9.0, 2.0, 3.0])
    assert torch.allclose(
        advantage(mute, mode=mode, gates=[0.5, None]), advantage(mute, mode=mode), atol=1e-5
    )


@every_mix
def test_a_reward_that_judges_only_what_failed_has_no_say(mode):
    made = advantage(table([0.9, 0.1, 0.8], [NAN, 7.0, NAN]), mode=mode, gates=[0.5, None])
    assert made[0] > made[2] > made[1]


def test_gates_follow_the_scale_of_all_prompts():
    groups = [table([0.9, 0.1, 0.9], [1.0, 1.0, 1.0]), table([0.9, 0.8, 0.7], [0.0, 20.0, 40.0])]
    made = mixed_advantages(groups, [0.0, 1.0], gates=[0.5, None], everywhere=groups)
    assert made[0][0, 1] < made[0][0, 0] and made[0].abs().max() < 5


def test_gates_look_at_each_completion_by_itself():
    rewards = torch.tensor([[[[0.9, 0.1], [0.9, 0.9], [0.8, 0.8]]]])
    found = apply_gates(rewards, [1.0], [0.5])
    assert found[0, 0, 0, 0] == pytest.approx(0.9) and found[0, 0, 0, 1] < 0.8


def test_mistakes_are_named():
    rewards = table([0.0, 1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="mix is 'max'; choose one of: zscore, sum, minimum, rank_product"):
        mixed_advantages([rewards], [1.0, 1.0], "max")
    with pytest.raises(ValueError, match="weights has 2 and gates 1 entries for 2 rewards"):
        mixed_advantages([rewards], [1.0, 1.0], "sum", [0.5])
    with pytest.raises(ValueError, match="weights has 1 and gates 0 entries for 2 rewards"):
        mixed_advantages([rewards], [1.0], "sum")
    with pytest.raises(ValueError, match="weights are all 0"):
        mixed_advantages([rewards], [0.0, 0.0], "zscore", [0.5, None])


def test_single_pictures_are_mixed_by_sum_or_minimum():
    scores = torch.tensor([[0.2, 0.9], [0.8, 0.4], [NAN, 5.0]])
    assert mix(scores[:2], [1.0, -0.5]).tolist() == pytest.approx([-0.2, 0.7])
    assert mix(scores[:2], [1.0, 2.0], "minimum").tolist() == pytest.approx([0.2, 0.8])
    assert mix(scores[:2], [1.0, 0.0], "minimum").tolist() == pytest.approx([0.2, 0.9])
    assert mix(scores, [1.0, 1.0, 1.0]).isnan().tolist() == [True, False]
    with pytest.raises(RewardError, match="the others need a group"):
        mix(scores, [1.0, 1.0, 1.0], "rank_product")


def test_a_single_picture_that_fails_a_gate_has_no_score():
    scores = torch.tensor([[0.2, 0.9, 0.5], [0.8, 0.4, 0.6]])
    assert mix(scores, [1.0, 1.0], gates=[0.5, None]).isnan().tolist() == [True, False, False]
    assert mix(scores, [1.0, -1.0], gates=[None, 0.5]).isnan().tolist() == [True, False, True]
    assert mix(scores, [0.0, 1.0], gates=[0.5, None])[1:].tolist() == pytest.approx([0.4, 0.6])
    with pytest.raises(RewardError, match="gates has 1 entries for 2 rewards"):
        mix(scores, [1.0, 1.0], gates=[0.5])


def test_a_mixed_reward_knows_the_same():
    images = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    parts = (REWARDS["exposure"], Rule("red", lambda images, prompts: images[..., 0].mean((1, 2)), False))
    mixed_reward = MixedReward(parts, (1.0, 2.0), "minimum", (None, 0.0))
    assert mixed_reward.name == "min(1 exposure, 2 red)"
    exposed, red = (part.score(images, [""] * 3) for part in parts)
    assert torch.equal(mixed_reward.score(images, [""] * 3), torch.minimum(exposed, 2 * red))
    with pytest.raises(RewardError, match="mix is 'zscore'"):
        MixedReward(parts, (1.0, 2.0), "zscore")
