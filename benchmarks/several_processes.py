"""How much sooner is an evaluation done by several processes? Wall-clock seconds on this machine's cores.

    python benchmarks/several_processes.py [--processes 2] [--repeats 3]

The demo's evaluation of 96 held-out prompts with 3 noises, by one process and by several in turn, each with
one thread, joined by gloo. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAID = "seconds of the evaluation:"


def evaluate_here() -> None:
    """Evaluate the untrained model twice, and say how long the second took."""
    import torch
    from accelerate import Accelerator

    from comfy_g2rpo.run.evaluation import evaluate
    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.run import prepare

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    setup = prepare(load("demo", []), accelerator)
    for _ in range(2):
        accelerator.wait_for_everyone()
        begin = time.perf_counter()
        found = evaluate(
            setup.policy,
            setup.judges,
            setup.prompts.heldout,
            setup.pace,
            setup.sigmas,
            setup.shape,
            world=setup.world,
        )
        accelerator.wait_for_everyone()
        spent = time.perf_counter() - begin
    if accelerator.is_main_process:
        print(f"{SAID} {spent:.3f} mean agreement {found.means()['agreement']:.6f}", flush=True)


def timed(processes: int) -> tuple[float, str]:
    """Run so many processes; return the seconds, and the mean score that they found."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ended = subprocess.run(
        [*launch, __file__, "--here"],
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


def main() -> None:
    """Measure in turn and print the ratio of the fastest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        return evaluate_here()
    best: dict[int, float] = {}
    for _ in range(options.repeats):
        for count in (1, options.processes):
            seconds, score = timed(count)
            best[count] = min(best.get(count, seconds), seconds)
            print(f"{count} processes: {seconds:.2f} s, {score}", flush=True)
    print(f"{options.processes} take {best[options.processes] / best[1]:.2f} of the time of 1")


if __name__ == "__main__":
    main()
