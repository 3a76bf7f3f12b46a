"""People's votes: Bradley–Terry scores, what counts as votes and for which pictures, and a file of votes
that a killed process leaves.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_expit

from comfy_g2rpo.files.safe import RunError
from comfy_g2rpo.files.save_pictures import save_png
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.votes import ballots
from comfy_g2rpo.votes.strengths import (
    MAX_PICTURES,
    VoteError,
    Votes,
    bradley_terry,
    from_table,
    parse,
    picture_key,
    scores,
)

A, B, C, D, E = (f"{i:016x}" for i in range(5))
GROUP = (A, B, C, D)


@st.composite
def tables(draw, largest=7):
    """Draw how often each of some pictures beat each other one."""
    n = draw(st.integers(1, largest))
    wins = np.array(draw(st.lists(st.integers(0, 5), min_size=n * n, max_size=n * n)), float).reshape(n, n)
    np.fill_diagonal(wins, 0)
    return wins


def posterior(wins, strength):
    """Return the log posterior under a standard normal prior."""
    return (wins * log_expit(strength[:, None] - strength[None])).sum() - strength @ strength / 2


# scores


@given(tables())
def test_strengths_are_the_mode_of_the_posterior(wins):
    strength = bradley_terry(wins)
    assert np.isfinite(strength).all() and abs(strength.sum()) < 1e-6
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert (
            posterior(wins, strength) >= posterior(wins, strength + rng.normal(size=len(wins)) * 0.05) - 1e-12
        )


@given(tables())
def test_strengths_do_not_depend_on_the_order_of_the_pictures(wins):
    order = np.random.default_rng(1).permutation(len(wins))
    assert np.allclose(bradley_terry(wins[np.ix_(order, order)]), bradley_terry(wins)[order], atol=1e-6)


@given(tables(), st.integers(0, 6), st.integers(0, 6))
def test_a_win_more_is_never_a_disadvantage(wins, winner, loser):
    winner, loser = winner % len(wins), loser % len(wins)
    more = wins.copy()
    more[winner, loser] += winner != loser
    assert bradley_terry(more)[winner] >= bradley_terry(wins)[winner] - 1e-6


def test_two_pictures_have_the_strengths_that_one_can_work_out():
    # One win: θ = 1/(1 + exp(2θ)) for the winner, −θ for the loser.
    winner, loser = bradley_terry(np.array([[0.0, 1.0], [0.0, 0.0]]))
    assert winner == pytest.approx(-loser)
    assert winner == pytest.approx(1 / (1 + np.exp(2 * winner)), abs=1e-9)


def test_one_sided_disconnected_and_very_many_comparisons_have_finite_strengths():
    wins = np.zeros((5, 5))
    wins[0, 1], wins[2, 3] = 1e9, 1
    a, b, c, d, nobody = bradley_terry(wins)
    assert a > c > nobody == 0 > d > b and a == pytest.approx(-b)
    assert a < 15


def test_a_ranking_is_the_order_of_the_scores_and_nobody_compared_is_nan():
    found = scores([E, *GROUP, A], [Votes(GROUP, ranking=(C, A, B))])
    assert found.dtype == torch.float32
    assert found[3] > found[1] > found[2]
    assert found[[0, 4]].isnan().all() and found[5] == found[1]


def test_winners_beat_the_rest_of_their_group_and_each_other_by_rank():
    assert Votes(GROUP, winners=(B,)).outcomes() == [(B, A), (B, C), (B, D)]
    assert Votes(GROUP, ranking=(B, A), winners=(B, A)).outcomes() == [(B, A), (B, C), (B, D), (A, C), (A, D)]
    assert Votes((A, B), ranking=(A, B), winners=(A,)).outcomes() == [(A, B)]


def test_several_people_count_together():
    two = [Votes(GROUP, pairs=((A, B),)), Votes(GROUP, pairs=((A, B), (B, A)), voter="other")]
    assert scores([A, B], two)[0] == pytest.approx(bradley_terry(np.array([[0.0, 2.0], [1.0, 0.0]]))[0])


def test_votes_on_other_pictures_do_not_count():
    assert Votes((A, B, E), ranking=(E, A, B)).within(GROUP) == [(A, B)]
    assert scores([C, D], [Votes((A, B), ranking=(A, B))]).isnan().all()


# keys


def test_a_picture_keeps_its_key_in_a_file_and_loses_it_with_a_pixel(tmp_path):
    picture = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0))
    save_png(tmp_path / "a.png", picture)
    assert picture_key(ballots.read_png(tmp_path / "a.png")) == picture_key(picture)
    other = picture.clone()
    other[2, 3, 1] = 1 - other[2, 3, 1].round()
    assert picture_key(other) != picture_key(picture)
    assert picture_key(torch.zeros(2, 8, 3)) != picture_key(torch.zeros(4, 4, 3))
    assert picture_key(torch.full((2, 2, 3), torch.nan)) == ""


# what counts as votes


def test_votes_come_back_as_they_were_written():
    votes = Votes(GROUP, (B, A), (B, A), ((C, D),), "a red cat", "Ann")
    assert parse(json.dumps(votes.table())) == votes


WRONG = {
    "no table": [],
    "no pictures": {"ranking": []},
    "an unknown name": {"pictures": GROUP, "scores": {}},
    "too many pictures": {"pictures": [f"{i:016x}" for i in range(MAX_PICTURES + 1)]},
    "a picture twice": {"pictures": [A, A]},
    "capitals": {"pictures": ["ABCDEF0123456789"]},
    "a stranger in the ranking": {"pictures": GROUP, "ranking": [E]},
    "a stranger among the pairs": {"pictures": GROUP, "pairs": [[A, E]]},
    "a pair of itself": {"pictures": GROUP, "pairs": [[A, A]]},
    "a pair of one": {"pictures": GROUP, "pairs": [[A]]},
    "a pair that is a text": {"pictures": GROUP, "pairs": ["ab"]},
    "winners in a table": {"pictures": GROUP, "winners": {A: 1}},
    "a prompt with NUL": {"pictures": GROUP, "prompt": "\0"},
    "a voter of numbers": {"pictures": GROUP, "voter": 7},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_exactly_votes_is_named(name):
    with pytest.raises(VoteError, match=r"^here: .*; ") as caught:
        from_table(json.loads(json.dumps(WRONG[name])), "here")
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(GROUP),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["pictures", "ranking", "pairs", "winners", "x"]), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_votes_or_a_named_error(value):
    try:
        votes = parse(json.dumps(value))
    except VoteError as error:
        assert str(error).startswith("votes: ")
    else:
        assert votes.pictures and set(votes.outcomes()) <= {
            (a, b) for a in votes.pictures for b in votes.pictures if a != b
        }


# the file of votes


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", {"config": {}}).path


def test_kept_votes_are_read_in_order_and_a_second_vote_replaces_the_first(run):
    first, second = Votes(GROUP, ranking=(A, B)), Votes((A, B), pairs=((B, A),))
    for votes in (first, second, Votes(GROUP, ranking=(B, A)), Votes(GROUP, ranking=(A, B), voter="Ann")):
        ballots.append(run, votes)
    assert ballots.read(run) == [
        second,
        Votes(GROUP, ranking=(B, A)),
        Votes(GROUP, ranking=(A, B), voter="Ann"),
    ]
    assert len(ballots.votes_file(run).read_bytes().splitlines()) == 5


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_that_was_torn_off_is_ignored_and_repaired(run, cut):
    for keys in ((A, B), (A, C)):
        ballots.append(run, Votes(keys, ranking=keys))
    place = ballots.votes_file(run)
    whole = place.read_bytes()
    # Without its last character the line is still whole JSON, and stays.
    place.write_bytes(whole[:-cut])
    kept = 2 if cut == 1 else 1
    assert len(ballots.read(run)) == kept
    ballots.append(run, Votes((A, D), ranking=(A, D)))
    assert len(ballots.read(run)) == kept + 1
    assert place.read_bytes().endswith(b"}\n") and place.read_bytes().count(b"\n") == kept + 2


def test_a_damaged_line_is_named_and_nothing_is_thrown_away(run):
    place = ballots.votes_file(run)
    ballots.append(run, Votes((A, B), ranking=(A, B)))
    place.write_bytes(place.read_bytes() + b"nonsense\n")
    with pytest.raises(RunError, match=r"votes.jsonl, line 3 is damaged; remove that line"):
        ballots.read(run)
    assert b"nonsense" in place.read_bytes()


def test_a_foreign_file_is_not_taken_for_votes(run):
    ballots.votes_file(run).write_text('{"step": 1}\n')
    with pytest.raises(RunError, match="is no file of votes"):
        ballots.read(run)


APPEND = """
import sys
from comfy_g2rpo.votes import ballots
from comfy_g2rpo.votes.strengths import Votes
for i in range(10**6):
    keys = tuple(f"{i:08x}{j:08x}" for j in range(200))
    ballots.append(sys.argv[1], Votes(keys, ranking=keys, prompt=str(i)))
    print(i, flush=True)
