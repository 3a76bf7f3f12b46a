"""Short training runs on the bundled model, for studies that ask one question each.

A run is one single-thread process that trains until its budgets are spent. What it measures on the way is the
study's own. Results are lines of a JSONL file, and what a file holds is not run again: a stopped study goes
on, and several processes with other seeds may write to one file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comfy_g2rpo.run.evaluation import Evaluation
    from comfy_g2rpo.run.setup import Learner, Setup

ROOT = Path(__file__).resolve().parent.parent
EVALUATION_SEED = 77
"""All runs are measured from the same start noises, as those of the learning benchmark are."""
METHOD = {"name": "g2rpo", "num_steps": 8, "shift": 3.0, "group_size": 8, "granularities": [2]}
METHOD |= {"pick": "random", "pick_size": 1, "max_grad_norm": 3e-5, "learning_rate": 1.5e-3, "ema": 0.9}
"""The arm that the learning benchmark's tuning chose: one random step, stride 2, scaled gradients."""

Look = Callable[["Setup", "Learner"], Mapping[str, Any]]


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file; one that does not exist holds nothing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def configure(
    method: Mapping[str, Any],
    rewards: Sequence[Mapping[str, Any]],
    measured: Sequence[str],
    split: str,
    seed: int,
    prompts: int = 2,
) -> Any:
    """Make the configuration of a run: METHOD and what differs, rewards, held-out rewards and prompts."""
    from g2rpo_trainer.config.reading import from_dict

    train = {"seed": seed, "prompts_per_step": prompts, "steps": 1_000_000, "micro_batch": 64}
    return from_dict(
        {
            "model": {"path": str(ROOT / "models/tiny"), "width": 64, "height": 64, "max_sequence_length": 0},
            "method": {**METHOD, **method},
            "rewards": list(rewards),
            "heldout_rewards": list(measured),
            "prompts": {
                "train": str(ROOT / "prompts/shapes_train.txt"),
                "heldout": str(ROOT / f"prompts/shapes_{split}.txt"),
            },
            "train": train,
        }
    )


def one_thread() -> None:
    """Use one thread, and no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)


def train(
    config: Any, goals: Iterable[Mapping[str, float]], look: Look, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Train until every goal is reached, such as {"cpu": 12}, {"work": 5000} or {"updates": 60}.

    Returns what `look` measures of the untrained model (`before`, unless it is given), and the points (CPU
    seconds, work, updates, measures) at which a goal was reached. Work counts a forward of one latent as 1
    and its backward as 2; measuring counts for neither budget.
    """
    one_thread()
    from accelerate import Accelerator

    from comfy_g2rpo.run.iteration import iterate
    from comfy_g2rpo.run.setup import make_learner
    from g2rpo_trainer.run import prepare

    setup = prepare(config, Accelerator(cpu=True))
    learner = make_learner(setup)
    before = look(setup, learner) if before is None else before
    left, spent, points = list(goals), 0.0, []
    while left:
        begin = time.process_time()
        iterate(setup, learner, lambda phase: None)
        spent += time.process_time() - begin
        trained = 3 * setup.pace.prompts_per_step * setup.recipe.pick_size * learner.step
        now = {"cpu": spent, "work": learner.forwards + trained, "updates": learner.step}
        after = [goal for goal in left if any(now[name] < least for name, least in goal.items())]
        if len(after) < len(left):
            points.append({**now, **look(setup, learner)})
        left = after
    return {"before": dict(before), "points": points}


def evaluated(setup: Setup, learner: Learner, noises: int, steps: int = 0, apart: bool = False) -> Evaluation:
    """Measure the averaged adapter on the held-out prompts, along the run's noise levels or so many steps.

    `apart` measures, too, how far a prompt's pictures lie from one another.
    """
    import dataclasses

    from comfy_g2rpo.run.checkpoint import averaged
    from comfy_g2rpo.run.evaluation import evaluate
    from comfy_g2rpo.schedule import shifted_sigmas

    pace = dataclasses.replace(setup.pace, seed=EVALUATION_SEED, eval_noises=noises)
    sigmas = shifted_sigmas(steps, setup.recipe.shift) if steps else setup.sigmas
    with averaged(setup, learner):
        return evaluate(
            setup.policy,
            setup.judges,
            setup.prompts.heldout,
            pace,
            sigmas,
            setup.shape,
            recipe=setup.recipe if apart else None,
        )
