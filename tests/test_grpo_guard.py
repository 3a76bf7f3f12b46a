"""GRPO-Guard against its published formula, written out with means and log-probabilities."""

import dataclasses

import pytest
import torch
from toys import SHAPE, ToyPolicy, small

from comfy_g2rpo import kernels
from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.objectives import OBJECTIVES
from comfy_g2rpo.objectives.guard import guarded_log_ratio, guarded_loss
from comfy_g2rpo.objectives.policy_gradient import kl_scale
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.update import backward, log_ratio, records, update

CONDS, SEEDS = [0.3, -0.8], [11, 12]


def rolled(kernel="flow_sde", eta=0.7, group_size=6):
    """Return the rows and the velocities of a rollout of the toy model."""
    made = dataclasses.replace(small("grpo_guard", 8, group_size), kernel=kernel, eta=eta)
    plan = build_plan(made)
    rollout = roll_out(ToyPolicy(), plan, shifted_sigmas(8), CONDS, SEEDS, SHAPE)
    scores = rollout.latents.flatten(2).sum(2)
    rows = records(rollout, [integrate(plan.values(row[None])) for row in scores], samples=True)
    return made, rows, rollout.velocity.flatten(0, 1)


def in_double(rows):
    """Return rows in float64."""
    fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
    wide = {name: x.double() for name, x in fields.items() if x is not None and x.is_floating_point()}
    return dataclasses.replace(rows, **wide)


def published(velocity, old, rows, made, clip):
    """The published loss, one sample at a time, with s = σ_t√−Δ, and then over −Δ."""
    sigmas, losses, ratios = shifted_sigmas(8).double(), [], []
    for s, row in enumerate(rows.owner.tolist()):
        k = int(rows.step[row])
        ends = sigmas[k], sigmas[k + 1], made.eta, sigmas[1]
        x = rows.x[row][None].double()
        mean, std = kernels._transition(made.kernel, x, velocity[row][None], *ends)
        mean_old, _ = kernels._transition(made.kernel, x, old[row][None], *ends)
        after = (mean_old + std * rows.noise[s].double()).detach()
        log_p = kernels.log_prob(after, mean, std)
        log_p_old = kernels.log_prob(after, mean_old, std).detach()
        drift = (mean - mean_old).square().flatten(1).mean(1) / (2 * std**2)
        ratio = ((log_p - log_p_old + drift) * std).exp()
        advantage = rows.advantage[s].double()
        worse = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        losses.append(rows.weight[row] * worse / (sigmas[k] - sigmas[k + 1]))
        ratios.append(ratio)
    return torch.stack(losses).sum(), torch.cat(ratios)


