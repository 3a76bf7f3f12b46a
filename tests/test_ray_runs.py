"""Runs whose workers explore on a real Ray cluster of several local nodes: equal, stale, killed, all gone."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import cluster, join
from test_run import assert_equal, config, outcome
from test_sharing import learned, without_workers

from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer.cluster.cluster_options import Cluster
from g2rpo_trainer.commands.exit_codes import AGAIN
from g2rpo_trainer.processes import Left
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.reports.time_shares import of_workers
from g2rpo_trainer.rewards.build import RewardError
from g2rpo_trainer.run import train

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.40'")

# Workers load the model in processes of their own, some ten seconds each where a core is free.
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.long]

QUICK = {"prompts_per_step": 2, "prompts_at_once": 1, "eval_every": 0, "watch": "off", "eval_noises": 1}
CLIP = {"objective": "clip"}
SLOW = """
import time
from pathlib import Path

def own(images, prompts):
    time.sleep({seconds} if Path({flag!r}).exists() else 0)
    return images.mean((1, 2, 3))
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Start a cluster: a head without processors, and two nodes of one each."""
    made = cluster()
    yield made
    ray.shutdown()
    made.shutdown()


class Trouble(Silent):
    """Do something when a step is shown."""

    def __init__(self, at: dict[int, Callable[[], None]]) -> None:
        self.at = at

    def step(self, metrics: Any) -> None:
        if "nfe" in metrics and (what := self.at.pop(metrics["step"], None)):
            what()


def explored(made: Any, place: Path, nodes: Any, staleness: int, trouble: Any = None, **how: Any) -> None:
    """Make a run by two workers of the cluster."""
    from g2rpo_trainer.cluster.connecting import exploring

    explorers = exploring(Cluster(nodes.address, 2, staleness), made)
    train(made, place, progress=trouble or Silent(), explorers=explorers, **how)


def actors(nodes: Any, kind: str = "RolloutActor") -> list[int]:
    """List the processes of this cluster that are workers of a kind."""
    parents = {
        each.process.pid for node in nodes.worker_nodes for each in node.all_processes.get("raylet", [])
    }
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if title.startswith(f"ray::{kind}".encode()) and parent in parents:
            found.append(int(entry.name))
    return found


def stepped(place: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's steps."""
    return [row for row in RunFolder(place).metrics() if "nfe" in row]


def test_without_staleness_a_run_is_that_of_one_process(tmp_path: Path, nodes: Any) -> None:
    made = config(tmp_path, train={**QUICK, "steps": 3})
    train(made, tmp_path / "alone", progress=Silent())
    explored(made, tmp_path / "shared", nodes, 0)
    assert_equal(outcome(tmp_path / "alone"), without_workers(outcome(tmp_path / "shared")))
    for row in stepped(tmp_path / "shared"):
        assert (row["workers/staleness"], row["workers/lost"]) == (0, 0)
        assert row["workers/sent_bytes"] > 0 and row["workers/got_bytes"] > 0 and row["time/waiting"] > 0


def test_a_run_outlives_its_workers_and_each_step_is_made_once(tmp_path: Path, nodes: Any) -> None:
    rng, steps = random.Random(7), 7
    made = config(tmp_path, method=CLIP, train={**QUICK, "steps": steps})

    def kill() -> None:
        os.kill(rng.choice(actors(nodes)), signal.SIGKILL)

    def swap() -> None:
        nodes.remove_node(rng.choice(sorted(nodes.worker_nodes, key=id)), allow_graceful=False)
        join(nodes)

    explored(made, tmp_path / "hurt", nodes, 1, Trouble({1: kill, 3: swap, 4: kill}))
    rows = stepped(tmp_path / "hurt")
    assert [row["step"] for row in rows] == [*range(1, steps + 1)]
    assert sum(row["workers/lost"] for row in rows) >= 1
    assert [row["workers/staleness"] for row in rows] == [0, *[1] * (steps - 1)]
    assert all(row["ratio/max_deviation"] > 0 for row in rows[1:])
    # Whoever dies, the run is the one that nobody disturbed.
    learned(made, tmp_path / "calm", 1)
    calm, hurt = (without_workers(outcome(tmp_path / name)) for name in ("calm", "hurt"))
    assert all(calm[0][name][i].equal(hurt[0][name][i]) for name in calm[0] for i in (0, 1))


def test_a_run_without_workers_ends_and_goes_on_as_if_it_had_not(
    tmp_path: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_SILENCE", "45")
    made = config(tmp_path, method=CLIP, train={**QUICK, "steps": 3})

    def end() -> None:
        for node in [*nodes.worker_nodes]:
            nodes.remove_node(node, allow_graceful=False)

    with pytest.raises(Left, match="none of 2 rollout workers has a place in the Ray cluster") as left:
        explored(made, tmp_path / "run", nodes, 1, Trouble({1: end}))
    assert left.value.code == AGAIN and "\n" not in str(left.value)
    reached = int(RunFolder(tmp_path / "run").latest().name)
    assert reached in (1, 2)
    for _ in range(2):
        join(nodes)
    explored(made, tmp_path / "run", nodes, 1, resume=True)
    assert [row["step"] for row in stepped(tmp_path / "run")] == [1, 2, 3]
    learned(made, tmp_path / "calm", 1)
    calm, run = (outcome(tmp_path / name)[0] for name in ("calm", "run"))
    assert all(calm[name][i].equal(run[name][i]) for name in calm for i in (0, 1))


def test_a_workers_mistake_is_one_line_and_a_stop_is_heard(tmp_path: Path, nodes: Any) -> None:
    (tmp_path / "own.py").write_text("def own(images, prompts):\n    raise KeyError('no such picture')\n")
    made = config(
        tmp_path,
        rewards=[{"name": "own", "path": f"{tmp_path}/own.py:own"}],
        prompts={"heldout": None},  # else the learner's own evaluation would ask it first
        train={**QUICK, "steps": 2},
    )
    with pytest.raises(RewardError, match=r"rollout worker on .*: reward 'own' failed with KeyError") as said:
        explored(made, tmp_path / "bad", nodes, 0)
    assert "\n" not in str(said.value) and RunFolder(tmp_path / "bad").config()

    made = config(tmp_path, train={**QUICK, "steps": 50})
    stop = Trouble({2: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(KeyboardInterrupt):
        explored(made, tmp_path / "stopped", nodes, 0, stop)
    assert RunFolder(tmp_path / "stopped").latest().name == "000002"


def test_the_learner_waits_for_slow_workers_and_says_so(tmp_path: Path, nodes: Any) -> None:
    seconds, flag = 5.0, tmp_path / "slow"
    (tmp_path / "own.py").write_text(SLOW.format(seconds=seconds, flag=str(flag)))
    made = config(
        tmp_path,
        rewards=[{"name": "own", "path": f"{tmp_path}/own.py:own"}],
        prompts={"heldout": None},
        train={**QUICK, "steps": 5},
    )
    explored(made, tmp_path / "run", nodes, 0, Trouble({3: flag.touch}))
    rows = stepped(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    fast, slow = rows[1:3], rows[3:]  # the first one loads the models
    assert min(row["time/waiting"] for row in slow) >= seconds
    assert min(row["time/waiting"] for row in fast) < min(row["time/waiting"] for row in slow)
    assert of_workers(slow)["idle"] > min(of_workers([row])["idle"] for row in fast) > 0
