"""Pictures that are the same teach nothing, whatever the last digits of their scores say."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from reward_folders import clip_folder, clip_model

from comfy_g2rpo.advantages import integrate, rank_agreement, zero_std_share
from comfy_g2rpo.options import MIXES
from comfy_g2rpo.plan import independent, singular
from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.recipes import recipe
from comfy_g2rpo.rewards import Reward, checked, load
from comfy_g2rpo.rewards.mixing import MixedReward, mixed_advantages
from comfy_g2rpo.rewards.models.installed import load_installed
from comfy_g2rpo.rewards.models.score_noise import variants
from comfy_g2rpo.run import scorer as scoring
from comfy_g2rpo.run.iteration import Explored, score, step_row
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.scorer import Scorer, comparison_groups
from comfy_g2rpo.run.setup import World
from g2rpo_trainer.rewards.own import with_defaults

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def group(*scores):
    """Make scores of one reward the rewards [1, 1, G, 1] of one group."""
    return torch.tensor(scores).reshape(1, 1, -1, 1)


def advantages(*rewards, mix="zscore", gates=(), noise=()):
    """Return the advantages [G] of a group by several rewards of weight 1."""
    return mixed_advantages([torch.cat(rewards)], [1.0] * len(rewards), mix, gates, noise=noise)[0][0]


@dataclass
class Counting(Reward):
    """A network's stand-in: adds its place in the batch to the brightness, and keeps what it saw."""

    step: float = 1e-3
    own_noise: float = 0.0
    name, licence, compares_across_prompts, depends_on_batch = "counting", "", True, True
    calls: list = field(default_factory=list)

    def noise(self):
        return self.own_noise

    def score(self, images, prompts):
        self.calls.append(list(prompts))
        return images.mean((1, 2, 3)) + self.step * torch.arange(len(images))


@pytest.mark.parametrize("base", [5.6, 21.7, -0.3, 1e6, 1.0, 3e-2])
@pytest.mark.parametrize("mix", MIXES)
def test_one_unit_in_the_last_place_teaches_nothing(base, mix):
    scores = torch.full((12,), base)
    scores[3] = torch.nextafter(scores[3], torch.tensor(1e9))
    scores = scores.reshape(1, 1, 12, 1)
    assert scores.unique().numel() == 2
    assert advantages(scores, mix=mix).abs().max() == 0 and zero_std_share(scores) == 1


@pytest.mark.parametrize(
    "scores", [(0.5, 0.500001, 0.5, 0.5), (1e-6, 2e-6, 1e-6), (123456.0, 123457.0, 123456.0), (0.0, 3e-7)]
)
def test_a_small_difference_of_an_exact_reward_teaches_in_full(scores):
    made = integrate(group(*scores))[0]
    assert made.argmax() == 1 and made[1] > 0.5 and zero_std_share(group(*scores)) == 0


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("gates", [(), (None, 0.5)])
def test_a_reward_within_its_noise_has_no_say_in_any_mix(mix, gates):
    noisy, exact = group(20.1, 20.2, 20.0, 20.15), group(0.6, 0.9, 0.7, 0.1)
    made = advantages(noisy, exact, mix=mix, gates=gates, noise=(0.2, 0.0))
    flat = advantages(group(20.0, 20.0, 20.0, 20.0), exact, mix=mix, gates=gates)
    assert torch.allclose(made, flat, atol=1e-5) and made.abs().max() > 0.1
    assert not torch.allclose(advantages(noisy, exact, mix=mix, gates=gates), flat, atol=1e-2)


@pytest.mark.parametrize("noise", [0.2, 5.0, 100.0])
@pytest.mark.parametrize("mix", MIXES)
def test_a_gate_still_closes_where_those_that_pass_differ_by_noise(noise, mix):
    judge, gate = group(20.1, 20.2, 20.0, 20.15), group(1.0, 1.0, 0.0, 1.0)
    made = advantages(judge, gate, mix=mix, gates=(None, 0.5), noise=(noise, 0.0))
    passed = made[[0, 1, 3]]
    assert made.argmin() == 2 and made[2] < -0.5 and passed.max() - passed.min() < 1e-5


def test_groups_within_the_noise_are_counted_and_do_not_measure_agreement():
    rewards = torch.tensor([[[[1.0, 1.1], [1.1, 1.0]], [[1.0, 5.0], [3.0, 9.0]]]])
    assert zero_std_share(rewards) == 0 and zero_std_share(rewards, noise=[0.2]) == 0.5
    assert rank_agreement(rewards)[1] == 0 and rank_agreement(rewards, [0.2])[1] == 1


def test_equal_pictures_of_one_prompt_are_judged_once():
    reward, images = Counting(), torch.zeros(6, 4, 4, 3)
    images[4] = 0.5
    images[2] = -0.0
    prompts = ["a", "a", "a", "b", "a", "b"]
    scores = checked(reward, images, prompts)
    assert reward.calls == [["a", "b", "a"]]
    assert torch.equal(scores, torch.tensor([0, 0, 0, 0.001, 0.502, 0.001]))


@pytest.mark.parametrize("other", [{"target_count": 2}, {"colour": "red", "shape": "circle"}, {}])
def test_other_columns_are_another_question(other):
    reward = Counting()
    checked(reward, torch.zeros(2, 4, 4, 3), [Prompt("a", {"target_count": 1}), Prompt("a", other)])
    assert len(reward.calls[0]) == 2


def test_pictures_that_only_hash_alike_are_both_judged():
    reward, images = Counting(0.0), torch.zeros(2, 2, 2, 3)
    images[0, 0, 0], images[1, 1, 1] = 1.0, 1.0
    checked(reward, images, ["a", "a"])
    assert len(reward.calls[0]) == 2


