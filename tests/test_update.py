import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SHAPE, ToyPolicy, plain_states, small

from comfy_g2rpo import kernels
from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.methods.recipe_options import KERNELS
from comfy_g2rpo.objectives.policy_gradient import clip
from comfy_g2rpo.plan import deterministic, singular
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.run.optimizers import swapped, update_average
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.update import (
    backward,
    clipped_loss,
    cotangent,
    log_ratio,
    records,
    snapshot,
    step_weights,
    update,
)

CONDS, SEEDS = [0.3, -0.8], [11, 12]


def rolled(made, policy=None, iteration=0):
    """Roll out a recipe on the toy model, score by a random linear reward, and collect the records."""
    plan = build_plan(made, iteration)
    rollout = roll_out(
        policy or ToyPolicy(), plan, shifted_sigmas(made.num_steps, made.shift), CONDS, SEEDS, SHAPE
    )
    probe = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    scores = (rollout.latents * probe).flatten(2).sum(2)
    advantages = [integrate(plan.values(row[None])) for row in scores]
    return rollout, advantages


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps", "ddim"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("k", [0, 3, 7])
def test_the_cotangent_is_autograd_of_the_clipped_loss_at_ratio_one(kernel, dtype, tolerance, k):
    generator = torch.Generator().manual_seed(k)
    sigmas, group = shifted_sigmas(8).to(dtype), 6
    x, v = (torch.randn(1, *SHAPE, generator=generator).to(dtype) for _ in range(2))
    v.requires_grad_()
    noise, advantage = (
        torch.randn(group, *SHAPE, generator=generator).to(dtype),
        torch.randn(group, generator=generator).to(dtype),
    )
    advantage -= advantage.mean()
    sigma, sigma_next, eta = sigmas[k], sigmas[k + 1], 0.5
    if kernel in ("cps", "ddim") and k == 7:
        assert cotangent(noise, sigma, sigma_next, eta, group, kernel, sigmas[1]).abs().max() == 0
        return
    mean, std = kernels._transition(kernel, x, v, sigma, sigma_next, eta, sigmas[1])
    x_next = (mean + std * noise).detach()
    log_p = kernels.log_prob(x_next, mean.expand_as(x_next), std)
    ratio = (log_p - log_p.detach()).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
    (expected,) = torch.autograd.grad(loss, v)
    direction = (advantage.view(-1, 1, 1, 1) * noise).sum(0, keepdim=True)
    made = cotangent(direction, sigma, sigma_next, eta, group, kernel, sigmas[1])
    assert (made - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_of_every_recipe_equal_a_plain_loop_over_samples(name):
    """Independent of records and slots: each transition's log-probability by itself, one sample at a time,
    from the plain rollout.
    """
    made = dataclasses.replace(
        small(name, 8, 4), objective="on_policy", kl=0.0, epochs=1, step_weight="uniform", std="group"
    )
    policy = ToyPolicy()
    rollout, advantages = rolled(made, policy, iteration=1)
    backward(policy, records(rollout, advantages), CONDS, made, micro_batch=3)
    shared = policy.adapter.grad.clone()

    plain, plan, sigmas = ToyPolicy(), rollout.plan, shifted_sigmas(8, made.shift)
    for p in range(2):
        states = plain_states(plain, plan, sigmas, CONDS[p], SEEDS[p])
        for child in plan.transitions:
            edge = plan.states[child]
            x = states[edge.parent][0][None]
            k = plan.states[edge.parent].index
            v = plain.velocity(x, sigmas[k].reshape(1), [CONDS[p]])
            mean, std = kernels._transition(edge.kernel, x, v, sigmas[k], sigmas[k + 1], edge.eta, sigmas[1])
            log_p = kernels.log_prob((mean + std * rollout.noise(p, child)).detach(), mean, std)
            (-advantages[p][edge.group, edge.member] * log_p / (2 * len(plan.transitions))).sum().backward()
    assert (shared - plain.adapter.grad).norm() <= 1e-5 * plain.adapter.grad.norm()


def test_gradients_do_not_depend_on_slots_or_micro_batches():
    made = recipe("g2rpo", num_steps=8, group_size=4)
    grads = []
    for slots, micro in ((2, 1), (64, 64)):
        policy = ToyPolicy()
        plan = build_plan(made)
        rollout = roll_out(policy, plan, shifted_sigmas(8), CONDS, SEEDS, SHAPE, slots=slots)
        advantages = [integrate(plan.values(row.flatten(1).sum(1)[None])) for row in rollout.latents]
        backward(policy, records(rollout, advantages), CONDS, made, micro_batch=micro)
        grads.append(policy.adapter.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].objective == "clip"])
