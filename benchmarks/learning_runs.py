"""The runs of the learning benchmark: one arm, trained in one thread until its budgets are spent."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from learning_arms import SMALL

ROOT = Path(__file__).resolve().parent.parent
NOISES = 3
WORK = 5000
"""Model work at which the arms are compared: a forward of one latent is 1, its backward 2 more."""


class Counted:
    """A policy that counts its model work, whoever asks for it: rollout, old velocities or update."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.work = policy, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def velocity(self, x: Any, sigma: Any, cond: Sequence[Any]) -> Any:
        """Count a forward per row now, and a backward per row if a gradient comes back."""
        self.work += len(x)
        velocity = self.policy.velocity(x, sigma, cond)
        if velocity.requires_grad:
            velocity.register_hook(lambda gradient: self.count(2 * len(gradient)))
        return velocity

    def count(self, work: int) -> None:
        """Add model work."""
        self.work += work


def configure(job: dict[str, Any]) -> Any:
    """Make the configuration of one run; what the job sets, as `section.name`, comes last."""
    from g2rpo_trainer.config.reading import from_dict

    tree: dict[str, Any] = {
        "model": {"path": str(ROOT / "models/tiny"), "width": 64, "height": 64, "max_sequence_length": 0},
        "method": {**SMALL, **job["method"], "learning_rate": job["lr"]},
        "rewards": [{"name": "agreement"}],
        "heldout_rewards": ["strict"],
        "prompts": {
            "train": str(ROOT / "prompts/shapes_train.txt"),
            "heldout": str(ROOT / f"prompts/shapes_{job['split']}.txt"),
        },
        "train": {
            "seed": job["seed"],
            "prompts_per_step": job["prompts"],
            "eval_noises": job["noises"],
            "steps": 1000000,
            "micro_batch": 64,
        },
    }
    for key, value in job.get("set", {}).items():
        section, _, name = key.partition(".")
        tree.setdefault(section, {})[name] = value
    return from_dict(tree)


REFERENCE = 0.13
"""Seconds of the reference machine for `piece`: one core of an AMD EPYC with AVX2."""
LOOK = 4.0
"""CPU seconds after which the speed of the machine is measured again."""


def piece(policy: Any, shape: Sequence[int]) -> float:
    """Return the CPU seconds that a fixed piece of work takes here and now, the fastest of three."""
    import torch

    cond, x = policy.encode(["a red circle"]) * 8, torch.zeros(8, *shape)
    times = []
    for _ in range(3):
        begin = time.process_time()
        with torch.no_grad():
            for _ in range(3):
                policy.velocity(x, torch.full((8,), 0.5), cond)
                policy.decode(x)
        times.append(time.process_time() - begin)
    return min(times)


class Clock:
    """CPU seconds as the reference machine would count them: of a machine half as fast, each counts half.

    So runs of several machines, or of a busy one, are of one length.
    """

    def __init__(self, measure: Callable[[], float]) -> None:
        self.measure, self.spent, self.paces = measure, 0.0, [REFERENCE / measure()]
        self.since = 0.0

    def add(self, seconds: float) -> None:
        """Count CPU seconds of this machine."""
        self.spent += seconds * self.paces[-1]
        self.since += seconds
        if self.since > LOOK:
            self.paces.append(REFERENCE / self.measure())
            self.since = 0.0


EVALUATION_SEED = 77
"""All runs are measured with the same prompts from the same start noises: what varies between seeds is the
training alone.
"""
BASE: dict[tuple[str, int], Any] = {}
"""Evaluations of the untrained model by split and noises."""