def test_a_reward_that_compares_a_group_sees_all_of_it():
    reward = Counting()
    reward.needs_group = True
    checked(reward, torch.zeros(3, 4, 4, 3), ["a"] * 3)
    assert len(reward.calls[0]) == 3


def test_a_broken_picture_lends_its_score_to_no_black_one():
    images = torch.zeros(3, 4, 4, 3)
    images[0] = torch.nan
    assert checked(Counting(), images, ["a"] * 3).isnan().tolist() == [True, False, False]


def test_an_object_of_yours_may_be_a_network_and_say_its_noise():
    class Mine:
        name, licence, compares_across_prompts = "mine", "", True

        def score(self, images, prompts):
            return images.mean((1, 2, 3))

        def noise(self):
            return 0.25

    made = with_defaults(Mine())
    assert made.depends_on_batch and made.noise() == 0.25 and load("jpeg").noise() == 0
    both = MixedReward((made, load("jpeg")), (-2.0, 1.0))
    assert both.noise() == 0.5 and both.depends_on_batch


def rolled(reward, plan, latents, batch, order, prompts=("a",)):
    """Score a plan's finished latents [images, 3, 4, 4] as they arrive: [P, images]."""
    groups = comparison_groups(plan)
    decode = lambda part: part.permute(0, 2, 3, 1)  # noqa: E731
    scorer = Scorer(decode, [reward], list(prompts), len(plan.images), batch, groups=groups)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        scorer([0] * len(part), part, latents[part])
    return scorer.scores[0]


PLAN = singular(6, [0, 1], 3, (1, 2))


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_what_is_compared_comes_in_one_call_however_it_arrives(batch):
    reward, count = Counting(), len(PLAN.images)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    latents = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    scores = rolled(reward, PLAN, latents, batch, order)
    assert [len(call) for call in reward.calls] == [3] * 4 and scores.isfinite().all()
    seats = ((scores[0] - latents.mul(255).round().div(255).mean((1, 2, 3))) / reward.step).round()
    assert PLAN.values(seats[None])[0].sort(1).values.flatten().tolist() == [0, 0, 1, 1, 2, 2] * 2


def test_trajectories_are_one_group_and_granularities_that_coincide_are_one():
    assert len(set(comparison_groups(independent(3, [0, 1], 4)))) == 1
    plan = singular(3, [2], 3, (1, 2))
    assert comparison_groups(plan) == [(0, 0, 1)] * 3


def test_where_memory_is_short_pictures_are_judged_before_their_group_is_whole(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_WAITING", 4 * 4 * 3 * 2)
    reward, count = Counting(0.0), len(PLAN.images)
    latents = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    scores = rolled(reward, PLAN, latents, 1, sorted(range(count), key=lambda i: i % 6 % 5))
    expected = latents.mul(255).round().div(255).mean((1, 2, 3))
    assert torch.allclose(scores[0], expected) and sum(map(len, reward.calls)) == count
    assert max(map(len, reward.calls)) <= 3 and len(reward.calls) > 4


def test_a_step_of_a_run_leaves_noise_out_and_counts_it():
    rewards = Counting(own_noise=0.2), Counting(own_noise=0.0)
    scores = torch.rand(2, 1, len(PLAN.images), generator=torch.Generator().manual_seed(3)) * 0.1
    setup = SimpleNamespace(recipe=recipe("g2rpo"), pace=Pace(), world=World(), rewards=rewards)
    setup.weights, setup.gates, setup.policy = (1.0, 1.0), (), SimpleNamespace(device=torch.device("cpu"))
    explored = Explored((), PLAN, SimpleNamespace(nfe=1), scores, {}, True, {}, {})
    scored = score(setup, explored, 1)
    learner = SimpleNamespace(step=1, limits=SimpleNamespace(lowered=dict))
    assert torch.equal(scored.advantages[0], integrate(PLAN.values(scores[1:, 0])))
    assert step_row(setup, learner, explored, scored, {}, 0.0)["zero_std_share"] == 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("rewards")
    clip_folder(place, "mine", "clipscore", clip_model())
    return place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [32, 5, 1])
@pytest.mark.parametrize("level", [0.0, 1.0, 0.5])
def test_blank_pictures_teach_nothing_through_a_reward_model(root, dtype, batch, level):
    reward = load_installed(root, "mine", dtype=dtype, batch=batch)
    scores = rolled(
        reward, PLAN, torch.full((len(PLAN.images), 3, 4, 4), level), 5, [*range(len(PLAN.images))]
    )
    rewards = PLAN.values(scores)
    assert mixed_advantages([rewards], [1.0])[0].abs().max() == 0 and zero_std_share(rewards) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [32, 5])
def test_pictures_that_look_the_same_teach_nothing_and_others_do(root, dtype, batch):
    reward = load_installed(root, "mine", dtype=dtype, batch=batch)
    alike = variants(48)[1]
    other = torch.rand(8, 48, 48, 3, generator=torch.Generator().manual_seed(0))
    for images, teaches in ((alike, False), (other, True)):
        rewards = checked(reward, images, ["a red cube"] * 8).reshape(1, 1, 8, 1)
        noise = [reward.noise()]
        made = mixed_advantages([rewards], [1.0], noise=noise)[0]
        assert made.any().item() is teaches and zero_std_share(rewards, noise=noise) == (not teaches)


def test_noise_is_measured_once_and_grows_with_the_rounding(root):
    exact, coarse = (load_installed(root, "mine", dtype=dtype) for dtype in DTYPES[:2])
    assert 0 < exact.noise() < coarse.noise()
    calls = []
    coarse.score = lambda images, prompts: calls.append(1)
    assert coarse.noise() > 0 and calls == []
