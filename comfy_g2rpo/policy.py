"""What a model must be able to do to be aligned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Policy(Protocol):
    """A flow model with an adapter; conditioning is one object per row that the policy alone reads."""

    def velocity(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v = ε − x₀ with guidance, float32 like x [B, …] in model space; sigma: [B], cond: B."""
        ...

    def parameters(self) -> list[nn.Parameter]:
        """List the trainable parameters (the adapter's)."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Switch the adapter off inside the context."""
        ...

    def inference(self) -> AbstractContextManager[None]:
        """Make velocity fast and free of gradients inside the context, such as by a merged adapter."""
        ...


class Trainee(Policy, Protocol):
    """A policy with all that a whole run needs: text in, pictures out, weights to save."""

    device: torch.device
    decodes_while_rolling: bool
    """Whether images may be decoded between two forwards: not where a host moves models on and off."""

    def encode(self, prompts: Sequence[str]) -> list[Any]:
        """Return one conditioning object per prompt, computed once per text."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, …] in model space to images [B, H, W, 3], float32 in [0, 1]."""
        ...

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the adapter's (down, up) by module name."""
        ...

    def training(self) -> AbstractContextManager[None]:
        """Make velocity differentiable by the adapter inside the context."""
        ...


Decoder = Callable[[Tensor], Tensor]
"""Latents [B, …] in model space → images [B, H, W, 3], float32 in [0, 1]."""
