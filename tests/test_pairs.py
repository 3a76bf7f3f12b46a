"""Losses of pairs: the published numbers, the algebra that makes them cheap, and what holds at the
reference.
"""

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.kernels import step
from comfy_g2rpo.objectives import OBJECTIVES
from comfy_g2rpo.objectives.pairs import (
    compared,
    dpo,
    least_loss,
    pair_metrics,
    pair_weights,
    pairs,
    rejected_share,
    ropo,
    slope,
)
from comfy_g2rpo.objectives.policy_gradient import cotangent
from comfy_g2rpo.objectives.record_rows import Records, micro_batches
from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.update import backward

ELEMENTS = math.prod(SHAPE)
ALPHA = 14.0
LOSSES = ("dpo", "ropo", "pg_dpo")


def made_recipe(loss="dpo", **changes):
    return recipe("g2rpo", objective="pairs", pair_loss=loss, **changes)


def stored(rows=2, branches=4, seed=0, wins=None, scores=None):
    """Make forks in float64 as they are kept, with full rankings unless wins [N, G, G] are given."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sigma = torch.linspace(0.9, 0.5, rows, dtype=torch.float64)
    _, v_coef, std = step("flow_sde", sigma, sigma - 0.1, 0.7, 0.95)
    x = normal(rows, *SHAPE)
    if wins is None:
        wins = torch.ones(branches, branches, dtype=torch.float64).triu(1).expand(rows, -1, -1)
    return Records(
        x=x,
        sigma=sigma,
        v_coef=v_coef,
        std=std,
        weight=pair_weights(wins),
        step=torch.arange(rows),
        prompt=torch.arange(rows) % 2,
        velocity=normal(rows, *SHAPE),
        branches=normal(rows, branches, *SHAPE),
        wins=wins,
        scores=torch.full((rows, branches), torch.nan, dtype=torch.float64) if scores is None else scores,
    )


def moved(made, by=0.1, seed=1):
    noise = torch.randn(
        made.velocity.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (made.velocity + by * noise).requires_grad_()


def plain_log_ratio(made, velocity, row, branch):
    """log N(x′; mean, s) − log N(x′; mean_ref, s), written out from the densities' own definition."""
    c, s = made.v_coef[row], made.std[row]
    reached = c * made.velocity[row] + s * made.branches[row, branch]  # up to a·x, which both means have

    def log_density(mean):
        return (-((reached - mean) ** 2) / (2 * s**2)).sum()

    return log_density(c * velocity[row]) - log_density(c * made.velocity[row])


# the published curves


def test_ropos_weight_has_the_published_values():
    made = made_recipe("ropo")
    top = math.log((ALPHA - 1) / (ALPHA + 1))
    assert top == pytest.approx(-0.1431, abs=5e-5)
    points = torch.tensor([0.0, top, -60.0, 3.0, top - 0.01, top + 0.01], dtype=torch.float64)
    zero, most, least, far, before, after = slope(points, made).tolist()
    assert zero == pytest.approx(0.99556, abs=5e-6)
    assert most == pytest.approx(1, abs=1e-15) and before < most > after
    assert least == pytest.approx(4 * ALPHA / (1 + ALPHA) ** 2, abs=1e-12)
    assert least == pytest.approx(0.24889, abs=5e-6)
    assert far == pytest.approx(0.1692, abs=5e-5)


@pytest.mark.parametrize("loss", ["dpo", "ropo"])
def test_the_weight_is_the_slope_of_the_loss(loss):
    u = torch.linspace(-8, 8, 41, dtype=torch.float64, requires_grad=True)
    total = (ropo(u, ALPHA) if loss == "ropo" else dpo(u)).sum()
    assert torch.allclose(slope(u, made_recipe(loss)), -torch.autograd.grad(total, u)[0], atol=1e-14)