@pytest.mark.parametrize("kernel", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("clip", [2e-6, 1e-3, 1.0])
@pytest.mark.parametrize("shift", [0.0, 0.05, -0.3])
def test_value_and_gradient_are_the_published_formulas(kernel, clip, shift):
    made, rows, velocity = rolled(kernel, eta=0.5)
    rows, old = in_double(rows), velocity.double()
    moved = old + shift * torch.randn(old.shape, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for loss in (lambda v: published(v, old, rows, made, clip), lambda v: guarded_loss(v, old, rows, clip)):
        v = moved.clone().requires_grad_()
        value, ratio = loss(v)
        (gradient,) = torch.autograd.grad(value, v)
        results.append((value.detach(), ratio.detach(), gradient))
    (value, ratio, gradient), (ours, our_ratio, our_gradient) = results
    assert (ours - value).abs() <= 1e-6 * max(1, value.abs())
    assert (our_ratio - ratio).abs().max() <= 1e-6
    assert (our_gradient - gradient).abs().max() <= 1e-6 * max(1, gradient.abs().max())
    assert gradient.any() or (shift and clip < 1e-3)


@pytest.mark.parametrize("size", [0.1, 0.5, 2.0])
def test_the_log_ratio_is_centred_whatever_the_velocity_moved(size):
    """Over mirrored draws the plain log-ratio has mean −‖μ − μ_old‖²/(2s²D), the guarded one 0."""
    _, rows, velocity = rolled(group_size=12)
    rows, velocity = in_double(rows), velocity.double()
    draws = torch.Generator().manual_seed(3)
    noise = torch.randn(20 * len(rows), *SHAPE, generator=draws).double()
    noise, owner = torch.cat([noise, -noise]), torch.arange(len(rows)).repeat(40)
    many = dataclasses.replace(rows, owner=owner, noise=noise, advantage=torch.ones(len(owner)))
    moved = velocity + size * torch.randn(velocity.shape, generator=draws)
    plain, guarded = (f(moved, velocity, many).view(40, -1) for f in (log_ratio, guarded_log_ratio))
    delta = (rows.v_coef / rows.std).view(-1, 1, 1, 1) * (moved - velocity)
    assert torch.allclose(plain.mean(0), -0.5 * delta.square().flatten(1).mean(1), rtol=1e-6)
    assert (plain.mean(0) < 0).all() and guarded.mean(0).abs().max() < 1e-12
    # The same draws spread the plain ratio by 1/s more than the guarded one.
    assert torch.allclose(guarded.std(0), rows.std * plain.std(0), rtol=1e-6)


def test_all_steps_pull_alike():
    """∇_v = −wAcε/(|Δ|D), with c/Δ the same at every step but the first; in Flow-GRPO it is −wAcε/(sD)."""
    made, rows, velocity = rolled()
    spreads = {}
    for name in ("guard", "none"):
        v = velocity.clone().requires_grad_()
        how = dataclasses.replace(made, ratio_norm=name)
        past = dataclasses.replace(rows, velocity=velocity)
        (gradient,) = torch.autograd.grad(OBJECTIVES["clip"].loss(v, past, how)[0], v)
        scale = gradient.flatten(1).norm(dim=1) / rows.direction.flatten(1).norm(dim=1)
        spreads[name] = torch.stack([scale[rows.step == k].mean() for k in range(7)])
    balanced = spreads["guard"]
    assert torch.allclose(balanced[1:], balanced[1].expand(6), rtol=1e-5)
    assert balanced[0] / balanced[1] == pytest.approx(1 / (1 + 0.7**2 / 2), rel=1e-5)
    assert spreads["none"][1:].max() / spreads["none"][1:].min() > 2


def test_a_step_without_noise_teaches_nothing():
    _, rows, velocity = rolled(eta=0.0)
    assert not guarded_log_ratio(velocity + 1, velocity, rows).any()


def test_the_recipe_is_flow_grpos_tree_with_the_guard():
    flow, guard = RECIPES["flow_grpo"], RECIPES["grpo_guard"]
    same = {"ratio_norm": "none", "clip": flow.clip, "kl": flow.kl, "kl_form": flow.kl_form}
    assert dataclasses.replace(guard, **same) == flow
    assert (guard.ratio_norm, guard.clip, guard.kl) == ("guard", 2e-6, 0)


def test_without_a_ratio_there_is_nothing_to_normalise():
    with pytest.raises(
        ValueError, match="ratio_norm is guard, but there is no ratio; choose objective: clip"
    ):
        recipe("g2rpo", ratio_norm="guard")


def test_several_epochs_are_held_by_the_clip():
    made, rows, _ = rolled()
    policy = ToyPolicy()
    made = dataclasses.replace(made, epochs=3)
    metrics = update(policy, rows, CONDS, torch.optim.AdamW(policy.parameters(), lr=1e-2), made)
    assert 0 < metrics["clip_share"] <= 1 and metrics["ratio/max_deviation"] > 2e-6


@pytest.mark.parametrize("num_steps", [8, 10, 16])
@pytest.mark.parametrize("form", ["velocity", "step", "published"])
def test_the_kl_has_the_form_that_is_asked_for(num_steps, form):
    """Flow-GRPO's paper: ‖μ − μ_ref‖²/(2σ_t²|Δ|); its code leaves out |Δ|; both averaged over elements."""
    made = dataclasses.replace(small("flow_grpo", num_steps, 4), kl=1.0, kl_form=form, objective="on_policy")
    plan, sigmas, policy = (
        build_plan(made),
        shifted_sigmas(num_steps).double(),
        ToyPolicy(dtype=torch.float64),
    )
    rollout = roll_out(ToyPolicy(), plan, sigmas.float(), CONDS, SEEDS, SHAPE)
    rows = records(rollout, [torch.zeros(plan.shape[:2])] * 2)
    rows = in_double(rows)
    backward(policy, rows, CONDS, made)
    ours, policy.adapter.grad = policy.adapter.grad, None
    conds = [CONDS[p] for p in rows.prompt.tolist()]
    v = policy.velocity(rows.x, rows.sigma, conds)
    with torch.no_grad(), policy.reference():
        reference = policy.velocity(rows.x, rows.sigma, conds)
    terms = []
    for row, k in enumerate(rows.step.tolist()):
        g = 0.7 * (sigmas[k] / (1 - (sigmas[1] if k == 0 else sigmas[k]))).sqrt()
        dt = sigmas[k + 1] - sigmas[k]
        mean, mean_ref = (
            rows.x[row] * (1 + g**2 / (2 * sigmas[k]) * dt)
            + each[row] * (1 + g**2 * (1 - sigmas[k]) / (2 * sigmas[k])) * dt
            for each in (v, reference)
        )
        variance = {"velocity": 0.5, "step": g**2 * -dt, "published": g**2}[form]
        apart = (v - reference)[row] if form == "velocity" else mean - mean_ref
        terms.append(apart.square().mean() / (2 * variance))
    torch.stack(terms).mean().backward()
    assert (ours - policy.adapter.grad).abs().max() <= 1e-6 * policy.adapter.grad.abs().max()


def test_the_velocity_kl_is_77_times_the_published_one_at_8_steps():
    """The same distance of the velocities at every step, T = 8, shift 3, η = .7: 13 times the exact KL."""
    plan = build_plan(small("flow_grpo", 8, 4))
    rollout = roll_out(ToyPolicy(), plan, shifted_sigmas(8), CONDS, SEEDS, SHAPE)
    rows = records(rollout, [torch.zeros(plan.shape[:2])] * 2)
    assert 1 / kl_scale(rows, "published").mean().item() == pytest.approx(77.3, abs=0.1)
    assert 1 / kl_scale(rows, "step").mean().item() == pytest.approx(12.9, abs=0.1)
