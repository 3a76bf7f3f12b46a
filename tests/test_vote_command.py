"""People as the reward of a headless run: it stops for them and goes on, the page and its file, and two
steps of votes that teach.
"""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from program import call

from comfy_g2rpo.rewards import RewardError, Rule
from comfy_g2rpo.run.evaluation import Evaluation, compare
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.run.iteration import dropped_share
from comfy_g2rpo.run.pace import Pace
from comfy_g2rpo.run.setup import World
from comfy_g2rpo.votes import ballots
from comfy_g2rpo.votes.strengths import Votes
from g2rpo_trainer.commands.train_here import WAITING
from g2rpo_trainer.config.reading import ConfigError, load
from g2rpo_trainer.rewards.vote_reward import UnvotedError, VoteReward

HOSTILE = "</script><script>window.hit = 1</script><!-- <img src=x onerror=hit()>"
REDNESS = """
def redness(images, prompts):
    return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))
"""
RECIPE = """
model: {path: models/tiny, width: 64, height: 64, max_sequence_length: 0}
lora: {rank: 8, alpha: 8}
method: {name: g2rpo, num_steps: 6, group_size: 8, granularities: [1], learning_rate: 1.0e-2}
rewards: [{name: votes}]
heldout_rewards: [{name: redness, path: "redness.py:redness"}]
prompts: {train: prompts/shapes_train.txt, heldout: prompts/shapes_heldout.txt}
train: {steps: 2, prompts_per_step: 4, eval_prompts: 24, eval_noises: 2}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "redness.py").write_text(REDNESS)
    (tmp_path / "votes.yaml").write_text(RECIPE)
    return tmp_path / "votes.yaml"


@pytest.fixture
def shown(tmp_path):
    """Make a run that waits for votes on two groups, of which one's prompt is hostile."""
    run = RunFolder.create(tmp_path / "run", {"config": {}}).path
    for i, prompt in enumerate(("a red cat", HOSTILE)):
        pictures = torch.rand(3, 8, 8, 3, generator=torch.Generator().manual_seed(i))
        ballots.write_ballot(run, pictures, prompt, 1)
    return run


def redder(ballot):
    """Vote for the redder pictures, the reddest first, as somebody would who sees them."""
    red = {
        key: float((p[..., 0] - p[..., 1:].mean(-1)).mean())
        for key, file in ballot.files.items()
        for p in [ballots.read_png(file)]
    }
    return Votes(tuple(red), ranking=tuple(sorted(red, key=red.get, reverse=True)), prompt=ballot.prompt)


def save_votes(run, place):
    """Vote on all that waits, as the page saves it."""
    votes = [redder(ballot).table() for ballot in ballots.open_ballots(run)]
    place.write_text(json.dumps({"schema": "g2rpo-votes/1", "votes": votes}))
    return len(votes)


# the whole way