@pytest.mark.parametrize("u", [-7.0, -0.3, 0.0, 2.0, 9.0])
def test_ropo_is_its_published_formula_and_nears_a_sigmoid_for_a_large_alpha(u):
    given = torch.tensor(u, dtype=torch.float64)
    written = 4 * 14 / 15**2 * (math.log(1 + math.exp(-u)) + 14 / (1 + math.exp(u)))
    assert ropo(given, ALPHA).item() == pytest.approx(written, rel=1e-12)
    assert (ropo(given, 1e9) / 4).item() == pytest.approx(1 / (1 + math.exp(u)), abs=1e-7)


def test_where_votes_are_firmly_contradicted_ropo_lets_go_and_dpo_does_not():
    u = torch.tensor([-50.0], dtype=torch.float64)
    assert slope(u, made_recipe("dpo")).item() == pytest.approx(1)
    assert slope(u, made_recipe("ropo")).item() < 0.25


def test_the_rejected_ones_share_is_the_published_one_for_positive_scores_and_bounded_for_others():
    share = rejected_share(torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.5]), 2.0)
    assert share.tolist() == pytest.approx([1 / (1 + math.exp(-2 * 0.3 / 0.6)), 0.5], abs=1e-5)
    odd = rejected_share(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0.0, -1e-9, -3.0]), 1.0)
    assert odd[:2].tolist() == pytest.approx([1 / (1 + math.exp(-10))] * 2)
    assert odd[2].item() == pytest.approx(1 / (1 + math.exp(-2 / 3)), abs=1e-5)
    assert rejected_share(torch.tensor([1.0]), torch.tensor([0.2]), 0.0).item() == 0.5


# the algebra


@pytest.mark.parametrize("by", [1e-3, 0.1, 1.0])
def test_log_ratios_are_those_of_the_densities(by):
    made = stored()
    velocity = moved(made, by)
    found = compared(velocity, made, made_recipe())
    for row, winner, loser, won, lost in zip(
        found.row, found.winner, found.loser, found.won, found.lost, strict=True
    ):
        for branch, ratio in ((winner, won), (loser, lost)):
            assert ratio.item() == pytest.approx(
                plain_log_ratio(made, velocity, row, branch).item(), abs=1e-10, rel=1e-10
            )


def test_the_squares_cancel_in_a_pair_and_in_its_gradient():
    made = stored()
    velocity = moved(made, 0.5)
    found = compared(velocity, made, made_recipe(pair_beta=0.25))
    delta = (made.v_coef / made.std)[:, None, None, None] * (made.velocity - velocity)
    apart = made.branches[found.row, found.winner] - made.branches[found.row, found.loser]
    short = -0.25 * (apart * delta[found.row]).flatten(1).sum(1)
    long = 0.25 * torch.stack(
        [
            plain_log_ratio(made, velocity, row, winner) - plain_log_ratio(made, velocity, row, loser)
            for row, winner, loser in zip(found.row, found.winner, found.loser, strict=True)
        ]
    )
    for other in (short, long):
        assert (found.margin - other).abs().max() <= 1e-13 * max(1.0, found.won.abs().max().item())
    ours, theirs = (
        torch.autograd.grad(dpo(u).sum(), velocity, retain_graph=True)[0] for u in (found.margin, long)
    )
    assert (ours - theirs).abs().max() <= 1e-14 * max(1.0, theirs.abs().max().item())


def test_pg_dpo_with_a_full_share_is_dpo_and_below_pulls_back_to_the_reference():
    full = stored()
    velocity = moved(full)
    plain, scaled = (
        compared(velocity, full, made_recipe(loss, pair_scale=0.0)) for loss in ("dpo", "pg_dpo")
    )
    # α = ½: half of ½‖δ‖² stays, which only the reference itself makes 0.
    delta = (full.v_coef / full.std)[:, None] * (full.velocity - velocity).flatten(1)
    kept = 0.5 * 0.5 * delta.square().sum(1)[plain.row]
    along = (full.branches.flatten(2) * delta[:, None]).sum(2)
    written = 0.5 * along[plain.row, plain.loser] - along[plain.row, plain.winner] - kept
    assert torch.allclose(scaled.margin, written, atol=1e-13)
    assert torch.allclose(scaled.margin, plain.won - 0.5 * plain.lost, atol=1e-13)
    # Differences far above the rejected score: α = σ(100 · 10), which is 1 in float64.
    clear = dataclasses.replace(full, scores=torch.tensor([[1e6, 1e4, 1e2, 1.0]] * 2, dtype=torch.float64))
    assert torch.equal(
        compared(velocity, clear, made_recipe("pg_dpo", pair_scale=100.0)).margin, plain.margin
    )


