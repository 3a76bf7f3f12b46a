"""The block Vote in the real ComfyUI: nothing runs until somebody votes, votes belong to these very
pictures, hostile ones are named.
"""

import json
import math
from pathlib import Path

import pytest
from comfy_host import COMFYUIS, Answer, make_base, run_script

pytestmark = [pytest.mark.comfyui, pytest.mark.xdist_group("scripts in comfyui")]

CHILD = Path(__file__).with_name("comfy_child_voting.py")
TEXTS = {
    "words": "the third one",
    "a number": "7",
    "a list": ["0123456789abcdef"],
    "nothing named": {},
    "half a table": '{"pictures": ["0123',
    "deep": "[" * 100_000,
    "long": "9" * 300_000,
    "nan": "NaN",
    "pictures of text": {"pictures": "0123456789abcdef"},
    "pictures without end": {"pictures": [f"{i:016x}" for i in range(300)]},
    "a picture by its path": {"pictures": ["../../../etc/pas"]},
    "a number as picture": {"pictures": [123456789012345]},
}
CHANGES = {
    "an unknown name": {"__proto__": {}},
    "pairs of text": {"pairs": "ab"},
    "pairs without end": {"pairs": [["0123456789abcdef", "1123456789abcdef"]] * 5000},
    "a ranking of numbers": {"ranking": [1, 2]},
    "a ranking of lists": {"ranking": [["0123456789abcdef"]]},
    "a long prompt": {"prompt": "a" * 3000},
    "a prompt of no text": {"prompt": ["a"]},
    "a voter of half a character": {"voter": "\ud800"},
    "a voter without end": {"voter": "a" * 1000},
}
RUNS = ["nobody", "../out", "/etc", "a/b"]


@pytest.fixture(scope="module", params=COMFYUIS)
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answer:
    given = {"texts": TEXTS, "changes": CHANGES, "runs": RUNS}
    return run_script(request.param, CHILD, make_base(tmp_path_factory.mktemp("voting")), given)


def keys_of(look: dict) -> list[str]:
    """Name the pictures that a look has shown."""
    return [picture["key"] for picture in look["ballot"]["pictures"]]


def test_nothing_below_runs_until_somebody_votes_and_nothing_fails(core: Answer) -> None:
    looked, trained, *_ = core.data["story"]["looks"]
    assert (looked["error"], looked["scores"], looked["updated"]) == ("", None, False)
    assert (trained["error"], trained["updated"]) == ("", True)
    assert len(set(keys_of(looked))) == 8 and keys_of(trained) == keys_of(looked)


def test_every_vote_that_is_kept_keeps_its_forks_with_the_model_and_the_prompt(core: Answer) -> None:
    kept = core.data["story"]["forks"]
    assert len(kept) == 2
    for each in kept:
        assert each["shapes"]["x"][0] == 2 and each["shapes"]["x"] == each["shapes"]["velocity"]
        assert each["shapes"]["origin"] == [8, 2] and each["shapes"]["noise"] == [8]
        assert each["notes"]["prompt"] == "two red circles"
        kind, patches = each["notes"]["base"].split(", ")
        assert kind.startswith("SD3 ") and patches == "none"
    assert len({each["notes"]["seed"] for each in kept}) == 2


def test_kept_votes_are_learned_from_several_times_and_the_run_goes_on(core: Answer) -> None:
    first, second = (core.data["again"][name] for name in ("first", "second"))
    assert (first["error"], second["error"]) == ("", "")
    # Two ballots of two forks, four forks to a step: five epochs are five steps.
    assert [row["step"] for row in first["rows"]] == [1, 2, 3, 4, 5] and first["step"] == 5
    assert [row["step"] for row in second["rows"]] == [*range(1, 11)] and second["step"] == 10
    assert second["rows"][:5] == first["rows"] and first["moved"] and first["lora"]
    assert first["said"].startswith("5 updates made; the model now ranks ")
    accuracy = [row["pairs/accuracy"] for row in second["rows"]]
    assert accuracy[-1] > 0.9 > accuracy[0]
    assert all(row["nfe"] == 4 and row["pairs/weight"] <= 1 for row in second["rows"])


def test_kept_votes_are_learned_from_without_a_run_and_with_guidance(core: Answer) -> None:
    for name in ("kept nowhere", "guided"):
        found = core.data["again"][name]
        assert (found["error"], found["step"], found["moved"]) == ("", 1, True)


