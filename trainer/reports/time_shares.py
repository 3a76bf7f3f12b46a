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
    "waiting": "waiting for others (waiting)",
}
"""What a step does, in words. Only a run of several processes, or with workers, has the
last."""
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


def of_workers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Say of the steps that workers explored how the learner fared; nothing where there are none.

    Its idle share is the time that it waited for workers, of that and its own.
    """
    theirs = [row for row in rows if "workers/ready" in row]
    if not theirs:
        return {}

    def total(name: str) -> float:
        return math.fsum(row.get(name) or 0.0 for row in theirs)

    waited = total("time/waiting")
    mean = {name: total(f"workers/{name}") / len(theirs) for name in ("staleness", "sent_bytes", "got_bytes")}
    busy = waited + total("time/update")
    return {
        "steps": len(theirs),
        "idle": waited / busy if busy else 0.0,
        "lost": total("workers/lost"),
        **mean,
    }


def worker_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what there is to say of a run on a cluster."""
    if found := of_workers(rows):
        yield (
            f"{found['steps']:g} steps by workers: the learner waited {found['idle']:.0%} of its time; the "
            "times of drawing and judging are all workers' together"
        )
        yield (
            f"staleness {found['staleness']:.2g} steps on average; {found['lost']:g} parts lost and done "
            f"again; a step sent {found['sent_bytes'] / 1e6:.3g} MB and got {found['got_bytes'] / 1e6:.3g} MB"
        )


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
    yield from worker_lines(rows)
