"""DenseGRPO: what a step gained, by probes of every state; and the plans, etas and logs that come with it."""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from program import leave
from test_resume import SMALL
from test_run import outcome
from toys import SHAPE, ToyPolicy, plain_states

from comfy_g2rpo.advantages import integrate
from comfy_g2rpo.exploration.noise_gaps import gain_noise, gap_lines, gap_metrics, mean_gaps
from comfy_g2rpo.plan import ROOT, Leaf, count_forwards, independent, singular
from comfy_g2rpo.recipes import RECIPES, Recipe, build_plan, recipe
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.run import settings
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.iteration import explore, score
from comfy_g2rpo.run.rank_guard import excerpt, sample
from comfy_g2rpo.run.scorer import comparison_groups
from comfy_g2rpo.run.setup import make_learner
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.trees.dense_chains import dense, probed
from g2rpo_trainer.config.reading import ConfigError, load
from g2rpo_trainer.run import prepare

TREES = {
    "chains": dense(5, range(5), 3),
    "all but the last": dense(5, range(4), 3),
    "one start": dense(5, range(5), 3, shared_start=True),
    "coarse": dense(7, range(6), 3, 2),
    "published end": dense(7, [0, 1, 2], 3, 3, "published"),
    "window": dense(6, [2, 3], 3, starts=2, shared_start=True),
    "trained in part": dense(6, [0, 1, 3], 4, trained_steps=[1]),
    "cheap": dense(8, [0, 1, 2], 3, coarsest=3),
}
each_tree = pytest.mark.parametrize("name", TREES)


def dyadic(plan, rewards=2, seed=0):
    """Draw scores [R, images] whose sums and differences float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4096, 4096, (rewards, len(plan.images)), generator=generator) / 1024


def path(plan, state):
    """List the states from the start to this one."""
    return [] if state == ROOT else [*path(plan, plan.states[state].parent), state]


def sums(plan, worth):
    """Score every image by what the stochastic edges on its way are worth."""
    found = [sum(worth.get(state, 0.0) for state in path(plan, image)) for image in plan.images]
    return torch.tensor(found, dtype=torch.float64)[None]


@pytest.mark.parametrize("shared", [False, True])
def test_in_an_additive_world_a_gain_is_what_its_own_step_did(shared):
    """R = Σ_k r_k(ε_k): the gain of k holds r_k alone, and var(gain)/var(final) = var(r_k)/Σ var(r_j)."""
    levels, scales = (-3.0, -1.0, 1.0, 3.0), (1.0, 0.25, 4.0)
    drawn = list(itertools.product(levels, repeat=3))  # every combination once: uncorrelated
    plan = dense(3, range(3), len(drawn), shared_start=shared)
    edges = [plan.states[i] for i in plan.transitions]
    own = [scales[edge.group] * drawn[edge.member][edge.group] for edge in edges]
    scores = sums(plan, dict(zip(plan.transitions, own, strict=True)))
    gains, final = plan.gains(scores)[0, ..., 0], plan.values(scores)[0, ..., 0]
    for edge, worth in zip(edges, own, strict=True):
        assert gains[edge.group, edge.member].item() == worth
    variances = torch.tensor(scales, dtype=torch.float64) ** 2
    ratio = gains.var(1) / final.var(1)
    assert torch.allclose(ratio, variances / variances.sum(), atol=1e-12)


@each_tree
def test_gains_add_up_to_what_the_whole_chain_gained(name):
    plan = TREES[name]
    scores = dyadic(plan)
    gains, column = plan.gains(scores), {image: i for i, image in enumerate(plan.images)}
    worth = {leaf.of: scores[:, column[leaf.state]] for leaf in plan.leaves if leaf.of != ROOT}
    for fork in set(plan.forks) - set(plan.transitions):  # where a trained chain begins
        for edge in (plan.states[i] for i in plan.children[fork] if plan.states[i].trained):
            chain = [
                i for i in plan.transitions if plan.states[i].member == edge.member and fork in path(plan, i)
            ]
            total = sum(gains[:, plan.states[i].group, edge.member, 0] for i in chain)
            assert torch.equal(total, worth[chain[-1]] - worth[fork])


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 16])
def test_a_chain_takes_half_the_square_of_its_steps(steps):
    group = 4
    assert dense(steps, range(steps), group).forwards == group * steps * (steps + 1) // 2
    # One start: its own states once, and everything else as before.
    shared = dense(steps, range(steps), group, shared_start=True)
    assert shared.forwards == steps + group * steps * (steps - 1) // 2


@pytest.mark.parametrize(("first", "size"), [(0, 2), (3, 2), (2, 4), (6, 2)])
def test_a_window_shares_what_lies_before_it(first, size):
    steps, group = 8, 5
    plan = dense(steps, range(first, first + size), group, starts=2, shared_start=True)
    each = sum(steps - first - j for j in range(1, size + 1))
    assert plan.forwards == 2 * (steps + group * each)
    assert plan.shape == (2 * size, group, 1)


@each_tree
def test_a_probe_is_the_completion_of_its_state_at_one_stride(name):
    plan = TREES[name]
    probes = [leaf for leaf in plan.leaves if leaf.of != ROOT]
    assert {leaf.of for leaf in probes} == {*plan.forks, *plan.transitions}
    widths = {"coarse": 2, "published end": 3, "cheap": 3}
    for leaf in probes:
        walked = path(plan, leaf.state)[len(path(plan, leaf.of)) - 1 :]
        at = [plan.states[i].index for i in walked]
        assert at[-1] == plan.num_steps and not any(plan.states[i].noise for i in walked[1:])
        assert all(
            b - a <= max(widths.get(name, 1), 1) or b == plan.num_steps for a, b in itertools.pairwise(at)
        )
        if len(at) > 3:
            assert at[1] - at[0] == 1 and at[2] - at[1] == widths.get(name, 1)


def test_probed_chains_are_the_independent_ones_and_their_probes_odes():
    """The same noises, so the same pictures; a probe's latent is the walk from its own state."""
    policy, sigmas = ToyPolicy(dtype=torch.float64), shifted_sigmas(6)
    plain, plan = independent(6, range(5), 3), dense(6, range(5), 3)
    ours, theirs = (roll_out(policy, each, sigmas, [0.4], [7], SHAPE) for each in (plan, plain))
    ends = [plan.images.index(leaf.state) for leaf in plan.leaves if leaf.of == ROOT]
    assert torch.allclose(ours.latents[:, ends], theirs.latents, atol=1e-6)
    assert torch.allclose(ours.x, theirs.x, atol=1e-6)
    seen = plain_states(policy, plan, sigmas, 0.4, 7)
    for image, state in enumerate(plan.images):
        assert torch.allclose(ours.latents[0, image], seen[state][0].float(), atol=1e-5)
    assert ours.nfe == plan.forwards