@pytest.mark.long
def test_two_steps_of_votes_for_redder_make_held_out_pictures_redder(recipe, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "votes.json"
    words = ["train", recipe, "--out", run, "--quiet"]
    for step in (1, 2):
        assert call(*words) == WAITING
        said = capsys.readouterr().err
        assert f"vote with: g2rpo vote {run}, then: g2rpo resume {run}" in said
        waiting = ballots.open_ballots(run)
        assert [ballot.step for ballot in waiting] == [step] * 4
        assert call("vote", run) == 0 and (run / "vote.html").is_file()
        assert save_votes(run, file) == 4
        assert call("vote", run, "--take", file) == 0
        assert "votes.jsonl: 4\n" in capsys.readouterr().out
        words = ["resume", run, "--quiet"]
    assert call(*words) == 0
    folder = RunFolder.open(run)
    assert [row["step"] for row in folder.metrics() if "nfe" in row] == [1, 2]
    # Nobody is asked twice: what came after a resume were the pictures that were voted on.
    assert len(ballots.read_ballots(run)) == 8 and len(ballots.read(run)) == 8
    before, after = Evaluation.read(folder, 0), Evaluation.read(folder, 2)
    gain = compare(before, after)["redness"]
    print(f"redness on {len(before.prompts)} held-out prompts: {gain}")
    assert gain["mean"] > 0 and gain["p"] < 0.01
    assert call("vote", run, "--export", tmp_path / "pairs.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == sum(len(votes.outcomes()) for votes in ballots.read(run))
    assert all((tmp_path / row[side]).is_file() for row in rows for side in ("winner", "loser"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("heldout_rewards=[votes]", "heldout_rewards names votes"),
        ("heldout_rewards=[]", "heldout_rewards is empty, and votes cannot measure"),
    ],
)
def test_people_are_not_asked_about_held_out_pictures(recipe, change, words):
    with pytest.raises(ConfigError, match=words):
        load(recipe, [change])


def test_a_picture_that_nobody_compared_is_no_failure_of_the_judge(shown):
    setup = SimpleNamespace(
        rewards=(VoteReward(shown), Rule("rule", None, False)), pace=Pace(max_dropped=0.2), world=World()
    )
    scores = torch.zeros(2, 1, 4)
    scores[0, 0, :3] = torch.nan
    assert dropped_share(setup, scores, 1) == 0
    with pytest.raises(RewardError, match="reward 'rule' could not judge 75%"):
        dropped_share(setup, scores.flip(0), 1)


def test_a_group_of_equal_pictures_is_a_tie_that_nobody_is_asked_about(shown):
    reward = VoteReward(shown)
    assert reward.score(torch.ones(3, 4, 4, 3), ["a red cat"] * 3).tolist() == [0, 0, 0]
    reward.settle()
    reward.score(torch.rand(3, 4, 4, 3), ["a green cat"] * 3)
    with pytest.raises(UnvotedError, match="a group waits for votes"):
        reward.settle()
    reward.settle()


# the page


def test_the_page_is_one_file_that_asks_nobody_for_anything(shown):
    assert call("vote", shown) == 0
    text = (shown / "vote.html").read_text("utf-8")
    assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    assert not re.findall(r"^(import|export) ", text, re.MULTILINE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert len(re.findall("data:image/png;base64,", text)) == 6


def test_a_prompt_is_data_in_the_page(shown):
    call("vote", shown)
    text = (shown / "vote.html").read_text("utf-8")
    assert text.count("<script") == 2 and text.count("</script") == 2
    data = json.loads(re.search(r'id="groups">(.*?)</script>', text, re.DOTALL)[1])
    assert {group["prompt"] for group in data["groups"]} == {"a red cat", HOSTILE}


def test_what_somebody_voted_on_is_not_shown_again(shown, tmp_path, capsys):
    ballots.append(shown, redder(ballots.open_ballots(shown)[0]))
    assert call("vote", shown) == 0
    assert "groups that wait for votes: 1;" in capsys.readouterr().out
    save_votes(shown, tmp_path / "votes.json")
    call("vote", shown, "--take", tmp_path / "votes.json")
    assert "no group waits for votes" in capsys.readouterr().out


def test_the_page_stays_while_votes_are_taken(shown, tmp_path, capsys):
    save_votes(shown, tmp_path / "votes.json")
    table = json.loads((tmp_path / "votes.json").read_text("utf-8"))
    (tmp_path / "votes.json").write_text(json.dumps(table | {"votes": table["votes"][:1]}))
    assert call("vote", shown, "--take", tmp_path / "votes.json") == 0
    assert capsys.readouterr().out.endswith("votes.jsonl: 1\ngroups that still wait for votes: 1\n")
    assert not (shown / "vote.html").exists()


def test_votes_are_not_taken_and_exported_at_once(shown, tmp_path, capsys):
    save_votes(shown, tmp_path / "votes.json")
    out = tmp_path / "pairs.jsonl"
    assert call("vote", shown, "--take", tmp_path / "votes.json", "--export", out) == 2
    assert "exclude each other; give one after the other" in capsys.readouterr().err
    assert not out.exists() and ballots.read(shown) == []


# its file


def test_votes_that_were_taken_are_not_taken_twice(shown, tmp_path, capsys):
    save_votes(shown, tmp_path / "votes.json")
    call("vote", shown, "--take", tmp_path / "votes.json")
    call("vote", shown, "--take", tmp_path / "votes.json")
    said = capsys.readouterr().out
    assert "votes.jsonl: 2\n" in said and "votes.jsonl: 0\n" in said
    assert len(ballots.read(shown)) == 2


SOUND = {"schema": "g2rpo-votes/1"}
STRANGER = {"pictures": [f"{i:016x}" for i in range(3)], "prompt": "a red cat"}
WRONG = {
    "not json": b"\xff\xfe",
    "of another kind": json.dumps([1]).encode(),
    "of another schema": json.dumps({"schema": "g2rpo-metrics/1", "votes": []}).encode(),
    "of no list": json.dumps({**SOUND, "votes": "all"}).encode(),
    "of no votes": json.dumps({**SOUND, "votes": [{}]}).encode(),
    "of pictures that were not shown": json.dumps({**SOUND, "votes": [STRANGER]}).encode(),
    "too deep": b"[" * 200_000,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_this_runs_votes_is_refused_and_changes_nothing(shown, tmp_path, capsys, name):
    good = redder(ballots.open_ballots(shown)[0]).table()
    content = WRONG[name]
    if name.startswith("of pictures") or name == "of no votes":
        content = json.dumps({**SOUND, "votes": [good, *json.loads(content)["votes"]]}).encode()
    (tmp_path / "votes.json").write_bytes(content)
    assert call("vote", shown, "--take", tmp_path / "votes.json") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and ";" in said and said.count("\n") == 1
    assert ballots.read(shown) == []


def test_a_file_that_is_too_large_is_not_read(shown, tmp_path, capsys):
    (tmp_path / "votes.json").touch()
    os.truncate(tmp_path / "votes.json", 2**26 + 1)
    assert call("vote", shown, "--take", tmp_path / "votes.json") == 2
    assert "votes.json has more than 64 MiB; give the file" in capsys.readouterr().err


def test_a_missing_run_or_file_is_named(shown, tmp_path, capsys):
    assert call("vote", tmp_path / "nowhere") == 2
    assert "holds no run" in capsys.readouterr().err
    assert call("vote", shown, "--take", tmp_path / "nowhere.json") == 2
    assert "no such file" in capsys.readouterr().err
    assert call("vote", shown, "--export", tmp_path / "pairs.jsonl") == 2
    assert "vote first" in capsys.readouterr().err