def run_arm(job: dict[str, Any]) -> dict[str, Any]:
    """Train one arm until its CPU, its model work and its updates, where it has a budget of them, are spent,
    with an evaluation as each is reached.

    The curve holds (CPU seconds, work, updates, gains) at those points; evaluations count for neither budget.
    CPU seconds are those of the reference machine; `pace` says how fast this one was, 1 as fast.
    A job with `points` of a recorded curve stops at their updates instead, whatever the machine does today.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from accelerate import Accelerator

    from comfy_g2rpo.run.checkpoint import averaged
    from comfy_g2rpo.run.evaluation import compare, evaluate
    from comfy_g2rpo.run.iteration import iterate
    from comfy_g2rpo.run.setup import make_learner
    from g2rpo_trainer.run import prepare

    setup = prepare(configure(job), Accelerator(cpu=True))
    counted = Counted(setup.policy)
    setup = dataclasses.replace(setup, policy=counted)
    learner = make_learner(setup)
    measuring = dataclasses.replace(setup.pace, seed=EVALUATION_SEED)

    def look() -> Any:
        work = counted.work
        with averaged(setup, learner):
            found = evaluate(
                counted, setup.judges, setup.prompts.heldout, measuring, setup.sigmas, setup.shape
            )
        counted.work = work
        return found

    key = (job["split"], job["noises"])
    before = BASE[key] = BASE.get(key) or look()
    clock, curve = Clock(partial(piece, setup.policy.policy, setup.shape)), []
    budgets = [{"cpu": seconds} for seconds in seconds_of(job)]
    budgets += [{name: job[name]} for name in ("work", "updates") if job.get(name)]
    recorded = job.get("points", [])
    goals = [{"updates": point["updates"]} for point in recorded] or budgets
    while goals:
        begin = time.process_time()
        iterate(setup, learner, lambda phase: None)
        clock.add(time.process_time() - begin)
        now = {"cpu": clock.spent, "work": counted.work, "updates": learner.step}
        if reached := [goal for goal in goals if all(now[name] >= least for name, least in goal.items())]:
            gains = {name: gain["mean"] for name, gain in compare(before, look()).items()}
            then = next((point for point in recorded if point["updates"] == learner.step), now)
            curve.append({**then, **gains})
            goals = [goal for goal in goals if goal not in reached]
    pace = sum(clock.paces) / len(clock.paces)
    return {**job, "before": before.means(), "curve": curve, "pace": round(pace, 3)}


def seconds_of(run: dict[str, Any]) -> list[float]:
    """List a run's budgets of CPU seconds; older results hold one number."""
    found = run["cpu_seconds"]
    return list(found) if isinstance(found, list) else [found]


def identity(job: dict[str, Any], *but: str) -> str:
    """Return what makes a run the same but for its length, and but for some fields."""
    other = ("before", "curve", "cpu_seconds", "pace", *but)
    return json.dumps({key: job[key] for key in job if key not in other}, sort_keys=True)


def missing(jobs: Iterable[dict[str, Any]], done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the jobs that no finished run holds; a run with more budgets holds those with fewer."""
    runs = held(done)
    return [job for job in jobs if not twin(job, runs)]


def held(done: Iterable[dict[str, Any]], *but: str) -> dict[str, list[dict[str, Any]]]:
    """Sort finished runs by what makes them the same."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in done:
        found.setdefault(identity(run, *but), []).append(run)
    return found


def twin(job: dict[str, Any], runs: dict[str, list[dict[str, Any]]], *but: str) -> dict[str, Any] | None:
    """Return a finished run that holds a job, None where there is none."""
    alike = runs.get(identity(job, *but), [])
    return next((run for run in alike if set(seconds_of(job)) <= set(seconds_of(run))), None)


def run_all(jobs: Iterable[dict[str, Any]], path: Path, workers: int) -> list[dict[str, Any]]:
    """Run what the results file does not hold yet, in the given order, each result written as it comes: a
    stopped benchmark goes on where it was. Arms that are the same but for their names share a run. One that
    fails is told, and once all others are done SystemExit ends the stage.
    """
    done, failed = read(path), []
    others = held(done, "arm")
    left = alike(missing(jobs, done))
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, path.open("a") as file:

        def keep(result: dict[str, Any], group: Sequence[dict[str, Any]]) -> None:
            for run in [result | {"arm": job["arm"]} for job in group]:
                file.write(json.dumps(run) + "\n")
                done.append(run)
                print(line(run), flush=True)
            file.flush()

        try:
            futures = {}
            for group in left:
                if run := twin(group[0], others, "arm"):
                    keep(run, group)
                else:
                    futures[pool.submit(run_arm, group[0])] = group
            for future in as_completed(futures):
                group = futures[future]
                if error := future.exception():
                    failed.append(f"{group[0]['arm']}, seed {group[0]['seed']}: {error!r}")
                    print(failed[-1], flush=True)
                else:
                    keep(future.result(), group)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise SystemExit(f"{len(failed)} of {len(left)} runs failed, the first of them {failed[0]}")
    return done


def alike(jobs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group jobs that differ in the name of the arm alone, in the order of the first of each."""
    groups: dict[tuple[str, tuple[float, ...]], list[dict[str, Any]]] = {}
    for job in jobs:
        groups.setdefault((identity(job, "arm"), tuple(seconds_of(job))), []).append(job)
    return list(groups.values())


def line(run: dict[str, Any]) -> str:
    """Say in a line what a run was and what it gained at its last point."""
    last, form = run["curve"][-1], run.get("form", "own")
    gains = f"agreement {last['agreement']:+.3f}  strict {last['strict']:+.3f}"
    return f"{run['arm']:22s} {form:20s} lr {run['lr']:g} seed {run['seed']}  {gains}"


def jobs_again(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe recorded runs once more, each up to the updates at which its budgets were spent."""
    kept = ("cpu", "work", "updates")
    return [
        {key: run[key] for key in run if key not in ("before", "curve", "pace")}
        | {"points": [{name: point[name] for name in kept} for point in run["curve"]]}
        for run in runs
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file; one that does not exist holds nothing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
