"""How much do the methods learn? Recipes side by side on the bundled model, at equal CPU time and at equal forwards.

Every arm's learning rate is tuned with the same budget on the tuning prompts; the final figures are gains over the base model, paired by
prompt and noise, on held-out prompts that nothing was tuned on, over seeds. One single-thread process per run.

    python benchmarks/learning.py tune   --out results/      # learning rates per arm
    python benchmarks/learning.py final  --out results/      # seeds × arms
    python benchmarks/learning.py report --out results/      # table and plot
"""

from __future__ import annotations

import argparse
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
LEARNING_RATES = (3e-4, 1e-3, 2e-3)
ARMS: dict[str, dict[str, Any]] = {
    "g2rpo {1}": {"name": "g2rpo_single"},
    "g2rpo {2}": {"name": "g2rpo", "granularities": [2]},
    "g2rpo {1,2}": {"name": "g2rpo", "granularities": [1, 2]},
    "g2rpo {1,3}": {"name": "g2rpo", "granularities": [1, 3]},
    "g2rpo {2,4}": {"name": "g2rpo", "granularities": [2, 4]},
    "flow_grpo": {"name": "flow_grpo"},
    "flow_grpo_fast": {"name": "flow_grpo_fast"},
    "dance_grpo": {"name": "dance_grpo"},
    "mix_grpo": {"name": "mix_grpo"},
    "tempflow_grpo": {"name": "tempflow_grpo", "group_size": 4},
}
NOISES = 3


def run_arm(job: dict[str, Any]) -> dict[str, Any]:
    """Train one arm for a CPU budget and evaluate at fractions of it; returns the curve of (CPU seconds, forwards, updates, gains)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from accelerate import Accelerator

    from comfy_g2rpo.evaluation import compare, evaluate
    from comfy_g2rpo.loop import averaged, iterate, make_learner
    from g2rpo_trainer.config import from_dict
    from g2rpo_trainer.run import prepare

    config = from_dict(
        {
            "model": {"path": str(ROOT / "models/tiny"), "width": 64, "height": 64, "max_sequence_length": 0},
            "lora": {"rank": job.get("rank", 16), "alpha": job.get("alpha", 16), "targets": job.get("targets", "attention")},
            "method": {**SMALL, **job["method"], "learning_rate": job["lr"]},
            "rewards": [{"name": "agreement"}],
            "heldout_rewards": ["strict"],
            "prompts": {"train": str(ROOT / "prompts/shapes_train.txt"), "heldout": str(ROOT / f"prompts/shapes_{job['split']}.txt")},
            "train": {
                "seed": job["seed"],
                "prompts_per_step": job.get("prompts", 2),
                "eval_noises": NOISES,
                "steps": 1000000,
                "micro_batch": 64,
            },
        }
    )
    setup = prepare(config, Accelerator(cpu=True))
    learner = make_learner(setup)

    def look() -> Any:
        with averaged(setup, learner):
            return evaluate(setup.policy, setup.judges, setup.prompts.heldout, setup.pace, setup.sigmas, setup.shape)

    before, spent, curve = look(), 0.0, []
    for fraction in job["fractions"]:
        while spent < fraction * job["cpu_seconds"]:
            begin = time.process_time()
            iterate(setup, learner, lambda phase: None)
            spent += time.process_time() - begin
        gains = compare(before, look())
        curve.append(
            {"cpu": spent, "forwards": learner.forwards, "updates": learner.step, **{name: gain["mean"] for name, gain in gains.items()}}
        )
    return {**job, "before": before.means(), "curve": curve}


def run_all(jobs: Iterable[dict[str, Any]], path: Path, workers: int) -> list[dict[str, Any]]:
    """Run what the results file does not hold yet, each result appended as it comes, so that a stopped benchmark goes on."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
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


