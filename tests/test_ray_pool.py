"""The pool of workers on a real Ray cluster of several local nodes, whose workers have no model to load."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from ray_nodes import cluster, join

from comfy_g2rpo.sharing.ahead import Order
from g2rpo_trainer.cluster.part_bound import PartBound
from g2rpo_trainer.commands.exit_codes import AGAIN, UNFORESEEN
from g2rpo_trainer.processes import Left

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.40'")

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.long]


class Light:
    """A worker without a model: it answers with what it was asked."""

    def here(self) -> dict[str, str]:
        return {"host": "here", "node": ray.get_runtime_context().get_node_id()}

    def build(self, tree: Mapping[str, Any], threads: int, judges: Sequence[Any] = ()) -> Any:
        self.tree = tree
        return tree.get("digest", "same").encode()

    def explore(self, order: Mapping[str, Any], adapter: bytes) -> Any:
        time.sleep(self.tree.get("seconds", 0.0))
        if order["step"] == self.tree.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if "answer" in self.tree:
            return {**self.tree["answer"], "host": "here"}, 0.0
        return json.dumps([order["step"], order["part"], adapter.decode(), os.getpid()]).encode(), 0.0


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Start a cluster: a head without processors, and two nodes of one each."""
    made = cluster()
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def pool_of(nodes: Any) -> Iterator[Callable[..., Any]]:
    """Make pools, and let their workers go."""
    from g2rpo_trainer.cluster.ray_pool import RayWorkers

    made = []

    def pool(
        patience: float = 600.0, count: int = 2, digest: str = "same", bound: float | None = None, **tree: Any
    ) -> Any:
        how = {"kind": Light, "digest": digest, "bound": PartBound(bound)}
        made.append(RayWorkers(tree, count, 1, {"num_cpus": 1}, patience, **how))
        return made[-1]

    yield pool
    for each in made:
        each.close()


def order(step: int, part: int, version: int = 0) -> Order:
    return Order(step, part, version, (0, 1), (part,))


def ask(pool: Any, step: int, parts: int, version: int = 0) -> None:
    pool.publish(version, f"adapter {version}".encode())
    for part in range(parts):
        pool.submit(order(step, part, version))


def nothing() -> None:
    """Wait for nothing else."""


def collected(pool: Any, step: int, wait: Callable[[], None] = nothing) -> list[list[Any]]:
    return [json.loads(each) for each in pool.collect(step, wait)]


def test_parts_come_in_their_order_by_the_adapter_that_was_meant(pool_of: Callable[..., Any]) -> None:
    pool = pool_of()
    ask(pool, 0, 5)
    ask(pool, 1, 3, 1)
    assert [found[:3] for found in collected(pool, 0)] == [[0, i, "adapter 0"] for i in range(5)]
    told = pool.told()
    assert told["workers/lost"] == 0 and told["workers/got_bytes"] > 0
    assert 1 <= told["workers/ready"] <= 2
    # Once to every machine, however many parts there are.
    assert len("adapter 0") <= told["workers/sent_bytes"] <= 4 * len("adapter 0")
    assert [found[:3] for found in collected(pool, 1)] == [[1, i, "adapter 1"] for i in range(3)]
    ask(pool, 2, 1, 2)
    assert [*pool.adapters] == [2]
    assert collected(pool, 2)[0][:3] == [2, 0, "adapter 2"]
    assert not pool.found and not pool.waiting and not pool.pending()


def test_a_killed_workers_part_is_done_again_and_the_worker_comes_back(pool_of: Callable[..., Any]) -> None:
    pool = pool_of(seconds=1.0)
    ask(pool, 0, 2)
    first = collected(pool, 0)
    pool.told()
    ask(pool, 1, 4)
    killed = []

    def kill() -> None:
        if not killed:
            killed.append(first[0][3])
            os.kill(first[0][3], signal.SIGKILL)

    found = collected(pool, 1, kill)
    assert [each[1] for each in found] == [0, 1, 2, 3]
    assert pool.told()["workers/lost"] == 1 and killed[0] not in {each[3] for each in found[2:]}
    deadline = time.monotonic() + 300
    while sum(worker.state == "ready" for worker in pool.team) < 2 and time.monotonic() < deadline:
        pool.turn()
    ask(pool, 2, 4)
    assert len({each[3] for each in collected(pool, 2)}) == 2


