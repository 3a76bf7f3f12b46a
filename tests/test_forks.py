"""Forks beside ballots: what parts where, what comes back from the file, and files that are not exactly
forks.
"""

import json
import os

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.curriculum.prompt_choice import in_turn
from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.plan import independent, singular
from comfy_g2rpo.recipes import build_plan
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.iteration import draw
from comfy_g2rpo.run.scorer import to_8_bit
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.update import records
from comfy_g2rpo.votes import ballots, forks
from comfy_g2rpo.votes.strengths import picture_key
from g2rpo_trainer import run as training
from g2rpo_trainer.config.input_files import model_digest
from g2rpo_trainer.config.reading import from_dict
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.rewards.vote_reward import UnvotedError

STEPS = 6


def rolled(plan, prompts=2):
    where = {"start": None, "slots": 7}
    sigmas = shifted_sigmas(plan.num_steps, 3.0)
    return roll_out(ToyPolicy(), plan, sigmas, [0.1, 0.2][:prompts], [5, 2**63 - 1][:prompts], SHAPE, **where)


def pictures(count, seed=0):
    return torch.rand(count, 2, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {"config": {}}).path


def kept(run, plan, prompt=1, shown=None):
    """Keep a ballot of a rollout's images with its forks."""
    rollout = rolled(plan)
    images = [*range(len(plan.images))] if shown is None else shown
    drawn = pictures(len(plan.images))[images]
    place = ballots.write_ballot(run, drawn, "a cat", 1)
    forks.keep_forks(place, [picture_key(one) for one in drawn], rollout, prompt, images, "base")
    return rollout, ballots.read_ballot(place)


TREES = {
    "one granularity": singular(STEPS, [0, 2], 3),
    "two granularities": singular(STEPS, [1, 3], 3, (1, 2)),
    "mirrored noises": singular(STEPS, [1], 4, antithetic=True),
    "two starts": singular(STEPS, [0, 1], 2, starts=2),
    "a window": singular(STEPS, [1], 3, window=2),
    "whole images of one start": independent(STEPS, [0, 1, 2], 3, shared_start=True),
}


@pytest.mark.parametrize("name", TREES)
def test_pictures_part_where_the_plan_says_by_the_noises_of_the_rollout(run, name):
    plan = TREES[name]
    rollout, ballot = kept(run, plan)
    found = forks.read_forks(ballot)
    rows = records(rollout, [torch.zeros(plan.shape[:2])] * 2)
    parted = 0
    for one, state in enumerate(plan.images):
        for other, second in enumerate(plan.images):
            ways = [forks.trained_edges(plan, each) for each in (state, second)]
            apart = [
                (a, b)
                for a in ways[0]
                for b in ways[1]
                if a != b and plan.states[a].parent == plan.states[b].parent
            ]
            place = found.parted(one, other)
            assert (place is not None) == bool(apart)
            if not apart:
                continue
            parted += 1
            ((mine, theirs),) = apart
            fork, a, b = place
            noises = found.draws(fork)
            assert torch.equal(noises[a], rollout.noise(1, mine)) and torch.equal(
                noises[b], rollout.noise(1, theirs)
            )
            row = len(plan.forks) + plan.forks.index(plan.states[mine].parent)
            assert torch.equal(found.x[fork], rows.x[row])
            assert torch.equal(found.velocity[fork], rollout.velocity.flatten(0, 1)[row])
            for field in ("sigma", "v_coef", "std", "step"):
                assert getattr(found, field)[fork] == getattr(rows, field)[row]
    assert parted
    assert (found.prompt, found.base, found.seed) == ("a cat", "base", 2**63 - 1)


def test_pictures_of_starts_of_their_own_never_part_at_a_fork(run):
    _, ballot = kept(run, independent(STEPS, [0, 1], 3))
    assert forks.read_forks(ballot) is None


def test_only_forks_at_which_shown_pictures_part_are_kept(run):
    plan = singular(STEPS, [0, 2], 3)
    _, ballot = kept(run, plan, shown=[0, 3, 4])
    found = forks.read_forks(ballot)
    assert len(found) == 1 and found.step.tolist() == [2]
    assert found.parted(0, 1) is None and found.parted(1, 2) == (0, 0, 1) and found.parted(2, 1) == (0, 1, 0)


