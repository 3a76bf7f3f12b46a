"""Recipe and pace from lines of text: types, bounds, and errors that say what to do."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

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
        ("eta:", "line 1: 'eta:' has no value; write name = value"),
        ("eta: 0.5: 0.6", "it must be a number"),
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


def other_value(field, kind):
    """Return a value of a field that it allows and that is not its default."""
    rule, default = field.metadata, field.default
    if kind is bool:
        return not default
    if rule["choices"]:
        return next(choice for choice in reversed(rule["choices"]) if choice != default)
    plain = float if "float" in str(kind) else int
    most = rule["high"] if rule["high"] is not None else 7
    found = next(plain(n) for n in (most, (rule["low"] + most) / 2) if n not in (default, (default,)))
    return (found,) if str(kind).startswith("tuple") else found


SECTIONS = {"method": recipes.Recipe, "train": pace.Pace}
PLACES = [(section, name) for section, made in SECTIONS.items() for name in made.__dataclass_fields__]


@pytest.mark.parametrize("sign", [" = ", ": ", "="])
@pytest.mark.parametrize(("section", "name"), PLACES)
def test_every_field_can_be_typed_in_all_its_forms(section, name, sign):
    field = SECTIONS[section].__dataclass_fields__[name]
    value = other_value(field, get_type_hints(SECTIONS[section])[name])
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    said = text.lower() if isinstance(value, bool) else text
    read = settings.parse(f"{section}.{name}{sign}{said}")[list(SECTIONS).index(section)]
    assert read == {name: value} and value != field.default
    assert type(read[name]) is type(value)


def literals(path):
    """Return the texts of a source file, those of f-strings among them, without its docstrings."""
    tree = ast.parse(path.read_text("utf-8"))
    made = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, made)}
    found = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [text for text in found if isinstance(text, str) and text not in docs]


ADVISING = [Path(recipes.__file__), Path(recipes.__file__).parent / "methods" / "recipe_checks.py"]
ADVICE = [text for path in ADVISING for text in literals(path) if " " in text]


def test_what_recipes_say_holds_for_blocks_and_for_the_command_line_alike():
    assert len(ADVICE) > 20
    headless = re.compile(r"--|\bg2rpo \w|\byaml\b|command line|\bresume\b|\bsection\b", re.IGNORECASE)
    assert [text for text in ADVICE if headless.search(text)] == []


ADVISED = {
    (field, value)
    for text in ADVICE
    for field, value in re.findall(r"\b(\w+): (\w+)", text)
    if field in recipes.FIELDS
}


@pytest.mark.parametrize(("field", "value"), sorted(ADVISED))
def test_what_a_recipe_s_error_advises_can_be_typed_as_it_stands(field, value):
    found = settings.parse(f"{field}: {value}")[0][field]
    assert (f"{found:g}" if isinstance(found, float) else str(found).lower()) == value


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
