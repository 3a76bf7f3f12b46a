import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.advantages import global_std, integrate, moments, rank_agreement, zero_std_share
from comfy_g2rpo.options import MIXES
from comfy_g2rpo.rewards.mixing import mixed_advantages


def rewards(r=2, k=3, g=6, length=2, seed=0):
    return torch.randn(r, k, g, length, generator=torch.Generator().manual_seed(seed))


def test_z_scores_are_summed_over_rewards_and_granularities():
    x = rewards()
    z = (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)
    expected = 2.0 * z[0].sum(-1) + 0.5 * z[1].sum(-1)
    assert torch.allclose(integrate(x, [2.0, 0.5], clamp=100), expected, atol=1e-5)


@given(st.integers(0, 50), st.integers(2, 8))
def test_advantages_of_a_group_sum_to_zero_and_do_not_depend_on_scale(seed, group):
    x = rewards(1, 2, group, 2, seed)
    made = integrate(x)
    assert made.sum(1).abs().max() < 1e-4
    assert torch.allclose(made, integrate(x * 7 + 3), atol=1e-2)


def test_the_group_is_re_centred_after_the_clamp():
    x = torch.zeros(1, 1, 64, 1)
    x[0, 0, 0] = 1.0
    made = integrate(x, clamp=5.0)
    assert made[0, 0] - made[0, 1] == pytest.approx(5 + 1 / 8, abs=1e-4) and made.sum().abs() < 1e-4


def test_equal_rewards_teach_nothing():
    assert integrate(torch.full((1, 2, 5, 1), 0.3)).abs().max() == 0
    assert zero_std_share(torch.full((1, 2, 5, 1), 0.3)) == 1


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 24), st.sampled_from([0.0, 1e-8, 1e-3]))
def test_equal_rewards_teach_nothing_whatever_rounding_leaves(value, group, floor):
    x = torch.full((1, 1, group, 1), value)
    assert integrate(x, floor=floor).abs().max() == 0 and zero_std_share(x, floor) == 1


def test_two_members_are_enough():
    assert torch.allclose(
        integrate(torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1)), torch.tensor([[-(2**-0.5), 2**-0.5]])
    )


def test_a_nan_reward_drops_the_sample_alone():
    x = rewards(1, 1, 5, 1)
    x[0, 0, 2] = torch.nan
    made = integrate(x)
    rest = integrate(x[:, :, [0, 1, 3, 4]])
    assert made[0, 2] == 0 and torch.allclose(made[0, [0, 1, 3, 4]], rest[0])


def test_a_sample_is_kept_while_one_granularity_can_be_judged():
    x = rewards(1, 1, 5, 2)
    x[0, 0, 2, 1] = torch.nan
    made = integrate(x)
    assert made[0, 2] != 0 and made.isfinite().all() and made.sum().abs() < 1e-5


@pytest.mark.parametrize("valid", [0, 1])
def test_groups_with_nothing_to_compare_give_zero(valid):
    x = torch.full((1, 1, 4, 1), torch.nan)
    x[0, 0, :valid] = 1.0
    assert integrate(x).abs().max() == 0 and zero_std_share(x) == 1


def test_moments_are_unbiased():
    x = rewards(1, 1, 7, 1)
    mean, std = moments(x)
    assert torch.allclose(std.flatten(), x.flatten().std()) and torch.allclose(mean.flatten(), x.mean())


def test_a_global_std_replaces_the_groups_own():
    groups = [rewards(1, 1, 4, 1, seed) * (seed + 1) for seed in range(3)]
    std = global_std(groups)
    assert torch.allclose(std.flatten(), torch.cat([g.flatten() for g in groups]).std())
    expected = (groups[2] - groups[2].mean()) / std
    assert torch.allclose(integrate(groups[2], std=std), expected.reshape(1, 4), atol=1e-5)


def test_weights_must_match_the_rewards():
    with pytest.raises(ValueError, match="one per reward"):
        integrate(rewards(), [1.0])


def test_rank_agreement_is_one_with_itself_and_minus_one_with_the_reverse():
    x = rewards(1, 2, 6, 1)
    assert torch.allclose(rank_agreement(torch.cat([x, x, -x], 3)), torch.tensor([1.0, 1.0, -1.0]))


def test_equal_rewards_share_their_rank():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 1.0]])[None, None]
    assert rank_agreement(x)[1] == pytest.approx(0.866, abs=1e-3)


def test_rank_agreement_of_ties_is_unknown():
    assert rank_agreement(torch.zeros(1, 1, 4, 2)).isnan().all()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("size", [1e15, 1e20, 1e30, 1e38, 3.4e38])
def test_the_size_of_a_reward_changes_no_advantage(size, mix):
    scores = torch.rand(2, 1, 24, 1, generator=torch.Generator().manual_seed(0))
    large = scores * torch.tensor([size, 1.0]).view(2, 1, 1, 1)
    for gates in ((), (0.5, None)):
        here, there = ([g and g * s for g in gates] for s in (1.0, size))
        weights = [1.0, 1.0] if mix != "sum" else [1.0, 0.0]
        one = mixed_advantages([scores], weights, mix, here)[0]
        other = mixed_advantages([large], weights, mix, there)[0]
        assert other.isfinite().all() and other.abs().max() > 1
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
