"""Does the watch catch a reward that is gamed, leave an honest run alone, and at what price? And does
diversity shaping raise diversity?

A planted reward, the saturation of a picture's colours, is maximised by one flat colour and no shapes. It is
trained on alone, beside an honest reward of equal weight, and as the flaw of a judge that is right at first;
agreement (graded) and strict (all right, or nothing) tell what becomes of pictures of held-out prompts.

    python benchmarks/watch.py hack      --out results/     # the same runs with and without the watch
    python benchmarks/watch.py flawed    --out results/     # likewise
    python benchmarks/watch.py honest    --out results/     # the demo's recipe: no alarm may be raised
    python benchmarks/watch.py diversity --out results/     # a reward that ends in blank pictures, and
    agreement, with and without shaping python benchmarks/watch.py cost      --out results/     # CPU seconds
    of the demo's recipe with and without the watch python benchmarks/watch.py report    --out results/     #
    tables

One thread per run; results already in watch.jsonl are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = {"num_steps": 8, "group_size": 8, "granularities": [2], "learning_rate": 1e-3}
AGREEMENT = {"name": "agreement"}
PLANTED, FLAWED = (
    {"name": name, "path": f"{Path(__file__).resolve()}:{name}"} for name in ("saturation", "flawed")
)
RARELY = {"watch": "warn", "eval_noises": 3, "eval_every": 60}
ARMS: dict[str, dict[str, Any]] = {
    "planted, watched": {"rewards": [PLANTED], "train": {"watch": "stop"}},
    "planted": {"rewards": [PLANTED], "train": {"watch": "off"}},
    "flawed, watched": {"rewards": [FLAWED], "train": {"watch": "stop", "eval_every": 10}},
    "flawed": {"rewards": [FLAWED], "train": {"watch": "off", "eval_every": 10}},
    "mixed, watched": {"rewards": [AGREEMENT, PLANTED], "train": {"watch": "stop"}},
    "mixed": {"rewards": [AGREEMENT, PLANTED], "train": {"watch": "off"}},
    "honest": {"rewards": [AGREEMENT], "train": {"watch": "stop"}},
    **{
        f"{reward}, λ = {weight}": {
            "rewards": [{"name": reward}],
            "train": RARELY,
            "method": {"diversity_weight": weight},
        }
        for reward in ("jpeg", "agreement")
        for weight in (0.0, 0.3, 1.0)
    },
}
STAGES = {
    "hack": ("planted, watched", "planted", "mixed, watched", "mixed"),
    "flawed": ("flawed, watched", "flawed"),
    "honest": ("honest",),
    "diversity": tuple(arm for arm in ARMS if "λ" in arm),
}


def saturation(images: Any, prompts: Sequence[str]) -> Any:
    """Measure the mean of max − min over the channels of pictures [B, H, W, 3]: the planted reward."""
    return (images.amax(-1) - images.amin(-1)).mean((1, 2))


def flawed(images: Any, prompts: Sequence[str]) -> Any:
    """Measure agreement, with a weakness for saturated colours: a judge that is right at first and can be
    gamed.
    """
    from comfy_g2rpo.rewards import load

    return load("agreement").score(images, prompts) + 3 * saturation(images, prompts)


def configure(arm: str, seed: int, steps: int) -> Any:
    """Make the configuration of one run: the demo's, evaluated more often and on fewer pictures."""
    from g2rpo_trainer.config.reading import from_dict

    made = ARMS[arm]
    train = {
        "seed": seed,
        "steps": steps,
        "prompts_per_step": 2,
        "slots": 128,
        "micro_batch": 64,
        "eval_every": 20,
    }
    return from_dict(
        {
            "model": {"path": str(ROOT / "models/tiny"), "width": 64, "height": 64, "max_sequence_length": 0},
            "method": {**DEMO, **made.get("method", {})},
            "rewards": made["rewards"],
            "heldout_rewards": ["agreement", "strict"],
            "prompts": {
                "train": str(ROOT / "prompts/shapes_train.txt"),
                "heldout": str(ROOT / "prompts/shapes_heldout.txt"),
            },
            "train": {**train, "checkpoint_every": 1000, **made["train"]},
        }
    )


def run_arm(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once; return where the run ended, what its LoRA is worth and what the watch said."""
    quieten()
    from comfy_g2rpo.run.folder import RunFolder
    from g2rpo_trainer.reports.progress import Silent
    from g2rpo_trainer.run import train

    with tempfile.TemporaryDirectory() as place:
        begin = time.process_time()
        summary = train(configure(arm, seed, steps), Path(place) / "run", progress=Silent())
        seconds = time.process_time() - begin
        looks = [row for row in RunFolder(Path(place) / "run").metrics() if "nfe" not in row]
    curve = [{k: v for k, v in row.items() if not k.endswith("ci95")} for row in looks]
    kept = (
        "steps",
        "stopped_by",
        "best_step",
        "lora_step",
        "alarms",
        "heldout_before",
        "heldout_after",
        "heldout_gain",
    )
    return {
        "arm": arm,
        "seed": seed,
        "length": steps,
        "cpu": seconds,
        **{name: summary[name] for name in kept},
        "curve": curve,
    }


def quieten() -> None:
    """Use one thread, and no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)


