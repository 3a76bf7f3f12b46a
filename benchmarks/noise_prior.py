"""What does a noise prior gain in a given time? The bundled model, several training seeds, with the control.

A prior is trained for so many CPU seconds of the reference machine and then measured on held-out prompts, by
the same noises for every seed. The control moves every prompt's noise by another prompt's shift: where that
gains as much, what was learned is one shift for all prompts. A stopped benchmark goes on where it was.

    python benchmarks/noise_prior.py run                      # seeds 0 to 4, 30 CPU seconds each
    python benchmarks/noise_prior.py run --split tune --rates 0.01 0.03 --seeds 100 101
    python benchmarks/noise_prior.py report
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

from learning_report import table
from learning_runs import EVALUATION_SEED, ROOT, Clock, piece, read

Row = dict[str, Any]
RESULTS = ROOT / "benchmarks/results/noise_prior.jsonl"
MEASURED = ("agreement", "strict")


@cache
def setup_of(split: str, noises: int) -> Any:
    """Load the model, the rewards and the prompts of a split, once per process."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from accelerate import Accelerator

    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.run import prepare

    torch.set_num_threads(1)
    prompts = ROOT / f"prompts/shapes_{split}.txt"
    changes = [f"prompts.heldout={prompts}", "train.eval_prompts=0", f"train.eval_noises={noises}"]
    return prepare(load("demo", changes), Accelerator(cpu=True))


@cache
def heldout_of(split: str, noises: int) -> Any:
    """Score the held-out prompts without a prior, once per process."""
    return training_of({"split": split, "noises": noises, "seed": 0}).heldout(EVALUATION_SEED)


def training_of(job: Row) -> Any:
    """Make a training by a job's settings."""
    import dataclasses

    from comfy_g2rpo.priors.prior_settings import PriorSettings
    from comfy_g2rpo.priors.prior_training import PriorTraining

    setup = setup_of(job["split"], job["noises"])
    pace = dataclasses.replace(setup.pace, seed=job["seed"])
    return PriorTraining(dataclasses.replace(setup, pace=pace), PriorSettings(**job.get("prior", {})))


def run_job(job: Row) -> Row:
    """Train one prior for its seconds, and measure it as it is then: no better one before is chosen."""
    heldout, training = heldout_of(job["split"], job["noises"]), training_of(job)
    clock = Clock(partial(piece, training.setup.policy, training.setup.shape))
    while clock.spent < job["cpu_seconds"]:
        begin = time.process_time()
        training.step()
        clock.add(time.process_time() - begin)
    look = training.look(heldout, EVALUATION_SEED)
    kinds = {"gain": look.gains, "other": look.others, "beyond": look.beyond}
    found = {kind: {name: list(gain) for name, gain in gains.items()} for kind, gains in kinds.items()}
    shape = {"kl": look.kl, "length": look.length, "diversity": look.diversity}
    base = {"before": heldout.before.means(), "diversity_before": heldout.diversity}
    pace = sum(clock.paces) / len(clock.paces)
    return {**job, **base, **found, **shape, "steps": training.steps, "pace": round(pace, 3)}


def identity(row: Row) -> str:
    """Return what makes a job the same."""
    return json.dumps([row[key] for key in ("split", "noises", "seed", "cpu_seconds", "prior")])


def run_all(options: argparse.Namespace) -> None:
    """Run what the results file does not hold yet, each written as it comes."""
    done = {identity(row) for row in read(options.results)}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for rate in options.rates:
        for seed in options.seeds:
            prior = {"learning_rate": rate, "alpha": options.alpha, "estimator": options.estimator}
            size = {"split": options.split, "noises": options.noises}
            job = {**size, "seed": seed, "cpu_seconds": options.cpu_seconds, "prior": prior}
            if identity(job) in done:
                continue
            row = run_job(job)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*cells(row), flush=True)


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    scores = [f"{mean:+.3f} ± {wide:.3f}" for mean, wide in (row[kind]["agreement"] for kind in KINDS)]
    strict = f"{row['gain']['strict'][0]:+.3f}"
    apart = f"{row['diversity_before']:.3f} → {row['diversity']:.3f}"
    rate = f"{row['prior']['learning_rate']:g}"
    return [str(row["seed"]), rate, *scores, strict, f"{row['kl']:.1f}", apart, str(row["steps"])]


KINDS = {"gain": "gain", "other": "another prompt's shift", "beyond": "own less another's"}
HEAD = ["seed", "learning rate", *KINDS.values(), "strict", "KL", "diversity", "updates"]


def report(rows: list[Row]) -> str:
    """Return the table of the results, with ± half of a 95 % interval over prompts."""
    return "\n".join(table(HEAD, [cells(row) for row in rows]))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("run", "report"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03])
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--estimator", choices=("policy", "value"), default="policy")
    parser.add_argument("--cpu-seconds", type=float, default=30.0)
    parser.add_argument("--split", choices=("heldout", "tune"), default="heldout")
    parser.add_argument("--noises", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    if options.stage == "run":
        run_all(options)
    print(report(read(options.results)))
