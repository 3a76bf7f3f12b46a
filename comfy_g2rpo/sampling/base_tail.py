"""Draw without exploration, the last steps without the adapter: its layout, the base's texture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..plan import deterministic
from ..policy import Policy
from ..speed.fitting_rollout import roll_out


def tail_steps(num_steps: int, share: float) -> int:
    """Return how many of the steps are the tail: the nearest whole number."""
    if not 0 <= share <= 1:
        raise ValueError(f"tail is {share}; it must lie between 0 and 1")
    return round(share * num_steps)


def draw_with_tail(
    policy: Policy,
    sigmas: Tensor,
    conds: Sequence[Any],
    seeds: Sequence[int],
    shape: Sequence[int],
    tail: float = 0.0,
    *,
    slots: int = 64,
    check: Callable[[], None] | None = None,
    device: Any = "cpu",
) -> Tensor:
    """Return latents [P, …] along sigmas [T+1] from the noises of `seeds`; the last `tail` share of the steps
    runs `reference()`.

    Both parts are the very steps of the whole: a tail of 0 and of 1 are the model with and without its
    adapter, to the bit.
    """
    count = len(sigmas) - 1
    split = count - tail_steps(count, tail)
    latents = None
    if split:
        made = roll_out(
            policy,
            deterministic(split),
            sigmas[: split + 1],
            conds,
            seeds,
            shape,
            slots=slots,
            check=check,
            device=device,
        )
        latents = made.latents[:, 0]
    if split < count:
        plan = deterministic(count - split)
        with policy.reference():
            made = roll_out(
                policy,
                plan,
                sigmas[split:],
                conds,
                seeds,
                shape,
                slots=slots,
                check=check,
                device=device,
                start=latents,
            )
        latents = made.latents[:, 0]
    return latents
