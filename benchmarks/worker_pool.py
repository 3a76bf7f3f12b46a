"""What the pool of Ray workers itself costs: workers and a learner that sleep instead of computing.

`python benchmarks/worker_pool.py` has 1 and 2 workers here and prints, by staleness, the seconds of a step,
the learner's idle share and what arithmetic says of both.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_g2rpo.sharing.ahead import Order
from g2rpo_trainer.cost.cluster_hours import Load, shared


class Sleeper:
    """A worker that sleeps for a part and answers with as many bytes as one has."""

    def here(self) -> dict[str, str]:
        """Say where this process is."""
        import ray

        return {"host": "here", "node": ray.get_runtime_context().get_node_id()}

    def build(self, tree: Mapping[str, Any], threads: int, judges: Sequence[Any] = ()) -> bytes:
        """Take the seconds of a part, and its bytes."""
        self.seconds, self.part = tree["seconds"], tree["part"]
        return b""

    def explore(self, order: Mapping[str, Any], adapter: bytes) -> tuple[bytes, float]:
        """Sleep."""
        time.sleep(self.seconds)
        return bytes(self.part), self.seconds


def measure(pool: Any, given: Any, parts: int, staleness: int) -> tuple[float, float]:
    """Make steps; return the seconds of one and the learner's idle share, the first left out."""
    asked, waited, begin, steps = 0, 0.0, 0.0, given.steps
    for step in range(steps + 1):
        if step == 1:
            waited, begin = 0.0, time.perf_counter()
        pool.publish(step, os.urandom(64) + bytes(given.adapter))
        for ahead in range(asked, min(step + staleness, steps) + 1):
            for part in range(parts):
                pool.submit(Order(ahead, part, step, (), (part,)))
            asked = ahead + 1
        start = time.perf_counter()
        pool.collect(step, lambda: None)
        waited += time.perf_counter() - start
        time.sleep(given.update)
    took = time.perf_counter() - begin
    return took / steps, waited / took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a part")
    parser.add_argument("--update", type=float, default=4.0, help="seconds of the learner")
    parser.add_argument("--adapter", type=int, default=570_000, help="bytes of a LoRA; here the demo's")
    parser.add_argument("--part", type=int, default=13_000, help="bytes of a part; here the demo's")
    given = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from g2rpo_trainer.cluster.ray_pool import RayWorkers

    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address="local", num_cpus=2, **quiet)
    load = Load(2, given.seconds, given.update, 0, 0)
    for workers in (1, 2):
        pool = RayWorkers(
            {"seconds": given.seconds, "part": given.part}, workers, 1, {"num_cpus": 1}, 600.0, Sleeper
        )
        while not all(worker.state == "ready" for worker in pool.team):
            pool.turn()
        for staleness in (0, 1):
            seconds, idle = measure(pool, given, load.prompts, staleness)
            told = shared(load, workers, staleness)
            print(
                f"{workers} workers, staleness {staleness}: {seconds:.2f} s a step (by arithmetic "
                f"{told.seconds:.2f}), "
                f"learner idle {idle:.0%} ({told.idle:.0%})",
                flush=True,
            )
        pool.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
