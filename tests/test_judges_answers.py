"""Whatever a judge answers, in whatever place: a score in its range, or nonsense.

Never another error, never another number.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from judge_host import completion

from g2rpo_trainer.rewards.judges.client import Nonsense
from g2rpo_trainer.rewards.judges.judge_protocol import read as read_scores
from g2rpo_trainer.rewards.judges.openai import KINDS, read

SIMPLE = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.sampled_from(["1", "5", "yes", "", "NaN"])
    | st.text(max_size=5)
)
JSON = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
WORTH = KINDS["rating"].worth


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """List the paths to everything in an answer."""
    yield at
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield from places(value, (*at, key))


def changed(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    """Put a value into a place of an answer."""
    if not at:
        return value
    made = copy.deepcopy(tree)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return made


def score_of(work: Any) -> float | None:
    """Return a score; None for nonsense."""
    try:
        return work()
    except Nonsense:
        return None


SOUND = completion({"5": 0.5, "1": 0.4, "no": 0.1})


@given(st.sampled_from(list(places(SOUND))), JSON, st.booleans())
def test_a_chat_completion_with_anything_in_any_place(at: tuple[Any, ...], value: Any, words: bool) -> None:
    score = score_of(lambda: read(changed(SOUND, at, value), WORTH, words))
    assert score is None or 1 <= score <= 5


@given(
    st.dictionaries(
        st.sampled_from(["1", " 2", "3", "▁4", "5", "6", "12", "five", ""]), st.floats(0, 1), min_size=1
    )
)
def test_a_rating_is_the_mean_of_the_digits_that_hold_most_of_the_probability(
    chances: dict[str, float],
) -> None:
    masses = {word.strip(" ▁"): chance for word, chance in chances.items() if word.strip(" ▁") in WORTH}
    total = sum(masses.values())
    score = score_of(lambda: read(completion(chances), WORTH, False))
    if 0.51 < total < 1:
        assert math.isclose(
            score, sum(float(digit) * mass for digit, mass in masses.items()) / total, rel_tol=1e-6
        )
    elif total < 0.49 or total > 1.02:
        assert score is None


@given(st.sampled_from(list(places({"scores": [0.5, None]}))), JSON)
def test_served_scores_with_anything_in_any_place(at: tuple[Any, ...], value: Any) -> None:
    answer = changed({"scores": [0.5, None]}, at, value)
    scores = score_of(lambda: read_scores(2, answer))
    assert scores is None or (
        len(scores) == 2 and all(math.isnan(score) or abs(score) <= 1e30 for score in scores)
    )


@given(JSON)
def test_what_is_no_answer_at_all(value: Any) -> None:
    # As it comes from the line: NaN and ∞ as Python reads them.
    value = json.loads(json.dumps(value))
    assert score_of(lambda: read(value, WORTH, False)) is None
