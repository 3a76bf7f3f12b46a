"""Reach a Ray cluster, or start one on this machine, for as long as a run lasts."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from comfy_g2rpo.curriculum.prompt_history import digest
from comfy_g2rpo.run.setup import Setup
from comfy_g2rpo.sharing.ahead import Ahead, check_ahead

from ..commands.arguments import CommandError
from ..config.reading import make_recipe
from ..config.reward_checks import VOTES
from ..processes import silence
from .cluster_options import INSTALL, Cluster
from .part_bound import PartBound, given_bound

if TYPE_CHECKING:
    from ..config.reading import Config

SECONDS = 10
"""That one waits for an answer at the address of a cluster."""
STORE = 2**30
"""Bytes of memory that a cluster of this machine alone keeps for adapters and parts."""
Explores = Callable[[Setup], Setup]


@contextmanager
def exploring(cluster: Cluster, config: Config) -> Iterator[Explores]:
    """Yield what lets a run's setup be explored by the workers of a cluster.

    They load their models while this process loads its own.
    """
    refuse(cluster, config)
    bound = PartBound(given_bound())
    with connected(cluster) as resources:
        from .ray_pool import RayWorkers
        from .reward_pool import RewardWorkers

        tree = config.model_dump(mode="json") | {"heldout_rewards": []}
        how, judges = (torch.get_num_threads(), resources, silence()), None
        if cluster.reward_workers:
            judges = RewardWorkers(tree, cluster.reward_workers, *how, bound)
        pool = RayWorkers(tree, cluster.workers, *how, bound=bound, judges=judges)

        def explored(setup: Setup) -> Setup:
            pool.digest = digest(setup.prompts.train)
            return dataclasses.replace(setup, explorer=Ahead(pool, cluster.staleness))

        try:
            yield explored
        finally:
            pool.close()


def refuse(cluster: Cluster, config: Config) -> None:
    """Refuse a run that workers cannot explore for."""
    check_ahead(make_recipe(config), cluster.staleness)
    if any(reward.name == VOTES for reward in config.rewards):
        raise CommandError("rewards has votes, which lie in this run's folder; leave --ray out")
    if importlib.util.find_spec("ray") is None:
        raise CommandError(f"--ray needs Ray, which is not installed; install it with: {INSTALL}")
    check_address(cluster.address)


def check_address(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise CommandError(f"--ray {address[:80]!r}: give auto, HOST:PORT, ray://HOST:10001, or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except OSError as error:
        start = "start a cluster with: ray start --head, or give --ray local"
        raise CommandError(f"--ray {address}: nobody answers there ({error}); {start}") from error


@contextmanager
def connected(cluster: Cluster) -> Iterator[dict[str, float]]:
    """Connect to a cluster; yield what of it each worker takes."""
    # Ray would tell its makers how it is used; nobody has been asked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    here = cluster.address == "local"
    alone = {"num_cpus": cluster.all_workers, "object_store_memory": STORE, "include_dashboard": False}
    try:
        with others_cards() if here else nullcontext():
            ray.init(address=cluster.address, **quiet, **(alone if here else {}))
    except Exception as error:  # Ray raises bare ones where a machine is too slow to start it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        start = "start one with: ray start --head, or give --ray local"
        said = f"--ray {cluster.address}: no Ray cluster answers there ({reason})"
        raise CommandError(f"{said}; {start}") from error
    try:
        yield resources_of(ray.cluster_resources(), cluster.all_workers, here)
    finally:
        ray.shutdown()


def resources_of(there: dict[str, float], workers: int, here: bool) -> dict[str, float]:
    """Return what a worker takes of a cluster: a card, where there are any; on one machine, at least a share
    of those that the learner leaves.
    """
    cards = there.get("GPU", 0.0)
    if not cards:
        return {"num_cpus": 1}
    return {"num_cpus": 1, "num_gpus": cards / workers if here and cards < workers else 1}


@contextmanager
def others_cards() -> Iterator[None]:
    """Leave the first of several cards, on which this process learns, out of what Ray sees as it starts."""
    name, former = "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    known = former.split(",") if former else [str(i) for i in range(count)]
    if count > 1:
        os.environ[name] = ",".join(known[1:])
    try:
        yield
    finally:
        if former is not None:
            os.environ[name] = former
        elif count > 1:
            del os.environ[name]