def test_values_leave_probes_out():
    plain, plan = independent(6, range(5), 3), dense(6, range(5), 3)
    scores = dyadic(plan)
    ends = [plan.images.index(leaf.state) for leaf in plan.leaves if leaf.of == ROOT]
    assert torch.equal(plan.values(scores), plain.values(scores[:, ends]))
    assert plain.gains(scores[:, ends]).isnan().all()


@pytest.mark.parametrize("starts", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_in_the_singular_tree_the_gain_is_the_same_advantage(starts, stride):
    """Every member's gain subtracts the same anchor: z is the same, to the bit where means are exact."""
    bare = singular(8, range(4), 8, (stride,), starts=starts)
    plan = probed(bare, {*bare.forks, *bare.transitions}, stride)
    scores = dyadic(plan, rewards=3)
    assert torch.equal(integrate(plan.gains(scores)), integrate(plan.values(scores)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"credit": "gain", "granularities": (1,)}, "credit is 'gain', which changes nothing"),
        ({"credit": "gain", "granularities": (1,), "pick": "random"}, "choose tree: independent"),
        ({"credit": "gain", "granularities": (1,), "pick": "random_window"}, "pick_size 2 or more"),
        (
            {
                "credit": "gain",
                "granularities": (1,),
                "tree": "independent",
                "pick": "random",
                "shared_start": True,
            },
            "changes nothing",
        ),
        ({"credit": "gain", "pick": "random_window", "pick_size": 2}, r"granularities is \(1, 2\)"),
        ({"credit": "gains"}, "did you mean 'gain'"),
        ({"etas": (0.5,)}, "etas has 1 value for 16 steps; give one per step, or none"),
        ({"etas": (0.5,) * 17}, "etas has 17 values for 16 steps"),
        ({"etas": (0.5,) * 15 + (11.0,)}, "must lie between 0 and 10"),
        ({"etas": (0.5,) * 15 + (float("nan"),)}, "must lie between 0 and 10"),
        (
            {"anchor_image": True, "tree": "independent", "granularities": (1,)},
            "anchor_image is for tree: singular",
        ),
        ({"anchor_image": True, "pick": "sliding_window"}, "credit: gain logs the gaps"),
        ({"anchor_image": True, "expand": 2.0}, "anchor_image logs gaps over all branches"),
    ],
)
def test_what_does_nothing_or_does_not_fit_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        recipe("g2rpo", **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense_grpo", {}),
        ("dense_grpo", {"granularities": (3,)}),
        ("mix_grpo", {"credit": "gain"}),
        ("dance_grpo", {"credit": "gain"}),
        ("flow_grpo_fast", {"credit": "gain"}),
        (
            "g2rpo",
            {"credit": "gain", "granularities": (2,), "pick": "sliding_window", "pick_size": 3, "starts": 2},
        ),
    ],
)
def test_gains_of_every_tree_that_has_them_are_whole(name, changes):
    for iteration in range(3):
        plan = build_plan(recipe(name, num_steps=8, group_size=4, **changes), iteration, 5)
        gains = plan.gains(dyadic(plan))
        assert gains.shape == (2, *plan.shape) and not gains.isnan().any()
        assert not plan.values(dyadic(plan)).isnan().any()


