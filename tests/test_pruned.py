"""Branches that are dropped on the way: who goes on, what it costs, and that nothing else changes."""

import math
from itertools import combinations, product

import pytest
import torch
from some_cases import some
from test_guard import Brightness, Crowd, Painter
from toys import SHAPE

from comfy_g2rpo.objectives.policy_gradient import on_policy
from comfy_g2rpo.plan import independent, singular
from comfy_g2rpo.recipes import RECIPES, build_plan, recipe
from comfy_g2rpo.run.scorer import Scorer, comparison_groups, roll_out_and_score
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.step_cache import Shortcut
from comfy_g2rpo.trees.pruned import PrunedPlan, finished_rows, pruned, widest
from comfy_g2rpo.trees.staged_rollout import roll_out_pruned
from comfy_g2rpo.trees.whole_images import ImagePlan
from comfy_g2rpo.update import records

STEPS, CONDS, SEEDS = 10, [0.3, -0.8], [11, 12]
SMALL = {"num_steps": STEPS, "group_size": 4}
MADE = {
    "coarsest": recipe("g2rpo", **SMALL, expand=2.0, prune_by="coarsest"),
    "coarsest of three": recipe("g2rpo", **SMALL, expand=1.5, granularities=(3, 1, 2), prune_by="coarsest"),
    "late steps": recipe("g2rpo", **SMALL, steps="all", expand=2.0, prune_by="coarsest"),
    "predicted": recipe("g2rpo", **SMALL, expand=2.0),
    "predicted at once": recipe("g2rpo", **SMALL, expand=3.0, prune_at=(0.0,), granularities=(2,)),
    "predicted twice": recipe("g2rpo", **SMALL, expand=3.0, prune_at=(0.2, 0.7), starts=2),
    "window": recipe("flow_grpo_fast", **SMALL, expand=2.0, prune_at=(0.3,)),
    "trajectories": recipe("pro_grpo", num_steps=STEPS, group_size=3),
    "from one start": recipe("mix_grpo", **SMALL, expand=2.0, prune_at=(0.5,)),
    "few trained": recipe("dance_grpo", **SMALL, expand=2.0, train_share=0.2, prune_at=(0.3, 0.6)),
}


def roll(plan, rewards=None, policy=None, slots=64, shortcut=None):
    """Roll out and score a plan for two prompts."""
    policy, rewards = policy or Painter(), rewards or (Brightness(),)
    scorer = Scorer(
        policy.decode,
        rewards,
        ["a", "b"],
        len(plan.images),
        describe=lambda images: {"pixels": images.flatten(1)},
        groups=comparison_groups(plan),
    )
    how = shifted_sigmas(plan.num_steps), CONDS, SEEDS, SHAPE, scorer, slots, None, shortcut
    if not isinstance(plan, PrunedPlan):
        return scorer, roll_out_and_score(policy, plan, *how), policy
    # The mean over rewards stands in for how they are mixed.
    return scorer, roll_out_pruned(policy, plan, *how, judge=lambda r: r[:, 0, :, 0].nanmean(0)), policy


def unpruned(plan):
    """Return the same plan with every leaf, run as a whole."""
    from comfy_g2rpo.plan import Plan

    return Plan(plan.num_steps, plan.states, plan.leaves)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(6))
def test_who_goes_on_has_the_largest_variance_of_all_subsets(seed, count):
    scores = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
    scores = scores.exp() if seed % 2 else scores

    def variance(members):
        part = scores[list(members)]
        return (part - part.mean()).square().mean().item()

    best = max(map(variance, combinations(range(8), count)))
    assert variance(widest(scores.tolist(), count)) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ([1, 2, 3, 4], 2, [0, 3]),
        ([0, 0, 0, 9], 2, [1, 3]),
        ([0, 9, 9, 9.1], 2, [0, 3]),
        ([5, 5, 5, 5], 2, [0, 3]),
        ([3, 1, 2], 3, [0, 1, 2]),
        ([-1e9, 0, 1e9], 2, [0, 2]),
    ],
)
def test_it_takes_the_extremes_and_is_balanced_where_it_may(scores, count, kept):
    chosen = widest(scores, count)
    assert sorted(scores[i] for i in chosen) == sorted(scores[i] for i in kept)
    assert chosen == sorted(chosen)


