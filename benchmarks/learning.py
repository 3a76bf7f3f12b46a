"""How much do the methods learn? The field's recipes side by side on the bundled model, at equal CPU time and
at equal model work.

Every arm's form (as published, or with the freedoms of our leader: one random step, stride 2), learning rate,
step weights, prompts per update and moving average are tuned with the same number of tries on the tuning
prompts; with --published every baseline is there once more, in its published form alone. CPU seconds are
those of a reference machine: a fixed piece of work is timed before and during every run. The final figures
are gains over the base model, paired by prompt and noise, on held-out prompts that nothing was tuned on, over
seeds. One single-thread process per run; several budgets are points of one curve. A stopped stage goes on
where it was.

    python benchmarks/learning.py tune --published         # the settings of each arm
    python benchmarks/learning.py final --seeds 600 620    # seeds × arms, seed after seed
    python benchmarks/learning.py final --seeds 600 605 --cpu-seconds 12 60 240
    python benchmarks/learning.py tune --cpu-seconds 60 --tuning field_tune_60 --start field_tune --tries 4
    python benchmarks/learning.py report --leader 'g2rpo {2}' --plot docs/learning_field.png
    python benchmarks/learning.py ideas --seeds 2000 2006
    python benchmarks/learning.py ideas --confirm NAME --seeds 700 712
    python benchmarks/learning.py ideas --leader 'dense_grpo, published' --ideas benchmarks/credit_ideas.json
    python benchmarks/learning.py again --runs refined_final --to clean_final   # recorded runs, measured anew

An ideas file is JSON, as ideas.json beside this file: changes to the leader by name, as `--set` takes them;
`minus` names the idea that one is compared with in place of the leader. A rate that falls needs train.steps,
the updates that the leader makes in the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_arms import ARMS, PUBLISHED, arms_here, describe, start
from learning_report import ideas_report, report
from learning_runs import NOISES, ROOT, WORK, identity, jobs_again, read, run_all, run_arm
from learning_tuning import TUNE_SEEDS, best_setting, tune

from comfy_g2rpo.recipes import FIELDS

__all__ = ["ARMS", "describe", "main", "run_arm"]

CONFIRMING = 12
"""Seeds that a confirmation must have at least."""


def chosen(options: argparse.Namespace) -> list[str]:
    """List the arms that were named, else those that run by themselves; say what this version lacks."""
    here, lacking = arms_here()
    if lacking:
        print(f"left out, for this version has no such recipe: {', '.join(lacking)}", flush=True)
    if options.arms:
        return [arm for arm in options.arms if arm in here]
    return [arm for arm in here if ARMS[arm].listed or (options.published and arm.endswith(PUBLISHED))]


def seeds_of(options: argparse.Namespace) -> range:
    """Return the seeds that were named; without any, all there are in a file."""
    return range(*(options.seeds or (0, sys.maxsize)))


def fresh(options: argparse.Namespace, own: Path) -> range:
    """Return the named seeds, refused where another results file holds held-out runs of them."""
    if not options.seeds:
        raise SystemExit("name the seeds, first and the one after the last, such as --seeds 600 620")
    seeds = seeds_of(options)
    for path in sorted(options.out.glob("*.jsonl")):
        used = {run.get("seed") for run in read(path) if run.get("split") == "heldout"} & set(seeds)
        if used and path != own:
            raise SystemExit(f"{path.name} holds runs of the seeds {sorted(used)}; choose fresh ones")
    return seeds


def tune_stage(options: argparse.Namespace) -> None:
    """Tune the arms."""
    earlier = read(options.out / f"{options.start}.jsonl") if options.start else []
    starts = {arm: best_setting(earlier, arm) if earlier else start(arm) for arm in chosen(options)}
    path = options.out / f"{options.tuning}.jsonl"
    found = tune(starts, path, options.cpu_seconds[:1], options.workers, options.tries)
    for arm, setting in found.items():
        print(f"{arm}: {setting}")


def final_stage(options: argparse.Namespace) -> None:
    """Run the arms at their settings on held-out prompts, seed after seed through all arms."""
    tuning, path = read(options.out / f"{options.tuning}.jsonl"), options.out / f"{options.runs}.jsonl"
    settings = {arm: best_setting(tuning, arm) for arm in chosen(options)}
    common = {"split": "heldout", "noises": NOISES, "cpu_seconds": options.cpu_seconds, "work": WORK}
    seeds = fresh(options, path)
    jobs = [describe(arm, settings[arm], seed=seed, **common) for seed in seeds for arm in settings]
    run_all(jobs, path, options.workers)


def report_stage(options: argparse.Namespace) -> None:
    """Write tables and plot of recorded runs."""
    runs = [run for run in read(options.out / f"{options.runs}.jsonl") if run["seed"] in seeds_of(options)]
    if options.arms:
        runs = [run for run in runs if run["arm"] in options.arms]
    name = options.out / options.runs
    plot = options.plot or name.with_suffix(".png")
    tuning = read(options.out / f"{options.tuning}.jsonl")
    report(runs, tuning, name.with_suffix(".md"), plot, options.leader)


def again_stage(options: argparse.Namespace) -> None:
    """Measure recorded runs anew."""
    runs = [run for run in read(options.out / f"{options.runs}.jsonl") if run["seed"] in seeds_of(options)]
    if options.arms:
        runs = [run for run in runs if run["arm"] in options.arms]
    run_all(jobs_again(runs), options.out / f"{options.to}.jsonl", options.workers)


def ideas_here(ideas: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the ideas whose fields this version has; say which it lacks."""
    known = {f"method.{name}" for name in FIELDS}
    lacking = [name for name, change in ideas.items() if {k for k in change if k[:7] == "method."} - known]
    if lacking:
        print(f"left out, for this version lacks a field of theirs: {', '.join(lacking)}", flush=True)
    return {name: change for name, change in ideas.items() if name not in lacking}


