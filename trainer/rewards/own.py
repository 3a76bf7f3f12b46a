"""Your own reward: a function or an object in a file or a module."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from comfy_g2rpo.rewards import Reward, RewardError, Rule

from .time_limit import TimeLimited, Worker, call_in_time


def custom(name: str, path: str, seconds: float) -> Reward:
    """Load your own reward: a function (images [B, H, W, 3], prompts [B]) → [B], or an object.

    It is imported and asked in a thread of its own, and given up when it takes longer than `seconds`.
    """
    worker = Worker(f"reward {name}")
    place = path.rpartition(":")[0]
    reward = call_in_time(
        worker, lambda: loaded(name, path), seconds, f"the import of {place} for reward {name!r}"
    )
    return TimeLimited(reward, worker, seconds)


def loaded(name: str, path: str) -> Reward:
    """Import what a path names, as a reward."""
    place, _, attribute = path.rpartition(":")
    module = module_at(place)
    if not hasattr(module, attribute):
        raise RewardError(f"reward {name!r}: {place} has no {attribute!r}; check the end of path")
    found: Any = getattr(module, attribute)
    missing = [
        member
        for member in ("name", "licence", "compares_across_prompts", "score")
        if not hasattr(found, member)
    ]
    if isinstance(found, type):
        raise RewardError(
            f"reward {name!r}: {path} is a class; make an object of it in that file, and name the object"
        )
    if not missing and found.name != name:
        raise RewardError(
            f"reward {name!r}: {path} calls itself {str(found.name)[:80]!a}; write that under name"
        )
    if not missing:
        return found if isinstance(found, Reward) else with_defaults(found)
    if callable(found):
        judge = located(name, found, module)
        return Rule(name, judge, compares_across_prompts=False, licence="your own", depends_on_batch=True)
    raise RewardError(
        f"reward {name!r}: {path} is no function and lacks {', '.join(missing)}; give a function or an object"
    )


def with_defaults(found: Any) -> Reward:
    """Make a reward of an object that has the members of one; those that it lacks are a reward's defaults."""
    made = Reward()
    made.depends_on_batch = True  # nobody knows what is in it
    for member in (member for member in dir(found) if not member.startswith("_")):
        setattr(made, member, getattr(found, member))
    return made


def located(
    name: str, function: Callable[[Tensor, Sequence[str]], Any], module: ModuleType
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Let a function answer with a list as well (None = cannot judge), and name the line where it fails."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        try:
            answer = function(images, prompts)
            if isinstance(answer, (list, tuple)):
                return torch.tensor([math.nan if value is None else float(value) for value in answer])
            return (
                answer.float() if isinstance(answer, Tensor) else torch.as_tensor(answer, dtype=torch.float32)
            )
        except RewardError:
            raise
        except Exception as cause:
            lines = [
                frame.lineno for frame in extract_tb(cause.__traceback__) if frame.filename == module.__file__
            ]
            where = f" in {module.__file__}, line {lines[-1]}" if lines else ""
            raise RewardError(
                f"reward {name!r} failed with {type(cause).__name__}{where}: {cause}"
            ) from cause

    return score


def module_at(place: str) -> ModuleType:
    """Import a module by file or dotted name."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        # A name of its own, so that a file called rewards.py or torch.py hides nothing.
        spec = importlib.util.spec_from_file_location(f"g2rpo_custom_{Path(place).stem}", place)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as cause:
        raise RewardError(f"cannot import {place}: {type(cause).__name__}: {cause}") from cause
