"""VarGrad: the formula written out, the policy gradient at the reference, and what it converges to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_update import CONDS, rolled
from torch import Tensor
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.objectives.policy_gradient import row_cotangent
from comfy_g2rpo.objectives.record_rows import Records
from comfy_g2rpo.objectives.vargrad import vargrad_loss
from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.rewards.mixing import raw_values
from comfy_g2rpo.update import backward, records, update


def fork(count: int = 6, rows: int = 1, seed: int = 0) -> Records:
    """Make rows of so many branches each, in float64, with values of their own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    owner = torch.arange(rows).repeat_interleave(count)
    return Records(
        x=normal(rows, *SHAPE),
        direction=torch.zeros(rows, *SHAPE, dtype=torch.float64),
        sigma=torch.full((rows,), 0.7),
        v_coef=-0.1 - normal(rows).abs(),
        std=0.2 + normal(rows).abs(),
        weight=torch.full((rows,), 1 / (count * rows), dtype=torch.float64),
        step=torch.zeros(rows, dtype=torch.long),
        prompt=torch.zeros(rows, dtype=torch.long),
        noise=normal(count * rows, *SHAPE),
        advantage=normal(count * rows),
        value=normal(count * rows),
        owner=owner,
    )


@pytest.mark.parametrize(("count", "rows", "tau"), [(6, 1, 0.1), (2, 3, 1.0), (12, 2, 7.5)])
def test_the_loss_is_half_the_variance_of_log_densities_less_rewards(
    count: int, rows: int, tau: float
) -> None:
    """Both densities written out: of a whole next latent under the present and under the reference policy."""
    made = fork(count, rows, seed=count)
    reference = torch.randn(rows, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    velocity = reference + 0.1 * made.x
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(rows):
        c, s = made.v_coef[row], made.std[row]
        errors = []
        for i in (made.owner == row).nonzero().flatten():
            reached = c * reference[row] + s * made.noise[i]
            now, then = (
                torch.distributions.Normal(c * v[row], s).log_prob(reached).sum()
                for v in (velocity, reference)
            )
            errors.append(now - then - made.value[i] / tau)
        expected += 0.5 * torch.stack(errors).var(unbiased=False) / rows
    loss, found = vargrad_loss(velocity, reference, made, tau)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert found["ratio"].shape == found["left"].shape == (count * rows,)


@pytest.mark.parametrize("tau", [0.01, 0.1, 3.0])
def test_at_the_reference_the_gradient_is_the_policy_gradient(tau: float) -> None:
    made = fork(rows=3)
    velocity = made.x.clone().requires_grad_()
    vargrad_loss(velocity, velocity.detach(), made, tau)[0].backward()
    means = torch.stack([made.value[made.owner == row].mean() for row in range(3)])
    advantage = (made.value - means[made.owner]) / tau
    direction = torch.zeros_like(made.x).index_add(0, made.owner, advantage.view(-1, 1, 1, 1) * made.noise)
    # The cotangent is that of a mean over elements, and the log-ratio here a sum.
    expected = row_cotangent(direction, made.v_coef, made.std, made.weight) * made.x[0].numel()
    cosine = torch.nn.functional.cosine_similarity(velocity.grad.flatten(), expected.flatten(), dim=0)
    assert abs(cosine.item() - 1) <= 4e-16
    assert (velocity.grad - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("shift", [1.0, -40.0, 1e6])
def test_a_constant_added_to_the_rewards_changes_nothing(shift: float) -> None:
    made = fork(rows=2)
    shifted = dataclasses.replace(made, value=made.value + shift)
    reference = made.x - 0.3
    losses = [vargrad_loss(made.x, reference, one, 0.1)[0].item() for one in (made, shifted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_one_fork_is_fitted_exactly(seed: int) -> None:
    """D ≥ G: Var = 0, and the log-ratios of branches then differ as their rewards do."""
    made, tau = fork(count=5, seed=seed), 0.5
    reference = made.x.clone()
    velocity = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([velocity], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = vargrad_loss(velocity, reference, made, tau)
        loss.backward()
        return loss

    optimizer.step(closure)
    loss, found = vargrad_loss(velocity, reference, made, tau)
    assert loss < 1e-12 and found["left"].sum() < 1e-10
    delta = (made.v_coef[0] * (reference - velocity) / made.std[0]).detach()
    inner = (made.noise * delta).flatten(1).sum(1)
    for i in range(5):
        for j in range(5):
            expected = -(made.value[i] - made.value[j]) / tau
            assert (inner[i] - inner[j]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_samples_of_advantage_zero_count_and_unjudged_ones_do_not() -> None:
    made = recipe("g2rpo", num_steps=8, group_size=4, objective="vargrad")
    rollout, advantages = rolled(made)
    advantages[0][0] = torch.tensor([1.0, 0.0, 0.0, -1.0])
    values = [torch.arange(table.numel()).view_as(table).float() for table in advantages]
    values[1][2, 1] = torch.nan
    rows = records(rollout, advantages, samples=True, values=values, every=True)
    assert len(rows.value) == sum(table.numel() for table in advantages) - 1
    assert not rows.value.isnan().any() and (rows.advantage == 0).sum() >= 2
    assert rows.draw.unique().numel() == len(rollout.plan.transitions)
    clipped = records(rollout, advantages, samples=True)
    assert len(clipped.owner) < len(rows.owner)


def test_updates_fit_the_rewards_and_say_how_much_is_left() -> None:
    made = recipe("g2rpo", num_steps=8, group_size=4, objective="vargrad", epochs=30, vargrad_tau=0.5)
    policy = ToyPolicy()
    rollout, advantages = rolled(made, policy)
    rows = records(rollout, advantages, samples=True, values=advantages, every=True)
    first = update(policy, rows, CONDS, torch.optim.SGD(policy.parameters(), lr=0.0), made)
    assert first["vargrad/unexplained"] == pytest.approx(1) and first["ratio/max_deviation"] == 0
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0)
    later = update(policy, rows, CONDS, optimizer, made)
    assert later["vargrad/unexplained"] < 0.9 and later["ratio/max_deviation"] > 0


@pytest.mark.parametrize("micro", [1, 3, 64])
def test_gradients_do_not_depend_on_micro_batches(micro: int) -> None:
    made = recipe("g2rpo", num_steps=8, group_size=4, objective="vargrad")
    grads = []
    for size in (micro, 7):
        policy = ToyPolicy()
        rollout, advantages = rolled(made, policy)
        rows = records(rollout, advantages, samples=True, values=advantages, every=True)
        backward(policy, rows, CONDS, made, micro_batch=size)
        grads.append(policy.adapter.grad)
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"name": "flow_grpo"}, "tree: singular"),
        ({"name": "mix_grpo"}, "tree: singular"),
        ({"pick": "random_window", "pick_size": 2}, "pick: random"),
        ({"mix": "minimum"}, "mix: sum"),
        ({"mix": "rank_product"}, "mix: sum"),
        ({"diversity_weight": 0.5}, "set it to 0"),
    ],
)
def test_what_it_cannot_compare_is_refused_with_the_remedy(changes: dict, fix: str) -> None:
    name = changes.pop("name", "g2rpo")
    with pytest.raises(ValueError, match=fix):
        recipe(name, objective="vargrad", **changes)


NAN = torch.nan


@pytest.mark.parametrize(
    ("rewards", "weights", "expected"),
    [
        ([[[1.0], [3.0], [8.0]]], [2.0], [2.0, 6.0, 16.0]),
        ([[[1.0, 2.0], [3.0, 5.0], [8.0, 0.0]]], [1.0], [1.5, 4.0, 4.0]),
        ([[[1.0, NAN], [3.0, NAN], [8.0, NAN]]], [1.0], [1.0, 3.0, 8.0]),
        ([[[1.0, 2.0], [3.0, NAN], [8.0, 0.0]]], [1.0], [1.5, NAN, 4.0]),
        ([[[1.0], [2.0], [3.0]], [[0.1], [0.2], [NAN]]], [1.0, -10.0], [0.0, 0.0, NAN]),
        ([[[1.0], [2.0], [3.0]], [[NAN], [NAN], [NAN]]], [1.0, 7.0], [1.0, 2.0, 3.0]),
    ],
)
def test_rewards_become_one_in_their_own_units(
    rewards: list, weights: list[float], expected: list[float]
) -> None:
    found = raw_values(torch.tensor(rewards)[:, None], weights)
    assert torch.allclose(found[0], torch.tensor(expected), atol=1e-6, equal_nan=True)


def test_a_gate_makes_its_losers_the_worst_of_the_group() -> None:
    rewards = torch.tensor([[[[1.0], [2.0], [9.0], [4.0]]], [[[0.9], [0.8], [0.1], [0.7]]]])
    found = raw_values(rewards, [1.0, 0.0], [None, 0.5])[0]
    assert found.argsort().tolist() == [2, 0, 1, 3] and found[[0, 1, 3]].tolist() == [1.0, 2.0, 4.0]
