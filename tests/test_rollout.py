import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SHAPE, ToyPolicy, plain_states

from comfy_g2rpo.plan import deterministic, independent, singular
from comfy_g2rpo.recipes import RECIPES, build_plan
from comfy_g2rpo.rollout import Frontier, roll_out, seeded_noise
from comfy_g2rpo.schedule import shifted_sigmas

CONDS, SEEDS = [0.3, -0.8], [11, 12]


def compare(plan, slots=5):
    """Assert that the shared rollout equals the plain loop for both prompts."""
    policy, sigmas = ToyPolicy(), shifted_sigmas(plan.num_steps, 3.0)
    rollout = roll_out(policy, plan, sigmas, CONDS, SEEDS, SHAPE, slots=slots)
    for p in range(2):
        plain = plain_states(ToyPolicy(), plan, sigmas, CONDS[p], SEEDS[p])
        for i, state in enumerate(plan.images):
            assert torch.allclose(rollout.latents[p, i], plain[state][0], atol=2e-5)
        for i, fork in enumerate(plan.forks):
            assert torch.allclose(rollout.x[p, i], plain[fork][0], atol=2e-5)
            assert torch.allclose(rollout.velocity[p, i], plain[fork][1], atol=2e-5)
    assert rollout.nfe == sum(policy.calls) == 2 * plan.forwards
    return policy


@pytest.mark.parametrize("name", [name for name, made in RECIPES.items() if made.expand == 1])
def test_every_recipe_equals_the_plain_loop(name):
    compare(build_plan(RECIPES[name], iteration=30, seed=3), slots=24)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_singular_plan_equals_the_plain_loop(data):
    num_steps = data.draw(st.integers(1, 8))
    steps = sorted(data.draw(st.sets(st.integers(0, num_steps - 1), min_size=1)))
    strides = tuple(data.draw(st.sets(st.integers(1, 9), min_size=1, max_size=3)))
    kernel = data.draw(st.sampled_from(["flow_sde", "dance_sde", "cps", "ddim"]))
    compare(
        singular(
            num_steps,
            steps,
            3,
            strides,
            kernel=kernel,
            eta=0.5,
            terminal=data.draw(st.sampled_from(["exact", "published"])),
        )
    )


def test_a_second_order_tail_equals_the_plain_loop():
    compare(independent(8, [1, 2], 3, tail="dpm_2m"))


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_results_do_not_depend_on_the_slots(slots):
    plan = singular(6, range(3), 4, (1, 2))
    policy, sigmas = ToyPolicy(dtype=torch.float64), shifted_sigmas(6)
    few = roll_out(policy, plan, sigmas, CONDS, SEEDS, SHAPE, slots=slots)
    assert max(policy.calls) <= slots
    many = roll_out(policy, plan, sigmas, CONDS, SEEDS, SHAPE, slots=1000)
    assert torch.allclose(few.latents, many.latents, atol=1e-5) and torch.allclose(few.x, many.x, atol=1e-5)


def test_what_waits_does_not_grow_with_the_group():
    """States held at one time are bounded by slots, prompts and branch steps; only the queue grows."""
    held = []

    class Counting(Frontier):
        def advance(self, edges):
            held.append(len(self.known))
            return super().advance(edges)

    peaks = []
    for group in (4, 32):
        held.clear()
        roll_out(
            ToyPolicy(),
            singular(8, range(4), group, (1, 2)),
            shifted_sigmas(8),
            CONDS,
            SEEDS,
            SHAPE,
            slots=6,
            sink=lambda *_: None,
            frontier=Counting,
        )
        peaks.append(max(held))
    assert peaks[0] == pytest.approx(peaks[1], abs=6)


def test_a_sink_gets_every_image_once_in_batches():
    plan, seen = singular(6, range(3), 4, (1, 2)), []

    def sink(prompts, images, latents):
        assert len(prompts) <= 7 and latents.shape == (len(prompts), *SHAPE)
        seen.extend(zip(prompts, images, strict=True))

    assert (
        roll_out(ToyPolicy(), plan, shifted_sigmas(6), CONDS, SEEDS, SHAPE, slots=7, sink=sink).latents
        is None
    )
    assert sorted(seen) == [(p, i) for p in range(2) for i in range(len(plan.images))]


def test_the_group_shares_its_anchor_and_differs_by_its_noise():
    plan = singular(6, [2], 3)
    rollout = roll_out(ToyPolicy(), plan, shifted_sigmas(6), CONDS, SEEDS, SHAPE)
    assert rollout.x.shape == (2, 1, *SHAPE)
    assert not torch.allclose(rollout.latents[0, 0], rollout.latents[0, 1])


def test_mirrored_noise_mirrors_the_draw():
    plan = singular(6, [2], 2, antithetic=True)
    rollout = roll_out(ToyPolicy(), plan, shifted_sigmas(6), CONDS[:1], SEEDS[:1], SHAPE)
    first, second = plan.transitions
    assert torch.equal(rollout.noise(0, first), -rollout.noise(0, second))


def test_evaluation_is_a_function_of_its_seed():
    images = [
        roll_out(ToyPolicy(), deterministic(4), shifted_sigmas(4), [0.1], [s], SHAPE).latents
        for s in (1, 1, 2)
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_streams_of_different_purpose_differ():
    assert not torch.equal(seeded_noise(SHAPE, "a", 1), seeded_noise(SHAPE, "b", 1))
    assert torch.equal(seeded_noise(SHAPE, "a", 1), seeded_noise(SHAPE, "a", 1))


def test_the_check_runs_before_every_forward_and_may_stop():
    policy, count = ToyPolicy(), iter(range(100))

    def check():
        if next(count) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(
            policy, singular(6, range(3), 4), shifted_sigmas(6), CONDS, SEEDS, SHAPE, slots=4, check=check
        )
    assert len(policy.calls) == 2


def test_a_rollout_can_start_from_given_states_and_draws_the_rest_as_ever():
    plan, sigmas = singular(6, [2], 3), shifted_sigmas(6)
    drawn = roll_out(ToyPolicy(), plan, sigmas, CONDS, SEEDS, SHAPE)
    start = torch.stack([drawn.noise(p, 0) for p in range(2)])
    assert torch.equal(
        roll_out(ToyPolicy(), plan, sigmas, CONDS, SEEDS, SHAPE, start=start).latents, drawn.latents
    )
    assert not torch.equal(
        roll_out(ToyPolicy(), plan, sigmas, CONDS, SEEDS, SHAPE, start=start.flip(0)).x, drawn.x
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "ddim"])
def test_short_schedules_have_no_nan(num_steps, kernel):
    plan = singular(num_steps, range(num_steps), 2, (1, 2), kernel=kernel, eta=0.7)
    rollout = roll_out(ToyPolicy(), plan, shifted_sigmas(num_steps), CONDS, SEEDS, SHAPE)
    assert rollout.latents.isfinite().all() and rollout.x.isfinite().all()
