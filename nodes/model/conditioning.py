"""Rows with conditioning and a noise level of their own: which share a forward, and how they are joined.

`conds` below are core's processed ones: {"positive": [entry, …], "negative": […]}; an entry's `model_conds`
are what the model gets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

Conds = dict[str, list[dict[str, Any]]]

# What core looks up at the first row's noise level alone, or ties to one entry.
LEVEL_BOUND = {"control", "hooks", "timestep_start", "timestep_end"}
ENTRY_LOCAL = LEVEL_BOUND | {"area", "mask", "gligen", "default", "strength"}
PLAIN_OPTIONS = {"transformer_options", "to_load_options", "disable_cfg1_optimization"}
PLAIN_TRANSFORMER_OPTIONS = {"sample_sigmas", "optimized_attention_override", "wrappers", "callbacks"}


def processed(model: Any, conds: dict[str, Any], like: Tensor, device: torch.device) -> Conds:
    """Turn CONDITIONING by kind into what the model takes, for one latent like `like` [1, …]."""
    entries = {kind: comfy.sampler_helpers.convert_cond(cond) for kind, cond in conds.items()}
    return first_row(
        comfy.samplers.process_conds(model, torch.zeros_like(like), entries, device, torch.zeros_like(like))
    )


def mapped(conds: Conds, change: Callable[[Tensor], Tensor]) -> Conds:
    """Apply a function to every tensor that the model gets; the conditioning itself stays as it was."""

    def cond(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        return [cond(part) for part in value] if isinstance(value, list) else value

    def entry(given: dict[str, Any]) -> dict[str, Any]:
        changed = {}
        for name, value in given["model_conds"].items():
            changed[name] = copy.copy(value)
            changed[name].cond = cond(value.cond)
        return {**given, "model_conds": changed}

    return {kind: [entry(given) for given in entries] for kind, entries in conds.items()}


def first_row(conds: Conds) -> Conds:
    """Return what a batch of one latent gets of conditioning that is itself a batch."""
    return mapped(conds, lambda tensor: tensor[:1] if tensor.ndim else tensor)


def level_bound(options: dict[str, Any], conds: Conds) -> bool:
    """Return whether something reads the first row's noise level alone, as schedules and ControlNets do."""
    transformer = options.get("transformer_options", {})
    wrappers = [group for kind in transformer.get("wrappers", {}).values() for group in kind.values()]
    if set(options) - PLAIN_OPTIONS or set(transformer) - PLAIN_TRANSFORMER_OPTIONS or any(wrappers):
        return True
    return any(LEVEL_BOUND & set(entry) for entries in conds.values() for entry in entries)


def joinable(one: Conds, other: Conds) -> bool:
    """Return whether two rows may share a forward: plain entries with tensors of equal shapes."""
    counts = [{kind: len(entries) for kind, entries in row.items()} for row in (one, other)]
    if counts[0] != counts[1] or max(counts[0].values(), default=0) > 1:
        return False
    for kind in one:
        for a, b in zip(one[kind], other[kind], strict=True):
            first, second = a["model_conds"], b["model_conds"]
            if ENTRY_LOCAL & (set(a) | set(b)) or first.keys() != second.keys():
                return False
            if not all(_alike(value, second[name]) for name, value in first.items()):
                return False
    return True


def _alike(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, comfy.conds.CONDConstant):
        return one.can_concat(other)
    return _shape(one.cond) == _shape(other.cond)


def _shape(cond: Any) -> Any:
    """Return the shape of a tensor or of a list of them; anything else equals nothing, not even itself."""
    if isinstance(cond, Tensor):
        return tuple(cond.shape), cond.dtype
    return [_shape(part) for part in cond] if isinstance(cond, list) else object()


def joined(rows: Sequence[Conds]) -> Conds:
    """Return one conditioning whose tensors have a row per element of `rows`, all joinable."""
    if all(row is rows[0] for row in rows):
        return rows[0]

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        return [join(list(parts)) for parts in zip(*values, strict=True)]

    made: Conds = {}
    for kind, entries in rows[0].items():
        made[kind] = []
        for i, entry in enumerate(entries):
            model_conds = {}
            for name, value in entry["model_conds"].items():
                model_conds[name] = copy.copy(value)
                if not isinstance(value, comfy.conds.CONDConstant):
                    model_conds[name].cond = join([row[kind][i]["model_conds"][name].cond for row in rows])
            made[kind].append({**entry, "model_conds": model_conds})
    return made


def grouped(rows: Sequence[Conds], sigma: Tensor, options: dict[str, Any]) -> list[list[int]]:
    """Sort the rows of a batch into forwards."""
    groups: list[list[int]] = []
    levels = sigma.tolist()
    bound = {key: level_bound(options, row) for key, row in {id(row): row for row in rows}.items()}
    for i, row in enumerate(rows):
        for group in groups:
            first = group[0]
            same_level = levels[first] == levels[i] or not (bound[id(row)] or bound[id(rows[first])])
            if same_level and (rows[first] is row or joinable(rows[first], row)):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def velocity(
    guider: Any,
    x: Tensor,
    sigma: Tensor,
    rows: Sequence[Conds],
    options: dict[str, Any],
    seed: int | None = None,
) -> Tensor:
    """Return v = (x − denoised)/σ [B, …] with the guider's guidance, for x in model space and sigma [B]."""
    parts, groups = [], grouped(rows, sigma, options)
    for group in groups:
        guider.conds = joined([rows[i] for i in group])
        one = len(groups) == 1
        x_part, sigma_part = (x, sigma) if one else (x[group], sigma[group])
        denoised = guider(x_part, sigma_part, model_options=options, seed=seed)
        parts.append((x_part - denoised.float()) / sigma_part.view(-1, *[1] * (x.ndim - 1)))
    if len(groups) == 1:
        return parts[0]
    order = torch.tensor([i for group in groups for i in group], device=x.device).argsort()
    return torch.cat(parts)[order]
