"""One line of a check-up, and checks that are kept apart: whatever breaks one is a line of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

OK, WARNING, PROBLEM = "ok", "warning", "problem"
INSTALL = "install the trainer's libraries with: pip install --upgrade 'g2rpo[trainer]'"


class Finding(NamedTuple):
    """What was looked at, how it is, and what to do."""

    name: str
    state: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """Lay it out for reading."""
        return f"{self.state:<8} {self.name}: {self.text}{f'; {self.remedy}' if self.remedy else ''}"


def apart(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield what a check finds; an exception that it ends with is a problem, and no more than that."""
    try:
        yield from check()
    except Exception as error:  # a broken library may raise anything
        said = " ".join(str(error).split())[:300] or "no reason given"
        known = isinstance(error, (ValueError, OSError))
        remedy = INSTALL if isinstance(error, ImportError) else ""
        yield Finding(name, PROBLEM, said if known else f"{type(error).__name__}: {said}", remedy)
