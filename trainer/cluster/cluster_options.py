"""What the command line says of a Ray cluster, and what of it becomes settings of the run. Needs no Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from ..commands.arguments import CommandError

if TYPE_CHECKING:
    from ..config.reading import Config

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Explore by workers of a Ray cluster: auto, HOST:PORT, ray://HOST:10001; local starts one here.",
    ),
]
RolloutWorkers = Annotated[
    int | None, typer.Option(min=1, max=4096, help="With --ray: workers that explore [default: 1].")
]
RewardWorkers = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="With --ray: workers that judge, and then the others load no reward model [default: none].",
    ),
]
Staleness = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=8,
        help="With --ray: steps that workers may be ahead; 0 waits for every update [default: 1].",
    ),
]
INSTALL = "pip install 'ray>=2.40'"


@dataclass(frozen=True)
class Cluster:
    """Where workers explore, how many, and how many steps ahead of the learner."""

    address: str
    workers: int = 1
    staleness: int = 1
    reward_workers: int = 0

    @property
    def all_workers(self) -> int:
        """Count those that explore and those that judge."""
        return self.workers + self.reward_workers


def cluster_of(
    address: str | None, workers: int | None, staleness: int | None, reward_workers: int | None = None
) -> Cluster | None:
    """Return what was asked for; None without --ray, which the other options need."""
    if address is None:
        names = ("--rollout-workers", "--reward-workers", "--staleness")
        for name, given in zip(names, (workers, reward_workers, staleness), strict=True):
            if given is not None:
                raise CommandError(f"{name} is for a run on Ray; give --ray ADDRESS too, such as --ray local")
        return None
    if not address.strip():
        raise CommandError("--ray is empty; give auto, HOST:PORT, ray://HOST:10001, or local")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise CommandError(
            "--ray and several processes of accelerate or torchrun exclude each other; start one process "
            "with --ray, or leave --ray out"
        )
    made = Cluster(address.strip(), workers or 1, 1 if staleness is None else staleness, reward_workers or 0)
    if made.reward_workers > made.workers:
        why = f"more than --rollout-workers {made.workers}, which ask one each at a time"
        raise CommandError(f"--reward-workers is {made.reward_workers}, {why}; give {made.workers} at most")
    return made


def cluster_settings(config: Config, cluster: Cluster | None, resumes: bool, quiet: bool) -> list[str]:
    """Return the settings that a run on a cluster needs beside those that were given, and say them.

    Each worker gets as many prompts at once as make a part for each. An objective that cannot learn from
    images of an older adapter becomes the clipped one, which is equal to it on images of the newest.
    """
    if cluster is None:
        return []
    from ..config.reading import make_recipe

    found = []
    if not config.train.prompts_at_once:
        found.append(f"train.prompts_at_once={-(-config.train.prompts_per_step // cluster.workers)}")
    if cluster.staleness and not resumes and make_recipe(config).objective == "on_policy":
        found.append("method.objective=clip")
    if found and not quiet:
        typer.echo(f"--ray sets {', '.join(found)}")
    return found
