"""Forward-process objectives: DiffusionNFT and AWM, from formula to whole runs."""

import dataclasses

import pytest
import torch
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.methods.recipe_checks import FORWARD
from comfy_g2rpo.objectives import OBJECTIVES
from comfy_g2rpo.objectives.forward_process import awm, image_rows, likelihood, nft, optimality
from comfy_g2rpo.plan import deterministic
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.rollout import roll_out, seeded_noise
from comfy_g2rpo.run.evaluation import exploring
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.update import backward, snapshot, update
from comfy_g2rpo.votes.forks import forks_of

CONDS, SEEDS = [0.3, -0.8], [11, 12]
SMALL = {"num_steps": 6, "group_size": 4}
NAMES = {"nft": "diffusion_nft", "awm": "awm"}


def made(objective, **changes):
    """Return a small recipe of an objective."""
    return recipe(NAMES[objective], **{**SMALL, "kl": 0.0, **changes})


def drawn(recipe, rewards=None, policy=None, slots=64):
    """Roll out a recipe on the toy model; return its rows, latents and advantages."""
    plan, sigmas = build_plan(recipe), shifted_sigmas(recipe.num_steps)
    rollout = roll_out(policy or ToyPolicy(), plan, sigmas, CONDS, SEEDS, SHAPE, slots=slots)
    if rewards is None:
        rewards = rollout.latents.flatten(2).sum(2)
    advantages = [integrate(plan.values(row[None])) for row in rewards]
    return image_rows(rollout, rollout.latents, advantages, sigmas), rollout.latents, advantages


def sampled(seed=0, rows=7):
    """Return rows of random numbers, and two velocities at them."""
    rows_of, _, _ = drawn(made("nft"))
    generator = torch.Generator().manual_seed(seed)
    part = rows_of.rows(torch.randperm(len(rows_of), generator=generator)[:rows].sort().values)
    new, old = (torch.randn(part.x.shape, generator=generator) for _ in range(2))
    advantage = torch.randn(rows, generator=generator) * 4
    return dataclasses.replace(part, velocity=old, advantage=advantage), new.requires_grad_(), old


# The formulas, sample by sample, as the published codes have them.


def published_nft(rows, new, old, beta, clip_max):
    total = 0.0
    for i in range(len(rows)):
        t, xt, x0 = rows.sigma[i], rows.x[i], rows.x[i] - rows.sigma[i] * rows.target[i]
        r = (rows.advantage[i].clamp(-clip_max, clip_max) / clip_max / 2 + 0.5).clamp(0, 1)
        loss = 0.0
        for share, moved in (
            (r, beta * new[i] + (1 - beta) * old[i]),
            (1 - r, (1 + beta) * old[i] - beta * new[i]),
        ):
            predicted = xt - t * moved
            size = (predicted - x0).abs().mean().clip(min=1e-5).detach()
            loss = loss + share * ((predicted - x0) ** 2 / size).mean() / beta
        total = total + loss * clip_max / len(rows)
    return total


def published_awm(rows, new, old, weighting, clip_range, clip_max):
    total = 0.0
    for i in range(len(rows)):
        log_probs = []
        for v in (new[i], old[i]):
            log_prob = -((v - rows.target[i]) ** 2).mean()
            if weighting == "sigma":
                log_prob = log_prob * rows.sigma[i]
            elif weighting == "ghuber":
                log_prob = -(((-log_prob + 1e-10) ** 0.25 - 1e-10**0.25) * rows.sigma[i] / 0.25)
            log_probs.append(log_prob)
        ratio = (log_probs[0] - log_probs[1]).exp()
        a = rows.advantage[i].clamp(-clip_max, clip_max) / clip_max
        total = total + max(-a * ratio, -a * ratio.clamp(1 - clip_range, 1 + clip_range)) / len(rows)
    return total


def doubled(rows, *velocities):
    """Return everything in float64, in which formulas are compared."""
    fields = {f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)}
    wide = {k: v.double() for k, v in fields.items() if v is not None and v.is_floating_point()}
    return dataclasses.replace(rows, **wide), *(v.detach().double().requires_grad_() for v in velocities)


