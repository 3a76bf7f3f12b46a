"""The tool that weakens guards makes every weaker guard once, and each of them is a program."""

import ast
from pathlib import Path

import pytest
import weaken_guards as tool

SOURCE = """
def check(x, y):
    if x is None or y >= 3:  # é stands before what is replaced
        raise ValueError
    if x:
        y = 1
    if not (
        x
        and y
    ):
        return None
    return x and y < 2
"""


@pytest.fixture
def weak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tool.Mutant]:
    """Weaken the guards of a small file."""
    (tmp_path / "file.py").write_text(SOURCE, "utf-8")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    return tool.mutants("file.py")


def test_every_guard_is_weakened_in_every_way(weak: list[tool.Mutant]) -> None:
    names = {mutant.name.split("::")[-1] for mutant in weak}
    assert {
        "x is None or y >= 3 -> False",
        "x is None -> False",
        "y >= 3 -> False",
        "y >= 3 -> y > 3",
        "not (x and y) -> False",
        "x -> True",
        "y < 2 -> True",
    } <= names
    assert not any(name.startswith("y = 1") for name in names)


def test_a_weak_guard_is_one_change_of_a_program_that_runs(weak: list[tool.Mutant]) -> None:
    for mutant in weak:
        ast.parse(mutant.text)
        assert mutant.text != SOURCE and "é stands before what is replaced" in mutant.text
    text = next(mutant.text for mutant in weak if mutant.name.endswith("y >= 3 -> y > 3"))
    assert "if x is None or (y > 3):  # é" in text
    (lines,) = {
        (mutant.line, mutant.last) for mutant in weak if mutant.name.endswith("not (x and y) -> False")
    }
    assert lines == (7, 10)


def test_some_are_chosen_at_even_spaces(weak: list[tool.Mutant]) -> None:
    assert tool.spaced(weak, None) == tool.spaced(weak, 99) == weak
    some = tool.spaced(weak, 3)
    assert len(some) == 3 and some[0] == weak[0] and [*filter(some.__contains__, weak)] == some


def test_every_guarded_file_and_its_tests_are_there() -> None:
    for file, tests in tool.GUARDED.items():
        assert (tool.ROOT / file).is_file() and tool.mutants(file)
        assert all((tool.ROOT / f"tests/{name}.py").is_file() for name in tests)
    known = {mutant.name for file in tool.GUARDED for mutant in tool.mutants(file)}
    assert set(tool.EQUIVALENT) <= known


def test_an_unknown_revision_is_no_silence() -> None:
    with pytest.raises(SystemExit, match=r"git diff --name-only nowhere --: fatal"):
        tool.changed_since("nowhere")
