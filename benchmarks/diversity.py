"""Does diversity shaping (SetPO) pay where nothing collapses? The best of a prompt's four pictures.

    python benchmarks/diversity.py train  --out results/ --seeds 0 3
    python benchmarks/diversity.py report --out results/

The demo's recipe, trained on agreement with diversity_weight λ = 0, .1 and .3 for equally many updates
(shaping costs no forward), paired by seed. Of four held-out pictures of a prompt, from noises that no run
trained on: the mean, the best, the share of prompts of which at least one picture is all right (pass@4), and
their mean distance. SetPO's promise is that the best of several pictures gains from unlike pictures, even
where the mean does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from brief import ROOT, add, configure, evaluated, read, train
from torch import Tensor

WEIGHTS = (0.0, 0.1, 0.3)
PICTURES = 4
MEASURES = ("agreement", "best", "strict", "pass", "distance")


def best_of(scores: Tensor) -> float:
    """Return the mean over prompts of the best of their pictures [prompts, pictures], NaN left out."""
    best = scores.nan_to_num(-torch.inf).amax(1)
    return best[best.isfinite()].mean().item()


def look(setup: Any, learner: Any) -> dict[str, float]:
    """Measure four pictures of every held-out prompt."""
    found = evaluated(setup, learner, PICTURES, apart=True)
    scores = dict(zip(found.names, found.scores.double(), strict=True))
    return {
        "agreement": scores["agreement"].nanmean().item(),
        "best": best_of(scores["agreement"]),
        "strict": scores["strict"].nanmean().item(),
        "pass": best_of(scores["strict"]),
        "distance": found.spread["pixels/group"].nanmean().item(),
    }


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Tabulate every λ's gains over the untrained model, and what differs by seed from λ = 0."""
    from comfy_g2rpo.run.evaluation import interval

    heads = ("mean of 4", "best of 4", "all right", "pass@4", "distance")
    lines = [f"| updates | λ | seeds | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    runs: dict[tuple[int, float], dict[int, dict[str, Any]]] = {}
    for row in rows:
        for point in row["points"]:
            runs.setdefault((point["updates"], row["weight"]), {})[row["seed"]] = point
    if rows:
        told = (f"{rows[0]['before'][name]:.3f}" for name in MEASURES)
        lines.append(f"| 0 | before | | {' | '.join(told)} |")
    for (updates, weight), found in sorted(runs.items()):
        base = runs.get((updates, 0.0), {}) if weight else {}
        for title, seeds in (
            (f"{weight:g}", list(found)),
            (f"{weight:g} − 0", [s for s in found if s in base]),
        ):
            values = [
                [found[s][name] - (base[s][name] if "−" in title else 0) for s in seeds] for name in MEASURES
            ]
            if seeds:
                sign = "+" if "−" in title else ""
                cells = (f"{{:{sign}.3f}} ± {{:.3f}}".format(*interval(torch.tensor(v))) for v in values)
                lines.append(f"| {updates} | {title} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("train", "report"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 3), help="first seed, and the one after the last"
    )
    parser.add_argument("--weights", type=float, nargs="*", default=list(WEIGHTS))
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument(
        "--split", choices=("tune", "heldout"), default="heldout", help="prompts to measure on"
    )
    options = parser.parse_args(arguments)
    path = options.out / "diversity.jsonl"
    if options.stage == "report":
        print("\n".join(report(read(path))))
        return
    done = read(path)
    known = {(row["weight"], row["seed"], row["updates"], row["split"]) for row in done}
    before = {row["split"]: row["before"] for row in done}
    for seed in range(*options.seeds):
        for weight in options.weights:
            if (weight, seed, options.updates, options.split) in known:
                continue
            method = {"diversity_weight": weight}
            config = configure(method, [{"name": "agreement"}], ["strict"], options.split, seed)
            goals = [{"updates": options.updates}]
            found = train(config, goals, look, before.get(options.split))
            before[options.split] = found["before"]
            row = {"weight": weight, "seed": seed, "updates": options.updates, "split": options.split}
            add(path, row | found)
            print(weight, seed, found["points"][-1], flush=True)


if __name__ == "__main__":
    sys.exit(main())