def assert_same(ours, theirs, new):
    assert abs(ours.item() - theirs.item()) <= 1e-6 * max(1, abs(theirs.item()))
    gradients = [torch.autograd.grad(loss, new)[0] for loss in (ours, theirs)]
    assert gradients[1].abs().max() > 1e-6
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * max(1, gradients[1].abs().max())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("beta", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("clamp", [1.0, 5.0])
def test_nft_is_the_published_formula_in_value_and_gradient(seed, beta, clamp):
    rows, new, old = sampled(seed)
    rows, new, old = doubled(dataclasses.replace(rows, weight=torch.full((7,), 1 / 7)), new, old)
    rows = dataclasses.replace(rows, velocity=old.detach())
    ours = nft(new, rows, made("nft", nft_beta=beta, clamp=clamp))[0]
    assert_same(ours, published_nft(rows, new, old.detach(), beta, clamp), new)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("weight", ["uniform", "sigma", "ghuber"])
@pytest.mark.parametrize("clip", [1.0, 0.2])
def test_awm_is_the_published_formula_in_value_and_gradient(seed, weight, clip):
    rows, new, old = sampled(seed)
    # Advantages beyond the clamp do not come out of `integrate`, and the clipping of them is not its own.
    rows = dataclasses.replace(rows, weight=torch.full((7,), 1 / 7), advantage=rows.advantage.clamp(-5, 5))
    rows, new, old = doubled(rows, new, old)
    rows = dataclasses.replace(rows, velocity=old.detach())
    ours = awm(new, rows, made("awm", awm_weight=weight, clip=clip))[0]
    assert_same(ours, published_awm(rows, new, old.detach(), weight, clip, 5.0), new)


def test_the_optimality_runs_from_0_to_1():
    found = optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0)
    assert found.tolist() == [0, 0, 0.5, 0.75, 1, 1]


# What is known of the gradients without any loss.


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_at_the_old_policy_the_gradient_of_nft_is_known_and_free_of_beta(beta):
    rows, _, old = sampled()
    rows = dataclasses.replace(rows, advantage=rows.advantage.clamp(-5, 5))
    rows, velocity = doubled(rows, old)
    rows = dataclasses.replace(rows, velocity=velocity.detach())
    (found,) = torch.autograd.grad(nft(velocity, rows, made("nft", nft_beta=beta))[0], velocity)
    away = (velocity - rows.target).detach()
    size = away.abs().flatten(1).mean(1) * away[0].numel()
    scale = rows.weight * rows.advantage * 2 * rows.sigma / size
    assert (found - scale.view(-1, 1, 1, 1) * away).abs().max() <= 1e-12


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_an_image_as_good_as_the_mean_only_pulls_nft_back_to_the_old_policy(beta):
    rows, new, old = sampled()
    rows = dataclasses.replace(rows, advantage=torch.zeros(len(rows)))
    still = old.clone().requires_grad_()
    assert torch.autograd.grad(nft(still, rows, made("nft", nft_beta=beta))[0], still)[0].abs().max() < 1e-9
    # Where both models err alike, r = ½ gives 2·clamp·β·σ²(v − v_old)/(D·size).
    rows, new, old = doubled(rows, rows.target + 0.1 * (new - old), rows.target)
    rows = dataclasses.replace(rows, velocity=old.detach())
    (found,) = torch.autograd.grad(nft(new, rows, made("nft", nft_beta=beta))[0], new)
    moved = (new - old).detach()
    size = (rows.sigma.view(-1, 1, 1, 1) * beta * moved).abs().flatten(1).mean(1) * moved[0].numel()
    scale = rows.weight * 2 * 5 * beta * rows.sigma**2 / size
    assert (found - scale.view(-1, 1, 1, 1) * moved).abs().max() <= 1e-12


