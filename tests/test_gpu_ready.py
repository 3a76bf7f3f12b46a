"""What keeps a GPU busy, counted without one: full batches of few shapes, few copies, nothing that waits.

The meta device stands for the GPU: what asks it for a number fails.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from some_cases import some
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import SHAPE, ToyPolicy

from comfy_g2rpo.plan import ROOT
from comfy_g2rpo.recipes import RECIPES, build_plan
from comfy_g2rpo.schedule import shifted_sigmas
from comfy_g2rpo.speed.fitting_rollout import heights, roll_out
from comfy_g2rpo.trees.pruned import PrunedPlan

CARD = "meta"
GROWING = ("branch_grpo", "tree_grpo", "flow_grpo_fast")
"""Recipes whose few forwards begin with one state: the first of them cannot be full."""
PLAIN = [
    name
    for name, made in RECIPES.items()
    if made.objective not in ("nft", "awm") and not isinstance(build_plan(made), PrunedPlan)
]


class Device(TorchDispatchMode):
    """Counts what passes between the processor and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        kinds = {
            leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)
        }
        if {CARD, "cpu"} <= kinds:
            self.passed[str(func)] += 1
        return out


class OnCard(ToyPolicy):
    """A policy that answers at once."""

    def velocity(self, x, sigma, cond):
        assert {x.device.type, sigma.device.type} == {CARD}
        self.calls.append(len(x))
        return x * sigma.view(-1, 1, 1, 1)


def rolled(name: str, prompts: int, slots: int) -> tuple[list[int], Device]:
    """Roll out a recipe at its published size; return the rows of each forward, and what passed."""
    made, policy = RECIPES[name], OnCard()
    sigmas = shifted_sigmas(made.num_steps, made.shift)
    how = {"slots": slots, "device": CARD, "sink": lambda prompts, images, latents: None}
    with Device() as device:
        found = roll_out(policy, build_plan(made), sigmas, [0.0] * prompts, range(prompts), SHAPE, **how)
    assert sum(policy.calls) == found.nfe == prompts * build_plan(made).forwards
    return policy.calls, device


@pytest.mark.parametrize(("prompts", "slots"), [(1, 4), (2, 16)])
@pytest.mark.parametrize("name", some(PLAIN, 4))
def test_forwards_are_full_of_few_shapes_and_stop_for_nothing(name: str, prompts: int, slots: int) -> None:
    calls, device = rolled(name, prompts, slots)
    full = sum(calls) / len(calls) / slots
    assert full >= (0.75 if name in GROWING else 0.92)
    assert len(set(calls)) <= 4
    # Coefficients, noise and noise levels of a forward, and of what it finishes.
    assert sum(device.passed.values()) <= 4 * len(calls)


def test_no_plan_needs_more_forwards_than_its_longest_way_or_its_states() -> None:
    """Hu's rule is optimal for trees, so chains reach the bound exactly where few enough wait: with 5 slots
    twelve are too many, and the deepest go first.
    """
    plan = build_plan(RECIPES["flow_grpo"])
    length = max(heights(plan)[i] for i, state in enumerate(plan.states) if state.parent == ROOT)
    for slots in (1, 6, 7, 8, 11, 64):
        calls, _ = rolled("flow_grpo", 1, slots)
        assert len(calls) == max(-(-plan.forwards // slots), length)
