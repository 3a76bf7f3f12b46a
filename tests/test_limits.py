"""Running out of memory: slots, decoding batches and micro-batches are halved, the run goes on with the
same results and says so.
"""

from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from program import Notes
from test_run import config
from test_update import CONDS, SEEDS, rolled
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.recipes import build_plan, recipe
from comfy_g2rpo.rewards import Reward, RewardError, checked
from comfy_g2rpo.run.batch_limits import Limits
from comfy_g2rpo.run.evaluation import velocity_distances
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.loop import learn
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.scorer import Scorer
from comfy_g2rpo.run.setup import make_learner
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.fitting_batch import Limit, OutOfMemory
from comfy_g2rpo.speed.fitting_rollout import roll_out
from comfy_g2rpo.update import records, update
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import dump


class SmallCard(ToyPolicy):
    """A policy that has memory for so many rows, and for fewer where gradients are kept."""

    def __init__(self, rows: int, learning: int | None = None) -> None:
        super().__init__()
        self.rows, self.learning = rows, learning or rows

    def velocity(self, x, sigma, cond):
        if len(x) > (self.learning if torch.is_grad_enabled() else self.rows):
            raise OutOfMemory("CUDA out of memory")
        return super().velocity(x, sigma, cond)


def rolled_out(policy, slots):
    plan = build_plan(recipe("g2rpo", num_steps=6, group_size=4))
    return roll_out(policy, plan, shifted_sigmas(6), CONDS, SEEDS, SHAPE, slots=slots)


def test_a_rollout_that_runs_out_of_memory_halves_its_slots_and_finds_the_same():
    slots = Limit(16)
    policy = SmallCard(3)
    small, large = rolled_out(policy, slots), rolled_out(ToyPolicy(), 16)
    assert slots.rows <= 3 and slots.halvings and max(policy.calls) <= 3
    assert small.nfe == large.nfe and torch.allclose(small.latents, large.latents, atol=1e-5)
    assert torch.allclose(small.x, large.x, atol=1e-5) and torch.allclose(
        small.velocity, large.velocity, atol=1e-5
    )


def test_a_single_latent_that_does_not_fit_ends_the_run():
    with pytest.raises(OutOfMemory):
        rolled_out(SmallCard(0), Limit(16))


@pytest.mark.parametrize(
    "changes",
    [{}, {"kl": 0.1}, {"objective": "clip", "epochs": 2}, {"objective": "clip", "update": "per_step"}],
)
def test_an_update_that_runs_out_of_memory_halves_its_micro_batch_and_learns_the_same(changes):
    made = recipe("g2rpo", num_steps=6, group_size=4, learning_rate=1e-2, **changes)
    rollout, advantages = rolled(made)
    rows = records(rollout, advantages, samples=made.objective == "clip")
    adapters, metrics = [], []
    for policy, limit in ((ToyPolicy(), Limit(8)), (SmallCard(64, 1), Limit(8))):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=made.learning_rate)
        metrics.append(update(policy, rows, CONDS, optimizer, made, micro_batch=limit))
        adapters.append(policy.adapter.detach())
    assert limit.rows == 1 and limit.halvings
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)
    assert torch.allclose(*adapters, atol=1e-4)


def test_a_gradient_that_breaks_off_half_way_is_begun_again_from_nothing():
    made = recipe("g2rpo", num_steps=6, group_size=4)
    rollout, advantages = rolled(made)
    rows = records(rollout, advantages)

    class LateFailure(ToyPolicy):
        failed = False

        def velocity(self, x, sigma, cond):
            if len(self.calls) == 1 and not self.failed:
                self.failed = True
                raise OutOfMemory("CUDA out of memory")
            return super().velocity(x, sigma, cond)

    norms = []
    for policy in (ToyPolicy(), LateFailure()):
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        norms.append(update(policy, rows, CONDS, optimizer, made, micro_batch=2)["grad_norm"])
    assert policy.failed and norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_decoding_in_smaller_batches_scores_the_same():
    class Brightness(Reward):
        name, licence, compares_across_prompts = "brightness", "Apache-2.0", True

        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    def decode(latents):
        if len(latents) > 2:
            raise OutOfMemory("CUDA out of memory")
        return latents

    pictures, scores = torch.rand(7, 4, 4, 3, generator=torch.Generator().manual_seed(0)), []
    for decoder, batch in ((decode, Limit(5)), (lambda latents: latents, Limit(5))):
        scorer = Scorer(decoder, [Brightness()], ["a"], 7, batch)
        scorer([0] * 7, list(range(7)), pictures)
        scores.append(scorer.scores)
    assert torch.equal(*scores) and scores[0].isfinite().all()