def test_the_trees_without_probes_are_as_they_were():
    """New fields that are left alone change no plan."""
    assert build_plan(Recipe()) == singular(16, range(8), 12, (1, 2))
    flow = RECIPES["flow_grpo"]
    assert build_plan(flow) == independent(16, range(15), 12, trained_steps=range(15))
    window = build_plan(RECIPES["flow_grpo_fast"], 3)
    first = min(window.states[i].index for i in window.forks)
    assert window == singular(16, [first], 12, (1,), window=2)
    assert all(leaf == Leaf(leaf.state, leaf.granularity) for leaf in window.leaves)


@pytest.mark.parametrize("tree", ["singular", "independent", "gain", "window"])
def test_etas_give_every_step_its_own_noise(tree):
    etas = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    changes = {
        "singular": {},
        "independent": {"tree": "independent", "granularities": (1,)},
        "gain": {"tree": "independent", "granularities": (1,), "credit": "gain"},
        "window": {"pick": "sliding_window", "pick_size": 2},
    }[tree]
    made = recipe("g2rpo", num_steps=6, group_size=2, steps="all", kernel="dance_sde", etas=etas, **changes)
    plan, sigmas = build_plan(made, 60), shifted_sigmas(6)
    std = plan.coefficients(sigmas).std
    assert plan.transitions
    for i in plan.transitions:
        k = plan.states[plan.states[i].parent].index
        assert plan.states[i].eta == etas[k]  # with dance_sde the paper's ψ: g(t) = ψ(t)
        assert std[i].item() == pytest.approx(etas[k] * (sigmas[k] - sigmas[k + 1]).sqrt().item(), rel=1e-6)
    same = recipe("g2rpo", num_steps=6, group_size=2, steps="all", kernel="dance_sde", eta=0.3, **changes)
    assert build_plan(dataclasses.replace(same, etas=(0.3,) * 6), 4) == build_plan(same, 4)


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("etas = 0.5, 0.25", {"etas": (0.5, 0.25)}),
        ("etas = none", {"etas": ()}),
        ("method.etas = [1]", {"etas": (1.0,)}),
        ("credit = gain", {"credit": "gain"}),
        ("anchor_image = true", {"anchor_image": True}),
        ("kernel = ddim", {"kernel": "ddim"}),
        ("step_weight = variance", {"step_weight": "variance"}),
    ],
)
def test_the_graphs_changes_take_the_new_fields(line, fields):
    assert settings.parse(line, "changes") == (fields, {})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("[0.5, 11, 0.5, 0.5]", "method.etas is (0.5, 11.0, 0.5, 0.5); it must lie between 0 and 10"),
        ("[0.5]", "method.etas has 1 value for 4 steps; give one per step, or none"),
        ("0.5", "method.etas is 0.5; it must be a list; write [0.5]"),
        ("[high]", "method.etas.0 is 'high'; it must be a number"),
    ],
)
def test_a_recipes_etas_are_checked_by_name(given, says):
    few = ["method.num_steps=4"]
    assert load("demo", [*few, "method.etas=[]"]).method.etas == ()
    assert load("demo", [*few, "method.etas=[0, 1, 2, 3]"]).method.etas == (0, 1, 2, 3)
    with pytest.raises(ConfigError) as error:
        load("demo", [*few, f"method.etas={given}"])
    assert says in str(error.value)