def test_training_with_rollouts_does_not_take_the_objective_of_pairs(core: Answer) -> None:
    found = core.data["again"]["rolled out"]
    assert "changes: objective is pairs" in found and "Update LoRA on Kept Votes" in found


@pytest.mark.parametrize("name", ["unknown", "no votes"])
def test_nothing_below_runs_where_nobody_has_voted_yet(core: Answer, name: str) -> None:
    found = core.data["again"][name]
    assert (found["error"], found["step"], found["lora"]) == ("", None, False)
    assert found["said"].startswith("no votes yet in run ") and "vote there first" in found["said"]


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "blank": "run is blank; write the name",
        "outside": "run is '../voted'",
        "damaged": "forks.safetensors is damaged",
        "another model": "was drawn by another model",
        "no forks": "ballots without their forks",
    }.items(),
)
def test_what_cannot_be_learned_from_is_named(core: Answer, name: str, words: str) -> None:
    found = core.data["again"][name]
    assert words in found["error"] and found["node"] == "update", found
    assert "/" not in found["error"].replace("../voted", "").replace("ballots/", "").replace("/forks", "")


def test_votes_are_scores_in_their_order(core: Answer) -> None:
    first = core.data["without"]
    scores = dict(zip(keys_of(first["first"]), first["voted"]["scores"], strict=True))
    assert first["voted"]["names"] == ["votes"]
    assert sorted(scores, key=scores.get, reverse=True) == first["votes"]["ranking"]


def test_a_picture_that_nobody_compared_has_no_score(core: Answer) -> None:
    a, b, c, *rest = core.data["without"]["pairs"]["scores"]
    assert a > c > b
    assert len(rest) == 5 and all(math.isnan(score) for score in rest)


def test_every_update_brings_a_new_group_on_which_former_votes_do_not_count(core: Answer) -> None:
    looks = core.data["story"]["looks"]
    groups = [set(keys_of(look)) for look in looks]
    assert (
        groups[0] == groups[1]
        and groups[2] == groups[3]
        and not groups[0] & groups[2]
        and not groups[2] & groups[4]
    )
    assert [look["updated"] for look in looks] == [False, True, False, True, False]
    assert [look["error"] for look in looks] == [""] * 5
    assert looks[4]["ballot"]["votes"] is None


def test_a_run_keeps_the_votes_with_their_prompt(core: Answer) -> None:
    head, *lines = core.data["story"]["lines"]
    assert json.loads(head) == {"schema": "g2rpo-votes/1"}
    assert len(lines) == 2
    assert json.loads(lines[1]) == {**core.data["story"]["votes"], "prompt": "two red circles"}


def test_kept_votes_count_again_without_the_page_but_not_for_another_prompt(core: Answer) -> None:
    found = core.data["without"]
    assert found["replayed"]["scores"] == found["kept"]["scores"] == found["voted"]["scores"]
    assert found["replayed"]["ballot"]["votes"] == {**found["votes"], "prompt": "two red circles"}
    assert found["another prompt"]["scores"] is None and found["another prompt"]["error"] == ""


def test_votes_that_are_taken_back_or_are_anothers_block_again(core: Answer) -> None:
    for name in ("again", "other"):
        assert (core.data["without"][name]["error"], core.data["without"][name]["scores"]) == ("", None)


@pytest.mark.parametrize("name", [*TEXTS, *CHANGES, *(f"run {run}" for run in RUNS)])
def test_a_hostile_widget_is_named_with_its_remedy(core: Answer, name: str) -> None:
    found = core.data["hostile"][name]
    kind, _, words = found["error"].strip().partition(": ")
    assert found["scores"] is None
    assert found["node"] == "vote" or name.startswith("run ")
    assert kind.rpartition(".")[2] in ("VoteError", "ValueError")
    assert words.startswith("run" if name.startswith("run ") else "votes")
    assert ";" in words and "\n" not in words and len(words) < 250


def test_everything_hostile_was_tried_and_refused(core: Answer) -> None:
    assert len(core.data["hostile"]) == len(TEXTS) + len(CHANGES) + len(RUNS) + 5
    assert [name for name, found in core.data["hostile"].items() if not found["error"]] == []


def test_random_votes_are_votes_or_a_named_error(core: Answer) -> None:
    assert core.data["noise"] == []


def test_pictures_of_another_count_are_refused(core: Answer) -> None:
    assert "pictures holds 1 images, the rollout 8 completions; " in core.data["another count"]