def test_the_first_ratio_is_exactly_one(name):
    made = small(name, 8, 4)
    policy = ToyPolicy()
    made_records = records(*rolled(made, policy), samples=True)
    past = dataclasses.replace(made_records, velocity=snapshot(policy, made_records, CONDS))
    gradients = []
    for rows in (past, made_records):
        policy.adapter.grad = None
        ratio = backward(policy, rows, CONDS, made)["ratio"]
        gradients.append(policy.adapter.grad)
        assert len(ratio) and (ratio == 1).all()
    assert torch.equal(*gradients)


def test_the_clipped_form_at_ratio_one_gives_the_on_policy_gradient():
    on, clip = (
        recipe("g2rpo", num_steps=8, group_size=4),
        recipe("g2rpo", num_steps=8, group_size=4, objective="clip"),
    )
    grads = []
    for made in (on, clip):
        policy = ToyPolicy()
        rows = records(*rolled(made, policy), samples=True)
        backward(policy, rows, CONDS, made)
        grads.append(policy.adapter.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


def test_the_log_ratio_is_the_difference_of_log_probabilities():
    made = recipe("g2rpo", num_steps=8, group_size=4)
    rollout, advantages = rolled(made)
    rows = records(rollout, advantages, samples=True)
    old, new = rollout.velocity.flatten(0, 1), rollout.velocity.flatten(0, 1) + 0.05
    sigmas = shifted_sigmas(8)
    for s in range(len(rows.owner)):
        row = rows.owner[s]
        k = int(rows.step[row])
        means = [
            kernels.flow_sde(rows.x[row][None], v[row][None], sigmas[k], sigmas[k + 1], 0.7, sigmas[1])
            for v in (old, new)
        ]
        x_next = means[0][0] + means[0][1] * rows.noise[s]
        expected = kernels.log_prob(x_next, means[1][0], means[1][1]) - kernels.log_prob(x_next, *means[0])
        assert log_ratio(new, old, rows)[s] == pytest.approx(expected.item(), abs=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_at_the_old_velocity_every_kernels_log_ratio_is_exactly_zero(kernel):
    made = recipe("g2rpo", num_steps=8, group_size=4, steps="all", kernel=kernel)
    rollout, advantages = rolled(made)
    rows, old = records(rollout, advantages, samples=True), rollout.velocity.flatten(0, 1)
    assert (log_ratio(old, old, rows) == 0).all()
    assert (log_ratio(old + 0.05, old, rows)[rows.std[rows.owner] > 0] != 0).all()


def test_clipping_stops_the_gradient_beyond_the_range():
    made = recipe("g2rpo", num_steps=8, group_size=4)
    rollout, advantages = rolled(made)
    rows = records(rollout, advantages, samples=True)
    old = rollout.velocity.flatten(0, 1)
    direction = torch.autograd.functional.vjp(lambda v: log_ratio(v, old, rows), old, rows.advantage)[1]
    far = (old + 50 * direction).requires_grad_()
    loss, ratio = clipped_loss(far, old, rows, 1e-4)
    free, _ = clipped_loss(far, old, rows, 1e9)
    (clipped,) = torch.autograd.grad(loss, far)
    (unclipped,) = torch.autograd.grad(free, far)
    assert ((ratio - 1).abs() > 1e-4).any() and clipped.norm() < unclipped.norm()


def test_a_velocity_kl_changes_the_gradient_and_pulls_towards_the_reference():
    policy = ToyPolicy()
    made = recipe("g2rpo", num_steps=8, group_size=4)
    rollout, advantages = rolled(made, policy)
    still = records(rollout, [torch.zeros_like(a) for a in advantages])
    backward(policy, still, CONDS, made)
    assert policy.adapter.grad.abs().max() == 0
    stats = backward(policy, still, CONDS, dataclasses.replace(made, kl=0.5))
    assert (stats["kl"] > 0).any() and (policy.adapter.grad * policy.adapter).sum() > 0


def test_the_kl_adds_two_beta_times_the_distance_to_the_cotangent():
    policy = ToyPolicy(dtype=torch.float64)
    made = recipe("g2rpo", num_steps=8, group_size=4, kl=0.3)
    rollout, advantages = rolled(made)
    rows = records(rollout, [torch.zeros_like(a) for a in advantages])
    rows = dataclasses.replace(rows, x=rows.x.double())
    backward(policy, rows, CONDS, made)
    conds = [CONDS[p] for p in rows.prompt.tolist()]
    v = policy.velocity(rows.x, rows.sigma, conds)
    with policy.reference():
        reference = policy.velocity(rows.x, rows.sigma, conds)
    (expected,) = torch.autograd.grad(
        v, policy.adapter, 2 * 0.3 * (v - reference).detach() / (rows.x[0].numel() * len(rows))
    )
    assert torch.allclose(policy.adapter.grad, expected, rtol=1e-5)


def test_the_kl_may_pull_towards_where_the_run_began():
    policy = ToyPolicy()
    made = recipe("g2rpo", num_steps=8, group_size=4, kl=0.3)
    rollout, advantages = rolled(made, policy)
    still = records(rollout, [torch.zeros_like(a) for a in advantages])
    start = [policy.adapter.detach().clone()]
    here = partial(swapped, policy.parameters(), start)
    assert not backward(policy, still, CONDS, made, reference=here)["kl"].any()
    assert policy.adapter.grad.abs().max() == 0
    with torch.no_grad():
        policy.adapter.add_(0.1)
    moved = policy.adapter.detach().clone()
    assert backward(policy, still, CONDS, made, reference=here)["kl"].sum() > 0
    assert (policy.adapter.grad * (moved - start[0])).sum() > 0 and torch.equal(policy.adapter, moved)


@pytest.mark.parametrize(("mode", "steps_taken"), [("accumulate", 1), ("per_step", 4)])
def test_updates_step_the_optimizer_once_or_per_branch_step(mode, steps_taken):
    made = recipe("g2rpo", num_steps=8, group_size=4, objective="clip", update=mode)
    policy = ToyPolicy()
    rows = records(*rolled(made, policy), samples=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    metrics = update(policy, rows, CONDS, optimizer, made)
    assert optimizer.state[policy.adapter]["step"] == steps_taken
    assert (metrics["ratio/max_deviation"] == 0) == (mode == "accumulate")


def test_several_epochs_leave_the_rollouts_policy_and_are_clipped():
    made = recipe("g2rpo", num_steps=8, group_size=4, objective="clip", epochs=3, clip=1e-6)
    policy = ToyPolicy()
    rows = records(*rolled(made, policy), samples=True)
    metrics = update(policy, rows, CONDS, torch.optim.AdamW(policy.parameters(), lr=1e-2), made)
    assert 0 < metrics["clip_share"] < 1 and metrics["ratio/max_deviation"] > 0


def test_updates_raise_the_reward():
    made, policy = recipe("g2rpo", num_steps=8, group_size=12), ToyPolicy()
    probe = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-2)

    def reward():
        latents = roll_out(policy, deterministic(8), shifted_sigmas(8), CONDS * 20, range(40), SHAPE).latents
        return (latents * probe).sum().item() / 40

    before = reward()
    for iteration in range(15):
        plan = build_plan(made, iteration)
        rollout = roll_out(
            policy, plan, shifted_sigmas(8), CONDS, [100 + 2 * iteration, 101 + 2 * iteration], SHAPE
        )
        scores = (rollout.latents * probe).flatten(2).sum(2)
        update(
            policy,
            records(rollout, [integrate(plan.values(s[None])) for s in scores]),
            CONDS,
            optimizer,
            made,
        )
    assert reward() > before + 1


def test_a_gradient_that_is_not_finite_is_skipped():
    made, policy = recipe("g2rpo", num_steps=8, group_size=4), ToyPolicy()
    rows = records(*rolled(made, policy))
    before = policy.adapter.detach().clone()
    rows = dataclasses.replace(rows, direction=rows.direction * torch.inf)
    metrics = update(policy, rows, CONDS, torch.optim.AdamW(policy.parameters(), lr=1e-2), made)
    assert metrics["skipped"] == 1 and torch.equal(policy.adapter.detach(), before)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 3),
    st.sampled_from(["flow_sde", "dance_sde", "cps", "ddim"]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from(["equal", "nan", "random"]),
)
def test_corner_cases_give_finite_gradients(num_steps, kernel, eta, kind):
    policy = ToyPolicy()
    plan = singular(num_steps, range(num_steps), 2, (1, 2), kernel=kernel, eta=eta)
    rollout = roll_out(policy, plan, shifted_sigmas(num_steps), CONDS, SEEDS, SHAPE)
    scores = {"equal": torch.ones, "nan": lambda *s: torch.full(s, torch.nan), "random": torch.rand}[kind](
        1, len(plan.images)
    )
    made = recipe("g2rpo", num_steps=num_steps, objective="clip")
    rows = records(rollout, [integrate(plan.values(scores))] * 2, samples=True, step_weight="balanced")
    backward(policy, dataclasses.replace(rows, velocity=snapshot(policy, rows, CONDS)), CONDS, made)
    assert policy.adapter.grad.isfinite().all()
    if kind != "random" or eta == 0:
        assert policy.adapter.grad.abs().max() == 0


def test_step_weights_have_mean_one_and_balance_the_scale():
    c, s = torch.tensor([-0.1, -0.2, -0.4]), torch.tensor([0.7, 0.5, 0.3])
    balanced = step_weights(c, s, "balanced")
    assert torch.allclose(
        balanced * c.abs() / s, (balanced * c.abs() / s)[0].expand(3)
    ) and balanced.mean() == pytest.approx(1)
    assert torch.allclose(step_weights(c, s, "variance"), s**2 / (s**2).mean())
    assert torch.allclose(step_weights(c, s, "std"), s / s.mean()) and torch.equal(
        step_weights(c, s, "uniform"), torch.ones(3)
    )


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("num_steps", [4, 8])
def test_weighted_by_variance_cps_has_the_gradient_of_its_published_loss(num_steps, eta):
    """Flow-CPS's log-probability is −‖x′ − mean‖², a mean over elements: ∇ = 2A·c·s·ε on the velocity.

    Ours, A·c·ε/s by a weight ∝ s², is that up to one constant for all steps; at σ′ = 0 both are nothing.
    """
    made = recipe("flow_cps", num_steps=num_steps, steps="all", group_size=4, eta=eta, kl=0)
    rollout, advantages = rolled(made)
    rows = records(rollout, advantages, samples=True, step_weight=made.step_weight)
    velocity = rollout.velocity.flatten(0, 1).double().requires_grad_()
    loss, _ = clip(velocity, dataclasses.replace(rows, velocity=velocity.detach()), made)
    (ours,) = torch.autograd.grad(loss, velocity)
    sigmas, loss = shifted_sigmas(num_steps).double(), 0.0
    for noise, advantage, row in zip(rows.noise, rows.advantage, rows.owner, strict=True):
        k = int(rows.step[row])
        mean, std = kernels.cps(
            rows.x[row][None].double(), velocity[row][None], sigmas[k], sigmas[k + 1], eta, 1.0
        )
        x_next = (mean + std * noise).detach()
        log_p = -((x_next - mean) ** 2).mean()
        loss = loss - advantage * (log_p - log_p.detach()).exp() / len(rows.advantage)
    (theirs,) = torch.autograd.grad(loss, velocity)
    constant = (ours * theirs).sum() / theirs.square().sum()
    assert constant > 0 and (ours - constant * theirs).norm() <= 1e-6 * ours.norm()
    last = rows.step == num_steps - 1
    assert last.any() and (rows.weight[last] == 0).all() and (ours[last] == 0).all()


def test_flow_cps_is_the_tree_of_flow_grpo_with_its_own_kernel_and_weights():
    # Its code divides the KL by 2s², for std_dev_t is the whole step's noise there.
    changed = dict(kernel="cps", eta=0.8, step_weight="variance", kl_form="step")
    assert recipe("flow_grpo", **changed) == RECIPES["flow_cps"]


def test_rows_keep_their_samples():
    made = recipe("flow_grpo", num_steps=8, group_size=4)
    rows = records(*rolled(made), samples=True)
    some = rows.rows((rows.step == 3).nonzero().flatten())
    assert (
        (some.step == 3).all()
        and len(some.owner) == len(some)
        and torch.equal(
            some.direction,
            some.advantage.view(-1, 1, 1, 1)[some.owner.argsort()] * some.noise[some.owner.argsort()],
        )
    )


def test_the_gradient_is_averaged_over_processes():
    made, policy = recipe("g2rpo", num_steps=8, group_size=4, max_grad_norm=1e9), ToyPolicy()
    rows = records(*rolled(made, policy))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    before = policy.adapter.detach().clone()
    update(policy, rows, CONDS, optimizer, made, reduce=torch._foreach_zero_)
    assert torch.equal(policy.adapter.detach(), before)


def test_the_average_follows_the_adapter():
    mean, now = [torch.zeros(3)], [torch.ones(3)]
    update_average(mean, now, 0.9)
    assert torch.allclose(mean[0], torch.full((3,), 0.1))
