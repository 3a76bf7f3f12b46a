"""Noise priors: what they learn on a toy, what their files hold, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from comfy_g2rpo.files.safe import FileError
from comfy_g2rpo.priors.noise_prior import (
    Critic,
    NoisePrior,
    Trained,
    Vectors,
    critic_loss,
    divergence,
    load_prior,
    policy_loss,
    save_prior,
    text_feature,
    value_loss,
)
from comfy_g2rpo.priors.prior_settings import PriorSettings
from comfy_g2rpo.priors.prior_training import derangement
from comfy_g2rpo.rollout import seeded_noise

SHAPE, FEATURES = (2, 4, 4), 6
MODEL = Vectors(100, 0.5)
WANTED = seeded_noise(SHAPE, "what the toy reward likes") / 4
TEXT = seeded_noise((1, FEATURES), "a prompt")


def toy_reward(starts: Tensor) -> Tensor:
    """R = ⟨w, z⟩ of starts [P, G, …]: [P, G]."""
    return (starts * WANTED).flatten(2).sum(2)


def moved(seed: int = 0) -> NoisePrior:
    """Return a prior whose shift is not zero."""
    prior = NoisePrior(FEATURES, SHAPE, rank=3, seed=seed)
    with torch.no_grad():
        prior.outer.weight.copy_(seeded_noise(prior.outer.weight.shape, "outer", seed))
    return prior


def saved(path: Path, prior: NoisePrior | None = None) -> Path:
    save_prior(path, prior or moved(), MODEL, {"model": "toy.safetensors", "kl": "3.5"})
    return path


def test_it_begins_at_ordinary_noise_and_is_the_same_for_a_seed() -> None:
    prior = NoisePrior(FEATURES, SHAPE, rank=3, seed=1)
    assert prior(TEXT).shape == (1, *SHAPE) and not prior(TEXT).any()
    twin, other = NoisePrior(FEATURES, SHAPE, 3, 1), NoisePrior(FEATURES, SHAPE, 3, 2)
    assert torch.equal(prior.inner.weight, twin.inner.weight)
    assert not torch.equal(prior.inner.weight, other.inner.weight)


def test_a_linear_reward_has_its_optimum_in_closed_form() -> None:
    """E R = ⟨w, μ⟩ less α·½‖μ‖² is greatest at μ = w/α."""
    alpha, prior = 0.5, NoisePrior(FEATURES, SHAPE, rank=3)
    optimizer = torch.optim.Adam(prior.parameters(), 0.02)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for number in range(600):
        noise = seeded_noise((1, 512, *SHAPE), "toy", number)
        shift = prior(TEXT)
        rewards = toy_reward(shift.detach()[:, None] + noise)
        optimizer.zero_grad()
        policy_loss(shift, noise, rewards - rewards.mean(1, keepdim=True), alpha).backward()
        optimizer.step()
        rates.step()
    assert (prior(TEXT)[0] - WANTED / alpha).abs().max() < 0.03


def test_the_gradient_is_the_score_functions() -> None:
    noise, advantages = seeded_noise((2, 5, *SHAPE), "noise"), seeded_noise((2, 5), "advantages")
    shift = seeded_noise((2, *SHAPE), "shift").requires_grad_()
    policy_loss(shift, noise, advantages, 0.3).backward()
    pulls = torch.stack([sum(advantages[p, i] * noise[p, i] for i in range(5)) / 5 for p in range(2)])
    assert torch.allclose(shift.grad, (0.3 * shift.detach() - pulls) / 2, atol=1e-6)


def test_both_estimators_pull_the_same_way() -> None:
    noise = seeded_noise((1, 10_000, *SHAPE), "many")
    values = toy_reward(noise)
    pulls = []
    critic = Critic(FEATURES, SHAPE)
    optimizer = torch.optim.Adam(critic.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        critic_loss(critic, noise, TEXT, values).backward()
        optimizer.step()
    for made in (
        lambda shift: policy_loss(shift, noise, values - values.mean(), 0.0),
        lambda shift: value_loss(critic, shift, noise, TEXT, 0.0),
    ):
        shift = torch.zeros(1, *SHAPE, requires_grad=True)
        made(shift).backward()
        pulls.append(-shift.grad.flatten())
    assert torch.cosine_similarity(*pulls, dim=0) > 0.9
    for pull in pulls:
        assert torch.cosine_similarity(pull, WANTED.flatten(), dim=0) > 0.9


def test_the_divergence_is_half_the_squared_length() -> None:
    shift = moved()(torch.cat([TEXT, 2 * TEXT]))
    assert torch.allclose(divergence(shift), shift.flatten(1).norm(dim=1) ** 2 / 2)
    there, plain = (torch.distributions.Normal(mean, 1.0) for mean in (shift, torch.zeros(())))
    exact = torch.distributions.kl_divergence(there, plain).flatten(1).sum(1)
    assert torch.allclose(divergence(shift), exact, rtol=1e-5)


def test_a_moved_noise_keeps_its_spread() -> None:
    noise = seeded_noise((20_000, *SHAPE), "spread")
    made = noise + moved()(TEXT)
    assert (made.std(0) - 1).abs().max() < 0.03


def test_a_file_brings_back_what_was_saved(tmp_path: Path) -> None:
    prior = moved()
    trained = load_prior(saved(tmp_path / "a.safetensors", prior))
    assert torch.equal(trained.shift(TEXT[0]), prior(TEXT).detach()[0])
    assert trained.model == MODEL and trained.notes["kl"] == "3.5"
    assert trained.prior.shape == SHAPE and trained.notes["latent_shape"] == "2,4,4"
    first = (tmp_path / "a.safetensors").read_bytes()
    assert saved(tmp_path / "b.safetensors", prior).read_bytes() == first


def test_another_size_checkpoint_or_text_encoder_is_refused_by_both_names(tmp_path: Path) -> None:
    trained = load_prior(saved(tmp_path / "a.safetensors"))
    trained.check_shape((2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"shape \[2, 4, 4\], and this one has \[2, 4, 8\]"):
        trained.check_shape((2, 4, 8))
    trained.check_model(Vectors(100, 0.5 * (1 + 1e-5)))
    for other in (Vectors(100, 0.501), Vectors(101, 0.5)):
        with pytest.raises(ValueError, match=r"checkpoint \(toy.safetensors, 100 numbers of mean size 0.5\)"):
            trained.check_model(other)
    with pytest.raises(ValueError, match="text features of 6 numbers, and these have 7"):
        trained.shift(torch.zeros(7))
    with pytest.raises(ValueError, match="NaN"):
        trained.shift(torch.full((6,), torch.nan))


def test_a_checkpoint_is_known_under_other_names_and_in_16_bit() -> None:
    weights = {f"block.{i}.bias": seeded_noise((500,), "bias", i) for i in range(4)}
    matrix = {"block.weight": torch.ones(9, 9)}
    known = Vectors.of({**weights, **matrix}.items())
    fused = {"qkv": torch.cat(list(weights.values())), "of.scale_weight": torch.ones(1)}
    assert known.count == 2000 and known.same(Vectors.of(fused.items()))
    assert known.same(Vectors.of((name, one.bfloat16()) for name, one in weights.items()))
    assert not known.same(Vectors.of((name, one * 1.001) for name, one in weights.items()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latent_shape": "2,4,8"}, "its tensor 'outer.*' does not fit"),
        ({"latent_shape": "2,4,-4"}, "is refused: it claims a network"),
        ({"latent_shape": "1000000,1000,1000"}, "is refused: it claims a network"),
        ({"latent_shape": "many"}, "does not say what it is for"),
        ({"text_features": "1e9"}, "does not say what it is for"),
        ({"model_vectors": "7"}, "does not say what it is for"),
        ({"model_vectors": "7 nan"}, "is refused"),
        ({"rank": "4"}, "does not fit"),
        ({"g2rpo.noise_prior": "2"}, "is no noise prior of this version"),
    ],
)
def test_a_file_that_claims_something_else_is_refused(
    change: dict[str, str], says: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.safetensors")
    save_file(load_file(path), path, {**load_prior(path).notes, **change})
    with pytest.raises(FileError, match=says):
        load_prior(path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    notes, whole = dict(load_prior(path).notes), path.read_bytes()
    for broken in (whole[:-9], whole[:20], b"", b"\x80\x02pickle", b"<html>"):
        path.write_bytes(broken)
        with pytest.raises(FileError):
            load_prior(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file({**tensors, "inner.bias": torch.full((64,), torch.nan)}, path, notes)
    with pytest.raises(FileError, match="holds no finite numbers"):
        load_prior(path)
    save_file({**tensors, "other": torch.zeros(1)}, path, notes)
    with pytest.raises(FileError, match="'other' does not fit"):
        load_prior(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FileError, match="no noise prior"):
        load_prior(path)


def test_a_save_that_is_interrupted_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "a.safetensors")
    before = path.read_bytes()

    def interrupted(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved(path, moved(1))
    monkeypatch.undo()
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


def test_what_is_read_of_a_prompt() -> None:
    tokens = torch.cat([seeded_noise((3, 5), "tokens"), torch.zeros(2, 5)])
    assert torch.equal(text_feature(tokens, torch.ones(4).half()), torch.ones(4))
    assert torch.allclose(text_feature(tokens, None), tokens[:3].mean(0))
    assert not text_feature(torch.zeros(2, 5), None).any()


def test_the_control_gives_every_prompt_anothers_shift() -> None:
    for count in (2, 3, 50):
        others = derangement(count, 5)
        assert sorted(others) == list(range(count)) and all(i != other for i, other in enumerate(others))
    assert derangement(50, 5) == derangement(50, 5) != derangement(50, 6)


def test_settings_are_bounded() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        PriorSettings(rank=0)
    with pytest.raises(ValueError, match="estimator is 'both'"):
        PriorSettings(estimator="both")


def test_a_trained_prior_has_nothing_left_to_learn(tmp_path: Path) -> None:
    trained = load_prior(saved(tmp_path / "a.safetensors"))
    assert isinstance(trained, Trained)
    assert not any(one.requires_grad for one in trained.prior.parameters())