def best_rates(tuned: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Choose each arm's learning rate by its mean gain on the tuning prompts."""
    means: dict[str, dict[float, list[float]]] = {}
    for result in tuned:
        means.setdefault(result["arm"], {}).setdefault(result["lr"], []).append(result["curve"][-1]["agreement"])
    return {arm: max(rates, key=lambda lr: sum(rates[lr]) / len(rates[lr])) for arm, rates in means.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval (Student's t)."""
    from scipy.stats import t

    mean, count = sum(values) / len(values), len(values)
    if count < 2:
        return mean, math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    return mean, float(t.ppf(0.975, count - 1)) * spread / math.sqrt(count)


def at_forwards(curve: Sequence[dict[str, float]], forwards: float, name: str) -> float:
    """Interpolate a gain at a number of forwards; the gain at 0 is 0."""
    before = {"forwards": 0.0, name: 0.0}
    for point in curve:
        if point["forwards"] >= forwards:
            share = (forwards - before["forwards"]) / (point["forwards"] - before["forwards"])
            return before[name] + share * (point[name] - before[name])
        before = point
    return before[name]


def report(final: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the table as Markdown and draw the plot."""
    arms = list(dict.fromkeys(result["arm"] for result in final))
    budget = min(max(p["forwards"] for p in result["curve"]) for result in final)
    rows = []
    for arm in arms:
        runs = [result for result in final if result["arm"] == arm]
        cells = {name: interval([run["curve"][-1][name] for run in runs]) for name in ("agreement", "strict")}
        cells["equal forwards"] = interval([at_forwards(run["curve"], budget, "agreement") for run in runs])
        updates = sum(run["curve"][-1]["updates"] for run in runs) / len(runs)
        forwards = sum(run["curve"][-1]["forwards"] for run in runs) / len(runs)
        rows.append((arm, runs[0]["lr"], len(runs), updates, forwards, cells))
    rows.sort(key=lambda row: -row[5]["agreement"][0])
    lines = [
        "| arm | lr | seeds | updates | forwards | agreement, equal CPU time | strict, equal CPU time "
        f"| agreement at {budget:,.0f} forwards |",
        "|---" * 8 + "|",
    ]
    for arm, lr, seeds, updates, forwards, cells in rows:
        gains = " | ".join(f"{mean:+.3f} ± {width:.3f}" for mean, width in (cells["agreement"], cells["strict"], cells["equal forwards"]))
        lines.append(f"| {arm} | {lr:g} | {seeds} | {updates:.0f} | {forwards:,.0f} | {gains} |")
    print("\n".join(lines))
    (out / "learning.md").write_text("\n".join(lines) + "\n")
    draw(rows, out / "learning.png", final[0]["cpu_seconds"])


def draw(rows: Sequence[tuple], path: Path, seconds: float) -> None:
    """Draw the gains with their intervals, best at the top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), sharey=True, constrained_layout=True)
    titles = {
        "agreement": f"agreement, {seconds:g} CPU seconds",
        "strict": f"strict, {seconds:g} CPU seconds",
        "equal forwards": "agreement, equal forwards",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for place, row in enumerate(reversed(rows)):
            mean, width = row[5][name]
            axis.errorbar(mean, place, xerr=width, fmt="o", capsize=3, color="#0072B2" if row[0].startswith("g2rpo") else "#D55E00")
        axis.set_title(title, fontsize=11)
        axis.axvline(0, color="0.7", linewidth=1)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [row[0] for row in reversed(rows)])
    figure.supxlabel("held-out gain over the base model, mean and 95 % interval over seeds", fontsize=10)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "final", "report"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--cpu-seconds", type=float, default=40.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    common = {"cpu_seconds": options.cpu_seconds}
    tuning, finals = options.out / "tune.jsonl", options.out / "final.jsonl"
    if options.stage == "tune":
        jobs = [
            {"arm": arm, "method": ARMS[arm], "lr": lr, "seed": 1000, "split": "tune", "fractions": [1.0], **common}
            for arm in options.arms
            for lr in LEARNING_RATES
        ]
        print(best_rates(run_all(jobs, tuning, options.workers)))
    elif options.stage == "final":
        rates = best_rates([json.loads(line) for line in tuning.read_text().splitlines()])
        jobs = [
            {"arm": arm, "method": ARMS[arm], "lr": rates[arm], "seed": seed, "split": "heldout", "fractions": [0.5, 1.0], **common}
            for seed in range(options.seeds)
            for arm in options.arms
        ]
        run_all(jobs, finals, options.workers)
    else:
        report([json.loads(line) for line in finals.read_text().splitlines()], options.out)


if __name__ == "__main__":
    sys.exit(main())
