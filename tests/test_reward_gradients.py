"""Rewards with a gradient: the same score as ever, and a slope that a small step up it confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reward_folders import PROMPTS, clip_folder, clip_model, hps_folder, open_clip_weights, owlv2_folder
from reward_folders import owlv2_model as detector
from reward_folders import pictures as examples
from torch import Tensor

from comfy_g2rpo.rewards import REWARDS, Reward, RewardError
from comfy_g2rpo.rewards.models.installed import load_installed
from comfy_g2rpo.rewards.models.preprocess import Pictures
from comfy_g2rpo.rewards.protocol import Wrapped

SMOOTH = ["sharpness", "colourfulness", "exposure", "symmetry"]


def pictures() -> Tensor:
    """Draw soft pictures whose values files can hold."""
    noise = torch.rand(3, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    grown = torch.nn.functional.interpolate(noise, (48, 56), mode="bicubic").clamp(0, 1)
    return (grown.movedim(1, -1) * 255).round() / 255


def slopes(reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
    given = images.clone().requires_grad_()
    scores = reward.differentiable(given, prompts)
    return scores.detach(), torch.autograd.grad(scores.sum(), given)[0]


def test_the_rewards_that_can_have_one_offer_it() -> None:
    assert {name for name, reward in REWARDS.items() if reward.gradient} == set(SMOOTH)
    with pytest.raises(RewardError, match="jpeg"):
        REWARDS["jpeg"].differentiable(pictures(), [""] * 3)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_reward_is_the_reward(name: str) -> None:
    scores, _ = slopes(REWARDS[name], pictures(), [""] * 3)
    torch.testing.assert_close(scores, REWARDS[name].score(pictures(), [""] * 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMOOTH)
def test_its_gradient_is_that_of_finite_differences(name: str) -> None:
    images, step = pictures().double(), 1e-6
    _, gradient = slopes(REWARDS[name], images, [""] * 3)
    way = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    up, down = (REWARDS[name].differentiable(images + s * step * way, [""] * 3) for s in (1, -1))
    assert ((up - down) / (2 * step)).sum().item() == pytest.approx((gradient * way).sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", SMOOTH)
def test_a_grey_picture_has_a_finite_one(name: str) -> None:
    scores, gradient = slopes(REWARDS[name], torch.full((1, 8, 8, 3), 0.4), [""])
    assert scores.isfinite().all() and gradient.isfinite().all()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install reward models with random weights."""
    pytest.importorskip("transformers", reason="model-backed rewards need transformers")
    root = tmp_path_factory.mktemp("rewards")
    clip_folder(root, "pickscore", "pickscore", clip_model(seed=1))
    hps_folder(root, "hpsv2.1", open_clip_weights())
    owlv2_folder(root, "detection", detector())
    return root


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1"])
def test_a_reward_model_s_gradient_leads_to_a_higher_score(name: str, root: Path) -> None:
    reward, images = load_installed(root, name), examples()
    scores, gradient = slopes(reward, images, PROMPTS)
    torch.testing.assert_close(scores, reward.score(images, PROMPTS), rtol=1e-5, atol=1e-5)
    assert gradient.shape == images.shape and gradient.flatten(1).norm(dim=1).min() > 0
    # Far enough that rounding to 8 bits does not hide it.
    better = (images + 0.05 * gradient.sign()).clamp(0, 1)
    assert (reward.score(better, PROMPTS) > scores).all()


def test_what_is_counted_has_no_slope(root: Path) -> None:
    assert not load_installed(root, "detection").gradient


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(48, 56), (61, 20), (24, 24), (300, 200)])
@pytest.mark.parametrize("rounds", [False, True])
def test_pictures_keep_their_places_where_they_are_resized_smoothly(
    fit: str, size: tuple[int, int], rounds: bool
) -> None:
    made = Pictures(24, fit, rounds=rounds)
    ramp = torch.linspace(0.1, 0.9, size[0])[:, None, None] + torch.linspace(-0.1, 0.1, size[1])[:, None]
    images = ramp[None].expand(1, *size, 3).clone().requires_grad_()
    exact, prepared = made(images), made.with_gradient(images)
    assert torch.equal(exact, prepared.detach())
    smooth = made._normalised(made._smooth(images.detach().movedim(-1, 1)))
    middle = (..., slice(2, -2), slice(2, -2))
    if fit != "pad":
        assert (smooth - exact)[middle].abs().max() < 0.08
    else:
        assert (smooth - exact).abs().mean() < 0.08
    assert torch.autograd.grad(prepared.sum(), images)[0].abs().sum() > 0


def test_a_wrapped_reward_passes_it_on() -> None:
    wrapped = Wrapped()
    wrapped.reward = REWARDS["exposure"]
    assert wrapped.gradient
    assert torch.equal(
        wrapped.differentiable(pictures(), [""] * 3), REWARDS["exposure"].differentiable(pictures(), [""] * 3)
    )
