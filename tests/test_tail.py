"""The tail of a drawing runs the base model: exact against a plain loop, and at both ends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.rollout import roll_out, state_noise
from comfy_g2rpo.sampling.base_tail import draw_with_tail, tail_steps
from comfy_g2rpo.schedule import shifted_sigmas

STEPS = 7
CONDS, SEEDS = [0.3, -1.0, 0.5], [1, 2, 3]


def plain(policy, sigmas, base_from):
    """Step x ← x + (σ′ − σ)v one sample at a time, with the adapter off from a step on."""
    drawn = []
    for cond, seed in zip(CONDS, SEEDS, strict=True):
        x = state_noise(deterministic(STEPS), 0, seed, SHAPE)[None]
        for k in range(STEPS):
            policy.active = k < base_from
            x = x + (sigmas[k + 1] - sigmas[k]) * policy.velocity(x, sigmas[k].reshape(1), [cond])
        policy.active = True
        drawn.append(x[0].detach())
    return torch.stack(drawn)


@pytest.mark.parametrize("base_from", range(STEPS + 1))
def test_the_last_steps_run_without_the_adapter(base_from):
    policy, sigmas = ToyPolicy(), shifted_sigmas(STEPS, 3.0)
    drawn = draw_with_tail(policy, sigmas, CONDS, SEEDS, SHAPE, (STEPS - base_from) / STEPS)
    assert torch.allclose(drawn, plain(policy, sigmas, base_from), atol=1e-5)
    assert policy.active


def test_a_tail_of_nothing_and_of_everything_are_the_model_with_and_without_its_adapter():
    policy, sigmas = ToyPolicy(), shifted_sigmas(STEPS, 3.0)
    whole = [roll_out(policy, deterministic(STEPS), sigmas, CONDS, SEEDS, SHAPE).latents[:, 0]]
    with policy.reference():
        whole.append(roll_out(policy, deterministic(STEPS), sigmas, CONDS, SEEDS, SHAPE).latents[:, 0])
    for tail, expected in zip((0.0, 1.0), whole, strict=True):
        assert torch.equal(draw_with_tail(policy, sigmas, CONDS, SEEDS, SHAPE, tail), expected)


@given(st.integers(1, 200), st.floats(0, 1))
def test_the_tail_is_the_nearest_whole_number_of_steps(count, share):
    assert abs(tail_steps(count, share) - share * count) <= 0.5 + 1e-9


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"tail is .*; it must lie between 0 and 1"):
        tail_steps(10, share)


def test_a_drawing_from_the_command_line_leaves_the_lora_out_of_its_tail(tmp_path):
    from comfy_g2rpo import lora
    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.model.inference import draw
    from g2rpo_trainer.run import load_policy

    config = load("demo")
    policy = load_policy(config, "cpu")
    policy.add_lora(4, 4.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _, up in policy.pairs().values():
        torch.nn.init.normal_(up, std=0.4, generator=generator)
    lora.write(tmp_path / "lora.safetensors", policy.pairs(), 4.0, style="diffusers", metadata={})
    file = tmp_path / "lora.safetensors"
    base = draw(config, ["a red circle"], 0, None)[0]
    tuned, half, tail = (draw(config, ["a red circle"], 0, file, share)[0] for share in (0.0, 0.5, 1.0))
    assert torch.equal(tail, base)
    assert all(
        (one - other).abs().mean() > 0.001 for one, other in ((tuned, base), (half, base), (half, tuned))
    )
