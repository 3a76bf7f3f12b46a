"""Where the files that come with the program lie."""

from __future__ import annotations

from pathlib import Path


def bundled_folder(kind: str) -> Path:
    """Return where recipes, prompts or models lie: in the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent.parent
    return here / kind if (here / kind).is_dir() else here.parent / kind


def bundled_recipes() -> dict[str, Path]:
    """Return the bundled recipes by name."""
    return {file.stem: file for file in sorted(bundled_folder("recipes").glob("*.yaml"))}
