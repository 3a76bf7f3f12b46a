"""Rewards that compare with pictures on this machine: one for all prompts from the recipe, or each prompt's
own from its columns.

Without either, a prompt that starts from a picture is compared with that: an edit is to keep what it was not
asked to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_g2rpo.files.picture_files import read
from comfy_g2rpo.prompts import columns_of, image_of
from comfy_g2rpo.rewards import RewardError
from comfy_g2rpo.rewards.likeness import KINDS, Likeness

if TYPE_CHECKING:
    from ..config.sections import RewardSection

KEPT = 64  # references that stay in memory


def compared(section: RewardSection) -> Likeness:
    """Load the reward that compares with the section's reference or palette, or with a prompt's own."""
    name, column = section.name, column_of(section.name)

    @lru_cache(maxsize=KEPT)
    def keep(given: str | tuple[str, ...]) -> Any:
        return KINDS[name].keep(given if column == "palette" else read(Path(given)))

    for_all = given_in(section)
    own = None if for_all is None else keep(for_all)

    def find(prompt: str) -> Any:
        given = columns_of(prompt).get(column)
        if given is None and own is None and column != "palette":
            given = image_of(prompt)
        if given is None:
            return own
        if not isinstance(given, list if column == "palette" else str):
            wanted = (
                'a list of colours such as ["#ff8800"]' if column == "palette" else "the path of a picture"
            )
            raise RewardError(f"column {column} of {prompt[:80]!a} is {str(given)[:40]!a}; write {wanted}")
        return keep(tuple(given) if column == "palette" else given)

    def refuse(prompts: Sequence[str]) -> None:
        found = [find(prompt) is not None for prompt in prompts]
        if found and not any(found):
            raise RewardError(
                f"reward {name!r} has nothing to compare with; give it a {column}, or the prompts a "
                "column of that name"
            )

    return Likeness(name, find, refuse)


def column_of(name: str) -> str:
    """Name the field, and the column, that holds what a reward compares with."""
    return "palette" if name == "palette" else "reference"


def given_in(section: RewardSection) -> str | tuple[str, ...] | None:
    """Return what a section compares with."""
    return section.palette if column_of(section.name) == "palette" else section.reference
