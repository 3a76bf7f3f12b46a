"""What do kept votes teach when some of them are wrong? DPO, ROPO and PG-DPO over the same stored forks.

Every seed draws 160 forks of 4 branches with the bundled model, as runs that wait for votes do, and votes by
the reward `agreement` in people's place; a share of the pairs is turned round. Each loss then trains a new
LoRA from these votes, as `g2rpo pairs` does, for the same CPU time. Figures are gains over the base
model, paired by prompt and noise, on prompts that nobody voted on. A stopped benchmark goes on.

    python benchmarks/pairs.py run --seeds 0 8       # losses × shares × seeds
    python benchmarks/pairs.py report                # the tables
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from learning_report import interval, table
from learning_runs import BASE, EVALUATION_SEED, NOISES, ROOT, read

LOSSES, SHARES = ("dpo", "ropo", "pg_dpo"), (0.0, 0.2, 0.4)
RUNS, PROMPTS, STEPS, BRANCHES = 4, 40, 8, 4
"""4 runs, each with 40 prompts that branch at one random step of the first half: 160 forks."""
SETTINGS = {"method.learning_rate": 3e-4, "method.pair_beta": 1.0, "train.prompts_per_step": 8}
"""Forks per step among them; the same for every loss, tuned for none."""


def draw_forks(seed: int, store: Path) -> list[Path]:
    """Draw a seed's forks, unless they are there: runs that stop at their first step for votes."""
    from g2rpo_trainer.config.reading import from_dict
    from g2rpo_trainer.reports.progress import Silent
    from g2rpo_trainer.rewards.vote_reward import UnvotedError
    from g2rpo_trainer.run import train

    found = []
    for part in range(RUNS):
        run = store / f"seed-{seed}-{part}"
        found.append(run)
        if (run / "drawn").exists():
            continue
        tree = {
            "model": {"path": str(ROOT / "models/tiny"), "width": 64, "height": 64, "max_sequence_length": 0},
            "method": {
                **{"num_steps": STEPS, "group_size": BRANCHES, "granularities": [1]},
                **{"pick": "random", "pick_size": 1},
            },
            "rewards": ["votes"],
            "heldout_rewards": ["agreement", "strict"],
            "prompts": {"train": str(ROOT / "prompts/shapes_train.txt")},
            "train": {"seed": RUNS * seed + part, "prompts_per_step": PROMPTS, "micro_batch": 64},
        }
        try:
            train(from_dict(tree), run, progress=Silent(), replace=run.exists())
        except UnvotedError:
            (run / "drawn").touch()
    return found


def vote(run: Path, share: float, seed: int, loss: str) -> Path:
    """Vote on a copy of a run by `agreement`, a share of the pairs the wrong way round: the same for all."""
    import torch

    from comfy_g2rpo.rewards import REWARDS
    from comfy_g2rpo.votes.ballots import append, read_ballots, read_png
    from comfy_g2rpo.votes.forks import read_forks
    from comfy_g2rpo.votes.strengths import Votes

    voted = run.with_name(f"{run.name}-{loss}-{share:g}")
    shutil.rmtree(voted, ignore_errors=True)
    shutil.copytree(run, voted)
    chance = random.Random(f"flips {seed} {share} {run.name}")
    for ballot in read_ballots(voted):
        forks, keys = read_forks(ballot), list(ballot.files)
        images = torch.stack([read_png(file) for file in ballot.files.values()])
        scores = REWARDS["agreement"].score(images, [ballot.prompt] * len(keys)).tolist()
        pairs = []
        for i, better in enumerate(keys):
            for j, worse in enumerate(keys):
                if scores[i] > scores[j] and forks.parted(i, j):
                    pairs.append((worse, better) if chance.random() < share else (better, worse))
        if pairs:
            append(voted, Votes(tuple(keys), pairs=tuple(pairs), prompt=ballot.prompt))
    return voted