@pytest.mark.parametrize("weight", ["uniform", "sigma", "ghuber"])
@pytest.mark.parametrize("clip", [1e-4, 1.0])
def test_on_policy_awm_is_the_policy_gradient_of_its_likelihood(weight, clip):
    rows, _, old = sampled()
    rows, velocity = doubled(rows, old)
    rows = dataclasses.replace(rows, velocity=velocity.detach())
    (found,) = torch.autograd.grad(
        awm(velocity, rows, made("awm", awm_weight=weight, clip=clip))[0], velocity
    )
    surrogate = -(rows.weight * rows.advantage / 5 * likelihood(velocity, rows, weight)).sum()
    (plain,) = torch.autograd.grad(surrogate, velocity)
    assert (found - plain).abs().max() <= 1e-12 * max(1, plain.abs().max())
    assert plain.abs().max() > 1e-6


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_a_constant_on_all_rewards_changes_nothing(objective):
    asked = made(objective)
    _, latents, _ = drawn(asked)
    scores = latents.flatten(2).sum(2)
    gradients = []
    for rewards in (scores, scores + 3, 2 * scores - 1):
        policy = ToyPolicy()
        backward(policy, drawn(asked, rewards)[0], CONDS, asked)
        gradients.append(policy.adapter.grad)
    assert gradients[0].norm() > 0
    assert all((g - gradients[0]).norm() <= 1e-4 * gradients[0].norm() for g in gradients[1:])


@pytest.mark.parametrize("objective", ["nft", "awm"])
@pytest.mark.parametrize("rewards", [torch.ones(2, 4), torch.full((2, 4), torch.nan)])
def test_equal_or_missing_rewards_teach_nothing_and_give_no_nan(objective, rewards):
    policy, asked = ToyPolicy(), made(objective, kl=0.0, epochs=2)
    before = policy.adapter.detach().clone()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    metrics = update(policy, drawn(asked, rewards)[0], CONDS, optimizer, asked)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] < 1e-6
    assert (policy.adapter - before).abs().max() < 1e-6


# Plans and rows.


@pytest.mark.parametrize("objective", ["nft", "awm"])
@pytest.mark.parametrize("coarsest", [1, 2, 3, 9])
def test_the_plan_compares_g_images_of_as_many_start_noises(objective, coarsest):
    asked = made(objective)
    plan = build_plan(asked, coarsest=coarsest)
    assert plan.shape == (1, 4, 1) and plan.forks == () and len(plan.images) == 4
    assert {state.kernel for state in plan.states} <= {"ode", "dpm_2m"}
    assert len({state.noise for state in plan.states if state.index == 0}) == 4
    assert plan.values(torch.tensor([[3.0, 1.0, 4.0, 2.0]])).tolist() == [[[[3.0], [1.0], [4.0], [2.0]]]]
    if coarsest == 1:
        assert plan.forwards == 4 * 6


def test_a_start_noise_is_no_fork_of_a_ballot():
    rollout = roll_out(ToyPolicy(), build_plan(made("nft")), shifted_sigmas(6), CONDS, SEEDS, SHAPE)
    assert rollout.plan.transitions == () and rollout.x.shape[1] == 0
    assert forks_of(rollout, 0, dict(enumerate(range(4))), "a red circle", "base") is None


@pytest.mark.parametrize("name", NAMES.values())
@pytest.mark.parametrize("changes", [{}, {"etas": (0.7,) * 6}, {"kernel": "cps", "eta": 0.9}])
def test_the_watch_looks_at_images_without_noise(name, changes):
    plan, sigmas = exploring(recipe(name, **SMALL, **changes)), shifted_sigmas(6)
    assert plan.forks and plan.shape[1] == 1
    found, plain = (
        roll_out(ToyPolicy(), each, sigmas, CONDS, SEEDS, SHAPE).latents for each in (plan, deterministic(6))
    )
    assert torch.allclose(found, plain, atol=1e-5)


def test_published_shares_of_the_levels():
    assert build_plan(RECIPES["diffusion_nft"]).draws == 14
    assert build_plan(dataclasses.replace(RECIPES["diffusion_nft"], num_steps=10)).draws == 9
    assert build_plan(dataclasses.replace(RECIPES["awm"], num_steps=14)).draws == 6


