"""Recipe and pace from lines of text: types, bounds, and errors that say what to do."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_g2rpo import recipes
from comfy_g2rpo.run import pace, settings


def test_lines_become_typed_changes_of_recipe_and_pace():
    text = (
        "# a comment\n\neta = 0.5\ngranularities = 1, 3\nantithetic = true\nslots=16\nminutes = "
        "none\nkernel = cps"
    )
    recipe, changes = settings.parse(text)
    assert recipe == {"eta": 0.5, "granularities": (1, 3), "antithetic": True, "kernel": "cps"}
    assert changes == {"slots": 16, "minutes": None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("eta", "line 1: 'eta' has no value; write name = value"),
        ("steps = 5", "write method.steps or train.steps"),
        ("etta = 1", "did you mean 'eta'"),
        ("eta = much", "it must be a number"),
        ("eta = nan", "between 0 and 10"),
        ("group_size = 1", "between 2 and 1024"),
        ("group_size = 2.5", "a whole number"),
        ("granularities = ,", "list at least one"),
        ("granularities = 1, 0", "between 1 and 1000"),
        ("kernel = flow_sd", "did you mean 'flow_sde'"),
        ("antithetic = yes", "write true or false"),
        ("eta = 1 " * 1000, "at most 4000"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(line, words):
    with pytest.raises(ValueError, match=r"^changes.*") as error:
        settings.parse(line, "changes")
    assert words in str(error.value)


def test_every_field_reads_its_own_default_back():
    lines = []
    for section, made in (("method", recipes.Recipe()), ("train", pace.Pace())):
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            text = ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            lines.append(
                f"{section}.{field.name} = "
                f"{text.lower() if isinstance(value, bool) or value is None else text}"
            )
    recipe, changes = settings.parse("\n".join(lines))
    assert recipes.Recipe(**recipe) == recipes.Recipe() and pace.Pace(**changes) == pace.Pace()


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_by_name(text):
    try:
        settings.parse(text, "changes")
    except ValueError as error:
        assert str(error).startswith("changes")
