"""The studies of granularities and of diversity measure what they say: plans, the model of noise, judges."""

import math

import brief
import diversity
import granularity
import pytest
import torch
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.plan import singular
from comfy_g2rpo.rewards import load
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.schedule import shifted_sigmas


def drawn(plan, sigmas):
    """Return the finished latents by (branch, granularity) of a plan on the toy model."""
    made = roll_out(ToyPolicy(), plan, sigmas, [0.3], [5], SHAPE)
    latents = plan.values(made.latents[0].flatten(1).T)
    return latents.squeeze(1).movedim(0, -1)


@pytest.mark.parametrize(("steps", "k"), [(4, 0), (4, 1), (8, 0), (8, 3), (16, 7)])
def test_branches_of_the_study_are_those_of_the_method_at_every_stride(steps, k):
    found = drawn(granularity.forks(steps, k, 3), granularity.levels(steps))
    expected = drawn(singular(steps, [k], 3, granularity.STRIDES), shifted_sigmas(steps))
    assert torch.allclose(found[:, :-1], expected, atol=1e-6)


@pytest.mark.parametrize(("steps", "k"), [(4, 0), (4, 1), (8, 2), (16, 7)])
def test_a_fine_completion_visits_every_level_between(steps, k):
    visited = granularity.levels(steps)[[k + 1, *granularity.fine_indices(steps, k)]]
    fine = shifted_sigmas(steps * granularity.REFINED)
    assert torch.equal(visited, fine[(k + 1) * granularity.REFINED :])