@pytest.mark.parametrize(
    ("changes", "levels", "draws"),
    [
        ({"steps": "all", "train_share": 1.0}, range(6), 6),
        ({"steps": "all", "train_share": 0.5}, range(6), 3),
        ({"steps": "first_half", "train_share": 1.0}, range(3), 3),
        ({"steps": "all_but_last", "train_share": 0.01}, range(5), 1),
    ],
)
def test_levels_are_those_of_the_schedule(changes, levels, draws):
    asked = made("nft", **changes)
    rows, latents, advantages = drawn(asked)
    assert build_plan(asked).levels == tuple(levels) and len(rows) == build_plan(asked).rows * 2 == 8 * draws
    assert {*rows.step.tolist()} <= {*levels}
    sigmas = shifted_sigmas(6)
    for i in range(len(rows)):
        p, image = divmod(i // draws, 4)
        noise = seeded_noise(SHAPE, "forward", SEEDS[p], image, int(rows.step[i]))
        sigma = sigmas[rows.step[i]]
        assert rows.prompt[i] == p and rows.sigma[i] == sigma
        assert torch.allclose(rows.x[i], (1 - sigma) * latents[p, image] + sigma * noise, atol=1e-6)
        assert torch.allclose(rows.target[i], noise - latents[p, image], atol=1e-6)
        assert rows.advantage[i] == advantages[p][0, image]
    assert rows.weight.sum().item() == pytest.approx(1)


def test_windows_and_random_choices_choose_levels_too():
    asked = made("awm", steps="all", pick="random", pick_size=2, train_share=1.0)
    chosen = {build_plan(asked, i).levels for i in range(20)}
    assert len(chosen) > 3 and all(len(levels) == 2 for levels in chosen)


def test_every_image_draws_its_own_levels():
    plan = build_plan(made("nft", steps="all", train_share=0.5))
    assert len({tuple(plan.levels_of(image, 11)) for image in range(4)}) > 1
    assert plan.levels_of(2, 11) == plan.levels_of(2, 11)


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_gradients_do_not_depend_on_slots_or_micro_batches(objective):
    gradients = []
    asked = made(objective, kl=0.1)
    for slots, micro in ((3, 1), (64, 5), (64, 64)):
        policy = ToyPolicy()
        backward(policy, drawn(asked, policy=policy, slots=slots)[0], CONDS, asked, micro_batch=micro)
        gradients.append(policy.adapter.grad)
    assert all((g - gradients[0]).norm() <= 1e-5 * gradients[0].norm() for g in gradients)


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_the_velocity_kl_adds_its_own_gradient(objective):
    gradients = {}
    for kl in (0.0, 0.1):
        policy, asked = ToyPolicy(), made(objective, kl=kl)
        rows = drawn(asked)[0]
        backward(policy, rows, CONDS, asked)
        gradients[kl] = policy.adapter.grad.clone()
    policy.adapter.grad = None
    cond = [CONDS[p] for p in rows.prompt.tolist()]
    velocity = policy.velocity(rows.x, rows.sigma, cond)
    with torch.no_grad(), policy.reference():
        anchored = policy.velocity(rows.x, rows.sigma, cond)
    (0.1 * (velocity - anchored).square().mean()).backward()
    assert (gradients[0.1] - gradients[0.0] - policy.adapter.grad).norm() <= 1e-5 * policy.adapter.grad.norm()


@pytest.mark.parametrize("objective", ["nft", "awm"])
def test_one_update_costs_no_forward_for_its_own_past(objective):
    asked, gradients = made(objective), []
    rows = drawn(asked)[0]
    for given in (rows, None):
        policy = ToyPolicy()
        if given is None:
            given = dataclasses.replace(rows, velocity=snapshot(policy, rows, CONDS))
            policy.calls.clear()
        backward(policy, given, CONDS, asked)
        assert sum(policy.calls) == len(rows)
        gradients.append(policy.adapter.grad)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-7 * gradients[1].abs().max()


@pytest.mark.parametrize("objective", ["nft", "awm"])
@pytest.mark.parametrize(
    "changes", [{"epochs": 3}, {"update": "per_step"}, {"epochs": 2, "update": "per_step"}]
)
def test_several_steps_from_one_rollout_go_on_from_the_same_past(objective, changes):
    asked, policy = made(objective, **changes), ToyPolicy()
    rows = drawn(asked)[0]
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    metrics = update(policy, rows, CONDS, optimizer, asked)
    told = metrics["old_policy/velocity"] if objective == "nft" else metrics["ratio/max_deviation"]
    assert told > 0 and metrics["skipped"] == 0


def test_what_an_image_learns_does_not_depend_on_the_processes(tmp_path):
    """Two processes of one prompt each have the rows that one process of two has."""
    asked = made("nft")
    whole = drawn(asked)[0]
    plan, sigmas = build_plan(asked), shifted_sigmas(6)
    for p in range(2):
        rollout = roll_out(ToyPolicy(), plan, sigmas, CONDS[p : p + 1], SEEDS[p : p + 1], SHAPE)
        table = [integrate(plan.values(rollout.latents[0].flatten(1).sum(1)[None]))]
        part = image_rows(rollout, rollout.latents, table, sigmas)
        mine = whole.rows((whole.prompt == p).nonzero().flatten())
        assert torch.equal(part.step, mine.step) and torch.allclose(part.x, mine.x, atol=1e-5)
        assert torch.allclose(part.weight / 2, mine.weight) and torch.allclose(
            part.target, mine.target, atol=1e-5
        )


# Settings that do not go together.


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("g2rpo", {"objective": "nft"}, "tree is singular.*choose tree: independent"),
        ("g2rpo", {"objective": "awm", "granularities": (1,)}, "tree is singular.*tree: independent"),
        ("awm", {"granularities": (1, 2)}, "granularities is"),
        ("diffusion_nft", {"granularities": (2,)}, "granularities is"),
        ("diffusion_nft", {"shared_start": True}, "shared_start is true.*shared_start: false"),
        ("dance_grpo", {"objective": "awm"}, "shared_start is true.*shared_start: false"),
        ("awm", {"step_weight": "balanced"}, "step_weight is balanced.*step_weight: uniform"),
        ("awm", {"tree": "singular"}, "tree is singular"),
        ("awm", {"credit": "gain"}, "credit is gain.*credit: final"),
        ("awm", {"replay": 2}, "replay is 2.*awm cannot"),
        ("awm", {"expand": 2.0}, "expand is 2.0.*expand: 1"),
        ("diffusion_nft", {"nft_beta": 0.0}, "nft_beta is 0.0; it must lie between 0.001 and 100"),
        ("diffusion_nft", {"old_decay": 1.0}, "old_decay is 1.0; it must lie between"),
        ("diffusion_nft", {"old_ramp": 0.0}, "old_ramp"),
        ("awm", {"awm_weight": "t"}, "awm_weight is 't'; choose one of: uniform, sigma, ghuber"),
        ("g2rpo", {"old_decay": 0.5}, "old_decay is 0.5.*objective: nft or awm, or old_decay: 0"),
        ("flow_grpo", {"old_decay": 0.5}, "old_decay is 0.5, which objective clip lacks"),
        ("diffusion_nft", {"objective": "on_policy"}, "old_decay"),
        ("awm", {"objective": "on_policy", "epochs": 2}, "epochs above 1"),
    ],
)
def test_settings_that_do_not_go_together_are_named_with_what_to_do(name, changes, words):
    with pytest.raises(ValueError, match=words) as told:
        recipe(name, **changes)
    assert "\n" not in str(told.value)


def test_what_checks_call_forward_learns_from_images():
    assert [name for name, objective in OBJECTIVES.items() if objective.images] == list(FORWARD)


def test_old_recipes_have_none_of_it():
    others = [made for name, made in RECIPES.items() if name not in NAMES.values()]
    assert all(made.old_decay == 0 and made.objective not in NAMES for made in others)
