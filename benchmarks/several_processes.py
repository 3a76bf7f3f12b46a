"""How much sooner several processes evaluate and learn than one: `python benchmarks/several_processes.py`.

    python benchmarks/several_processes.py [evaluation | steps] [--processes 2] [--repeats 3]

The demo's evaluation of 96 held-out prompts × 3 noises, and a step of its training from 4 prompts, by one
process and by several in turn, each with one thread, joined by gloo. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_g2rpo.run.setup import Setup

ROOT = Path(__file__).resolve().parent.parent
SAID = "seconds:"
PROMPTS, STEPS = 4, 5
"""Prompts of a step, and how many steps are measured; one goes before them."""


def evaluating(setup: Setup) -> Callable[[], float]:
    """Return what evaluates the untrained model and finds its mean agreement."""
    from comfy_g2rpo.run.evaluation import evaluate

    heldout, shape = setup.prompts.heldout, setup.shape

    def work() -> float:
        found = evaluate(
            setup.policy, setup.judges, heldout, setup.pace, setup.sigmas, shape, world=setup.world
        )
        return found.means()["agreement"]

    return work


def learning(setup: Setup) -> Callable[[], float]:
    """Return what takes a step and finds the mean agreement of its pictures, in all processes."""
    from comfy_g2rpo.run.iteration import iterate
    from comfy_g2rpo.run.setup import make_learner

    learner = make_learner(setup)
    return lambda: iterate(setup, learner, lambda phase: None)["reward/agreement/mean"]


CASES = {"evaluation": (evaluating, 1), "steps": (learning, STEPS)}
"""What is measured, and how many times in a row."""


def measure_here(case: str) -> None:
    """Do the work once, then as often as it is measured; say the seconds of one time and what it found."""
    import torch
    from accelerate import Accelerator

    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.run import prepare

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    setup = prepare(load("demo", [f"train.prompts_per_step={PROMPTS}"]), accelerator)
    make, times = CASES[case]
    work = make(setup)
    work()
    accelerator.wait_for_everyone()
    begin = time.perf_counter()
    for _ in range(times):
        found = work()
    accelerator.wait_for_everyone()
    spent = (time.perf_counter() - begin) / times
    if accelerator.is_main_process:
        print(f"{SAID} {spent:.3f} mean agreement {found:.6f}", flush=True)


def timed(case: str, processes: int) -> tuple[float, str]:
    """Run so many processes; return the seconds, and the mean score that they found."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ended = subprocess.run(
        [*launch, __file__, case, "--here"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = next((line for line in ended.stdout.splitlines() if line.startswith(SAID)), None)
    if said is None:
        raise SystemExit(ended.stderr[-3000:])
    seconds, _, score = said.removeprefix(SAID).strip().partition(" ")
    return float(seconds), score


def compare(case: str, processes: int, repeats: int) -> None:
    """Measure in turn and print how the fastest compare."""
    best: dict[int, float] = {}
    for _ in range(repeats):
        for count in (1, processes):
            seconds, score = timed(case, count)
            best[count] = min(best.get(count, seconds), seconds)
            print(f"{case}, {count} processes: {seconds:.2f} s, {score}", flush=True)
    share = best[processes] / best[1]
    efficiency = 1 / (processes * share)
    print(f"{case}: {processes} take {share:.2f} of the time of 1, an efficiency of {efficiency:.0%}")


def main() -> None:
    """Measure one case or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", choices=CASES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return measure_here(options.case)
    for case in [options.case] if options.case else CASES:
        compare(case, options.processes, options.repeats)


if __name__ == "__main__":
    main()