@pytest.mark.parametrize("name", MADE)
def test_forwards_and_pictures_are_counted_before_they_are_spent(name):
    plan = build_plan(MADE[name], 3, 1)
    scorer, rollout, policy = roll(plan)
    assert rollout.nfe == sum(policy.calls) == 2 * plan.forwards
    assert plan.forwards < unpruned(plan).forwards or name == "late steps"
    for table in rollout.finished:
        assert (table.sum(1) <= MADE[name].group_size).all()
    assert {len(images) for images in rollout.images} == {len(rollout.images[0])}
    kept = (~scorer.scores.isnan()).sum().item()
    assert kept == sum(map(len, rollout.images))


@pytest.mark.parametrize(("name", "slots"), some(product(MADE, (1, 5, 64)), 7))
def test_what_is_finished_is_what_the_whole_plan_makes(name, slots):
    plan = build_plan(MADE[name], 3, 1)
    scorer, rollout, _ = roll(plan, slots=slots)
    whole, all_of_it, _ = roll(unpruned(plan), slots=slots)
    there = ~scorer.scores.isnan()
    assert (scorer.scores - whole.scores)[there].abs().max() < 1e-6
    assert (scorer.features["pixels"].isnan().any(2) == ~there[0]).all()
    for p, table in enumerate(rollout.finished):
        rows = [
            i
            for i, fork in enumerate(plan.forks)
            if any(table[plan.place(c)] for c in plan.children[fork] if c in plan.transitions)
        ]
        assert torch.allclose(rollout.x[p, rows], all_of_it.x[p, rows], atol=1e-6)
        assert torch.allclose(rollout.velocity[p, rows], all_of_it.velocity[p, rows], atol=1e-6)
        values = plan.final_values(scorer.scores[:, p])
        assert (~values.isnan().all(3)[0] == table).all()


@pytest.mark.parametrize("name", ["coarsest", "predicted", "trajectories"])
def test_the_survivors_are_those_that_the_judge_sees_differ_most(name):
    plan = build_plan(MADE[name], 3, 1)
    _, rollout, _ = roll(plan)
    whole, _, _ = roll(unpruned(plan))
    if len(plan.judges) > 1:
        return
    column = {state: i for i, state in enumerate(plan.images)}
    for p, table in enumerate(rollout.finished):
        for block in plan.members:
            seen = [whole.scores[0, p, column[plan.leaves[m[plan.judges[0]]].state]].item() for m in block]
            group = plan.states[
                max(s for s in plan.above([plan.leaves[block[0][0]].state]) if plan.states[s].trained)
            ].group
            assert table[group].nonzero().flatten().tolist() == widest(seen, plan.sizes[0])


def test_prediction_is_the_clean_latent_of_the_state_after_so_much_of_the_way():
    plan = pruned(independent(50, range(49), 32), (1,), 8, "prediction", (0.6, 0.8))
    assert plan.sizes == (16, 8)
    levels = {leaf.granularity: plan.states[plan.states[leaf.state].parent].index for leaf in plan.leaves}
    assert levels == {0: 49, 1: 30, 2: 40}
    # 32 trajectories of 30 steps and the prediction's forward, 16 of ten more, 8 to the end.
    assert plan.forwards == 32 * 31 + 16 * 10 + 8 * 9
    assert plan.pictures == 32 + 16 + 8 and plan.rows == 8 * 49
    coefficients = plan.coefficients(shifted_sigmas(50))
    leaf = next(leaf for leaf in plan.leaves if leaf.granularity == 1)
    sigma = coefficients.sigma[plan.states[leaf.state].parent]
    assert coefficients.x_coef[leaf.state] == 1 and coefficients.std[leaf.state] == 0
    assert coefficients.v_coef[leaf.state] == pytest.approx(-sigma.item())


def test_halving_shares_the_states_of_all_granularities():
    plan = build_plan(
        recipe("g2rpo", num_steps=8, group_size=4, expand=2.0, prune_by="coarsest", pick="random")
    )
    k = plan.states[plan.forks[0]].index
    coarse = len(range(k + 2, 8, 2)) + 1
    fine = 8 - k - 1
    # The steps k+1 and k+2 are common to both strides.
    assert plan.forwards == k + 1 + 8 * coarse + 4 * (fine - 2)


