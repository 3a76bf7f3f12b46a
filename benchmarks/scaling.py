"""Do time and memory grow with the work alone? One child process per size: CPU seconds per unit, and peaks.

    python benchmarks/scaling.py [case …] [--json OUT]

A unit is a forward or decoded picture at 64×64 pixels (larger sides count by their area), a row, a prompt or
a picture. What stands after a size is the child's CPU seconds of the work alone, the least of its repeats,
and how far the process's peak memory grew while it worked.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Work = tuple[float, Callable[[], Any]]


def rollout(group: int = 16, steps: int = 8, prompts: int = 1, side: int = 64) -> Work:
    """Roll out and score groups, 64 states at a time."""
    import torch

    from comfy_g2rpo.plan import singular
    from comfy_g2rpo.rewards import load as load_reward
    from comfy_g2rpo.run.scorer import Scorer
    from comfy_g2rpo.schedule import shifted_sigmas
    from comfy_g2rpo.speed.fitting_rollout import roll_out
    from g2rpo_trainer.families.sd3 import SD3, load_pipeline
    from g2rpo_trainer.model.placing import keep_freed_memory

    keep_freed_memory()
    policy = SD3(load_pipeline(ROOT / "models/tiny", torch.float32))
    policy.add_lora(16, 16, seed=0)
    plan, shape = singular(steps, range(steps // 2), group, (2,)), policy.latent_shape(side, side)
    texts = [f"a red circle and {i} blue squares" for i in range(prompts)]
    conds, judge = policy.encode(texts), load_reward("agreement")

    def work() -> None:
        scorer = Scorer(policy.decode, [judge], texts, len(plan.images))
        sigmas = shifted_sigmas(steps)
        roll_out(policy, plan, sigmas, conds, range(prompts), shape, slots=64, sink=scorer)

    return prompts * (plan.forwards + len(plan.images)) * (side / 64) ** 2, work


def metric_rows(count: int) -> Work:
    """Append 1,000 rows to a run that has so many; every hundredth time ask for all, as evaluations do."""
    from comfy_g2rpo.run.folder import RunFolder

    run = RunFolder.create(Path(tempfile.mkdtemp()) / "run", {})
    row = {f"reward/{i}/mean": 0.123456789 * i for i in range(20)}
    with run.metrics_file.open("a") as file:
        file.writelines(json.dumps({"step": step, **row}) + "\n" for step in range(count))
    run.metrics()

    def work() -> None:
        for step in range(1000):
            run.append({"step": count + step, **row})
            if step % 100 == 0:
                run.metrics()

    return 1000, work


def read_rows(count: int) -> Work:
    """Read the rows of a run and draw its curves."""
    from comfy_g2rpo.run.folder import RunFolder
    from g2rpo_trainer.reports.report import write_report

    run = RunFolder.create(Path(tempfile.mkdtemp()) / "run", {})
    row = {f"reward/{i}/{kind}": 0.5 for i in range(3) for kind in ("mean", "std")}
    with run.metrics_file.open("a") as file:
        file.writelines(json.dumps({"step": step, "nfe": 1, **row}) + "\n" for step in range(count))
    return count, lambda: write_report(RunFolder.open(run.path))


def prompts(count: int) -> Work:
    """Read a file of prompts and split held-out ones off."""
    from comfy_g2rpo.prompts import load

    file = Path(tempfile.mkdtemp()) / "train.txt"
    file.write_text("".join(f"a picture of {i} things on a table\n" for i in range(count)))
    return count, lambda: load(file, None, 0.01, 0)


def pictures(count: int) -> Work:
    """List what a run with so many pictures, ten to a step, has sampled."""
    from comfy_g2rpo.run.folder import RunFolder

    run = RunFolder.create(Path(tempfile.mkdtemp()) / "run", {})
    for step in range(count // 10):
        place = run.path / f"images/{step:06d}"
        place.mkdir(parents=True)
        for i in range(10):
            (place / f"{i}.png").write_bytes(b"")
        (place / "index.json").write_text("[]")
    return count, lambda: run.sampled_steps()


def heldout(count: int) -> Work:
    """Evaluate so many held-out prompts."""
    import torch
    from accelerate import Accelerator

    from comfy_g2rpo.run.evaluation import evaluate
    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.run import prepare

    torch.set_num_threads(1)
    file = Path(tempfile.mkdtemp()) / "heldout.txt"
    file.write_text("".join(f"a red circle and {i} blue squares\n" for i in range(count)))
    changes = [f"prompts.heldout={file}", f"train.eval_prompts={count}", "train.eval_noises=1"]
    setup = prepare(load("demo", changes), Accelerator(cpu=True))
    known = (setup.policy, setup.judges, setup.prompts.heldout, setup.pace, setup.sigmas, setup.shape)
    return count, lambda: evaluate(*known)


CASES: dict[str, tuple[Callable[..., Work], str, tuple[int, ...]]] = {
    "group size": (rollout, "group", (8, 16, 32, 64)),
    "steps of a schedule": (rollout, "steps", (8, 16, 32)),
    "prompts of a step": (rollout, "prompts", (1, 2, 4, 8)),
    "side in pixels": (rollout, "side", (64, 96, 128)),
    "metric rows, appending": (metric_rows, "count", (100, 10_000, 100_000)),
    "metric rows, report": (read_rows, "count", (1000, 10_000, 100_000)),
    "prompts of a file": (prompts, "count", (1000, 10_000, 100_000)),
    "pictures of a run": (pictures, "count", (100, 1000, 10_000)),
    "held-out prompts": (heldout, "count", (100, 300, 1000)),
}


def measure(case: str, size: int, repeats: int = 3) -> dict[str, float]:
    """Do the work in this process; the first time warms up."""
    make, name, _ = CASES[case]
    units, work = make(**{name: size})
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(seconds), "units": units, "grown_mib": grown / 1024}


def in_child(case: str, size: int) -> dict[str, float]:
    """Do the work in a process of its own."""
    ended = subprocess.run(
        [sys.executable, __file__, "--here", case, str(size)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.here[0], int(options.here[1]))))
        return
    found = {}
    for case in options.cases or CASES:
        rows = {size: in_child(case, size) for size in CASES[case][2]}
        found[case] = rows
        first = next(iter(rows.values()))
        for size, row in rows.items():
            each = row["seconds"] / row["units"]
            ratio = each / (first["seconds"] / first["units"])
            print(
                f"{case:24s} {size:>7}  {row['seconds']:8.3f} s  {1000 * each:9.4f} ms a unit "
                f"({ratio:.2f} of the first)  peak + {row['grown_mib']:.0f} MiB",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