@pytest.mark.parametrize("granularities", [(1,), (1, 2), (2,), (2, 1)])
def test_the_anchors_image_gives_the_gap_of_every_step(granularities):
    made = recipe("g2rpo", num_steps=8, group_size=3, granularities=granularities, anchor_image=True)
    plan, plain = build_plan(made), build_plan(dataclasses.replace(made, anchor_image=False))
    if granularities[0] == 1:
        assert plan.forwards == count_forwards(8, range(4), 3, granularities, anchor_image=True)
        assert len(plan.images) == len(plain.images) + 1
    scores = torch.stack([dyadic(plan, seed=p) for p in range(3)], 1)
    metrics = gap_metrics(["one", "two"], plan, scores)
    assert list(metrics) == [f"gap/{name}/{k}" for k in range(4) for name in ("one", "two")]
    probes = {leaf.of: plan.images.index(leaf.state) for leaf in plan.leaves if leaf.of != ROOT}
    for k in range(4):
        (anchor,) = (fork for fork in plan.forks if plan.states[fork].index == k)
        branches = torch.stack([plan.values(scores[:, p])[:, k, :, 0] for p in range(3)])  # [P, R, G]
        gap = branches.mean((0, 2)) - scores[:, :, probes[anchor]].mean(1)
        assert torch.allclose(
            torch.tensor([metrics[f"gap/one/{k}"], metrics[f"gap/two/{k}"]]), gap, atol=1e-6
        )
    # What is trained on stays the same.
    picked = [plan.images.index(i) for i in plain.images]
    assert torch.equal(plan.values(scores[:, 0]), plain.values(scores[:, 0][:, picked]))


def test_gaps_need_probes_and_leave_out_what_was_not_judged():
    plain = singular(4, [0, 1], 3)
    assert gap_metrics(["r"], plain, torch.zeros(1, 2, len(plain.images))) == {}
    plan = probed(plain, {*plain.forks, *plain.transitions})
    scores = torch.ones(1, 1, len(plan.images))
    scores[:, :, 0] = torch.nan
    assert set(gap_metrics(["r"], plan, scores).values()) <= {0.0}
    assert gap_metrics(["r"], plan, scores * torch.nan) == {}


def test_the_report_says_where_exploration_costs_most():
    rows = [
        {"step": 0, "heldout/a/mean": 0.5},
        {"step": 1, "gap/a/0": -0.1, "gap/a/12": -0.5, "gap/b/c/0": 0.2, "gap/b/c/1": None, "nfe": 7},
        {"step": 2, "gap/a/0": -0.2, "gap/a/12": -0.25, "gap/b/c/0": "much", "gap/b/c/x": 1.0},
    ]
    assert mean_gaps(rows) == {"a": {0: pytest.approx(-0.15), 12: pytest.approx(-0.375)}, "b/c": {0: 0.2}}
    assert gap_lines(rows) == [
        "exploration costs 0.375 of a at sampling step 12, the most, and 0.15 at step 0, the least",
        "exploration costs no b/c: with its noise images score 0.2 higher at sampling step 0",
    ]
    assert gap_lines([{"gap/a/0": 0.25, "gap/a/1": -0.5}]) == [
        "exploration costs 0.5 of a at sampling step 1, the most, and none at step 0, the least"
    ]
    assert gap_lines(rows[:1]) == gap_lines([]) == []


def test_gains_of_rounding_teach_nothing():
    """Scores near 1000 are apart by float32's rounding alone."""
    plan = dense(3, range(3), 4)
    scores = 1000 + torch.randint(-1, 2, (1, len(plan.images))) * 6.1e-5
    noise = gain_noise([0.0], scores)
    assert noise[0] >= 1000 * torch.finfo(torch.float32).eps
    assert gain_noise([3.0, 0.0], scores.expand(2, -1))[0] == pytest.approx(3 * 2**0.5)
    assert integrate(plan.gains(scores), noise=noise).abs().max() == 0


