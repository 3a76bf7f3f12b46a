"""What may be cheaper about completions, as options; `run/rank_guard.py` watches over it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..options import option


@dataclass(frozen=True)
class Speed:
    """Completions for less; anchors, branch states and updates stay exact. Off unless asked for."""

    precision: str = option(
        "same",
        "Precision of the completions' forwards: the model's, or lower.",
        choices=("same", "bf16", "fp16", "fp8"),
    )
    compile: bool = option(
        False, "Compile the transformer's blocks for completions; the first forwards take minutes."
    )
    cache: float = option(
        0.0,
        "Relative change of the velocity up to which a completion's step is skipped; 0 runs all, try 0.1.",
        0,
        1,
    )
    tail_stride: int = option(
        1,
        (
            "Stride of completions at least, by a second-order solver for granularities below it; 1 leaves "
            "them as they are."
        ),
        1,
        1000,
    )
    guard_every: int = option(
        25, "Iterations between measurements of the order of rewards against exact completions.", 1, 1_000_000
    )
    guard_share: float = option(
        0.25, "Share of the groups that a measurement completes exactly, too.", 0.001, 1
    )
    guard_rank: float = option(
        0.95, "Rank correlation with the exact rewards below which completions are exact from then on.", 0, 1
    )

    @property
    def on(self) -> bool:
        """Return whether anything is to be cheaper."""
        return self.precision != "same" or self.compile or self.cache > 0 or self.tail_stride > 1


FIELDS = {field.name: field for field in dataclasses.fields(Speed)}
