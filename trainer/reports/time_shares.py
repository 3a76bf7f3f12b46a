"""Where the time of a run went: seconds of its steps by phase, and of several processes the waiting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

PHASES = {
    "rollout": "drawing latents (rollout)",
    "decode": "making pictures of them (decode)",
    "reward": "judging them (reward)",
    "update": "learning from it (update)",
    "waiting": "waiting for other processes (waiting)",
}
"""What a step does, in words. Only a run of several processes has the last."""
MOST = "waiting_max"
"""The waiting of the process that waited most, where the others are given by their mean."""


def shares_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum up the seconds of a run's steps by phase; a phase that no row has is left out."""
    found = {}
    for phase in (*PHASES, MOST):
        known = [row[f"time/{phase}"] for row in rows if isinstance(row.get(f"time/{phase}"), (int, float))]
        if known:
            found[phase] = math.fsum(known)
    return found


def time_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a short table of the time by phase; nothing where no step has been timed."""
    seconds = shares_of(rows)
    most = seconds.pop(MOST, None)
    steps, total = sum("nfe" in row for row in rows), sum(seconds.values())
    if not steps or not total:
        return
    wide = max(len(PHASES[phase]) for phase in seconds)
    yield f"{f'time of {steps} steps':<{wide}}  s a step  share"
    for phase, spent in seconds.items():
        yield f"{PHASES[phase]:<{wide}}{spent / steps:>10.3g}{spent / total:>7.0%}"
    if most is not None:
        yield (
            f"waiting is the mean over the processes, of which one waited {most / steps:.3g} s a step; the "
            "rest is the first process's time"
        )
