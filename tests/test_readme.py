"""README and docs: short sentences, short lines, and nothing named that is not there."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

from comfy_g2rpo.recipes import RECIPES
from g2rpo_trainer.cli import app

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_WORDS, MAX_COLUMNS = 30, 110
ROOMS = ("benchmarks", "comfy_g2rpo", "docs", "nodes", "recipes", "tests", "tools", "trainer", "web")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(text: str) -> str:
    """Return a page without code blocks, tables, headings, pictures and link targets."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\||#|!\[).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(text: str) -> list[str]:
    """List the sentences of a page; a list item or a paragraph ends one."""
    blocks = re.split(r"\n\s*\n|\n(?=[-*] )", prose(text))
    found = [re.split(r"(?<=[.!?])[*)\"]*\s+", " ".join(block.split())) for block in blocks]
    return [sentence for block in found for sentence in block if sentence]


def code(text: str) -> list[str]:
    """List what a page sets as code, in blocks and in lines."""
    return re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_sentences_are_counted_without_code_and_tables() -> None:
    page = "# Head\n\nOne two.\nThree [four](five.md)!\n\n| six |\n\n- Seven\n- Eight\n\n```\nNine.\n```\n"
    assert sentences(page) == ["One two.", "Three [four]!", "- Seven", "- Eight"]


def test_no_sentence_of_the_readme_is_long() -> None:
    found = sentences(README.read_text("utf-8"))
    assert [sentence for sentence in found if len(sentence.split()) > MAX_WORDS] == []


@each_page
def test_lines_are_short(page: Path) -> None:
    assert [line for line in page.read_text("utf-8").splitlines() if len(line) > MAX_COLUMNS] == []


@each_page
def test_links_lead_to_something(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        place = page.parent / unquote(file) if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text("utf-8")), target


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    pattern = rf"`((?:{'|'.join(ROOMS)})/[^`\s<>*…]*)`"
    named = re.findall(pattern, page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_commands_are_those_of_the_program(page: Path) -> None:
    verbs = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"\bg2rpo ([a-z][a-z-]*)", "\n".join(code(page.read_text("utf-8"))))) <= verbs


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(code(README.read_text("utf-8")))))
    assert {"demo", "test"} <= named <= targets


def test_the_readme_names_every_method() -> None:
    text = README.read_text("utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


def test_the_page_of_options_lists_every_bundled_recipe_and_every_method() -> None:
    text = (ROOT / "docs/options.md").read_text("utf-8")
    assert [file.stem for file in (ROOT / "recipes").glob("*.yaml") if f"| `{file.stem}` |" not in text] == []
    assert [name for name in RECIPES if f"| `{name}` |" not in text] == []
