"""Trees whose branches split again: shape, fused rewards, advantages per depth, and the gradient."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from toys import SHAPE, ToyPolicy, plain_states, small

from comfy_g2rpo import kernels
from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.methods.step_choice import split_factor
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.rewards import Rule
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.run.evaluation import exploring
from comfy_g2rpo.run.iteration import Explored, score
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.settings import parse
from comfy_g2rpo.run.setup import World
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.trees.branching import branching
from comfy_g2rpo.update import backward, records

CONDS, SEEDS = [0.3, -0.8], [11, 12]


def nodes_per_group(plan):
    """Count the members of every comparison group."""
    count = Counter(plan.states[child].group for child in plan.transitions)
    return [count[group] for group in range(plan.shape[0])]


def test_branch_grpo_is_the_published_tree():
    """Splits at 0, 3, 6 and 9, noise on every step: 13.7 edges per image at 20 steps, as the paper counts."""
    made = dataclasses.replace(RECIPES["branch_grpo"], num_steps=20, steps="all")
    plan = build_plan(made)
    assert nodes_per_group(plan) == [2] * 3 + [4] * 3 + [8] * 3 + [16] * 11
    assert len(plan.images) == 16 and plan.shape == (20, 16, 1)
    assert sum(nodes_per_group(plan)) / 16 == pytest.approx(13.625)
    assert plan.forwards == 1 + sum(nodes_per_group(plan)) - 16


def test_branch_grpo_leaves_the_last_step_without_noise():
    plan = build_plan(RECIPES["branch_grpo"])
    assert nodes_per_group(plan) == [2] * 3 + [4] * 3 + [8] * 3 + [16] * 6
    assert {plan.states[i].kernel for i in plan.images} == {"ode"}


def test_tree_grpo_splits_at_each_step_of_a_window_that_moves():
    for iteration, start in ((0, 0), (49, 0), (50, 1), (11 * 50, 11), (12 * 50, 0)):
        plan = build_plan(RECIPES["tree_grpo"], iteration)
        forks = [plan.states[fork].index for fork in plan.forks]
        assert Counter(forks) == {start: 1, start + 1: 2, start + 2: 4, start + 3: 8}
        assert nodes_per_group(plan) == [2, 4, 8, 16] and len(plan.images) == 16


@pytest.mark.parametrize(
    ("splits", "group_size", "factor"), [((0,), 5, 5), ((1, 4), 9, 3), ((0, 1, 2), 8, 2), ((3, 2), 16, 4)]
)
def test_branches_split_into_the_root_of_the_group(splits, group_size, factor):
    plan = branching(8, splits, splits, group_size)
    depths = range(1, len(splits) + 1)
    assert nodes_per_group(plan) == [factor**d for d in depths] and len(plan.images) == group_size
    assert len({state.noise for state in plan.states if state.noise}) == 1 + len(plan.transitions)


def test_several_starts_are_trees_of_their_own():
    plan = build_plan(recipe("tree_grpo", starts=2, group_size=4, pick_size=2))
    assert nodes_per_group(plan) == [2, 4, 2, 4] and len(plan.images) == 8


def test_a_share_of_the_steps_is_trained():
    made = recipe("branch_grpo", train_share=0.4)
    plans = [build_plan(made, i) for i in range(5)]
    assert all(plan.shape[0] == 6 and len(plan.images) == 16 for plan in plans)
    assert len({plan.forks for plan in plans}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 12}, "group_size is 12; 4 splits of a branch make 16 or 81 images"),
        ({"branch_at": (0, 3)}, None),
        ({"branch_at": (0,)}, None),
        ({"branch_at": (0, 1, 2)}, "group_size is 16; 3 splits of a branch make 27 or 64 images"),
        ({"num_steps": 8}, "branch_at is .0, 3, 6, 9.; the last of 8 steps is 7"),
        ({"branch_at": None}, "group_size is 16; 15 splits of a branch make more images"),
        ({"granularities": (2,)}, "granularities is .2,.; branches that split again"),
        ({"branch_at": (-1, 3)}, "branch_at is .-1, 3.; it must lie between 0 and 999"),
    ],
)
def test_what_does_not_make_a_tree_is_named(changes, message):
    if message is None:
        assert len(build_plan(recipe("branch_grpo", **changes)).images) == 16
    else:
        with pytest.raises(ValueError, match=message):
            recipe("branch_grpo", **changes)


def test_objectives_that_need_one_state_or_no_noise_refuse_what_they_lack():
    with pytest.raises(ValueError, match="tree is branching, but objective vargrad compares"):
        recipe("tree_grpo", objective="vargrad", mix="sum", std="group")
    with pytest.raises(ValueError, match="kl_form is step, but of objective nft: no step has noise"):
        recipe("diffusion_nft", kl_form="step")
    with pytest.raises(ValueError, match="expand is 2; branches that split again cannot be dropped"):
        recipe("branch_grpo", expand=2.0)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_split_factor_is_the_exact_root(factor, splits):
    assert split_factor(factor**splits, splits) == factor


def tree(counts, plan):
    """Return scores [1, images] of one reward, and the same by the leaf's place from left to right."""
    scores = torch.arange(len(plan.images), dtype=torch.float32).square()[None] / 7
    assert len(plan.images) == counts
    return scores, scores[0]


