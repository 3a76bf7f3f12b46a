"""Reward workers: rewards that judge in another process are the same, whoever of them dies or hangs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_nodes import cluster
from test_ray_runs import Trouble, actors, stepped
from test_run import assert_equal, config, outcome, prepare
from test_sharing import same, without_workers

from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.rewards import REWARDS
from comfy_g2rpo.run.iteration import explore
from comfy_g2rpo.run.setup import make_learner
from g2rpo_trainer import run as training
from g2rpo_trainer.cluster.cluster_options import Cluster
from g2rpo_trainer.processes import accelerator_of
from g2rpo_trainer.reports.progress import Silent
from g2rpo_trainer.rewards.build import RewardError
from g2rpo_trainer.run import train

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.40'")

pytestmark = pytest.mark.xdist_group("ray")

OWN = """
import time
from pathlib import Path

with Path({log!r}).open("a") as log:
    log.write(Path("/proc/self/cmdline").read_text().split(chr(0))[0] + chr(10))

class Own:
    # Its score depends on what else it is given, so that another batch shows.
    name, licence, compares_across_prompts, may_abstain = "own", "mine", True, True
    needs_group, depends_on_batch = {group}, True

    def score(self, images, prompts):
        if Path({hang!r}).exists():
            Path({hang!r}).unlink()
            time.sleep(10_000)
        return images.mean((1, 2, 3)) + images.std() + 0.001 * len(images)

    def embed(self, images):
        return images.mean((1, 2)) / images.norm()

own = Own()
"""
QUICK = {"prompts_per_step": 2, "prompts_at_once": 1, "eval_every": 0, "watch": "off", "eval_noises": 1}


def judged_by(tmp_path: Path, group: bool = False, **sections: Any) -> Any:
    """Configure a run that is judged by a rule and by a reward of the user's."""
    (tmp_path / "own.py").write_text(OWN.format(log=f"{tmp_path}/log", hang=f"{tmp_path}/hang", group=group))
    own = {"name": "own", "path": f"{tmp_path}/own.py:own"}
    return config(tmp_path, rewards=[{"name": "jpeg"}, own], prompts={"heldout": None}, **sections)


class Here:
    """Reward workers in this process."""

    def __init__(self, made: Any) -> None:
        from g2rpo_trainer.cluster.reward_actor import RewardActor

        self.actor = RewardActor(made.model_dump(mode="json"), 1)

    def ask(self, method: str, *given: Any) -> bytes:
        answer = getattr(self.actor, method)(*given)
        assert isinstance(answer, bytes), answer
        return answer


def rewards_of(judges: Any) -> Any:
    from g2rpo_trainer.cluster.judged_elsewhere import Judges

    return Judges.rewards(judges)


@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize(
    "method",
    [{}, {"expand": 2.0, "prune_at": (0.5,)}, {"diversity_weight": 0.5, "diversity_by": "embed"}],
    ids=["tree", "pruned", "features"],
)
def test_judged_elsewhere_a_step_is_the_same(tmp_path: Path, method: dict[str, Any], group: bool) -> None:
    made = judged_by(tmp_path, group, method={"num_steps": 4, **method}, train={"prompts_per_step": 2})
    setup = prepare(made)
    judges = Here(made)
    other = training.prepare(made, accelerator_of(True), rewards=rewards_of(judges))
    assert all(reward.runs_elsewhere and reward.module is None for reward in other.rewards)
    one, two = (explore(each, make_learner(each), lambda phase: None) for each in (setup, other))
    same(one, two)
    assert not one.scores.isnan().all() and judges.actor.longest > 0


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_what_stands_for_a_reward_says_of_itself_what_that_does(name: str) -> None:
    from g2rpo_trainer.cluster.judged_elsewhere import MEMBERS, JudgedElsewhere
    from g2rpo_trainer.cluster.reward_actor import described

    there = JudgedElsewhere(described(REWARDS[name]), None)
    assert all(getattr(there, member) == getattr(REWARDS[name], member) for member in MEMBERS)
    assert there.runs_elsewhere != there.takes_turns


@pytest.mark.parametrize("levels", [True, False])
def test_pictures_travel_bit_for_bit(levels: bool) -> None:
    from g2rpo_trainer.cluster.judged_elsewhere import packed, prompts_of, unpacked

    given = torch.rand(2, 3, 4, 3)
    given = (given * 255).round() / 255 if levels else given
    content = packed(given)
    assert torch.equal(unpacked(content), given) and (len(content) < 200) is levels
    text, row = prompts_of([("a", {}), ("b", {"image": "b.png"})])
    assert type(text) is str and isinstance(row, Prompt) and row.columns == {"image": "b.png"}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """Start a cluster: a head without processors, and two nodes of one each."""
    made = cluster()
    yield made
    ray.shutdown()
    made.shutdown()


def shared(made: Any, place: Path, nodes: Any, trouble: Any = None) -> None:
    """Make a run by a rollout worker and a reward worker of the cluster."""
    from g2rpo_trainer.cluster.connecting import exploring

    explorers = exploring(Cluster(nodes.address, 1, 0, 1), made)
    train(made, place, progress=trouble or Silent(), explorers=explorers)


@pytest.mark.long
def test_a_run_is_that_of_one_process_though_its_reward_worker_dies_and_hangs(
    tmp_path: Path, nodes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("G2RPO_SILENCE", "60")
    monkeypatch.setenv("G2RPO_PART_SECONDS", "60")
    made = judged_by(tmp_path, train={**QUICK, "steps": 5})
    train(made, tmp_path / "alone", progress=Silent())
    (tmp_path / "log").unlink()

    def send(number: int) -> None:
        (only,) = actors(nodes, "RewardActor")
        os.kill(only, number)

    stop = {2: lambda: send(signal.SIGKILL), 3: lambda: send(signal.SIGSTOP), 4: (tmp_path / "hang").touch}
    trouble = Trouble(stop)
    shared(made, tmp_path / "shared", nodes, trouble)
    assert_equal(outcome(tmp_path / "alone"), without_workers(outcome(tmp_path / "shared")))
    rows = stepped(tmp_path / "shared")
    assert sum(row["workers/rewards_lost"] for row in rows) >= 3 and not trouble.at
    loaded = (tmp_path / "log").read_text().splitlines()
    # The learner's own, and the reward worker's each time that it came.
    assert len(loaded) >= 5 and not any("RolloutActor" in title for title in loaded)


@pytest.mark.long
def test_a_reward_that_fails_there_is_one_line(tmp_path: Path, nodes: Any) -> None:
    (tmp_path / "own.py").write_text("def own(images, prompts):\n    raise KeyError('no such picture')\n")
    own = {"name": "own", "path": f"{tmp_path}/own.py:own"}
    made = config(tmp_path, rewards=[own], prompts={"heldout": None}, train={**QUICK, "steps": 2})
    with pytest.raises(RewardError, match=r"reward worker on .*: reward 'own' failed with KeyError") as said:
        shared(made, tmp_path / "bad", nodes)
    assert "\n" not in str(said.value)
