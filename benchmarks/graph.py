"""Does Train LoRA learn in ComfyUI what the headless demo learns? The recipe of recipes/demo.yaml, on the
tiny model, in a real ComfyUI.

    python benchmarks/graph.py [--steps 240] [--seed 0] [--comfyui ~/comfy/ComfyUI]

Prints the held-out scores before and after, paired by prompt. Compare with `g2rpo train demo --set
train.seed=SEED`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from comfy_host import comfyui_roots, make_base, run_script  # noqa: E402

from g2rpo_trainer.config.reading import load  # noqa: E402

CHILD = Path(__file__).with_name("graph_child.py")


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
    parser.add_argument("--steps", type=int, default=load("demo").train.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--comfyui", type=Path, default=None)
    options = parser.parse_args(arguments)
    roots = [options.comfyui.expanduser()] if options.comfyui else comfyui_roots()
    if not roots:
        sys.exit("error: no ComfyUI found; give its folder with --comfyui")
    for root in roots[:1]:
        base, begin = make_base(Path(tempfile.mkdtemp())), time.monotonic()
        run_script(root, CHILD, base, widgets(options.steps, options.seed), timeout=7200)
        summary = json.loads((base / "output/g2rpo/graph/summary.json").read_text())
        print(
            f"{root.name}, {summary['steps']} steps, {summary['seconds']:.0f} s of training, "
            f"{time.monotonic() - begin:.0f} s in all"
        )
        for name, gain in summary["heldout_gain"].items():
            ends = f"{summary['heldout_before'][name]:.3f} → {summary['heldout_after'][name]:.3f}"
            print(f"{name}: {ends}, {gain['mean']:+.3f} ± {gain['ci95']:.3f}, p = {gain['p']:.1g}")


if __name__ == "__main__":
    main()