@pytest.mark.parametrize("steps", granularity.STEPS)
def test_strides_that_draw_one_picture_are_known(steps):
    for k in range(steps // 2):
        plan = granularity.forks(steps, k, 1)
        leaf = {one.granularity: one.state for one in plan.leaves}
        same = [[float(leaf[i] == leaf[j]) for j in range(4)] for i in range(4)]
        assert granularity.shared(steps, k).tolist() == same


SHARES = [((1,), 1), ((2,), 1), ((1, 2), 1), ((1, 3), 1), ((2, 4), 1), ((1,), 2)]


@pytest.mark.parametrize("noise", granularity.NOISE)
@pytest.mark.parametrize(("strides", "again"), SHARES)
def test_the_model_predicts_z_scores_that_are_summed(strides, again, noise):
    generator = torch.Generator().manual_seed(1)
    true = torch.randn(200_000, generator=generator, dtype=torch.float64)
    errors = torch.randn(4, 200_000, generator=generator, dtype=torch.float64)
    # Coarse errors that share a part, as those of Euler's steps do; the finest has none.
    errors = errors + 0.7 * errors[1]
    clean = torch.stack([true + size * error for size, error in zip((0, 0.3, 0.5, 0.8), errors, strict=True)])
    clean = clean / clean.std(1, keepdim=True)
    judged = clean[[s - 1 for s in strides] * again]
    judged = judged + noise * torch.randn(judged.shape, generator=generator, dtype=torch.float64)
    total = ((judged - judged.mean(1, keepdim=True)) / judged.std(1, keepdim=True)).sum(0)
    among = torch.corrcoef(clean)
    found = granularity.predicted(among[0], among, torch.eye(4).double(), strides, noise, again)
    assert found == pytest.approx(torch.corrcoef(torch.stack([total, true]))[0, 1].item(), abs=0.01)


@pytest.mark.parametrize("r", [0.5, 0.8, 0.93, 1.0])
def test_a_second_granularity_is_worth_nothing_without_noise_and_at_most_twice_with_it(r):
    t, k = torch.tensor([1, r]).double(), torch.tensor([[1, r], [r, 1]]).double()

    def gain(noise):
        both, one = (granularity.predicted(t, k, torch.eye(2), s, noise) for s in ((1, 2), (1,)))
        return (both / one) ** 2

    assert gain(0) == pytest.approx((1 + r) / 2)
    for noise in (0.5, 1, 2):
        assert gain(noise) == pytest.approx((1 + r) ** 2 * (1 + noise**2) / (2 * (1 + r + noise**2)))
    assert gain(1e4) == pytest.approx((1 + r) ** 2 / 2, rel=1e-4)


def judged(steps=4, k=1, groups=3):
    """Make up judged branches, of strides that share a picture where the plan does."""
    generator = torch.Generator().manual_seed(0)
    same = granularity.shared(steps, k).argmax(1)
    rows = []
    for i in range(groups):
        scores = torch.rand(granularity.GROUP, 4, generator=generator)[:, same]
        scores = torch.cat([scores, torch.rand(granularity.GROUP, 1, generator=generator)], 1)
        rows.append({"steps": steps, "prompt": f"{i}", "seed": 0, "step": k, "scores": scores.tolist()})
    return granularity.Judged(rows, steps)


def test_one_picture_is_judged_once():
    made = judged(4, 1)
    noisy = made.noisy(1.0)
    assert all(torch.equal(noisy[..., 0], noisy[..., level]) for level in (1, 2, 3))
    other = judged(8, 0)
    assert (other.noisy(1.0)[..., 0] - other.noisy(1.0)[..., 1]).std() > 0.1


def test_noise_is_in_units_of_the_group_s_spread():
    made = judged(8, 0)
    error = (made.noisy(2.0).unflatten(0, (granularity.DRAWS, -1)) - made.scores[..., :-1]).std((0, 2, 3))
    assert (error / made.scores[..., 0].std(1)).tolist() == pytest.approx([2.0] * 3, rel=0.05)


def test_groups_that_score_alike_do_not_count():
    rows = judged(8, 0).rows
    rows[1]["scores"] = [[0.5] * 5] * granularity.GROUP
    assert len(granularity.Judged(rows, 8).rows) == 2


@pytest.mark.parametrize("strides", granularity.SETS)
def test_a_branch_s_price_is_what_one_more_costs(strides):
    forwards, pictures = judged(8, 2).price(strides)
    assert forwards * 5 + 3 == singular(8, [2], 5, strides).forwards and pictures == len(strides)


def test_the_direction_is_as_true_as_the_advantages():
    made = judged(8, 0, groups=20)
    found = made.advantages((1, 2), 1.0)
    assert made.cosine(found, "fine").mean() == pytest.approx(
        made.correlation(found, "fine").mean(), abs=0.02
    )


def test_a_noisy_judge_makes_the_same_mistake_again():
    pictures = torch.rand(40, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle"] * 40
    once = granularity.noisy_2(pictures, prompts)
    assert torch.equal(once, granularity.noisy_2(pictures.flip(0), prompts).flip(0))
    error = once - load("agreement").score(pictures, prompts)
    assert error.std().item() == pytest.approx(2 * granularity.SPREAD, rel=0.3)


def test_the_best_of_several_pictures():
    scores = torch.tensor([[0.1, 0.9], [math.nan, 0.3], [math.nan, math.nan], [0.5, 0.2]])
    assert diversity.best_of(scores) == pytest.approx((0.9 + 0.3 + 0.5) / 3)


def test_runs_are_paired_by_seed():
    def run(weight, seed, best):
        point = {"updates": 2, **dict.fromkeys(diversity.MEASURES, 0.5), "best": best}
        return {
            "weight": weight,
            "seed": seed,
            "before": dict.fromkeys(diversity.MEASURES, 0.0),
            "points": [point],
        }

    rows = [run(0.0, 0, 0.5), run(0.0, 1, 0.7), run(0.3, 0, 0.6), run(0.3, 1, 0.8), run(0.3, 2, 9.0)]
    line = next(line for line in diversity.report(rows) if "| 0.3 − 0 | 2 |" in line)
    assert "| +0.100 ± 0.000 |" in line


def test_a_brief_run_ends_where_its_goals_are_reached_and_counts_its_work():
    config = brief.configure(
        {"num_steps": 4, "group_size": 4}, [{"name": "agreement"}], ["strict"], "tune", 0, 1
    )
    found = brief.train(config, [{"updates": 1}, {"updates": 3}], lambda setup, learner: {"at": learner.step})
    assert found["before"] == {"at": 0}
    assert [(point["updates"], point["at"]) for point in found["points"]] == [(1, 1), (3, 3)]
    least, most = (singular(4, [k], 4, [2]).forwards + 3 for k in (1, 0))
    assert min(least, most) <= found["points"][0]["work"] <= max(least, most)
