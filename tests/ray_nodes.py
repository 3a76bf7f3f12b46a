"""A Ray cluster of several nodes on this machine, which may be slow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

STORE = 10**8
HEAD = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
ATTEMPTS = 6


def cluster() -> Any:
    """Start a head without processors, and two nodes of one each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Workers find classes of tests by the names of their files.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, dict.fromkeys(paths)))
    for left in reversed(range(ATTEMPTS)):
        try:
            made = Cluster(initialize_head=True, head_node_args=HEAD)
            break
        except Exception:  # Ray gives a node 30 s to start, and raises nothing more special
            if not left:
                raise
    for _ in range(2):
        join(made)
    return made


def join(nodes: Any) -> None:
    """Let a node join."""
    for left in reversed(range(ATTEMPTS)):
        try:
            nodes.add_node(num_cpus=1, object_store_memory=STORE)
            return
        except Exception:  # as above
            if not left:
                raise