class Large(Reward):
    """A judge that has memory for so many images at once."""

    name, licence, compares_across_prompts = "large", "Apache-2.0", True

    def __init__(self, room: int, needs_group: bool = False) -> None:
        self.room, self.needs_group = room, needs_group

    def score(self, images, prompts):
        if len(images) > self.room:
            raise OutOfMemory("CUDA out of memory")
        return images.mean((1, 2, 3)) + torch.tensor([float(prompt) for prompt in prompts])


def test_a_judge_that_runs_out_of_memory_gets_fewer_images_at_once():
    pictures, prompts = torch.rand(7, 4, 4, 3, generator=torch.Generator().manual_seed(0)), [*"0123456"]
    small, large = (checked(Large(room), pictures, prompts) for room in (2, 7))
    assert torch.equal(small, large) and small.isfinite().all()
    assert checked(Large(0), pictures[:0], []).shape == (0,)
    for judge in (Large(0), Large(6, needs_group=True)):
        with pytest.raises(RewardError, match=r"'large' ran out of memory; choose a smaller judge"):
            checked(judge, pictures, prompts)


def test_what_has_come_down_is_said_once():
    limits = Limits.of(Pace(slots=8, decode_batch=4, micro_batch=2))
    assert not limits.lowered() and limits.news() == "" and limits.within(Pace()) == Pace()
    assert limits.slots.attempt(out_of_memory, 8) is None
    assert limits.lowered() == {"slots": 4} and limits.within(Pace()).slots == 4
    assert (
        limits.news() == "memory ran out: slots is 4 from now on; results stay the same"
        and limits.news() == ""
    )


def out_of_memory():
    raise OutOfMemory


@contextmanager
def card_of(policy, rows, learning):
    """Let a policy have memory for so many rows alone."""
    velocity = policy.velocity

    def checked(x, sigma, cond):
        if len(x) > (learning if torch.is_grad_enabled() else rows):
            raise OutOfMemory("CUDA out of memory")
        return velocity(x, sigma, cond)

    policy.velocity = checked
    yield
    policy.velocity = velocity


def test_a_whole_run_goes_on_with_what_fits_and_says_so_in_notes_and_metrics(tmp_path):
    runs = []
    for name, rows, learning in (("large", 1000, 1000), ("small", 5, 1)):
        quick = {"steps": 2, "slots": 16, "micro_batch": 4, "eval_every": 0, "watch": "off"}
        made = config(tmp_path, train=quick, rewards=[{"name": "colourfulness"}], prompts={"heldout": None})
        setup, notes = training.prepare(made, Accelerator(cpu=True)), Notes()
        folder = RunFolder.create(tmp_path / name, dump(made))
        with card_of(setup.policy, rows, learning):
            learn(setup, make_learner(setup), folder, notes, lambda phase: None, ())
        runs.append(([row for row in RunFolder.open(tmp_path / name).metrics() if "nfe" in row], notes.said))
    (large, quiet), (small, said) = runs
    assert not any("memory ran out" in text for text in quiet) and not any(
        "memory/slots" in row for row in large
    )
    assert any(
        text.startswith("step 1: memory ran out: slots is 4 from now on, micro_batch is 1 from now on")
        for text in said
    )
    assert sum("memory ran out" in text for text in said) == 1
    assert [row["memory/slots"] for row in small] == [4, 4] and [
        row["memory/micro_batch"] for row in small
    ] == [1, 1]
    for one, other in zip(large, small, strict=True):
        assert one["nfe"] == other["nfe"] and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_the_distance_from_the_reference_is_measured_in_what_fits():
    large, small = (
        velocity_distances(policy, rolled_out(policy, 16), CONDS, 8).mean()
        for policy in (ToyPolicy(), SmallCard(3))
    )
    assert large > 0 and small == pytest.approx(large, rel=1e-5)
