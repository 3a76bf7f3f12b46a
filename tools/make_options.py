"""Write the list of every option in docs/options.md from the recipe's own fields."""

from __future__ import annotations

import textwrap
from itertools import groupby
from pathlib import Path

from g2rpo_trainer.config.recipe_fields import RecipeOption, options

PAGE = Path(__file__).parent.parent / "docs/options.md"
MARK = "<!-- From here on: made by tools/make_options.py. -->\n"
COLUMNS = 110


def section(option: RecipeOption) -> str:
    """Return the section that an option stands in, or its own name where it stands alone."""
    return option.name.partition(".")[0]


def entry(option: RecipeOption) -> str:
    """Write one option as an item of a list."""
    default = option.default if option.default == "required" else f"default {option.default}"
    item = f"- `{option.name}` ({option.takes}; {default}): {option.sentence}"
    return textwrap.fill(
        item, COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def listed() -> str:
    """Write every option, by section; held-out rewards' only where they differ from those of rewards."""
    known = options()
    trained = {option.name: option for option in known}
    own = [
        option
        for option in known
        if not option.name.startswith("heldout_rewards.")
        or option.sentence != trained[option.name.removeprefix("heldout_")].sentence
    ]
    parts = []
    for name, found in groupby(own, section):
        parts.append(f"### {name}\n\n" + "\n".join(map(entry, found)))
    return "\n\n".join(parts) + "\n"


def page(former: str) -> str:
    """Return the page with its list renewed; what stands before the mark stays."""
    written, mark, _ = former.partition(MARK)
    if not mark:
        raise ValueError(f"{PAGE} has lost its line {MARK.strip()}; put it back under the last heading")
    return f"{written}{mark}\n{listed()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