def test_a_stopped_workers_part_is_done_again_and_the_worker_comes_back(pool_of: Callable[..., Any]) -> None:
    pool = pool_of(bound=20.0, seconds=1.0)
    ask(pool, 0, 2)
    stopped = collected(pool, 0)[0][3]
    pool.told()
    ask(pool, 1, 4)
    os.kill(stopped, signal.SIGSTOP)
    assert [each[:2] for each in collected(pool, 1)] == [[1, part] for part in range(4)]
    assert pool.told()["workers/lost"] >= 1
    deadline = time.monotonic() + 300
    while sum(worker.state == "ready" for worker in pool.team) < 2 and time.monotonic() < deadline:
        pool.turn()
    ask(pool, 2, 4)
    pids = {each[3] for each in collected(pool, 2)}
    assert len(pids) == 2 and stopped not in pids


def test_machines_leave_and_join(pool_of: Callable[..., Any], nodes: Any) -> None:
    pool = pool_of(seconds=1.0, count=3)
    ask(pool, 0, 2)
    collected(pool, 0)
    gone = []

    def swap() -> None:
        if not gone:
            gone.append(sorted(nodes.worker_nodes, key=id)[0])
            nodes.remove_node(gone[0], allow_graceful=False)
            for _ in range(2):
                join(nodes)

    ask(pool, 1, 6)
    assert [each[1] for each in collected(pool, 1, swap)] == [*range(6)]
    deadline = time.monotonic() + 300
    while sum(worker.state == "ready" for worker in pool.team) < 3 and time.monotonic() < deadline:
        pool.turn()
    assert len({worker.node for worker in pool.team}) == 3


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        ({"kind": "mistake", "text": "rewards is wrong"}, ValueError, "rollout worker on here: rewards is"),
        ({"kind": "bug", "text": "KeyError: 'x'"}, Left, "rollout worker on here: KeyError"),
        ({"kind": "memory", "text": "out of memory"}, MemoryError, "out of memory"),
    ],
)
def test_what_goes_wrong_on_a_worker_is_one_line(
    pool_of: Callable[..., Any], answer: dict[str, str], kind: type[Exception], says: str
) -> None:
    pool = pool_of(answer=answer)
    ask(pool, 0, 1)
    with pytest.raises(kind, match=says) as error:
        collected(pool, 0)
    assert "\n" not in str(error.value) and getattr(error.value, "code", UNFORESEEN) == UNFORESEEN


def test_other_prompts_on_a_machine_are_noticed(pool_of: Callable[..., Any]) -> None:
    pool = pool_of(digest="other")
    ask(pool, 0, 1)
    with pytest.raises(ValueError, match=r"prompts\.train differs"):
        collected(pool, 0)


def test_a_part_that_kills_its_workers_ends_the_run(
    pool_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from g2rpo_trainer.cluster import ray_pool

    monkeypatch.setattr(ray_pool, "MOST_LOSSES", 2)
    pool = pool_of(dies=0)
    ask(pool, 0, 1)
    with pytest.raises(Left, match="2 workers died or hung over the same part of step 1") as left:
        collected(pool, 0)
    assert left.value.code == AGAIN


def test_a_stop_is_heard_while_one_waits(pool_of: Callable[..., Any]) -> None:
    pool, begin = pool_of(seconds=60.0), time.monotonic()
    ask(pool, 0, 1)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(pool, 0, stop)
    assert time.monotonic() - begin < 30


def test_without_any_worker_for_too_long_the_run_ends(pool_of: Callable[..., Any], nodes: Any) -> None:
    pool = pool_of(patience=8.0)
    ready = time.monotonic() + 300
    while not any(worker.state == "ready" for worker in pool.team) and time.monotonic() < ready:
        pool.seen = time.monotonic()  # the machine may be slow to start any
        pool.turn()
    for node in [*nodes.worker_nodes]:
        nodes.remove_node(node, allow_graceful=False)
    ask(pool, 0, 1)
    with pytest.raises(Left, match=r"none of 2 rollout workers has a place .* for 8 s") as left:
        collected(pool, 0)
    assert left.value.code == AGAIN and "num_" not in str(left.value)
    for _ in range(2):
        join(nodes)
