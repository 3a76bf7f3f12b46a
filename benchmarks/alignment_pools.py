"""Pools of images of a prompt, without a search: what guidance chooses early, and what draws keep."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from learning_report import interval, table

Row = dict[str, Any]
POOL, FILTER_STEPS = 16, 3
HEATS = (1e-4, 0.05, 0.1, 0.2, 1e6)
"""Temperatures of draws; the first keeps the best, the last anybody."""
SIDE = 8  # pixels of the small images by which results are compared


def distance(images: Any) -> float:
    """Return the mean distance of images [n, H, W, 3] made small; NaN for a single one."""
    import torch

    small = torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2), SIDE).flatten(1)
    return torch.pdist(small).mean().item() / small.shape[1] ** 0.5 if len(small) > 1 else math.nan


def pool_jobs(options: argparse.Namespace, hard: Iterable[str]) -> list[Row]:
    """List the pools, at guidance 1, 1.5 and 2."""
    common = {"arm": "pool", "split": options.split, "budget": 0, "seeds": []}
    return [{**common, "guidance": g, "prompt": prompt} for prompt in sorted(hard) for g in (1.0, 1.5, 2.0)]


def pool_job(job: Row, host: Any, seed: int) -> Row:
    """Make a pool of images of a prompt; return their scores, how far guidance moved them in the first steps,
    and what budgeted draws of a quarter of them keep.
    """
    import torch

    from comfy_g2rpo.sampling.budgeted import drawn

    setup, policy = host.setup, host.setup.policy
    cond, sigmas = policy.encode([job["prompt"]]) * POOL, setup.sigmas
    x = torch.randn((POOL, *setup.shape), generator=torch.Generator().manual_seed(seed))
    gaps = torch.zeros(POOL, dtype=torch.float64)
    with torch.no_grad(), policy.inference():
        for k in range(len(sigmas) - 1):
            velocity, gap = policy.velocity_and_gap(x, sigmas[k].expand(POOL), cond)
            gaps += gap if k < FILTER_STEPS else 0
            x = x + (sigmas[k + 1] - sigmas[k]) * velocity
    scores = host.scores(setup.judges, x, job["prompt"])
    names = {judge.name: row.tolist() for judge, row in zip(setup.judges, scores, strict=True)}
    images = host.images(x)
    draws = {}
    for heat in HEATS:
        kept = drawn(names["agreement"], POOL // 4, heat, 0)
        draws[str(heat)] = [statistics.mean(names["agreement"][i] for i in kept), distance(images[kept])]
    return {**job, **names, "gaps": gaps.tolist(), "draws": draws}


def pools_report(rows: Sequence[Row], hard: set[str]) -> list[str]:
    """Tabulate what a quarter of a pool is worth that guidance's effect chose, and what draws keep."""
    lines, draws = [], []
    for guidance in sorted({row["guidance"] for row in rows}):
        here = [row for row in rows if row["guidance"] == guidance and row["prompt"] in hard]
        cells = [f"{guidance:g}"]
        for reward in ("agreement", "strict"):
            means = [statistics.mean(row[reward]) for row in here]
            best = [statistics.mean(row[reward][i] for i in by_gap(row)[: POOL // 4]) for row in here]
            worst = [statistics.mean(row[reward][i] for i in by_gap(row)[-POOL // 4 :]) for row in here]
            gains = [plus_minus([a - b for a, b in zip(some, means, strict=True)]) for some in (best, worst)]
            cells += [f"{statistics.mean(means):.3f}", *gains]
        lines.append(cells)
        for heat in HEATS:
            found = [row["draws"][str(heat)] for row in here]
            kept, apart = (f"{statistics.mean(column):.3f}" for column in zip(*found, strict=True))
            draws.append([f"{guidance:g}", f"{heat:g}", kept, apart])
    heads = (
        "guidance",
        "all",
        "best quarter",
        "worst quarter",
        "strict: all",
        "best quarter ",
        "worst quarter ",
    )
    return [
        *(
            "",
            f"**Early filter: {POOL} images of a prompt by guidance's effect in {FILTER_STEPS} steps**",
            "",
        ),
        *table(heads, lines),
        *("", f"**Draws of {POOL // 4} of {POOL}, by temperature**", ""),
        *table(("guidance", "temperature", "agreement", "distance"), draws),
    ]


def by_gap(row: Row) -> list[int]:
    """List a pool's images, those that guidance moved most first."""
    return sorted(range(POOL), key=lambda i: -row["gaps"][i])


def plus_minus(pairs: Sequence[float]) -> str:
    """Write a mean with its interval."""
    mean, width = interval(pairs)
    return f"{mean:+.3f} ± {width:.3f}"
