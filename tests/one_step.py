"""Be one process of a run: take two steps, and write down the gradients, the metrics, and what the second
step sent to the other processes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from comfy_g2rpo.files.safe import write_tensors
from comfy_g2rpo.recipes import Recipe
from comfy_g2rpo.run.iteration import iterate
from comfy_g2rpo.run.setup import make_learner
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.processes import accelerator_of, together
from g2rpo_trainer.run import prepare


def main(recipe: str, out: str, *settings: str) -> None:
    """Step by plain descent: Adam would blow a gradient of nothing but rounding up to a whole step."""
    gradients: list[list[Tensor]] = []

    def descent(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=recipe.learning_rate)
        made.register_step_pre_hook(
            lambda *given: gradients.append([parameter.grad.clone() for parameter in parameters])
        )
        return made

    accelerator = accelerator_of(cpu=True)
    with together(accelerator) as (world, _):
        setup = prepare(load(recipe, list(settings)), accelerator, world=world)
        learner = make_learner(dataclasses.replace(setup, optimizer=descent))
        rows: list[dict[str, Any]] = [iterate(setup, learner, lambda phase: None)]
        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], record_shapes=True) as profile:
            rows.append(iterate(setup, learner, lambda phase: None))
    sent = [(event.name, event.input_shapes) for event in profile.events() if event.name.startswith("gloo:")]
    flat = [torch.cat([gradient.flatten() for gradient in step]) for step in gradients]
    write_tensors(Path(f"{out}.{world.index}.safetensors"), {"gradients": torch.stack(flat)})
    Path(f"{out}.{world.index}.json").write_text(json.dumps({"rows": rows, "sent": sent}))
