"""The speed benchmarks measure what they say: the plain trainer's formulas, units, and whole processes."""

from __future__ import annotations

import math
import sys

import independent
import pytest
import scaling
import several_processes
import torch
from toys import SHAPE, ToyPolicy

from comfy_g2rpo import kernels
from comfy_g2rpo.rewards import Rule
from comfy_g2rpo.schedule import shifted_sigmas

BRIGHTNESS = Rule("brightness", lambda images, prompts: images.mean((1, 2, 3)), compares_across_prompts=False)


class Plain(ToyPolicy):
    """The toy model with what the plain trainer asks of a policy."""

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return SHAPE

    def encode(self, prompts: list[str]) -> list[float]:
        return [0.1 * len(prompt) for prompt in prompts]


def decode(latents: torch.Tensor) -> torch.Tensor:
    return latents[:, :1].sigmoid().permute(0, 2, 3, 1).expand(-1, 3, 3, 3)


@pytest.mark.parametrize(("sigma", "to"), [(1.0, 0.9), (0.96, 0.5), (0.7, 0.55), (0.2, 0.0)])
def test_the_plain_trainer_steps_as_flow_grpo(sigma: float, to: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x, velocity, then = (torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    mean, std = kernels.flow_sde(x, velocity, sigma, to, independent.ETA, 0.95)
    its_mean, its_std = independent.moments(x, velocity, sigma, to)
    assert torch.allclose(its_mean, mean, atol=1e-12) and math.isclose(its_std, float(std), rel_tol=1e-6)
    found = independent.log_probability(then, its_mean, its_std)
    assert torch.allclose(found, kernels.log_prob(then, its_mean, its_std), atol=1e-12)


def test_an_update_makes_the_steps_of_better_pictures_more_likely() -> None:
    policy, prompts = Plain(), ["a dog"] * 16
    scores, steps = independent.trajectories(policy, decode, BRIGHTNESS, prompts, 6, seed=5)
    assert scores.shape == (16,) and len(steps) == 6
    assert [step.sigma for step in steps] == shifted_sigmas(6).tolist()[:-1]
    advantages = (scores - scores.mean()) / scores.std()

    @torch.no_grad()
    def weighted() -> float:
        found = []
        for step in steps[:-1]:
            velocity = policy.velocity(step.x, torch.full((16,), step.sigma), policy.encode(prompts))
            mean, spread = independent.moments(step.x, velocity, step.sigma, step.to)
            found.append((advantages * independent.log_probability(step.then, mean, spread)).mean())
        return float(sum(found))

    before = weighted()
    assert math.isclose(
        before, float(sum((advantages * s.log_probability).mean() for s in steps[:-1])), abs_tol=1e-6
    )
    policy.calls.clear()
    independent.update(policy, steps, prompts, advantages, torch.optim.AdamW(policy.parameters(), lr=1e-3))
    assert policy.calls == [16] * 5
    assert weighted() > before


@pytest.mark.parametrize(
    ("case", "size", "units"), [("prompts of a file", 200, 200), ("pictures of a run", 30, 30)]
)
def test_a_case_is_measured_by_its_units(case: str, size: int, units: int) -> None:
    found = scaling.measure(case, size, repeats=1)
    assert found["units"] == units and found.keys() == {"units", "seconds", "grown_mib"}


def test_units_of_a_rollout_grow_with_what_they_count() -> None:
    one, _ = scaling.rollout(group=4, steps=4)
    assert scaling.rollout(group=4, steps=4, prompts=3)[0] == 3 * one
    assert scaling.rollout(group=4, steps=4, side=128)[0] == 4 * one
    assert scaling.rollout(group=8, steps=4)[0] > 1.5 * one


def test_what_fails_in_a_child_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="KeyError"):
        scaling.in_child("no such case", 1)


@pytest.mark.long
@pytest.mark.parametrize("case", several_processes.CASES)
def test_two_processes_find_the_score_of_one(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["several_processes.py", case, "--repeats", "1"])
    several_processes.main()
    one, two, outcome = capsys.readouterr().out.splitlines()
    scores = [float(line.partition("mean agreement ")[2]) for line in (one, two)]
    # Steps by Adam let what other batches round otherwise grow.
    assert scores[0] == pytest.approx(scores[1], abs=0 if case == "evaluation" else 1e-3)
    seconds = [float(line.partition(": ")[2].partition(" s")[0]) for line in (one, two)]
    efficiency = float(outcome.rpartition(" ")[2].removesuffix("%")) / 100
    assert efficiency == pytest.approx(seconds[0] / (2 * seconds[1]), rel=0.05)