def test_without_scores_pg_dpo_goes_by_what_the_model_itself_prefers():
    made = stored()
    velocity = moved(made, 0.3)
    found = compared(velocity, made, made_recipe("pg_dpo"))
    share = rejected_share(found.won.detach(), found.lost.detach(), 1.0)
    assert torch.allclose(found.margin, found.won - share * found.lost, atol=1e-10)


@pytest.mark.parametrize("loss", ["dpo", "ropo"])
def test_at_the_reference_the_gradient_is_the_policy_gradient_with_borda_counts(loss):
    made = stored(rows=1)
    velocity = made.velocity.clone().requires_grad_()
    loss_sum, _ = pairs(velocity, made, made_recipe(loss, pair_beta=0.3))
    ours = torch.autograd.grad(loss_sum, velocity)[0]
    borda = (made.wins - made.wins.transpose(1, 2)).sum(2)[0]
    assert borda.tolist() == [3, 1, -1, -3]
    direction = (borda[:, None, None, None] * made.branches[0]).sum(0, keepdim=True)
    theirs = cotangent(direction, made.sigma, made.sigma - 0.1, 0.7, len(borda), "flow_sde", 0.95)
    # A mean over 6 pairs and a sum over D elements here, a mean over 4 branches and D elements there.
    scale = 0.3 / 2 * len(borda) * ELEMENTS / 6
    if loss == "ropo":
        scale *= 2 * 4 * ALPHA / (1 + ALPHA) ** 2 * 0.5 * (1 + ALPHA / 2)
    assert (ours - scale * theirs).abs().max() <= 1e-14 * ours.abs().max()


@pytest.mark.parametrize("loss", ["dpo", "ropo"])
@pytest.mark.parametrize("u", [-0.5, 0.0, 0.3])
def test_forty_percent_of_flipped_labels_keep_the_sign_in_expectation(loss, u):
    right, wrong = slope(torch.tensor([u, -u], dtype=torch.float64), made_recipe(loss)).tolist()
    assert 0.6 * right - 0.4 * wrong > 0


def test_dpo_settles_where_its_margin_says_how_many_labels_are_right():
    u = math.log(0.6 / 0.4)
    right, wrong = slope(torch.tensor([u, -u], dtype=torch.float64), made_recipe("dpo")).tolist()
    assert 0.6 * right - 0.4 * wrong == pytest.approx(0, abs=1e-15)


def test_the_anchor_pulls_only_at_preferred_branches_that_became_less_likely():
    made = stored()
    velocity = moved(made, 0.3)
    free, held = (compared(velocity, made, made_recipe(pair_anchor=weight)) for weight in (0.0, 2.0))
    assert torch.allclose(held.loss - free.loss, 2 * (-free.won).clamp(min=0))
    assert (free.won < 0).any()


# rows


class Recorded(ToyPolicy):
    def reference(self):
        raise AssertionError("a reference forward is not needed")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("branches", [2, 4, 7])
def test_one_row_per_fork_serves_all_its_pairs_without_a_reference_forward(loss, branches):
    made = stored(rows=3, branches=branches)
    policy = Recorded(dtype=torch.float64)
    values = backward(policy, made, [0.1, 0.2], made_recipe(loss))
    assert policy.calls == [3]
    assert len(values["won"]) == 3 * branches * (branches - 1) / 2