def idea_jobs(
    leader: dict[str, Any], ideas: dict[str, dict[str, Any]], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Describe runs of the leader and of the leader with each idea, seed after seed."""
    found = []
    for seed in seeds:
        found.append({**leader, "seed": seed, "idea": {}})
        for name, change in ideas.items():
            changes = {key: value for key, value in change.items() if key != "minus"}
            changed = {"arm": name, "set": {**leader["set"], **changes}, "idea": change}
            found.append({**leader, **changed, "seed": seed})
    return found


def ideas_stage(options: argparse.Namespace) -> None:
    """Compare changes to the leader on tuning prompts, or confirm some on fresh seeds of held-out prompts."""
    if not options.seeds:
        raise SystemExit("name --seeds, first and the one after the last")
    ideas, leader = ideas_here(json.loads(options.ideas.read_text())), options.leader or "g2rpo {2}"
    setting = best_setting(read(options.out / f"{options.tuning}.jsonl"), leader)
    tuned, confirmed = options.out / "ideas_tune.jsonl", options.out / "ideas_final.jsonl"
    path, split, seeds = tuned, "tune", seeds_of(options)
    if options.confirm is None and set(TUNE_SEEDS) & set(seeds):
        raise SystemExit(f"the leader was tuned on the seeds {TUNE_SEEDS}; choose fresh ones")
    if options.confirm is not None:
        path, split, seeds = confirmed, "heldout", fresh(options, confirmed)
        ideas = {name: ideas[name] for name in options.confirm}
        if len(seeds) < CONFIRMING:
            raise SystemExit(f"{len(seeds)} seeds confirm nothing; take at least {CONFIRMING}")
    common = {"split": split, "noises": NOISES, "cpu_seconds": options.cpu_seconds, "work": WORK}
    common |= {"updates": options.updates} if options.updates else {}
    jobs = idea_jobs(describe(leader, setting, **common), ideas, seeds)
    asked = {identity(job) for job in jobs}
    runs = [run for run in run_all(jobs, path, options.workers) if identity(run) in asked]
    known = {json.dumps(run["idea"], sort_keys=True) for run in [*read(tuned), *runs] if run["idea"]}
    lines = ideas_report(runs, leader, len(known))
    print("\n".join(lines))
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


STAGES = {
    "tune": tune_stage,
    "final": final_stage,
    "report": report_stage,
    "again": again_stage,
    "ideas": ideas_stage,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=tuple(STAGES))
    add("--out", type=Path, default=ROOT / "benchmarks/results")
    add("--cpu-seconds", type=float, nargs="+", default=[12.0], help="budgets; tuning takes the first")
    add("--updates", type=int, default=0, help="also measure ideas after this number of updates")
    add("--tries", type=int, default=10, help="settings that each arm's tuning may try")
    add("--tuning", default="field_tune", help="results file of the tuning, without .jsonl")
    add("--start", help="results file of an earlier tuning: what it chose is where this one starts")
    add("--seeds", type=int, nargs=2, help="first seed, and the one after the last (report, again: all)")
    add("--arms", nargs="*", choices=list(ARMS), help="arms (default: all that are not variants of ours)")
    add("--published", action="store_true", help="also every baseline in its published form alone")
    add("--workers", type=int, default=1)
    add("--runs", default="field_final", help="results file of the final runs, without .jsonl")
    add("--to", default="clean_final", help="results file of again, without .jsonl")
    add("--leader", choices=list(ARMS), help="arm that is compared with the others, or with ideas")
    add("--plot", type=Path, help="file of the report's plot (default: beside its table)")
    add("--ideas", type=Path, default=ROOT / "benchmarks/ideas.json", help="JSON file of ideas")
    add("--confirm", nargs="+", help="ideas that go to held-out prompts, on fresh seeds")
    options = parser.parse_args(arguments)
    STAGES[options.stage](options)


if __name__ == "__main__":
    sys.exit(main())