def cost(steps: int) -> dict[str, Any]:
    """Measure CPU seconds of a step and of an evaluation with and without the watch, in turns, and what
    that makes of a demo run.
    """
    quieten()
    import dataclasses

    from accelerate import Accelerator

    from comfy_g2rpo.run.evaluation import evaluate
    from comfy_g2rpo.run.iteration import iterate
    from comfy_g2rpo.run.setup import make_learner
    from g2rpo_trainer.config.reading import load
    from g2rpo_trainer.run import prepare

    setup = prepare(load("demo"), Accelerator(cpu=True))
    setups = {
        watch: dataclasses.replace(setup, pace=dataclasses.replace(setup.pace, watch=watch))
        for watch in ("off", "stop")
    }
    learners, spent = {watch: make_learner(made) for watch, made in setups.items()}, {}
    for i in range(2 * steps + 4):
        watch = ("off", "stop")[i % 2]
        made, begin = setups[watch], time.process_time()
        if i < 2 * steps:
            learners[watch].step = i // 2
            iterate(made, learners[watch], lambda phase: None)
        else:
            recipe = made.recipe if watch == "stop" else None
            evaluate(
                made.policy,
                made.judges,
                made.prompts.heldout,
                made.pace,
                made.sigmas,
                made.shape,
                recipe=recipe,
            )
        spent.setdefault(f"{'step' if i < 2 * steps else 'look'}, {watch}", []).append(
            time.process_time() - begin
        )
    best = {name: sorted(times)[len(times) // 2] for name, times in spent.items()}
    total = {watch: 240 * best[f"step, {watch}"] + 5 * best[f"look, {watch}"] for watch in setups}
    return {
        "arm": "cost",
        **best,
        "demo, off": total["off"],
        "demo, stop": total["stop"],
        "share": total["stop"] / total["off"] - 1,
    }


def report(results: Sequence[dict[str, Any]]) -> str:
    """Write the tables as Markdown."""
    lines = [
        "| run | seed | ended | alarm at | LoRA of step | agreement before | after | strict before | after |",
        "|---" * 9 + "|",
    ]
    for r in (r for r in results if r["arm"] in (*STAGES["hack"], *STAGES["flawed"], *STAGES["honest"])):
        scores = " | ".join(
            f"{r[f'heldout_{when}'][name]:.3f}"
            for name in ("agreement", "strict")
            for when in ("before", "after")
        )
        alarm = r["alarms"][0]["step"] if r["alarms"] else "none"
        lines.append(
            f"| {r['arm']} | {r['seed']} | {r['steps']}, {r['stopped_by']} | {alarm} | "
            f"{r['lora_step']} | {scores} |"
        )
    lines += [
        "",
        "| trained on, λ | seed | steps | diversity, one prompt | diversity, prompt set | reward |",
        "|---" * 6 + "|",
    ]
    for r in (r for r in results if r["arm"] in STAGES["diversity"]):
        first, last = r["curve"][0], r["curve"][-1]
        ends = " | ".join(
            f"{first[n]:.4f} → {last[n]:.4f}" for n in ("diversity/pixels/group", "diversity/pixels/set")
        )
        reward = r["arm"].partition(",")[0]
        scores = " → ".join(f"{r[f'heldout_{when}'][reward]:.3f}" for when in ("before", "after"))
        lines.append(f"| {r['arm']} | {r['seed']} | {r['steps']} | {ends} | {scores} |")
    lines += [json.dumps(r) for r in results if r["arm"] == "cost"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "cost", "report"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 3), help="first seed, and the one after the last"
    )
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args(arguments)
    path = options.out / "watch.jsonl"
    results = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(r["arm"], r.get("seed"), r.get("length")) for r in results}
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in range(*options.seeds):
        for arm in STAGES.get(options.stage, ()):
            if (arm, seed, options.steps) not in known:
                results.append(run_arm(arm, seed, options.steps))
                with path.open("a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
                print(report(results[-1:]), flush=True)
    if options.stage == "cost":
        with path.open("a") as file:
            file.write(json.dumps(cost(20)) + "\n")
        print(path.read_text().splitlines()[-1])
    if options.stage == "report":
        print(report(results))


if __name__ == "__main__":
    sys.exit(main())
