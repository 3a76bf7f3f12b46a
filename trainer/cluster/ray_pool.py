"""The rollout workers of a run: Ray starts them, restarts them and says which are lost; lost parts go out
again.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from comfy_g2rpo.rewards import RewardError
from comfy_g2rpo.sharing.ahead import Order

from ..commands.exit_codes import AGAIN, UNFORESEEN
from ..processes import Left
from .part_bound import MOST_LOSSES, UNKNOWN, VARIABLE, PartBound
from .reward_pool import RewardWorkers, no_place
from .rollout_actor import RolloutActor

TURN, AGAIN_AFTER = 0.2, 1.0
"""Seconds that one waits for news at a time, and after which a lost worker is asked once more."""


class WorkerMistake(RewardError):
    """Something on a worker that a user can mend; the run stays as it was."""


@dataclass
class Worker:
    """An actor, and how far it is: absent (no process), building (loads its model), ready."""

    actor: Any
    state: str = "absent"
    node: str = ""
    orders: list[Order] = field(default_factory=list)
    rests_until: float = 0.0
    asked: bool = False
    since: float = 0.0
    """When it began what it is at: to build, or the first of its orders."""


@dataclass(frozen=True)
class Call:
    """What a worker has been asked: here, build, or an order."""

    worker: Worker
    what: str | Order


@dataclass
class RayWorkers:
    """Gives orders to whoever is free, and keeps what comes back (`comfy_g2rpo.sharing.ahead.Workers`)."""

    tree: Mapping[str, Any]
    count: int
    threads: int
    resources: Mapping[str, float]
    patience: float
    kind: type = RolloutActor
    """What a worker is."""
    bound: PartBound = field(default_factory=PartBound)
    """How long a part may take."""
    judges: RewardWorkers | None = None
    """Who judges, where rollout workers do not."""
    digest: str = ""
    """What tells the learner's list of prompts from another; blank before it is known."""
    calls: dict[Any, Call] = field(default_factory=dict)
    waiting: deque[Order] = field(default_factory=deque)
    found: dict[tuple[int, int], bytes] = field(default_factory=dict)
    open: dict[int, int] = field(default_factory=dict)
    """By step, how many parts it has."""
    adapters: dict[int, tuple[Any, int]] = field(default_factory=dict)
    """By version, its place in Ray's store and its bytes: put there once for all workers."""
    handed: set[tuple[int, str]] = field(default_factory=set)
    losses: dict[tuple[int, int], int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What a lost worker was at is done by another, so Ray is asked for the worker alone to come back.
        self.actor = ray.remote(max_restarts=-1, max_task_retries=0, **self.resources)(self.kind)
        self.team = [Worker(self.actor.remote()) for _ in range(self.count)]
        self.seen = time.monotonic()

    def publish(self, version: int, adapter: bytes) -> None:
        """Put an adapter into Ray's store, and let go of those that no order names."""
        named = {order.version for order in self.pending()} | {version}
        self.adapters = {number: put for number, put in self.adapters.items() if number in named}
        if version not in self.adapters:
            self.adapters[version] = ray.put(adapter), len(adapter)

    def pending(self) -> list[Order]:
        """List the orders that are not done."""
        return [*self.waiting, *(order for worker in self.team for order in worker.orders)]

    def submit(self, order: Order) -> None:
        """Take an order, and hand it on at once if somebody is free."""
        self.open[order.step] = self.open.get(order.step, 0) + 1
        self.waiting.append(order)
        self.dispatch(1)

    def collect(self, step: int, wait: Callable[[], None]) -> list[bytes]:
        """Return the parts of a step in their order, once all are there."""
        parts = [(step, part) for part in range(self.open.pop(step))]
        for each in filter(None, (self, self.judges)):
            each.seen = max(each.seen, time.monotonic() - self.patience / 2)  # nobody looked meanwhile
        while not all(part in self.found for part in parts):
            wait()
            try:
                self.turn()
            except RayError as error:
                line = str(error).strip().partition("\n")[0][:200]
                raise Left(AGAIN, f"the Ray cluster is gone ({line})") from error
        # Until the next step is collected nobody attends to workers: they get all that waits.
        self.dispatch(len(self.waiting) + 1)
        return [self.found.pop(part) for part in parts]

    def told(self) -> dict[str, float]:
        """Return how many workers are ready, which parts were lost, and bytes to and from workers."""
        counted, self.counted = self.counted, {}
        ready = sum(worker.state == "ready" for worker in self.team)
        names = ("lost", "sent_bytes", "got_bytes")
        told = {"workers/ready": float(ready)} | {f"workers/{n}": float(counted.get(n, 0)) for n in names}
        return told | (self.judges.told() if self.judges else {})

    def count_up(self, name: str, much: int) -> None:
        """Count for the next row of metrics."""
        self.counted[name] = self.counted.get(name, 0) + much

    def turn(self) -> None:
        """Ask the workers that are due, hand out what waits, and take what has come."""
        now = time.monotonic()
        for worker in self.team:
            if worker.state == "absent" and not worker.asked and now >= worker.rests_until:
                worker.asked = True
                self.calls[worker.actor.here.remote()] = Call(worker, "here")
        self.dispatch(1)
        if any(worker.state != "absent" for worker in self.team):
            self.seen = now
        elif now - self.seen > self.patience:
            raise Left(AGAIN, no_place("rollout", self.count, self.resources, self.patience))
        if self.calls:
            ready, _ = ray.wait(list(self.calls), num_returns=1, timeout=TURN)
        else:
            ready = []
            time.sleep(TURN)
        for call in ready:
            self.hear(self.calls.pop(call), call)
        if self.judges and self.judges.turn():
            for worker in self.team:  # its part may have waited for them
                worker.since = time.monotonic()
        if not ready:  # else there may be more that came while nobody looked
            self.end_hung()
        self.dispatch(1)

    def end_hung(self) -> None:
        """Have Ray end the workers that are at something for far too long, and start them again."""
        now = time.monotonic()
        for worker in self.team:
            if worker.state == "building":
                bound = UNKNOWN
            elif worker.orders:
                first = worker.orders[0]
                bound = self.bound.seconds(self.losses.get((first.step, first.part), 0))
            else:
                continue
            if now - worker.since > bound:
                ray.kill(worker.actor, no_restart=False)
                self.lose(worker, False)

    def dispatch(self, depth: int) -> None:
        """Hand waiting orders to ready workers, the least busy first, so that none has more than `depth`."""
        while self.waiting:
            ready = [worker for worker in self.team if worker.state == "ready" and len(worker.orders) < depth]
            if not ready:
                return
            worker, order = min(ready, key=lambda each: len(each.orders)), self.waiting.popleft()
            if not worker.orders:
                worker.since = time.monotonic()
            worker.orders.append(order)
            place, size = self.adapters[order.version]
            if (order.version, worker.node) not in self.handed:
                self.handed.add((order.version, worker.node))
                self.count_up("sent_bytes", size)
            call = worker.actor.explore.remote(dataclasses.asdict(order), place)
            self.calls[call] = Call(worker, order)

    def hear(self, call: Call, place: Any) -> None:
        """Take a worker's answer, or that it is lost."""
        worker = call.worker
        try:
            answer = ray.get(place)
        except RayTaskError as error:
            line = str(error).strip().splitlines()[-1][:300]
            raise Left(UNFORESEEN, f"a rollout worker ended with {line}") from error
        except RayError as error:
            if worker.state != "absent" or call.what == "here":  # several calls of one worker end together
                self.lose(worker, isinstance(error, ActorDiedError))
            return
        if isinstance(call.what, Order):
            answer, seconds = answer
            self.bound.took(seconds)
            worker.since = time.monotonic()
            if self.judges:
                self.judges.in_a_row = 0
            if call.what in worker.orders:
                worker.orders.remove(call.what)
            self.found[call.what.step, call.what.part] = self.sound(answer)
            self.count_up("got_bytes", len(answer))
        elif call.what == "here":
            worker.state, worker.node, worker.asked = "building", answer["node"], False
            worker.since = time.monotonic()
            judges = [judge.actor for judge in self.judges.team] if self.judges else []
            self.calls[worker.actor.build.remote(self.tree, self.threads, judges)] = Call(worker, "build")
        else:
            if self.digest and self.sound(answer).decode() != self.digest:
                raise ValueError(
                    "prompts.train differs between this machine and a rollout worker's; give every machine "
                    "the same files"
                )
            worker.state = "ready"

    def sound(self, answer: Any) -> bytes:
        """Return a worker's bytes, or raise what went wrong there."""
        if isinstance(answer, bytes):
            return answer
        line = f"rollout worker on {answer['host']}: {answer['text']}"
        if answer["kind"] == "memory":
            raise MemoryError(line)
        if answer["kind"] == "bug":
            raise Left(UNFORESEEN, line)
        raise WorkerMistake(line)

    def lose(self, worker: Worker, for_good: bool) -> None:
        """Take note that a worker is lost: its orders go to others, and it is asked whether it is back."""
        for order in worker.orders:
            place = order.step, order.part
            self.losses[place] = self.losses.get(place, 0) + 1
            if self.losses[place] >= MOST_LOSSES:
                times = f"{MOST_LOSSES} workers died or hung over the same part of step {order.step + 1}"
                why = "their memory may be too small, a reward may end its process or wait for ever"
                raise Left(AGAIN, f"{times}; {why}, or {VARIABLE} is too short")
        self.count_up("lost", len(worker.orders))
        self.waiting.extendleft(reversed(worker.orders))
        worker.orders, worker.state, worker.asked = [], "absent", False
        worker.rests_until = time.monotonic() + AGAIN_AFTER
        self.calls = {place: each for place, each in self.calls.items() if each.worker is not worker}
        if for_good:
            worker.actor = self.actor.remote()

    def close(self) -> None:
        """Let the workers go."""
        for worker in self.team:
            with suppress(RayError, RuntimeError):  # the cluster may be gone
                ray.kill(worker.actor)
        if self.judges:
            self.judges.close()
