"""The reward workers of a run: rollout workers ask them; here one sees that they are there, and ends those
that hang. Ray starts them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from ..commands.exit_codes import AGAIN
from ..processes import Left
from .part_bound import LEAST, MOST_LOSSES, UNKNOWN, VARIABLE, PartBound
from .reward_actor import RewardActor

EVERY = 1.0
"""Seconds from one question whether a reward worker is there to the next."""


@dataclass
class Judge:
    """A reward worker: whether it was there when it last answered, and what it has been asked since."""

    actor: Any
    there: bool = False
    call: Any = None
    asked: float = 0.0


@dataclass
class RewardWorkers:
    """Starts reward workers, and looks after them whenever somebody waits for a part."""

    tree: Mapping[str, Any]
    count: int
    threads: int
    resources: Mapping[str, float]
    patience: float
    bound: PartBound = field(default_factory=PartBound)
    lost: int = 0
    in_a_row: int = 0
    """Times that one was lost since a part came back."""

    def __post_init__(self) -> None:
        # A part waits for its pictures: what hangs here must show before the part seems to.
        self.bound = PartBound(self.bound.given and self.bound.given / 2, LEAST / 2)
        kind = ray.remote(
            max_restarts=-1, max_task_retries=0, concurrency_groups={"life": 1}, **self.resources
        )(RewardActor)
        self.team = [Judge(kind.remote(self.tree, self.threads)) for _ in range(self.count)]
        self.seen = time.monotonic()

    def turn(self) -> bool:
        """Ask and hear every reward worker; return whether one was lost. Left where none comes back."""
        now, before = time.monotonic(), self.lost
        for judge in self.team:
            if judge.call is None and now - judge.asked > EVERY:
                judge.call, judge.asked = judge.actor.here.remote(), now
        asked = {judge.call: judge for judge in self.team if judge.call is not None}
        ready, silent = ray.wait([*asked], num_returns=len(asked), timeout=0) if asked else ([], [])
        for call in ready:
            self.hear(asked[call])
        for judge in (asked[call] for call in silent):
            if judge.there and now - judge.asked > self.patience / 2:
                self.end(judge)
        if any(judge.there for judge in self.team):
            self.seen = now
        elif now - self.seen > self.patience:
            raise Left(AGAIN, no_place("reward", self.count, self.resources, self.patience))
        return self.lost > before

    def hear(self, judge: Judge) -> None:
        """Take what a reward worker says of itself, or that it is lost."""
        call, judge.call = judge.call, None
        try:
            said = ray.get(call)
        except RayError:
            if judge.there:
                self.lose(judge)
            return
        judge.there = True
        self.bound.took(said["longest"])
        if said["seconds"] > (UNKNOWN if said["doing"] == "build" else self.bound.seconds()):
            self.end(judge)

    def end(self, judge: Judge) -> None:
        """Have Ray end a reward worker that hangs, and start it again."""
        ray.kill(judge.actor, no_restart=False)
        self.lose(judge)

    def lose(self, judge: Judge) -> None:
        """Take note that a reward worker is lost; rollout workers ask another by themselves."""
        judge.there, judge.call, judge.asked = False, None, time.monotonic()
        self.lost, self.in_a_row = self.lost + 1, self.in_a_row + 1
        if self.in_a_row >= MOST_LOSSES:
            why = f"a reward may end its process or wait for ever, or {VARIABLE} is too short"
            raise Left(AGAIN, f"reward workers died or hung {MOST_LOSSES} times over the same part; {why}")

    def told(self) -> dict[str, float]:
        """Return how many are there, and how many were lost since the last time."""
        lost, self.lost = self.lost, 0
        there = sum(judge.there for judge in self.team)
        return {"workers/rewards_ready": float(there), "workers/rewards_lost": float(lost)}

    def close(self) -> None:
        """Let the reward workers go."""
        for judge in self.team:
            with suppress(RayError, RuntimeError):  # the cluster may be gone
                ray.kill(judge.actor)


def no_place(what: str, count: int, resources: Mapping[str, float], seconds: float) -> str:
    """Say that no worker is there."""
    line = f"none of {count} {what} workers has a place in the Ray cluster"
    wants = ", ".join(f"{much:g} {name.removeprefix('num_')}" for name, much in resources.items())
    return f"{line} for {seconds:g} s; each needs {wants}: see with `ray status` that nodes are up"
