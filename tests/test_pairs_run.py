"""Runs that learn from kept votes: epochs over stored forks, and every reason for which there is nothing to
learn from.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from program import Notes, StopAt, leave
from safetensors.torch import load_file, save_file
from some_cases import some
from toys import SHAPE, ToyPolicy

from comfy_g2rpo import lora
from comfy_g2rpo.plan import singular
from comfy_g2rpo.rollout import roll_out
from comfy_g2rpo.run.folder import RunFolder, read_state
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.votes import ballots, forks
from comfy_g2rpo.votes.kept_pairs import by_scores, by_votes, read_pairs
from comfy_g2rpo.votes.pair_steps import PairSteps, rows_of
from comfy_g2rpo.votes.strengths import Votes, picture_key
from g2rpo_trainer import run as training
from g2rpo_trainer.commands.train_pairs import pair_config, pair_settings
from g2rpo_trainer.config.reading import apply_overrides, from_dict
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.rewards.vote_reward import UnvotedError

pytestmark = pytest.mark.xdist_group("run")


def red(file):
    picture = ballots.read_png(file)
    return float(picture[..., 0].mean() - picture[..., 1:].mean())


def vote_red(run, **more):
    for ballot in ballots.read_ballots(run):
        order = sorted(ballot.files, key=lambda key: red(ballot.files[key]), reverse=True)
        ballots.append(run, Votes(tuple(ballot.files), ranking=tuple(order), prompt=ballot.prompt, **more))


def config(folder: Path, **method):
    (folder / "train.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    (folder / "heldout.txt").write_text("a yellow circle\na red square\n")
    made = {
        "name": "g2rpo",
        "num_steps": 4,
        "group_size": 4,
        "granularities": [1],
        "pick": "random",
        **method,
    }
    return from_dict(
        {
            "model": {"path": "models/tiny", "width": 64, "height": 64, "max_sequence_length": 0},
            "lora": {"rank": 4, "alpha": 8},
            "method": {**made, "learning_rate": 3e-3, "max_grad_norm": 1.0},
            "rewards": ["votes"],
            "heldout_rewards": ["agreement"],
            "prompts": {"train": str(folder / "train.txt"), "heldout": str(folder / "heldout.txt")},
            "train": {"steps": 9, "prompts_per_step": 3, "checkpoint_every": 1},
        }
    )


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    """Make a run whose first step waits for votes, and vote."""
    folder = tmp_path_factory.mktemp("voted")
    with pytest.raises(UnvotedError):
        training.train(config(folder), folder / "run", progress=Silent())
    vote_red(folder / "run")
    return folder / "run"


@pytest.fixture
def copied(voted, tmp_path):
    return Path(shutil.copytree(voted, tmp_path / "run"))


def settings(*more):
    return ["train.eval_every=2", "train.prompts_per_step=2", *more]


def pairs_of(run, *more):
    given = pair_settings([run], settings(*more), None)
    return from_dict(apply_overrides(pair_config([run]), given))


def outcome(path):
    folder = RunFolder.open(path)
    rows = [
        {k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in folder.metrics()
    ]
    return lora.read(folder.latest() / "lora.safetensors").pairs, read_state(folder.latest())[0], rows


# the whole way


def test_the_command_trains_from_kept_votes_and_leaves_what_a_run_leaves(voted, tmp_path, capsys):
    out = tmp_path / "new"
    words = ["pairs", voted, "--out", out, "--epochs", "10", "--set", "method.pair_loss=dpo"]
    code, _, said = leave(capsys, *words, "--set", "train.prompts_per_step=2", "--quiet")
    assert code == 0, said
    rows = [row for row in RunFolder.open(out).metrics() if "nfe" in row]
    # 3 forks, 2 to a step: 2 steps to an epoch.
    assert len(rows) == 20 and {row["nfe"] for row in rows} == {1, 2}
    assert {"pairs/accuracy", "pairs/margin", "pairs/displacement", "pairs/weight", "grad_norm"} <= set(
        rows[0]
    )
    early, late = (sum(row["pairs/accuracy"] for row in some) / 4 for some in (rows[:4], rows[-4:]))
    assert late > 0.9 and late > early
    assert rows[-1]["pairs/margin"] > rows[0]["pairs/margin"] + 0.5
    for name in ("config.json", "summary.json", "curves.png", "before_after.png"):
        assert (out / name).stat().st_size
    saved = json.loads((out / "summary.json").read_text())
    assert saved["steps"] == 20 and "agreement" in saved["heldout_gain"]
    assert (out / saved["lora"]).is_file() and saved["forwards"] == 30
    assert not (out / "ballots").exists() and not (out / "votes.jsonl").exists()
    assert leave(capsys, "pairs", voted, "--out", out)[0] == 2
    code, _, said = leave(capsys, "resume", out, "--set", "train.steps=22", "--quiet")
    assert code == 0, said
    assert RunFolder.open(out).metrics()[-1]["step"] == 22


@pytest.mark.parametrize(
    "more", some([("method.pair_keep=0.5", "method.ema=0.9", "method.pair_loss=pg_dpo"), ()], 1)
)
def test_an_interrupted_run_of_pairs_resumes_bit_for_bit(voted, tmp_path, more):
    made = pairs_of(voted, "train.steps=5", *more)
    training.train(made, tmp_path / "a", progress=Silent())
    with pytest.raises(KeyboardInterrupt):
        training.train(made, tmp_path / "b", progress=StopAt(3))
    training.train(made, tmp_path / "b", progress=Silent(), resume=True)
    (ours, state, rows), (theirs, other, others) = (outcome(tmp_path / name) for name in "ab")
    assert rows == others and all(torch.equal(state[name], other[name]) for name in state | other)
    assert all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))
    if more:
        # Losses are looked at before the step: one more forward per fork.
        assert {row["nfe"] for row in rows if "nfe" in row} == {2, 4}


def test_votes_that_come_later_are_an_input_that_changed(copied, tmp_path, capsys):
    out = tmp_path / "new"
    training.train(pairs_of(copied, "train.steps=1"), out, progress=Silent())
    vote_red(copied, voter="Ann")
    more = ["--set", "train.steps=2", "--quiet"]
    code, _, said = leave(capsys, "resume", out, *more)
    assert code == 2 and "pairs.runs.0 votes.jsonl" in said and "--changed-inputs" in said
    assert leave(capsys, "resume", out, *more, "--changed-inputs")[0] == 0


def test_rewards_can_prefer_in_place_of_people(copied, tmp_path):
    os.remove(ballots.votes_file(copied))
    (tmp_path / "redness.py").write_text(
        "def redness(images, prompts):\n"
        "    return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))\n"
    )
    own = f"rewards=[{{name: redness, path: '{tmp_path / 'redness.py'}:redness'}}]"
    made = pairs_of(copied, "pairs.from=rewards", own, "train.steps=1", "method.pair_loss=pg_dpo")
    training.train(made, tmp_path / "new", progress=Silent())
    (row,) = [row for row in RunFolder.open(tmp_path / "new").metrics() if "nfe" in row]
    assert row["pairs/weight"] == pytest.approx(0.5, abs=1e-3)


def test_the_kept_pairs_are_those_of_the_votes(voted):
    base = forks.read_forks(ballots.read_ballots(voted)[0]).base
    people = read_pairs([voted], base, {})
    judged = read_pairs(
        [voted], base, {}, lambda ballot: torch.tensor([red(f) for f in ballot.files.values()])
    )
    assert len(people) == 3
    for one, other in zip(people, judged, strict=True):
        assert torch.equal(one.wins, other.wins) and one.wins.sum() == 6
        assert (
            one.scores.isnan().all() and other.scores.argsort().tolist() == one.wins.sum(1).argsort().tolist()
        )


# steps


def kept(run, plan, prompt="a cat", seed=0, shape=SHAPE, votes=True):
    """Keep a toy's rollout as a ballot with its forks; the first picture is the best."""
    policy = ToyPolicy() if shape == SHAPE else ToyPolicy.__new__(ToyPolicy)
    policy.velocity = policy.velocity if shape == SHAPE else lambda x, sigma, cond: x
    policy.inference = ToyPolicy.inference.__get__(policy)
    rollout = roll_out(policy, plan, shifted_sigmas(plan.num_steps, 3.0), [0.1], [seed], shape)
    drawn = torch.rand(len(plan.images), 2, 2, 3, generator=torch.Generator().manual_seed(seed))
    place, keys = ballots.write_ballot(run, drawn, prompt, 1), [picture_key(one) for one in drawn]
    forks.keep_forks(place, keys, rollout, 0, range(len(keys)), "base")
    if votes:
        ballots.append(run, Votes(tuple(keys), ranking=tuple(keys), prompt=prompt))
    return ballots.read_ballot(place)