def test_a_node_is_worth_the_mean_of_the_images_beneath():
    plan = branching(6, (0, 1, 3, 4), (0, 3), 9)
    scores, leaf = tree(9, plan)
    values = plan.values(scores)[0, :, :, 0]
    assert plan.shape == (4, 9, 1)
    for group, nodes in enumerate((3, 3, 9, 9)):
        fused = leaf.view(nodes, -1).mean(1)
        assert torch.allclose(values[group, :nodes], fused) and values[group, nodes:].isnan().all()


def test_advantages_are_z_scores_of_each_depth_and_sum_to_nothing():
    plan = branching(6, (0, 3), (0, 3), 9)
    scores, leaf = tree(9, plan)
    advantages = integrate(plan.values(scores), clamp=100)
    coarse = leaf.view(3, 3).mean(1)
    assert torch.allclose(advantages[0, :3], (coarse - coarse.mean()) / coarse.std(), atol=1e-6)
    assert torch.allclose(advantages[1], (leaf - leaf.mean()) / leaf.std(), atol=1e-6)
    assert not advantages[0, 3:].any() and advantages.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("mix", ["zscore", "minimum", "rank_product"])
@pytest.mark.parametrize("missing", [(), (3,), (0, 8)])
def test_tree_grpo_gives_an_edge_the_mean_advantage_of_its_images(mix, missing):
    """`std: tree` divides by the spread of all the tree's images: z fuses as the rewards do."""
    plan = branching(6, (0, 3), (0, 3), 9)
    scores = torch.rand(1, 2, 9, generator=torch.Generator().manual_seed(4))
    scores[:, :, list(missing)] = torch.nan
    reward = Rule("any", lambda images, prompts: images.mean((1, 2, 3)), compares_across_prompts=True)
    made = recipe("tree_grpo", group_size=9, branch_at=(0, 3), mix=mix, clamp=1000)
    setup = SimpleNamespace(
        recipe=made, pace=Pace(max_dropped=1), world=World(), rewards=[reward], weights=(1.0,), gates=()
    )
    scored = score(setup, Explored((), plan, SimpleNamespace(nfe=1), scores, {}, True, {}, {}), 1)
    for images, advantages in zip(scores[0], scored.advantages, strict=True):
        assert advantages.sum(1).abs().max() < 1e-5
        if mix == "zscore":
            z = (images - images.nanmean()) / images[~images.isnan()].std()
            fused = z.view(3, 3).nanmean(1)
            assert torch.allclose(advantages[0, :3], fused - fused.mean(), atol=1e-5)
            expected = torch.where(z.isnan(), 0.0, z - z.nanmean())
            assert torch.allclose(advantages[1], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["branch_grpo", "tree_grpo"])
def test_the_gradient_is_that_of_the_mean_over_all_edges(name):
    """The plain loss: every edge's clipped loss at ratio 1, summed and divided by their number."""
    made, grads = small(name, 8, 4), []
    for records_too in (True, False):
        policy, sigmas = ToyPolicy(), shifted_sigmas(8, made.shift)
        plan = build_plan(made)
        rollout = roll_out(policy, plan, sigmas, CONDS, SEEDS, SHAPE)
        probe = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
        scores = (rollout.latents * probe).flatten(2).sum(2)
        advantages = [integrate(plan.values(row[None])) for row in scores]
        if records_too:
            backward(policy, records(rollout, advantages, samples=True), CONDS, made)
        else:
            losses = []
            for p in range(2):
                states = plain_states(policy, plan, sigmas, CONDS[p], SEEDS[p])
                for child in plan.transitions:
                    edge = plan.states[child]
                    x, k = states[edge.parent][0][None], plan.states[edge.parent].index
                    v = policy.velocity(x, sigmas[k].reshape(1), [CONDS[p]])
                    ends = sigmas[k], sigmas[k + 1], made.eta, sigmas[1]
                    mean, std = kernels._transition(made.kernel, x, v, *ends)
                    after = (mean + std * rollout.noise(p, child)).detach()
                    log_p = kernels.log_prob(after, mean, std)
                    ratio = (log_p - log_p.detach()).exp()
                    losses.append(-advantages[p][edge.group, edge.member] * ratio)
            torch.stack(losses).mean().backward()
        grads.append(policy.adapter.grad)
    assert len(set(nodes_per_group(plan))) > 1
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


@pytest.mark.parametrize("coarsest", [2, 3])
def test_cheap_completions_keep_what_is_stochastic(coarsest):
    for name in ("branch_grpo", "tree_grpo"):
        whole, cheap = (build_plan(RECIPES[name], 0, 0, stride) for stride in (1, coarsest))
        assert nodes_per_group(whole) == nodes_per_group(cheap)
        assert cheap.forwards < whole.forwards or name == "branch_grpo"


@pytest.mark.parametrize("name", ["branch_grpo", "tree_grpo"])
def test_the_watch_looks_at_one_branch_of_a_tree(name):
    plan = exploring(RECIPES[name])
    assert len(plan.images) == 1 and set(nodes_per_group(plan)) == {1}
    assert len(plan.transitions) == build_plan(RECIPES[name]).shape[0]


def test_a_tree_is_settable_line_by_line():
    lines = (
        "tree = branching\nbranch_at = 0, 3\ngroup_size = 9\ngranularities = 1\nstd = tree\nobjective = clip"
    )
    made = recipe("g2rpo", **parse(lines)[0])
    assert nodes_per_group(build_plan(made)) == [3, 3, 3, 9, 9, 9, 9, 9]
    assert parse("branch_at = none")[0] == {"branch_at": None}
