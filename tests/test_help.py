"""Every block has a help page, which ComfyUI shows beside it, and the page explains every input."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "web" / "docs"
BLOCKS = json.loads((Path(__file__).parent / "snapshots" / "nodes.json").read_text("utf-8"))


def test_there_is_a_page_for_every_block_and_no_other() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(BLOCKS)


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_a_page_names_its_block_and_every_input(block: str) -> None:
    text = (PAGES / f"{block}.md").read_text("utf-8")
    names = [entry["id"] for entry in BLOCKS[block]["inputs"]]
    assert text.startswith(f"# {BLOCKS[block]['name']}\n")
    assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == []


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_a_page_shows_nothing_from_elsewhere(block: str) -> None:
    text = (PAGES / f"{block}.md").read_text("utf-8")
    assert not re.search(r"<(script|iframe|img|object)\b|!\[[^]]*\]\(https?:", text, re.IGNORECASE)