@pytest.fixture
def toy(tmp_path):
    return RunFolder.create(tmp_path / "run", {"config": {}}).path


def test_every_fork_comes_once_in_an_epoch_in_an_order_of_its_own(toy):
    for seed in range(7):
        kept(toy, singular(4, [1], 3), f"prompt {seed}", seed)
    steps = PairSteps(read_pairs([toy], "base", {}), 3, 5)
    assert steps.steps_per_epoch == 3 and len(steps.prompts) == 7
    epochs = [[[each.prompt for each in steps.batch(3 * epoch + i)] for i in range(3)] for epoch in range(4)]
    orders = [[prompt for batch in batches for prompt in batch] for batches in epochs]
    assert all(sorted(order) == sorted(steps.prompts) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert sorted(len(batch) for batch in epochs[0]) == [1, 3, 3]
    again = PairSteps(read_pairs([toy], "base", {}), 3, 5)
    assert [each.prompt for each in again.batch(7)] == epochs[2][1]
    assert [each.prompt for each in PairSteps(steps.kept, 3, 6).batch(7)] != epochs[2][1]


def test_a_step_has_latents_of_one_size(toy):
    for seed in range(3):
        kept(toy, singular(4, [1], 3), f"small {seed}", seed)
        kept(toy, singular(4, [1], 3), f"large {seed}", seed, (2, 5, 5))
    steps = PairSteps(read_pairs([toy], "base", {}), 2)
    assert steps.steps_per_epoch == 4
    for step in range(8):
        assert len({each.prompt.split()[0] for each in steps.batch(step)}) == 1
        rows_of(steps.batch(step), "cpu")


def test_rows_with_fewer_branches_are_filled_up_and_have_no_pair_there(toy):
    kept(toy, singular(4, [1], 2), "two", 1)
    kept(toy, singular(4, [1], 4), "four", 2)
    made = rows_of(read_pairs([toy], "base", {}), "cpu")
    assert made.branches.shape[:2] == (2, 4)
    small = made.wins.sum((1, 2)).argmin()
    assert (
        made.wins[small].sum() == 1 and not made.wins[small, 2:].any() and not made.branches[small, 2:].any()
    )
    assert made.weight.tolist() == pytest.approx([1 / 7] * 2)


def test_what_two_people_say_counts_twice_and_a_persons_second_vote_replaces_the_first(toy):
    ballot = kept(toy, singular(4, [1], 2))
    a, b = ballot.files
    ballots.append(toy, Votes((a, b), ranking=(a, b), prompt="a cat", voter="Ann"))
    ballots.append(toy, Votes((a, b), ranking=(b, a), prompt="a cat", voter="Bob"))
    ballots.append(toy, Votes((a, b), ranking=(a, b), prompt="a cat", voter="Bob"))
    (pair,) = read_pairs([toy], "base", {})
    assert pair.wins.tolist() == [[0, 3], [0, 0]]


def test_pictures_of_one_branch_or_of_two_forks_make_no_pair(toy):
    plan = singular(4, [0, 1], 2, (1, 2))
    ballot = kept(toy, plan, votes=False)
    found, keys = forks.read_forks(ballot), list(ballot.files)
    way = [found.ways[picture] for picture in range(len(keys))]
    same = next((i, j) for i in range(8) for j in range(8) if i != j and way[i] == way[j])
    across = next((i, j) for i in range(8) for j in range(8) if not way[i].keys() & way[j].keys())
    for i, j in (same, across):
        vote = Votes(tuple(keys), pairs=((keys[i], keys[j]),), prompt="a cat")
        assert by_votes(found, ballot, [vote], "a cat") == []


def test_a_branchs_score_is_the_mean_of_its_pictures(toy):
    found = forks.read_forks(kept(toy, singular(4, [1], 3, (1, 2)), votes=False))
    scores = torch.full((6,), torch.nan)
    for picture, way in found.ways.items():
        scores[picture] = [1.0, 2.0, 3.0][way[0]] + (0.25 if picture % 2 else -0.25)
    (pair,) = by_scores(found, scores, "a cat")
    assert pair.scores.tolist() == pytest.approx([1, 2, 3], abs=0.26)
    assert pair.wins.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert by_scores(found, scores.fill_(0.3), "a cat") == []
    scores[0] = torch.nan
    assert by_scores(found, scores * torch.nan, "a cat") == []


def test_scores_within_their_noise_make_no_pair(toy):
    found = forks.read_forks(kept(toy, singular(4, [1], 3), votes=False))
    (pair,) = by_scores(found, torch.tensor([0.0, 0.01, 1.0]), "a cat", 0.1)
    assert pair.wins.tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]