def test_a_chains_images_are_compared_with_one_another():
    """A reward whose scores depend on the batch sees a start and what came of it together."""
    assert len(set(comparison_groups(dense(4, range(4), 3)))) == 1
    assert len(set(comparison_groups(dense(4, [1, 2], 3, starts=2, shared_start=True)))) == 2


def test_a_guards_excerpt_keeps_the_probes_of_its_groups():
    whole = dense(6, [2, 3], 3, starts=3, shared_start=True)
    part = excerpt(whole, [2])
    generator = torch.Generator().manual_seed(0)
    worth = {
        (s.group, s.member): torch.rand((), generator=generator).item() for s in whole.states if s.trained
    }
    found = [
        plan.gains(
            sums(plan, {i: worth[plan.states[i].group, plan.states[i].member] for i in plan.transitions})
        )
        for plan in (part, whole)
    ]
    assert torch.equal(found[0][:, 2:4], found[1][:, 2:4]) and not found[0][:, 2:4].isnan().any()
    assert part.forwards < whole.forwards
    chains, prompts = sample(dense(4, range(4), 3), 4, 0.5, random.Random(0))
    assert chains == dense(4, range(4), 3) and len(prompts) == 2


CHAINS = ("method.name=dense_grpo", "method.kl=0", "method.granularities=[1]")
DENSE = [*SMALL, *(word for setting in CHAINS for word in ("--set", setting))]


def rows_of(run):
    """Read a run's rows of training, without their times."""
    rows = [row for row in RunFolder(run).metrics() if "nfe" in row]
    return [{key: row[key] for key in row if not key.startswith(("time/", "memory/"))} for row in rows]


def test_a_run_learns_from_gains_logs_them_and_resumes_bit_for_bit(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    for name, steps in (("whole", 2), ("halved", 1)):
        words = [
            "train",
            "demo",
            "--quiet",
            "--out",
            tmp_path / name,
            *DENSE,
            "--set",
            f"train.steps={steps}",
        ]
        assert leave(capsys, *words)[0] == 0
    assert leave(capsys, "resume", tmp_path / "halved", "--quiet", "--set", "train.steps=2")[0] == 0
    ours, whole = outcome(tmp_path / "halved"), outcome(tmp_path / "whole")
    assert all(torch.equal(ours[0][name][i], whole[0][name][i]) for name in whole[0] for i in (0, 1))
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "halved")
    assert [key for key in rows[0] if key.startswith("gap/")] == [f"gap/agreement/{k}" for k in range(3)]
    _, _, said = leave(capsys, "report", tmp_path / "whole")
    assert "exploration costs " in said and " at sampling step " in said
    assert rows[0]["nfe"] == dense(4, range(3), 3).forwards and rows[0]["advantage/abs_mean"] > 0


def test_a_gate_is_a_limit_for_whole_scores(tmp_path, capsys):
    words = ["train", "demo", "--quiet", "--out", tmp_path / "run", *DENSE, "--set", "rewards.0.gate=0.5"]
    code, _, errors = leave(capsys, *words)
    assert code == 2 and "rewards has a gate" in errors and not (tmp_path / "run").exists()


def test_the_advantage_of_a_step_is_the_z_score_of_its_gain(monkeypatch):
    """A_t = (ΔR_t − mean)/std over the group, ΔR_t = R(ODE(x_{t+1})) − R(ODE(x_t)) of each chain."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    few = ["method.num_steps=4", "method.group_size=4", "train.prompts_per_step=2", "train.seed=3"]
    setup = prepare(load("demo", [*few, *CHAINS]), Accelerator(cpu=True))
    explored = explore(setup, make_learner(setup), lambda phase: None)
    found, plan = score(setup, explored, 1), explored.plan
    column = {leaf.of: plan.images.index(leaf.state) for leaf in plan.leaves if leaf.of != ROOT}
    for p, advantages in enumerate(found.advantages):
        rewards = explored.scores[0, p].double()
        for k in range(plan.shape[0]):
            edges = [i for i in plan.transitions if plan.states[i].group == k]
            gains = torch.stack([rewards[column[i]] - rewards[column[plan.states[i].parent]] for i in edges])
            z = (gains - gains.mean()) / gains.std() if gains.std() > 1e-5 else torch.zeros(len(edges))
            assert torch.allclose(advantages[k].double(), z.double(), atol=1e-5)
    assert any(advantages.abs().max() > 0.5 for advantages in found.advantages)