@pytest.mark.parametrize("name", MADE)
def test_the_gradient_is_the_mean_over_the_survivors(name):
    made = MADE[name]
    plan = build_plan(made, 3, 1)
    scorer, rollout, policy = roll(plan)
    values = [plan.final_values(scorer.scores[:, p])[0].nansum(2) for p in range(2)]
    tables = [
        torch.where(t, v - v.sum(1, keepdim=True) / t.sum(1, keepdim=True).clamp(min=1), 0.0)
        for t, v in zip(rollout.finished, values, strict=True)
    ]
    assert all(table.sum(1).abs().max() < 1e-5 for table in tables)
    assert all((table[~t] == 0).all() for table, t in zip(tables, rollout.finished, strict=True))
    rows = finished_rows(records(rollout, tables), plan, rollout.finished)
    assert len(rows) == 2 * plan.rows
    conds = [CONDS[p] for p in rows.prompt.tolist()]
    loss, _ = on_policy(policy.velocity(rows.x, rows.sigma, conds).float(), rows, made)
    # Written out: −1/(prompts · groups · survivors) Σ A · c/(s·D) · ⟨ε, v⟩.
    groups, expected, c = plan.shape[0], 0.0, rollout.coefficients
    survivors = made.group_size
    for p, table in enumerate(tables):
        for state in plan.transitions:
            edge = plan.states[state]
            if not rollout.finished[p][edge.group, edge.member] or c.std[state] == 0:
                continue
            fork = plan.forks.index(edge.parent)
            v = policy.velocity(rollout.x[p, fork][None], c.sigma[edge.parent][None], [CONDS[p]])[0]
            scale = c.v_coef[state] / (c.std[state] * v.numel())
            pull = (rollout.noise(p, state) * v).sum() * scale
            expected -= table[edge.group, edge.member] * pull / (2 * groups * survivors)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("rolling", [True, False])
@pytest.mark.parametrize("name", ["coarsest", "predicted twice", "trajectories"])
def test_a_reward_that_needs_its_group_gets_each_stages_own(name, rolling):
    class Apart(Painter):
        decodes_while_rolling = rolling

    plan = build_plan(MADE[name], 3, 1)
    scorer, _, _ = roll(plan, (Brightness(), Crowd()), Apart())
    plain, _, _ = roll(plan, (Brightness(),), Apart())
    lone, other, plain = (each.nan_to_num(-1) for each in (*scorer.scores, plain.scores[0]))
    assert torch.equal(lone, other) and torch.equal(lone, plain)


@pytest.mark.parametrize("name", ["coarsest", "predicted", "from one start"])
def test_cheaper_completions_go_on_across_stages(name):
    plan = build_plan(MADE[name], 3, 1, coarsest=2)
    scorer, rollout, _ = roll(plan, shortcut=Shortcut(None, 0.0))
    whole, _, _ = roll(unpruned(plan), shortcut=Shortcut(None, 0.0))
    there = ~scorer.scores.isnan()
    assert (scorer.scores - whole.scores)[there].abs().max() < 1e-6
    plan = build_plan(MADE[name], 0, 1)
    _, rollout, _ = roll(plan)
    cached, short, _ = roll(plan, shortcut=Shortcut(None, 5.0))
    assert short.nfe < rollout.nfe and (~cached.scores.isnan()).sum() == there.sum()


@pytest.mark.parametrize("name", MADE)
def test_a_reward_that_is_silent_drops_nobody_for_it(name):
    class Silent(Brightness):
        def score(self, images, prompts):
            return torch.full((len(images),), math.nan)

    plan = build_plan(MADE[name], 3, 1)
    _, rollout, _ = roll(plan, (Silent(),))
    assert rollout.nfe == 2 * plan.forwards


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prune_by": "coarsest", "granularities": (2,)}, "choose prune_by: prediction"),
        ({"prune_by": "coarsest", "granularities": (2, 2)}, "list a smaller one too"),
        ({"prune_at": (0.5, 1.0)}, "prune_at is"),
        ({"prune_by": "best"}, "choose one of"),
        ({"expand": 0.5}, "expand is 0.5"),
        ({"anchor_image": True}, "anchor_image logs gaps"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(changes, said):
    with pytest.raises(ValueError, match=said):
        recipe("g2rpo", **{"expand": 2.0, **changes})


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "pro_grpo"])
def test_other_recipes_prune_nothing(name):
    plan = build_plan(RECIPES[name], 5, 2)
    assert not isinstance(plan, PrunedPlan)
    assert plan.pictures == len(plan.images)
    assert plan.rows == (len(plan.images) * plan.draws if isinstance(plan, ImagePlan) else len(plan.forks))
    assert singular(4, [0], 2).final_values(torch.arange(2.0)[None]).shape == (1, 1, 2, 1)