# nothing to learn from


def drop_votes(run):
    os.remove(ballots.votes_file(run))


def drop_forks(run):
    for ballot in ballots.read_ballots(run):
        (ballot.path / forks.FILE).unlink()


def other_base(run):
    place = ballots.read_ballots(run)[0].path / forks.FILE
    with open(place, "rb") as file:
        notes = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    save_file(load_file(place), place, {**notes, "base": "another"})


def spoil_forks(run):
    (ballots.read_ballots(run)[0].path / forks.FILE).write_bytes(b"PK\3\4")


NOTHING = {
    "no votes": (drop_votes, (), r"keeps no votes; vote first \(g2rpo vote "),
    "no forks": (drop_forks, (), r"keeps 3 ballots without their forks: .*tree: singular"),
    "another model": (other_base, (), r"was drawn by another model .*leave this run out"),
    "another guidance": (lambda run: None, ("model.guidance=2",), r"was drawn by another model"),
    "damaged forks": (spoil_forks, (), r"forks.safetensors is damaged .*remove it"),
    "equal scores": (
        lambda run: None,
        ("pairs.from=rewards", "rewards=[{name: jpeg, weight: 1, gate: 1e9}]"),
        r"score all branches of every fork alike, so there is no pair; name another reward",
    ),
    "votes as rewards": (
        lambda run: None,
        ("pairs.from=rewards",),
        r"pairs.from is rewards, but rewards has votes",
    ),
    "rewards as votes": (lambda run: None, ("rewards=[jpeg]",), r"rewards has jpeg, but pairs.from is votes"),
    "a group size": (lambda run: None, ("method.group_size=4",), r"method.group_size is 4; objective pairs"),
    "rollouts beside": (
        lambda run: None,
        ("method.objective=clip",),
        r"pairs.runs needs method.objective: pairs",
    ),
    "no runs": (
        lambda run: None,
        ("pairs.runs=[]",),
        r"pairs.runs is empty, .*start it with: g2rpo pairs RUN",
    ),
    "a run that is gone": (
        lambda run: None,
        ("pairs.runs=[nowhere]",),
        r"pairs.runs.0 is 'nowhere', which does",
    ),
    "no votes anywhere": (drop_votes, ("train.steps=3",), r"keeps no votes; vote first"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_cannot_be_learned_from_is_named_with_the_way_out(copied, tmp_path, capsys, name):
    change, more, words = NOTHING[name]
    change(copied)
    sets = [word for one in more for word in ("--set", one)]
    code, _, said = leave(capsys, "pairs", copied, "--out", tmp_path / "new", *sets, "--quiet")
    assert code == 2 and said.count("\n") == 1
    assert re.search(words, said), said
    assert not (tmp_path / "new").exists() or not (tmp_path / "new/metrics.jsonl").exists()


def test_a_recipe_that_says_pairs_without_runs_is_refused_and_so_is_a_length_given_twice(
    voted, tmp_path, capsys
):
    code, _, said = leave(capsys, "train", "demo", "--set", "method.objective=pairs", "--out", tmp_path / "a")
    assert (code == 2 and "pairs.runs is empty" in said) or "objective pairs" in said
    words = ["pairs", voted, "--epochs", "2", "--set", "train.steps=3", "--out", tmp_path / "b"]
    code, _, said = leave(capsys, *words)
    assert code == 2 and "--epochs and --set train.steps" in said


def test_a_run_of_comfyui_is_trained_in_comfyui(toy, tmp_path, capsys):
    run = RunFolder.create(
        tmp_path / "graph", {"config": {"model": {"fingerprint": "SD3 0"}}, "recipe": {}}
    ).path
    code, _, said = leave(capsys, "pairs", run)
    assert code == 2 and "made in ComfyUI" in said and "Update LoRA on Kept Votes" in said


def test_several_runs_are_learned_from_together(voted, copied, tmp_path):
    given = pair_settings([voted, copied], ["train.prompts_per_step=5"], 3)
    assert given[-1] == "train.steps=6"
    made = from_dict(apply_overrides(pair_config([voted, copied]), given))
    notes = Notes()
    training.train(made, tmp_path / "new", progress=notes)
    # Two forks to a step are no two prompts.
    assert not any("prompts_per_step" in said for said in notes.said)
    rows = [row for row in RunFolder.open(tmp_path / "new").metrics() if "nfe" in row]
    assert len(rows) == 6 and sum(row["nfe"] for row in rows) == 18


def test_a_price_is_said_before_anything_runs(voted, tmp_path, capsys):
    made = pairs_of(voted, "train.steps=4")
    recipe = tmp_path / "pairs.yaml"
    recipe.write_text(json.dumps(made.model_dump(mode="json")))
    code, said, error = leave(capsys, "plan", recipe)
    assert code == 0, error
    found = {line.partition("  ")[0]: line.split()[-1] for line in said.splitlines()}
    assert found["forwards per prompt group"] == "0"
    assert "time per step" in said
