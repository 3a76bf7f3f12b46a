"""Distances between pictures, and SetPO's credit for being unlike the rest, against values computed by
hand.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo.run.diversity import (
    describe,
    marginals,
    mean_distance,
    measure,
    pixel_features,
    shaping,
    spread,
)


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_pixel_distance_is_the_root_mean_square_difference():
    black, white = torch.zeros(1, 16, 16, 3), torch.ones(1, 16, 16, 3)
    half = torch.cat([black[:, :8], white[:, 8:]], 1)
    described = pixel_features(torch.cat([black, white, half]))
    assert mean_distance(described[:2]) == pytest.approx(1.0)
    assert mean_distance(described[[0, 2]]) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64), (1, 1), (37, 200)])
def test_pictures_of_any_size_are_described_alike(height, width):
    assert torch.allclose(
        pixel_features(torch.full((2, height, width, 3), 0.25)), torch.full((2, 192), 0.25 / math.sqrt(192))
    )


def test_the_mean_distance_runs_over_the_pairs():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert mean_distance(points) == pytest.approx((5 + 1 + math.sqrt(18)) / 3)
    assert mean_distance(torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [3.0, 4.0]])) == pytest.approx(5)
    assert mean_distance(points[:1]).isnan()


def test_equal_pictures_are_exactly_no_distance_apart():
    assert mean_distance(features(1, 192).repeat(8, 1) * 1e3) == 0


def test_spread_tells_one_prompts_pictures_from_those_of_others():
    pictures = torch.tensor([[[0.0], [1.0]], [[10.0], [11.0]], [[10.0], [13.0]]])  # [3 prompts, 2 noises, 1]
    found = spread(pictures)
    assert found["group"].tolist() == [1, 1, 3]
    assert found["set"].tolist() == [(10 + 10 + 10 + 12) / 4, (10 + 0 + 10 + 2) / 4, (10 + 0 + 12 + 2) / 4]
    assert spread(pictures[:, :1]).keys() == {"set"} and spread(pictures[:1]).keys() == {"group"}


def test_the_marginal_is_the_diversity_with_and_without_the_member():
    group = torch.tensor([[0.0], [1.0], [3.0], [torch.nan]])
    width = (1 + 3 + 2) / 3
    unlike = {d: 1 - math.exp(-0.5 * (d / width) ** 2) for d in (1, 2, 3)}
    whole = (unlike[1] + unlike[3] + unlike[2]) / 3
    expected = [whole - unlike[2], whole - unlike[3], whole - unlike[1]]
    found = marginals(group)
    assert found[:3].tolist() == pytest.approx(expected, abs=1e-6) and found[3].isnan()


def test_the_odd_one_out_gains_and_its_twins_lose():
    found = marginals(torch.tensor([[0.0], [0.0], [0.0], [5.0]]))
    assert found[3] > 0 > found[0] and found[0] == found[1] == found[2]


@given(st.integers(0, 1000), st.integers(2, 9), st.floats(0.01, 100))
def test_marginals_know_neither_order_nor_scale(seed, size, scale):
    group = features(2, size, 5, seed=seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    found = marginals(group)
    assert torch.allclose(marginals(group[:, order]), found[:, order], atol=1e-5)
    assert torch.allclose(marginals(group * scale + 7), found, atol=1e-3)


@given(st.integers(0, 1000), st.integers(2, 8), st.integers(1, 3), st.floats(0.1, 3))
def test_shaping_sums_to_zero_over_those_that_were_judged(seed, size, levels, weight):
    group, rewards = features(3, size, levels, 4, seed=seed), features(2, 3, size, levels, seed=seed + 1)
    rewards[:, 1, 0] = torch.nan
    found = shaping(group, rewards, weight)
    assert found.shape == (3, size) and found.isfinite().all() and found.sum(1).abs().max() < 1e-4
    assert found[1, 0] == 0
    assert torch.allclose(
        shaping(group, rewards, 2 * weight, clamp=1e9),
        2 * shaping(group, rewards, weight, clamp=1e9),
        atol=1e-4,
    )


@pytest.mark.parametrize("apart", [1e-3, 0.1, 7.0])
@pytest.mark.parametrize(("twins", "weight"), [(2, 1.0), (2, 0.3), (3, 0.1), (7, 2.0)])
def test_one_picture_among_twins_is_credited_by_the_closed_form(twins, weight, apart):
    pictures = torch.zeros(1, twins + 1, 1, 4)
    pictures[0, -1] = apart
    # Marginals are linear in (is it the odd one), whatever the distance; so are the z-scores: −1/√n and
    # (n−1)/√n of n pictures.
    count = twins + 1
    expected = [-weight / count**0.5] * twins + [weight * twins / count**0.5]
    found = shaping(pictures, torch.zeros(1, 1, count, 1), weight)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(2, 5))
def test_duplicates_get_less_than_singles(seed, copies, singles):
    pictures = torch.eye(singles + 1)
    group = torch.cat([pictures, pictures[:1].repeat(copies, 1)])[None, :, None]
    order = torch.randperm(group.shape[1], generator=torch.Generator().manual_seed(seed))
    found = shaping(group[:, order], torch.zeros(1, 1, group.shape[1], 1), 1.0)[0]
    copied = (group[0, order, 0] == pictures[0]).all(1)
    assert found[copied].max() < found[~copied].min()


@given(st.integers(0, 1000), st.integers(4, 12), st.sampled_from([0.1, 0.3, 1.0, 3.0]))
def test_the_credit_has_the_scale_of_a_reward_of_that_weight(seed, size, weight):
    found = shaping(features(2, size, 1, 5, seed=seed), torch.zeros(1, 2, size, 1), weight, clamp=1e9)
    assert found.std(1).tolist() == pytest.approx([weight, weight], rel=1e-3)


def test_a_group_of_equal_pictures_is_not_shaped():
    assert shaping(torch.ones(2, 6, 1, 4), features(1, 2, 6, 1), 1.0).abs().max() == 0


def test_a_broken_picture_is_described_as_unknown():
    pictures = torch.rand(3, 8, 8, 3)
    pictures[1, 0, 0, 0] = torch.nan
    found = describe(pictures, lambda images: torch.nn.functional.normalize(images.flatten(1), dim=1))
    assert found.keys() == {"pixels", "embed"}
    assert all(values[1].isnan().any() and values[[0, 2]].isfinite().all() for values in found.values())
    assert found["embed"][0].norm() == pytest.approx(1)


def test_what_pictures_are_compared_by():
    embed = pixel_features
    assert (measure(embed, "auto"), measure(None, "auto"), measure(embed, "pixels")) == (
        "embed",
        "pixels",
        "pixels",
    )
    with pytest.raises(ValueError, match="diversity_by is embed, but no reward"):
        measure(None, "embed")