def test_a_picture_that_comes_twice_stands_for_its_first_branch(run):
    plan, drawn = singular(STEPS, [1], 3), pictures(3)
    drawn[2] = drawn[0]
    place = ballots.write_ballot(run, drawn, "a cat", 1)
    forks.keep_forks(place, [picture_key(one) for one in drawn], rolled(plan), 0, [0, 1, 2], "base")
    found = forks.read_forks(ballots.read_ballot(place))
    assert found.parted(0, 1) == (0, 0, 1) and len(found.fork) == 2


def test_forks_of_other_pictures_are_not_laid_beside_a_ballot(run):
    plan = singular(STEPS, [1], 3)
    place = ballots.write_ballot(run, pictures(3), "a cat", 1)
    others = [picture_key(one) for one in pictures(3, seed=1)]
    forks.keep_forks(place, others, rolled(plan), 0, [0, 1, 2], "base")
    assert forks.read_forks(ballots.read_ballot(place)) is None


def test_forks_that_are_there_stay(run):
    _, ballot = kept(run, singular(STEPS, [1], 3))
    before = (ballot.path / forks.FILE).read_bytes()
    _, again = kept(run, singular(STEPS, [2], 3))
    assert again == ballot and (ballot.path / forks.FILE).read_bytes() == before


# hostile and damaged files


def changed(place, tensors=None, notes=None, drop=()):
    """Write the file again with some tensors or metadata changed."""
    found = {name: tensor for name, tensor in load_file(place).items() if name not in drop} | (tensors or {})
    sound = {"schema": forks.SCHEMA, "prompt": "a cat", "base": "base", "seed": "5"}
    save_file(found, place, {**sound, **(notes or {})})


