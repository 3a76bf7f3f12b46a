"""What a stochastic step costs in reward: images after it against that without it (arXiv 2510.10767)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Plan


def step_gains(plan: Plan, scores: Tensor) -> dict[int, Tensor]:
    """Collect by schedule step what its noise raised each reward by: [R, P, images] → [R, n] each.

    The gains of `Plan.gains`, over prompts, groups and members; steps without probes are left out.
    """
    rewards, prompts = scores.shape[:2]
    gains = plan.gains(scores.flatten(0, 1)).reshape(rewards, prompts, *plan.shape[:2])
    groups: dict[int, list[int]] = {}
    for i in plan.transitions:
        edge = plan.states[i]
        groups.setdefault(plan.states[edge.parent].index, []).append(edge.group)
    found = {k: gains[:, :, sorted(set(places))].flatten(1) for k, places in sorted(groups.items())}
    return {k: values for k, values in found.items() if not values.isnan().all()}


def gain_noise(noise: Sequence[float], scores: Tensor) -> list[float]:
    """Return by how much gains may differ from noise [R] alone: √2 as much as scores [R, …] of that noise.

    At least float32's rounding at the size of the scores, which a difference no longer shows.
    """
    sizes = scores.abs().nan_to_num(0.0).flatten(1).amax(1).tolist()
    rounding = torch.finfo(torch.float32).eps
    return [2**0.5 * max(own, rounding * size) for own, size in zip(noise, sizes, strict=True)]


def gap_metrics(names: Sequence[str], plan: Plan, scores: Tensor) -> dict[str, float]:
    """Return the mean gain of every step's noise, by reward, as gap/<reward>/<step>; below 0 it costs."""
    return {
        f"gap/{name}/{k}": values.double().nanmean().item()
        for k, found in step_gains(plan, scores).items()
        for name, values in zip(names, found, strict=True)
    }


def mean_gaps(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Average the gaps of rows of metrics, by reward and schedule step; rows without any are skipped."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        for key, gap in row.items():
            kind, _, rest = key.partition("/")
            name, _, step = rest.rpartition("/")
            if kind == "gap" and isinstance(gap, (int, float)) and math.isfinite(gap) and step.isdecimal():
                found.setdefault(name, {}).setdefault(int(step), []).append(gap)
    return {
        name: {step: math.fsum(gaps) / len(gaps) for step, gaps in sorted(steps.items())}
        for name, steps in found.items()
    }


def gap_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Say by reward where exploration costs most and where least, on the average of a run."""
    lines = []
    for name, gaps in mean_gaps(rows).items():
        most, least = min(gaps, key=gaps.__getitem__), max(gaps, key=gaps.__getitem__)
        if gaps[most] >= 0:
            score = f"with its noise images score {gaps[most]:.3g} higher at sampling step {most}"
            lines.append(f"exploration costs no {name}: {score}{', the least' if least != most else ''}")
            continue
        other = f"{-gaps[least]:.3g}" if gaps[least] < 0 else "none"
        other = f", the most, and {other} at step {least}, the least" if least != most else ""
        lines.append(f"exploration costs {-gaps[most]:.3g} of {name} at sampling step {most}{other}")
    return lines
