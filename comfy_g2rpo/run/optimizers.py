"""Optimizers of a run: AdamW, and what a checkpoint keeps of any, so that a run goes on bit for bit."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..files.safe import RunError, sound
from ..recipes import Recipe

KEY = re.compile(r"optimizer/([0-9]{1,6})/([a-z][a-z0-9_]{0,30})")
GROUP_KEY = re.compile(r"optimizer/group/([a-z][a-z0-9_]{0,30})")
MOMENTS = 256
"""Numbers that share a scale in bitsandbytes' 8-bit moments; also the length of their code."""

Optimizers = Callable[[Sequence[nn.Parameter], Recipe], torch.optim.Optimizer]
"""Makes the optimizer that a recipe names over the adapter."""


@dataclass(frozen=True)
class Kept:
    """A tensor of a parameter's state: the shapes that it may have, and the least that it may hold."""

    shapes: Callable[[Tensor], set[torch.Size]]
    least: float = -math.inf
    optional: bool = False
    whole: bool = False
    """Whether it holds whole numbers: a count, or codes."""


def alike(parameter: Tensor) -> set[torch.Size]:
    """The parameter's own shape."""
    return {parameter.shape}


def single(parameter: Tensor) -> set[torch.Size]:
    """One number."""
    return {torch.Size()}


def flat(parameter: Tensor) -> set[torch.Size]:
    """The parameter in a row, or one zero in its place."""
    return {torch.Size([parameter.numel()]), torch.Size()}


def code(parameter: Tensor) -> set[torch.Size]:
    """The table of 8-bit numbers."""
    return {torch.Size([MOMENTS])}


def scales(parameter: Tensor) -> set[torch.Size]:
    """One scale per block of 8-bit numbers."""
    return {torch.Size([-(-parameter.numel() // MOMENTS)])}


ADAM = {"step": Kept(single, 0), "exp_avg": Kept(alike), "exp_avg_sq": Kept(alike, 0)}
COUNTED = {"step": Kept(single, 0, whole=True)}
PRODIGY = COUNTED | {"s": Kept(flat), "p0": Kept(flat), "exp_avg": Kept(alike), "exp_avg_sq": Kept(alike, 0)}
EIGHT_BIT = COUNTED | {
    "state1": Kept(alike, whole=True),
    "state2": Kept(alike, whole=True),
    **{f"qmap{i}": Kept(code) for i in (1, 2)},
    **{f"absmax{i}": Kept(scales, 0) for i in (1, 2)},
}
# bitsandbytes keeps the moments of small tensors as they are.
SMALL = COUNTED | {"state1": Kept(alike), "state2": Kept(alike, 0)}
STATES: dict[str, tuple[dict[str, Kept], ...]] = {
    "AdamW": (ADAM,),
    "AdamW8bit": (EIGHT_BIT, SMALL),
    "Prodigy": (PRODIGY,),
}
"""What is kept per parameter, by the optimizer's class."""
GROUPS = {
    "Prodigy": {
        "d": float,
        "d0": float,
        "d_max": float,
        "d_numerator": float,
        "d_denom": float,
        "d_hat": float,
        "k": int,
    }
}
"""Numbers that an optimizer keeps for all parameters together."""


def adamw(parameters: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Make AdamW, in one kernel on a GPU; ValueError for an optimizer that this host lacks."""
    if recipe.optimizer != "adamw":
        raise ValueError(
            f"optimizer is {recipe.optimizer}, which the headless trainer alone has; set it to adamw"
        )
    fused = True if parameters and all(p.is_cuda for p in parameters) else None
    return torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
    )


def rate_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, done: int = 0) -> LambdaLR:
    """Return the schedule of a run of so many steps, of which some are done; ValueError for a warm-up that
    does not end within the run.

    The first step takes 1/warmup_steps of the rate and no step takes none of it: a step is too dear for that.
    The share depends on the count of steps alone, which is all that a checkpoint must hold of it.
    """
    warm = recipe.warmup_steps
    if warm and warm >= steps:
        raise ValueError(f"warmup_steps is {warm}, but the run has {steps} steps; set it below that")

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        left = 1 - min((step - warm) / (steps - warm), 1)
        return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}.get(recipe.lr_schedule, 1.0)

    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.learning_rate
    return LambdaLR(optimizer, share, last_epoch=done - 1)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimizer's state to `optimizer/<parameter>/<name>` and `optimizer/group/<name>`."""
    group = optimizer.param_groups[0]
    # Not by state_dict, in which bitsandbytes hides some of it.
    state = [optimizer.state.get(p, {}) for every in optimizer.param_groups for p in every["params"]]
    tensors = {
        f"optimizer/{i}/{name}": torch.as_tensor(value)
        for i, values in enumerate(state)
        for name, value in values.items()
    }
    numbers = GROUPS.get(type(optimizer).__name__, {})
    return tensors | {
        f"optimizer/group/{name}": torch.tensor(group[name], dtype=torch.float64)
        for name in numbers
        if name in group
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` flattened, bit for bit, or raise RunError."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kind = type(optimizer).__name__
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if not key.startswith("optimizer/"):
            continue
        if own := GROUP_KEY.fullmatch(key):
            _load_number(optimizer, kind, own[1], tensor)
            continue
        found = KEY.fullmatch(key)
        index = int(found[1]) if found else -1
        if not 0 <= index < len(parameters) or not any(
            _fits(form, found[2], tensor, parameters[index]) for form in STATES[kind]
        ):
            raise RunError(
                f"the checkpoint's optimizer state {key[:80]!a} does not fit this adapter; resume with "
                "the run's own configuration"
            )
        counted = tensor.ndim == 0 and not tensor.is_floating_point()
        state.setdefault(index, {})[found[2]] = int(tensor) if counted else tensor
    missing = [
        index
        for index, values in state.items()
        if values.keys() not in [form.keys() for form in STATES[kind]]
    ]
    if missing:
        raise RunError(
            f"the checkpoint's optimizer state {missing[0]} is incomplete; take an earlier checkpoint "
            "or start another run"
        )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(form: Mapping[str, Kept], name: str, tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor may be what an optimizer keeps under a name."""
    kept = form.get(name)
    if kept is None or tensor.shape not in kept.shapes(parameter):
        return False
    if kept.whole:
        return (
            not tensor.is_floating_point()
            and not tensor.is_complex()
            and (tensor.ndim > 0 or int(tensor) >= kept.least)
        )
    return sound(tensor, kept.least)


def _load_number(optimizer: torch.optim.Optimizer, kind: str, name: str, tensor: Tensor) -> None:
    """Take one of an optimizer's own numbers."""
    wanted = GROUPS.get(kind, {}).get(name)
    if wanted is None or tensor.ndim or not sound(tensor):
        raise RunError(
            f"the checkpoint's optimizer has a number {name!a} that is none of its own; resume with "
            "the run's own configuration"
        )
    for group in optimizer.param_groups:
        group[name] = wanted(tensor.item())


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters other values inside the context."""
    kept = [parameter.detach().clone() for parameter in parameters]

    def put(numbers: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, number in zip(parameters, numbers, strict=True):
                parameter.copy_(number)

    put(values)
    try:
        yield
    finally:
        put(kept)


@torch.no_grad()
def update_average(average: Sequence[Tensor], parameters: Sequence[Tensor], decay: float) -> None:
    """Move an exponential moving average of the adapter towards its parameters, in place."""
    for mean, parameter in zip(average, parameters, strict=True):
        mean.lerp_(parameter.detach(), 1 - decay)