DAMAGE = {
    "another schema": {"notes": {"schema": "g2rpo-votes/1"}},
    "more metadata": {"notes": {"path": "/etc/passwd"}},
    "another prompt": {"notes": {"prompt": "a dog"}},
    "no seed": {"notes": {"seed": "../.."}},
    "a negative seed": {"notes": {"seed": "-1"}},
    "a huge seed": {"notes": {"seed": str(2**64)}},
    "a missing tensor": {"drop": ("velocity",)},
    "another tensor": {"tensors": {"code": torch.zeros(1)}},
    "half precision": {"tensors": {"x": torch.zeros(2, *SHAPE, dtype=torch.float16)}},
    "NaN": {"tensors": {"x": torch.full((2, *SHAPE), torch.nan)}},
    "infinity": {"tensors": {"velocity": torch.full((2, *SHAPE), torch.inf)}},
    "another size": {"tensors": {"velocity": torch.zeros(2, 2, 3, 4)}},
    "fewer steps": {"tensors": {"sigma": torch.full((1,), 0.5)}},
    "no noise level": {"tensors": {"sigma": torch.tensor([0.0, 0.5])}},
    "a noise level above 1": {"tensors": {"sigma": torch.tensor([1.5, 0.5])}},
    "a step without noise": {"tensors": {"std": torch.zeros(2)}},
    "a fork that is not there": {"tensors": {"fork": torch.tensor([0, 0, 0, 1, 1, 2])}},
    "a fork below 0": {"tensors": {"fork": torch.tensor([0, 0, 0, 1, 1, -1])}},
    "no noise": {"tensors": {"noise": torch.tensor([1, 2, 3, 4, 5, 0])}},
    "a picture that is not there": {"tensors": {"origin": torch.tensor([[6, 0]])}},
    "a branch that is not there": {"tensors": {"origin": torch.tensor([[0, 6]])}},
    "links of three": {"tensors": {"origin": torch.tensor([[0, 0, 0]])}},
    "nothing in it": {"tensors": {"x": torch.zeros(0, *SHAPE)}},
    "a number for a latent": {"tensors": {"x": torch.tensor(1.0), "velocity": torch.tensor(1.0)}},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_exactly_forks_is_named(run, name):
    _, ballot = kept(run, singular(STEPS, [0, 2], 3))
    changed(ballot.path / forks.FILE, **DAMAGE[name])
    with pytest.raises(RunError, match=r"forks.safetensors is damaged \(.+\); remove it") as caught:
        forks.read_forks(ballot)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


BYTES = {
    "empty": b"",
    "a pickle": b"\x80\x04\x95" + b"x" * 100,
    "a header that claims a terabyte": (2**40).to_bytes(8, "little") + b"{}",
    "a tensor that claims a terabyte": (lambda head: len(head).to_bytes(8, "little") + head)(
        json.dumps({"x": {"dtype": "F32", "shape": [2**20, 2**18], "data_offsets": [0, 2**40]}}).encode()
    ),
    "cut short": None,
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_safetensors_file_is_named(run, name):
    _, ballot = kept(run, singular(STEPS, [0, 2], 3))
    place = ballot.path / forks.FILE
    place.write_bytes(place.read_bytes()[:-5] if BYTES[name] is None else BYTES[name])
    with pytest.raises(RunError, match=r"forks.safetensors is damaged \(.+\); remove it"):
        forks.read_forks(ballot)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_or_folder_in_its_place_is_not_waited_for(run):
    _, ballot = kept(run, singular(STEPS, [1], 3))
    place = ballot.path / forks.FILE
    place.unlink()
    for make in (os.mkfifo, os.mkdir):
        make(place)
        with pytest.raises(RunError, match="is damaged"):
            forks.read_forks(ballot)
        place.rmdir() if place.is_dir() else place.unlink()


# the headless run


def config(tmp_path, lines, **method):
    (tmp_path / "train.txt").write_text("\n".join(lines))
    made = {"num_steps": 4, "group_size": 3, "granularities": [1, 2], **method}
    return from_dict(
        {
            "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
            "method": {"name": "g2rpo", **made},
            "rewards": ["votes"],
            "prompts": {"train": str(tmp_path / "train.txt")},
            "train": {"steps": 2, "prompts_per_step": 3},
        }
    )


@pytest.mark.parametrize("lines", [["a red circle", "two blue squares", "a green star"], ["a red circle"]])
def test_every_ballot_of_a_run_keeps_the_forks_of_its_own_pictures(tmp_path, lines):
    made, run = config(tmp_path, lines), tmp_path / "run"
    with pytest.raises(UnvotedError):
        training.train(made, run, progress=Silent())
    setup = training.prepare(made, Accelerator(cpu=True), run)
    prompts, seeds = draw(setup, in_turn(setup, 0), 0)
    plan = build_plan(setup.recipe, 0, setup.pace.seed)
    conds = setup.policy.encode(prompts)
    rollout = roll_out(setup.policy, plan, setup.sigmas, conds, seeds, setup.shape)
    shown = ballots.read_ballots(run)
    assert len(shown) == 3 == len({ballot.path for ballot in shown})
    for ballot in shown:
        found = forks.read_forks(ballot)
        p = seeds.index(found.seed)
        decoded = to_8_bit(setup.policy.decode(rollout.latents[p]))
        keys = [picture_key(picture) for picture in decoded]
        assert set(ballot.files) == set(keys) and found.prompt == prompts[p]
        assert torch.equal(found.x, rollout.x[p]) and torch.equal(found.velocity, rollout.velocity[p])
        assert found.base == model_digest(RunFolder(run).config()) != ""
    kept = [(ballot.path / forks.FILE).read_bytes() for ballot in shown]
    for ballot in shown[1:]:
        # As ballots of an earlier version are, or of a run that was killed in between.
        (ballot.path / forks.FILE).unlink()
    with pytest.raises(UnvotedError):
        training.train(made, run, progress=Silent(), resume=True)
    assert [(ballot.path / forks.FILE).read_bytes() for ballot in shown] == kept


def test_the_model_of_a_run_is_told_from_others_by_its_files_loras_and_guidance(tmp_path):
    content = {
        "inputs": {"model.path": "1", "prompts.train": "2"},
        "config": {"model": {"family": "sd3", "guidance": 1.0, "lora": [{"path": "a", "strength": 1.0}]}},
    }
    others = [
        {**content, "inputs": {"model.path": "2"}},
        {**content, "inputs": {"model.path": "1", "model.lora.0.path": "3"}},
        {**content, "config": {"model": {**content["config"]["model"], "guidance": 2.0}}},
        {
            **content,
            "config": {"model": {**content["config"]["model"], "lora": [{"path": "a", "strength": 2.0}]}},
        },
    ]
    assert len({model_digest(each) for each in [content, *others]}) == 5
    moved = {**content, "inputs": {"model.path": "1", "prompts.train": "other"}}
    assert model_digest(moved) == model_digest(content)
    assert model_digest({"config": content["config"]}) == ""