def run_loss(job: dict[str, Any], store: Path) -> dict[str, Any]:
    """Train by one loss from one share of wrong votes until the CPU time is spent; return the gains."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    from accelerate import Accelerator

    from comfy_g2rpo.run.evaluation import Evaluation, compare, evaluate
    from comfy_g2rpo.run.setup import make_learner
    from g2rpo_trainer.commands.train_pairs import pair_config
    from g2rpo_trainer.config.reading import apply_overrides, from_dict
    from g2rpo_trainer.run import prepare

    drawn = draw_forks(job["seed"], store)
    runs = [vote(run, job["flips"], job["seed"], job["loss"]) for run in drawn]
    heldout = ROOT / f"prompts/shapes_{job['split']}.txt"
    given = {**job["settings"], "method.pair_loss": job["loss"], "prompts.heldout": str(heldout)}
    given |= {"train.eval_noises": NOISES, "train.seed": job["seed"]}
    settings = [f"{key}={value}" for key, value in given.items()]
    config = from_dict(apply_overrides(pair_config(runs), [*settings, "train.steps=1000000"]))
    setup = prepare(config, Accelerator(cpu=True), runs[0])
    learner, steps = make_learner(setup), setup.stored
    measuring = dataclasses.replace(setup.pace, seed=EVALUATION_SEED)

    def look() -> Evaluation:
        held = setup.prompts.heldout
        return evaluate(setup.policy, setup.judges, held, measuring, setup.sigmas, setup.shape)

    key = (job["split"], NOISES)
    before = BASE[key] = BASE.get(key) or look()
    spent, rows = 0.0, []
    while spent < job["cpu_seconds"]:
        begin = time.process_time()
        rows.append(steps(setup, learner, lambda phase: None))
        spent += time.process_time() - begin
    gains = {name: gain["mean"] for name, gain in compare(before, look()).items()}
    last = rows[-steps.steps_per_epoch :]
    shown = {
        name: sum(row[f"pairs/{name}"] for row in last) / len(last)
        for name in ("accuracy", "margin", "displacement", "weight")
    }
    pairs = int(sum(each.wins.sum().item() for each in steps.kept))
    return {**job, "forks": len(steps.kept), "pairs": pairs, "updates": learner.step, **shown, "gains": gains}


def jobs_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Describe every run; seeds last, so that an early stop has whole rows."""
    common = {"split": options.split, "cpu_seconds": options.cpu_seconds, "settings": SETTINGS}
    return [
        {"loss": loss, "flips": share, "seed": seed, **common}
        for seed in range(*options.seeds)
        for share in options.flips
        for loss in options.losses
    ]


def run_all(jobs: Sequence[dict[str, Any]], path: Path, store: Path, workers: int) -> None:
    """Run what the results file does not hold yet, each result written as it comes."""
    done = [{name: run.get(name) for name in jobs[0]} for run in read(path)]
    left = [job for job in jobs if job not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, path.open("a") as file:
        for seed in dict.fromkeys(job["seed"] for job in left):
            pool.submit(draw_forks, seed, store).result()  # by one process, for all runs of the seed
            mine = [pool.submit(run_loss, job, store) for job in left if job["seed"] == seed]
            for future in as_completed(mine):
                found = future.result()
                file.write(json.dumps(found) + "\n")
                file.flush()
                said = f"{found['loss']:7s} flips {found['flips']:g} seed {seed}"
                print(f"{said}  {found['gains']['agreement']:+.3f}  {found['updates']} updates", flush=True)


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Write the gains by loss and share of wrong votes, and those over DPO on the same seeds."""
    lines = []
    shares = sorted({run["flips"] for run in runs})
    by = {(run["loss"], run["flips"], run["seed"]): run["gains"] for run in runs}
    for reward in ("agreement", "strict"):
        rows, over = [], []
        for loss in (loss for loss in LOSSES if any(run["loss"] == loss for run in runs)):
            cells, apart = [], []
            for share in shares:
                seeds = [seed for one, flips, seed in by if (one, flips) == (loss, share)]
                gains = [by[loss, share, seed][reward] for seed in seeds]
                cells.append(cell(gains))
                both = [seed for seed in seeds if ("dpo", share, seed) in by]
                apart.append(cell([by[loss, share, s][reward] - by["dpo", share, s][reward] for s in both]))
            rows.append([loss, *cells])
            over += [[f"{loss} minus dpo", *apart]] if loss != "dpo" else []
        heads = [f"{reward}, votes turned round", *(f"{share:.0%}" for share in shares)]
        lines += [*table(heads, rows + over), ""]
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    """Write mean, interval and the number of seeds."""
    if not values:
        return "–"
    mean, width = interval(values)
    return f"{mean:+.3f} ± {width:.3f} ({len(values)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("run", "report"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/pairs.jsonl")
    parser.add_argument(
        "--store", type=Path, default=ROOT / "runs/benchmark-pairs", help="where forks are kept"
    )
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 8), help="first seed, and one after the last"
    )
    parser.add_argument("--losses", nargs="*", choices=LOSSES, default=LOSSES)
    parser.add_argument("--flips", type=float, nargs="*", default=SHARES, help="shares of votes turned round")
    parser.add_argument("--split", choices=("tune", "heldout"), default="heldout")
    parser.add_argument("--cpu-seconds", type=float, default=8.0)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.stage == "run":
        run_all(jobs_of(options), options.out, options.store, options.workers)
    print(report(read(options.out)))


if __name__ == "__main__":
    sys.exit(main())
