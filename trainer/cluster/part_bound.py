"""How long a worker may be at a part before it counts as hung: as long as parts took, and much more."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..processes import seconds_given

VARIABLE = "G2RPO_PART_SECONDS"
"""Names the environment variable that has another bound."""
UNKNOWN, LEAST = 3600.0, 300.0
"""Seconds for a part before any has come back, and for loading a model; and the least after that."""
TIMES = 4.0
"""Times that the longest part so far may be exceeded."""
MOST_LOSSES = 10
"""Times that a part may be lost before the run ends: it may be the part that kills its workers."""


@dataclass
class PartBound:
    """The seconds that a part may take: `given` ones, else what earlier parts took tells."""

    given: float | None = None
    least: float = LEAST
    longest: float = 0.0

    def took(self, seconds: float) -> None:
        """Take note of a part that came back."""
        self.longest = max(self.longest, seconds)

    def seconds(self, losses: int = 0) -> float:
        """Return the bound for a part that was lost so often.

        It doubles with every loss, unless it was given: a part that truly takes longer comes through.
        """
        if self.given:
            return self.given
        return (max(self.least, TIMES * self.longest) if self.longest else UNKNOWN) * 2**losses


def given_bound() -> float | None:
    """Return the bound that the environment has; None where it has none, ValueError where it is no number."""
    return seconds_given(VARIABLE, 0.0) if os.environ.get(VARIABLE) else None