@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_step_add_up_to_the_whole(loss):
    made = stored(rows=5, scores=torch.rand(5, 4, dtype=torch.float64))
    grads, metrics = [], []
    for size in (5, 2, 1):
        policy = ToyPolicy(dtype=torch.float64)
        values = backward(policy, made, [0.1, 0.2], made_recipe(loss, pair_anchor=0.5), micro_batch=size)
        grads.append(policy.adapter.grad)
        metrics.append(pair_metrics(values, made_recipe(loss)))
    for grad, found in zip(grads[1:], metrics[1:], strict=True):
        assert torch.allclose(grad, grads[0], atol=1e-12)
        assert found == pytest.approx(metrics[0])


def test_parts_hold_the_pairs_of_their_rows():
    wins = torch.zeros(3, 2, 2)
    wins[0, 0, 1], wins[2, 1, 0] = 1, 2
    made = stored(rows=3, branches=2, wins=wins)
    parts = [*micro_batches(made, 2)]
    assert [part.wins.tolist() for part in parts] == [wins[:2].tolist(), wins[2:].tolist()]
    assert pair_weights(wins).tolist() == pytest.approx([1 / 3] * 3)
    found = compared(made.velocity, made, made_recipe())
    assert (found.row.tolist(), found.winner.tolist(), found.count.tolist()) == ([0, 2], [0, 1], [1, 2])


def test_metrics_before_the_first_update_are_those_of_a_coin():
    made = stored()
    _, values = pairs(made.velocity, made, made_recipe())
    assert pair_metrics(values, made_recipe()) == pytest.approx(
        {"pairs/accuracy": 0.5, "pairs/margin": 0, "pairs/displacement": 0, "pairs/weight": 0.5}
    )


def test_metrics_count_a_pair_as_often_as_it_was_preferred():
    values = {
        name: torch.tensor(row)
        for name, row in {
            "won": [1.0, -2.0],
            "lost": [0.5, 1.0],
            "margin": [0.5, -3.0],
            "count": [3.0, 1.0],
        }.items()
    }
    found = pair_metrics(values, made_recipe())
    assert found["pairs/accuracy"] == 0.75 and found["pairs/displacement"] == 0.25
    assert found["pairs/margin"] == pytest.approx((3 * 0.5 - 3) / 4)
    assert found["pairs/weight"] == pytest.approx((3 / (1 + math.exp(0.5)) + 1 / (1 + math.exp(-3))) / 4)


@pytest.mark.parametrize(("share", "left"), [(0.05, 1), (0.5, 6), (0.75, 9), (1.0, 12)])
def test_the_pairs_with_the_least_loss_are_kept(share, left):
    made = stored()
    velocity = moved(made, 0.5)
    made_of = made_recipe(pair_keep=share)
    before = compared(velocity, made, made_of)
    after = compared(velocity, least_loss(velocity, made, made_of), made_of)
    assert len(after.loss) == left
    assert torch.allclose(after.loss.sort()[0], before.loss.sort()[0][:left])
    assert least_loss(velocity, made, made_of).weight.tolist() == pytest.approx([1 / left] * 2)


# recipes


@pytest.mark.parametrize(
    "changes",
    [{"group_size": 4}, {"tree": "independent", "granularities": (1,)}, {"epochs": 2}, {"kernel": "cps"}],
)
def test_what_only_rollouts_have_is_refused_by_name(changes):
    field = next(name for name in ("kernel", "tree", "group_size", "epochs") if name in changes)
    with pytest.raises(ValueError, match=f"^{field} is .*; objective pairs .*leave it out$"):
        made_recipe(**changes)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("pair_alpha", 2.0),
        ("pair_beta", 0.0),
        ("pair_keep", 0.01),
        ("pair_scale", -1.0),
        ("pair_anchor", -0.1),
    ],
)
def test_bounds_are_those_of_the_formulas(field, wrong):
    with pytest.raises(ValueError, match=f"^{field} is "):
        made_recipe(**{field: wrong})


def test_pairs_are_in_the_table_of_objectives():
    assert OBJECTIVES["pairs"].stored and not OBJECTIVES["pairs"].samples
    u = torch.tensor(0.7)
    assert dpo(u) == -logsigmoid(u)
