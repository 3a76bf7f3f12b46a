"""How much do the methods learn? Recipes side by side on the bundled model, at equal CPU time and at equal
model work.

Every arm's learning rate, step weights, prompts per update and moving average are tuned with the same budget
on the tuning prompts; the final figures are gains over the base model, paired by prompt and noise, on
held-out prompts that nothing was tuned on, over seeds. One single-thread process per run.

    python benchmarks/learning.py tune   --out results/      # the settings of each arm
    python benchmarks/learning.py final  --out results/      # seeds × arms
    python benchmarks/learning.py report --out results/      # table and plot
    python benchmarks/learning.py again --runs refined_final --to clean_final   # recorded runs, measured anew
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"num_steps": 8, "shift": 3.0, "group_size": 8}
SHARED = {"max_grad_norm": 3e-5}
"""What all arms share: gradients, whose norms are about 1e-3 and differ between steps and arms, are scaled
to one norm.
"""
TUNE_SEEDS, NOISES = (1000, 1001, 1002), 3
ONE_STEP = {"name": "g2rpo", "pick": "random", "pick_size": 1}
ARMS: dict[str, dict[str, Any]] = {
    "g2rpo {1}": {**ONE_STEP, "granularities": [1]},
    "g2rpo {2}": {**ONE_STEP, "granularities": [2]},
    "g2rpo {1,2}": {**ONE_STEP, "granularities": [1, 2]},
    "g2rpo {1,3}": {**ONE_STEP, "granularities": [1, 3]},
    "g2rpo {2,4}": {**ONE_STEP, "granularities": [2, 4]},
    "g2rpo {2}, every step": {"name": "g2rpo", "granularities": [2]},
    "flow_grpo": {"name": "flow_grpo"},
    "flow_grpo_fast": {"name": "flow_grpo_fast"},
    "dance_grpo": {"name": "dance_grpo"},
    "mix_grpo": {"name": "mix_grpo"},
    "tempflow_grpo": {"name": "tempflow_grpo", "group_size": 4},
}
OWN = "own"
START = (2e-3, OWN, 2, 0.0)
"""Tuning starts at this learning rate, step weights (the recipe's own), prompts per update and decay of the
adapter's moving average (0 is none), unless an earlier tuning has chosen.
"""
RATES = (2.5e-4, 3.5e-4, 5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3)
WEIGHTS, PROMPTS, AVERAGES = (OWN, "balanced"), (1, 2, 4), (0.0, 0.9)
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
    """Make the configuration of one run."""
    from g2rpo_trainer.config.reading import from_dict

    return from_dict(
        {
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
    )


EVALUATION_SEED = 77
"""All runs are measured with the same prompts from the same start noises: what varies between seeds is the
training alone.
"""
BASE: dict[tuple[str, int], Any] = {}
"""Evaluations of the untrained model by split and noises."""


def run_arm(job: dict[str, Any]) -> dict[str, Any]:
    """Train one arm until its CPU and its model work are spent, with an evaluation as each is reached.

    The curve holds (CPU seconds, work, updates, gains) at those points; evaluations count for neither budget.
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
    spent, curve = 0.0, []
    budgets = [{name: job[key]} for name, key in (("cpu", "cpu_seconds"), ("work", "work")) if job[key]]
    recorded = job.get("points", [])
    goals = [{"updates": point["updates"]} for point in recorded] or budgets
    while goals:
        begin = time.process_time()
        iterate(setup, learner, lambda phase: None)
        spent += time.process_time() - begin
        now = {"cpu": spent, "work": counted.work, "updates": learner.step}
        if reached := [goal for goal in goals if all(now[name] >= least for name, least in goal.items())]:
            gains = {name: gain["mean"] for name, gain in compare(before, look()).items()}
            then = next((point for point in recorded if point["updates"] == learner.step), now)
            curve.append({**then, **gains})
            goals = [goal for goal in goals if goal not in reached]
    return {**job, "before": before.means(), "curve": curve}


def run_all(jobs: Iterable[dict[str, Any]], path: Path, workers: int) -> list[dict[str, Any]]:
    """Run what the results file does not hold yet, each result appended as it comes, so that a stopped
    benchmark goes on.
    """
    done = read(path)
    keys = {json.dumps({k: r[k] for k in r if k not in ("before", "curve")}, sort_keys=True) for r in done}
    left = [job for job in jobs if json.dumps(job, sort_keys=True) not in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, path.open("a") as file:
        for result in pool.map(run_arm, left):
            file.write(json.dumps(result) + "\n")
            file.flush()
            done.append(result)
            last = result["curve"][-1]
            gains = f"agreement {last['agreement']:+.3f}  strict {last['strict']:+.3f}"
            print(f"{result['arm']:16s} lr {result['lr']:g} seed {result['seed']}  {gains}", flush=True)
    return done


Setting = tuple[float, str, int, float]
"""A learning rate, the step weights, a number of prompts per update, and the decay of the adapter's moving
average.
"""


def describe(arm: str, setting: Setting, **common: Any) -> dict[str, Any]:
    """Describe a run of an arm at a setting."""
    rate, weights, prompts, average = setting
    method = {
        **SHARED,
        **ARMS[arm],
        **({} if weights == OWN else {"step_weight": weights}),
        **({"ema": average} if average else {}),
    }
    return {"arm": arm, "method": method, "lr": rate, "weights": weights, "prompts": prompts, **common}


def tuning_jobs(arm: str, setting: Setting, cpu_seconds: float) -> list[dict[str, Any]]:
    """Describe the tuning runs of one try, one per tuning seed."""
    common = {"split": "tune", "noises": NOISES, "cpu_seconds": cpu_seconds, "work": 0}
    return [describe(arm, setting, seed=seed, **common) for seed in TUNE_SEEDS]


def jobs_again(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe recorded runs once more, each up to the updates at which its budgets were spent."""
    kept = ("cpu", "work", "updates")
    return [
        {key: run[key] for key in run if key not in ("before", "curve")}
        | {"points": [{name: point[name] for name in kept} for point in run["curve"]]}
        for run in runs
    ]


def setting_of(run: dict[str, Any]) -> Setting:
    """Read a run's setting."""
    return run["lr"], run.get("weights", OWN), run["prompts"], run["method"].get("ema", 0.0)


def tried(results: Sequence[dict[str, Any]], arm: str) -> dict[Setting, float]:
    """List an arm's tries: the mean gain in agreement over the tuning seeds, by setting."""
    gains: dict[Setting, list[float]] = {}
    for run in results:
        if run["arm"] == arm:
            gains.setdefault(setting_of(run), []).append(run["curve"][-1]["agreement"])
    seeds = {run["seed"] for run in results}
    return {setting: sum(found) / len(found) for setting, found in gains.items() if len(found) == len(seeds)}


def neighbours(setting: Setting, weighted: bool) -> list[Setting]:
    """List a setting's neighbours: half the prompts, the next rates, other averages, other step weights
    where they matter, more prompts.
    """
    rate, weights, prompts, average = setting
    place = RATES.index(rate)
    fewer, more = (
        [(rate, weights, count, average)] if count in PROMPTS else [] for count in (prompts // 2, prompts * 2)
    )
    rates = [(RATES[i], weights, prompts, average) for i in (place + 1, place - 1) if 0 <= i < len(RATES)]
    averages = [(rate, weights, prompts, other) for other in AVERAGES if other != average]
    others = [(rate, other, prompts, average) for other in WEIGHTS if weighted and other != weights]
    return [*fewer, *rates, *averages, *others, *more]


def next_setting(gains: dict[Setting, float], weighted: bool, start: Setting) -> Setting:
    """Climb: the first neighbour of the best setting so far with a value that was never tried, else one
    that was not tried as a whole.
    """
    if not gains:
        return start
    ranked = sorted(gains, key=lambda setting: -gains[setting])
    values = [set(column) for column in zip(*gains, strict=True)]
    near = [neighbour for setting in ranked for neighbour in neighbours(setting, weighted)]
    new = [
        setting
        for setting in neighbours(ranked[0], weighted)
        if any(v not in known for v, known in zip(setting, values, strict=True))
    ]
    return next(setting for setting in [*new, *near] if setting not in gains)


def weighted(arm: str) -> bool:
    """Say whether step weights can matter: not where an update has one stochastic step."""
    return ARMS[arm].get("pick_size") != 1


def tune(
    starts: dict[str, Setting], path: Path, cpu_seconds: float, workers: int, tries: int
) -> dict[str, Setting]:
    """Give every arm the same number of tries, the first at its start, one round after another.

    Return its best setting.
    """
    results = read(path)
    for count in range(1, tries + 1):
        short = [arm for arm in starts if len(tried(results, arm)) < count]
        settings = {arm: next_setting(tried(results, arm), weighted(arm), starts[arm]) for arm in short}
        jobs = [job for arm, setting in settings.items() for job in tuning_jobs(arm, setting, cpu_seconds)]
        results = run_all(jobs, path, workers)
    return {arm: best_setting(results, arm) for arm in starts}


def best_setting(results: Sequence[dict[str, Any]], arm: str) -> Setting:
    """Choose an arm's setting by its mean gain on the tuning prompts."""
    gains = tried(results, arm)
    return max(gains, key=lambda setting: gains[setting])


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file; one that does not exist holds nothing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval (Student's t)."""
    from scipy.stats import t

    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)


def reached(run: dict[str, Any], budget: str) -> dict[str, float]:
    """Return the first point of a run's curve at which a budget, "cpu" or "work", was spent."""
    goal = {"cpu": run["cpu_seconds"], "work": run["work"]}[budget]
    return next(point for point in run["curve"] if point[budget] >= goal)


COLUMNS = {"agreement": ("cpu", "agreement"), "strict": ("cpu", "strict"), "work": ("work", "agreement")}


def report(final: Sequence[dict[str, Any]], out: Path, name: str, leader: str | None = None) -> None:
    """Print the tables as Markdown and draw the plot.

    The second table compares the leader, the best arm unless named, with the others.
    """
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in final):
        runs = [result for result in final if result["arm"] == arm]
        cells = {
            name: interval([reached(run, budget)[reward] for run in runs])
            for name, (budget, reward) in COLUMNS.items()
        }
        means = [sum(reached(run, "cpu")[name] for run in runs) / len(runs) for name in ("updates", "work")]
        setting = setting_of(runs[0])
        rows.append((arm, *setting, len(runs), *means, cells))
    rows.sort(key=lambda row: -row[-1]["agreement"][0])
    seconds, work = final[0]["cpu_seconds"], final[0]["work"]
    lines = [
        f"| arm | lr | weights | prompts | average | seeds | updates | work | agreement, {seconds:g} CPU s | "
        f"strict, {seconds:g} CPU s | agreement, {work:,} work |",
        "|---" * 11 + "|",
    ]
    for arm, lr, weights, prompts, average, seeds, updates, spent, cells in rows:
        gains = " | ".join(f"{mean:+.3f} ± {width:.3f}" for mean, width in cells.values())
        lines.append(
            f"| {arm} | {lr:g} | {weights} | {prompts} | {average:g} | {seeds} | {updates:.0f} | "
            f"{spent:,.0f} | {gains} |"
        )
    leader = leader or rows[0][0]
    lines += ["", *differences(final, leader, [row[0] for row in rows if row[0] != leader])]
    print("\n".join(lines))
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    draw(rows, out / f"{name}.png", seconds, work)


def differences(final: Sequence[dict[str, Any]], best: str, others: Sequence[str]) -> list[str]:
    """Compare the best arm with every other on the seeds that both have: same prompts, same start noises."""
    by_seed = {(run["arm"], run["seed"]): run for run in final}
    lines = [
        f"| {best} minus | seeds | agreement, equal CPU time | agreement, equal work |",
        "|---" * 4 + "|",
    ]
    for other in others:
        seeds = [seed for arm, seed in by_seed if arm == best and (other, seed) in by_seed]
        cells = [
            interval(
                [
                    reached(by_seed[best, s], budget)["agreement"]
                    - reached(by_seed[other, s], budget)["agreement"]
                    for s in seeds
                ]
            )
            for budget in ("cpu", "work")
        ]
        lines.append(
            f"| {other} | {len(seeds)} | "
            + " | ".join(f"{mean:+.3f} ± {width:.3f}" for mean, width in cells)
            + " |"
        )
    return lines


def draw(rows: Sequence[tuple], path: Path, seconds: float, work: int) -> None:
    """Draw the gains with their intervals, best at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.4), sharey=True, constrained_layout=True)
    titles = {
        "agreement": f"agreement, {seconds:g} CPU seconds",
        "strict": f"strict, {seconds:g} CPU seconds",
        "work": f"agreement, model work of {work:,} forwards",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for place, row in enumerate(reversed(rows)):
            mean, width = row[-1][name]
            axis.errorbar(
                mean,
                place,
                xerr=width,
                fmt="o",
                capsize=3,
                color="#0072B2" if row[0].startswith("g2rpo") else "#D55E00",
            )
        axis.set_title(title, fontsize=11)
        axis.axvline(0, color="0.7", linewidth=1)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    figure.supxlabel("held-out gain over the base model, mean and 95 % interval over seeds", fontsize=10)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("tune", "final", "report", "again"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--cpu-seconds", type=float, default=12.0)
    parser.add_argument("--tries", type=int, default=5, help="settings that each arm's tuning may try")
    parser.add_argument("--tuning", default="refined_tune", help="results file of the tuning, without .jsonl")
    parser.add_argument(
        "--start", help="results file of an earlier tuning: what it chose is where this one starts"
    )
    parser.add_argument(
        "--seeds", type=int, nargs=2, help="first seed, and the one after the last (final: 0 5; report: all)"
    )
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--runs", default="refined_final", help="results file of the final runs, without .jsonl"
    )
    parser.add_argument("--to", default="clean_final", help="results file of again, without .jsonl")
    parser.add_argument("--leader", choices=list(ARMS), help="arm that the report compares with the others")
    options = parser.parse_args(arguments)
    tuning, finals = options.out / f"{options.tuning}.jsonl", options.out / f"{options.runs}.jsonl"
    if options.stage == "tune":
        earlier = read(options.out / f"{options.start}.jsonl") if options.start else []
        starts = {arm: best_setting(earlier, arm) if earlier else START for arm in options.arms}
        print(tune(starts, tuning, options.cpu_seconds, options.workers, options.tries))
    elif options.stage == "final":
        settings = {arm: best_setting(read(tuning), arm) for arm in options.arms}
        common = {"split": "heldout", "noises": NOISES, "cpu_seconds": options.cpu_seconds, "work": WORK}
        jobs = [
            describe(arm, settings[arm], seed=seed, **common)
            for seed in range(*(options.seeds or (0, 5)))
            for arm in options.arms
        ]
        run_all(jobs, finals, options.workers)
    elif options.stage == "again":
        first, end = options.seeds or (0, sys.maxsize)
        runs = [run for run in read(finals) if first <= run["seed"] < end and run["arm"] in options.arms]
        run_all(jobs_again(runs), options.out / f"{options.to}.jsonl", options.workers)
    else:
        first, end = options.seeds or (0, sys.maxsize)
        report(
            [run for run in read(finals) if first <= run["seed"] < end],
            options.out,
            finals.stem,
            options.leader,
        )


if __name__ == "__main__":
    sys.exit(main())
