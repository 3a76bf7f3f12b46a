"""Train LoRA in a real ComfyUI beside the headless program, on the tiny model, by recipes/demo.yaml.

    python benchmarks/graph.py [--updates 12] [--comfyui ~/comfy/ComfyUI]    what an update costs in both
    python benchmarks/graph.py --steps 240 [--seed 0]                        what the graph learns

The first form runs both at once, one after the other by turns, update by update, and prints the CPU seconds
of either process per update and per evaluation, and their ratio. The second prints the held-out scores before
and after, paired by prompt. Compare with `g2rpo train demo --set train.seed=SEED`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from comfy_host import comfyui_roots, environment, make_base, run_script  # noqa: E402

from g2rpo_trainer.config.reading import load  # noqa: E402

CHILD, HEADLESS = (Path(__file__).with_name(f"graph_{name}.py") for name in ("child", "headless"))
UPDATES_PER_LOOK = 4
WARM_UP = 1  # of each kind, left out


def widgets(steps: int, seed: int) -> dict[str, Any]:
    """Translate the demo's recipe into Train LoRA's widgets."""
    config = load("demo")
    method = {
        name: value
        for name, value in config.method
        if value is not None and name not in ("name", "learning_rate")
    }
    kept = ("decode_batch", "micro_batch", "eval_prompts", "eval_noises", "checkpoint_every")
    train = {name: getattr(config.train, name) for name in kept}
    lines = {**{f"method.{k}": v for k, v in method.items()}, **{f"train.{k}": v for k, v in train.items()}}
    return {
        "recipe": config.method.name,
        "steps": steps,
        "prompts": Path(config.prompts.train).read_text("utf-8"),
        "heldout_prompts": Path(config.prompts.heldout or "").read_text("utf-8"),
        "negative": "",
        "guidance": config.model.guidance,
        "width": config.model.width,
        "height": config.model.height,
        "learning_rate": config.method.learning_rate,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "targets": config.lora.targets,
        "prompts_per_step": config.train.prompts_per_step,
        "slots": config.train.slots,
        "eval_every": config.train.eval_every,
        "seed": seed,
        "run": "graph",
        "changes": "\n".join(
            f"{k} = {', '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in lines.items()
        ),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--updates", type=int, default=12, help="updates that are clocked")
    parser.add_argument("--steps", type=int, help="learn for so many steps, and clock nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--comfyui", type=Path, default=None)
    options = parser.parse_args(arguments)
    roots = [options.comfyui.expanduser()] if options.comfyui else comfyui_roots()[-1:]
    if not roots:
        sys.exit("error: no ComfyUI found; give its folder with --comfyui")
    if options.steps:
        learning(roots[0], options.steps, options.seed)
    else:
        speed(roots[0], options.updates + WARM_UP)


def learning(root: Path, steps: int, seed: int) -> None:
    """Let the graph learn, and print what it did."""
    base, begin = make_base(Path(tempfile.mkdtemp())), time.monotonic()
    run_script(root, CHILD, base, {"clock": "", "widgets": widgets(steps, seed)}, timeout=7200)
    summary = json.loads((base / "output/g2rpo/graph/summary.json").read_text())
    print(
        f"{root.name}, {summary['steps']} steps, {summary['seconds']:.0f} s of training, "
        f"{time.monotonic() - begin:.0f} s in all"
    )
    for name, gain in summary["heldout_gain"].items():
        ends = f"{summary['heldout_before'][name]:.3f} → {summary['heldout_after'][name]:.3f}"
        print(f"{name}: {ends}, {gain['mean']:+.3f} ± {gain['ci95']:.3f}, p = {gain['p']:.1g}")


def speed(root: Path, updates: int) -> None:
    """Clock both in turn, and print what an update and an evaluation cost."""
    folder = Path(tempfile.mkdtemp())
    plan = {**widgets(updates, 0), "eval_every": UPDATES_PER_LOOK}
    settings = (f"train.steps={updates}", f"train.eval_every={UPDATES_PER_LOOK}")
    with Listener(str(folder / "headless"), "AF_UNIX") as one, Listener(str(folder / "graph")) as other:
        given = {"clock": other.address, "folder": str(CHILD.parent), "widgets": plan}
        inside = Thread(target=run_script, args=(root, CHILD, make_base(folder / "base"), given), daemon=True)
        command = [sys.executable, str(HEADLESS), one.address, str(folder / "run"), *settings]
        alone = subprocess.Popen(command, env=environment())
        inside.start()
        spans = in_turn(one.accept(), other.accept())
    alone.wait()
    inside.join()
    print(f"{root.name}, CPU seconds, one thread; the median of the ratios of pairs, and the outer ones")
    for kind in ("update", "evaluation"):
        headless, graph = ([time for what, time in own if what == kind][WARM_UP:] for own in spans)
        ratios = [b / a for a, b in zip(headless, graph, strict=True)]
        print(
            f"{kind}: headless {statistics.median(headless):.3f}, graph {statistics.median(graph):.3f}, "
            f"graph/headless {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
            f"{len(ratios)} pairs)"
        )


def in_turn(*children: Connection) -> list[list[tuple[str, float]]]:
    """Let the children run by turns, one span at a time; return the spans that each reports at its end."""
    said = [child.recv() for child in children]
    while "ready" in said:
        for i, child in enumerate(children):
            if said[i] == "ready":
                child.send("go")
                said[i] = child.recv()
    return said


if __name__ == "__main__":
    main()