"""


@pytest.mark.long
def test_votes_survive_a_process_that_is_killed_while_it_writes(run):
    acknowledged = -1
    for turn in range(3):
        child = subprocess.Popen([sys.executable, "-c", APPEND, str(run)], stdout=subprocess.PIPE, text=True)
        for _ in range(3 + turn):
            last = child.stdout.readline()
        time.sleep(0.003 * turn)
        os.kill(child.pid, signal.SIGKILL)
        # Whatever it said that it had kept is there, and at most one vote more, whose word was lost.
        last = [*child.stdout.read().split(), last.strip()]
        child.wait()
        acknowledged = max(int(word) for word in last if word)
        found = ballots.read(run)
        assert {str(i) for i in range(acknowledged + 1)} <= {votes.prompt for votes in found}
        assert all(
            len(votes.pictures) == 200 == len(votes.ranking)
            for votes in found
            if not votes.prompt.startswith("after")
        )
        ballots.append(run, Votes((A, B), ranking=(A, B), prompt=f"after {turn}"))
    assert [votes.prompt for votes in ballots.read(run) if votes.prompt.startswith("after")] == [
        "after 0",
        "after 1",
        "after 2",
    ]
    assert acknowledged >= 4


# ballots


def group(count=3, seed=0):
    return torch.rand(count, 4, 6, 3, generator=torch.Generator().manual_seed(seed))


def test_a_ballot_waits_until_somebody_votes_on_it_for_its_prompt(run):
    pictures = group()
    ballots.write_ballot(run, pictures, "a red cat", 3)
    (waiting,) = ballots.open_ballots(run)
    assert (waiting.prompt, waiting.step, list(waiting.files)) == (
        "a red cat",
        3,
        [picture_key(p) for p in pictures],
    )
    assert ballots.score(run, pictures, "a red cat", 3) is None
    keys = tuple(waiting.files)
    ballots.append(run, Votes(keys, ranking=keys, prompt="a blue cat"))
    assert ballots.open_ballots(run) == [waiting]
    ballots.append(run, Votes(keys, ranking=keys, prompt="a red cat"))
    assert ballots.open_ballots(run) == []
    assert ballots.score(run, pictures, "a red cat", 3).argsort().tolist() == [2, 1, 0]


def test_a_step_whose_pictures_come_again_but_for_roundings_finds_its_votes(run):
    pictures = group()
    place = ballots.write_ballot(run, pictures, "a cat", 1)
    (ballot,) = ballots.read_ballots(run)
    ballots.append(run, Votes(tuple(ballot.files), ranking=tuple(ballot.files), prompt="a cat"))
    again = (pictures + 0.4 / 255).clamp(0, 1)
    assert [picture_key(p) for p in again] != [picture_key(p) for p in pictures]
    assert torch.equal(ballots.score(run, again, "a cat", 1), ballots.score(run, pictures, "a cat", 1))
    assert (
        ballots.score(run, group(seed=1), "a cat", 1) is None
        and ballots.score(run, again, "a cat", 2) is None
    )
    assert ballots.write_ballot(run, pictures, "a cat", 1) == place


@pytest.mark.parametrize(("levels", "same"), [(0, True), (1, True), (2, False), (255, False)])
def test_pictures_are_the_same_up_to_one_level_of_255(run, levels, same):
    # Single grey pixels: their mean difference is a level exactly, at least from black.
    pictures = torch.tensor([[0.0], [8 / 255]]).view(2, 1, 1, 1)
    place = run / "ballots/a"
    place.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        save_png(place / f"{i:03d}.png", picture.expand(1, 1, 3))
    rows = [{"key": key, "file": f"{i:03d}.png"} for i, key in enumerate((A, B))]
    (place / "ballot.json").write_text(json.dumps({"prompt": "a cat", "step": 1, "pictures": rows}))
    again = (pictures * 255 + levels).expand(2, 1, 1, 3) / 255
    assert bool(ballots.shown_as(run, again, "a cat", 1)) is same


def test_a_ballot_that_is_there_is_left_as_it_is(run):
    place = ballots.write_ballot(run, group(), "a cat", 1)
    (place / "000.png").write_bytes(b"mine")
    assert ballots.write_ballot(run, group(), "a cat", 1) == place
    assert (place / "000.png").read_bytes() == b"mine"


def test_a_ballot_of_equal_pictures_is_refused(run):
    with pytest.raises(VoteError, match="nothing to compare; "):
        ballots.write_ballot(run, torch.zeros(3, 4, 4, 3), "a cat", 1)


def test_pairs_are_exported_with_their_pictures(run, tmp_path):
    pictures = group()
    ballots.write_ballot(run, pictures, "a “red” cat", 1)
    keys = tuple(picture_key(p) for p in pictures)
    ballots.append(
        run, Votes(keys, ranking=(keys[2], keys[0]), winners=(keys[2],), prompt="a “red” cat", voter="Ann")
    )
    ballots.append(run, Votes((A, B), ranking=(A, B), prompt="of pictures that are gone"))
    assert ballots.export(run, tmp_path / "out.jsonl") == 2
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert {(row["prompt"], row["voter"]) for row in rows} == {("a “red” cat", "Ann")}
    shown = [
        [picture_key(ballots.read_png(tmp_path / row[side])) for side in ("winner", "loser")] for row in rows
    ]
    assert shown == [[keys[2], keys[0]], [keys[2], keys[1]]]
    with pytest.raises(RunError, match="exists; choose another file"):
        ballots.export(run, tmp_path / "out.jsonl")


SOUND = {"prompt": "", "step": 1, "pictures": []}
ROWS = (
    1,
    {"key": A, "file": "../../a.png"},
    {"key": A, "file": "000.png\n"},
    {"key": A, "file": 1},
    {"key": A},
    {"key": 1, "file": "000.png"},
    {"key": A.upper() + "F", "file": "000.png"},
    {"key": "<img>", "file": "000.png"},
)
DAMAGED = (
    [],
    {},
    SOUND | {"prompt": 1},
    SOUND | {"step": "1"},
    SOUND | {"pictures": {}},
    *(SOUND | {"pictures": [row]} for row in ROWS),
)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_ballot_is_named(run, content):
    place = ballots.write_ballot(run, group(), "a cat", 1) / "ballot.json"
    place.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"ballot.json is damaged"):
        ballots.open_ballots(run)


def test_a_damaged_picture_is_named_where_it_is_needed(run):
    place = ballots.write_ballot(run, group(), "a cat", 1)
    ballots.append(run, Votes((A, B), ranking=(A, B)))
    (place / "000.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"000.png cannot be read; "):
        ballots.score(run, group(seed=1), "a cat", 1)


NO_TABLE = {
    "[" * 10**5: "not JSON",
    "9" * 10**6: "1000000 characters",
    '{"a": 1, "a": 2}': "a name comes twice",
    "{": "not JSON",
}


@pytest.mark.parametrize("text", NO_TABLE, ids=["deep", "long", "twice", "half"])
def test_text_that_is_no_json_table_is_refused(text):
    with pytest.raises(VoteError, match=NO_TABLE[text]):
        parse(text)


def test_a_place_where_nothing_can_be_kept_is_named(tmp_path):
    with pytest.raises(RunError, match="the vote is not kept yet"):
        ballots.append(tmp_path / "nowhere", Votes((A, B), ranking=(A, B)))
    ballots.votes_file(tmp_path).mkdir()
    with pytest.raises(RunError, match="cannot read"):
        ballots.read(tmp_path)
