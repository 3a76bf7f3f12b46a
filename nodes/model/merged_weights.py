"""The LoRA in a layer's weight: added at every call, as training needs it, or once for a whole rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

EXACT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # weights that can simply be added to


class Delta:
    """Add the LoRA to a layer's weight when core calls it, rounded as core rounds its own patches."""

    def __init__(self, down: Tensor, up: Tensor, scale: float) -> None:
        self.down, self.up, self.scale, self.active = down, up, scale, True
        self.dtype: torch.dtype | None = None  # in which core has asked for the weight

    def __call__(self, weight: Tensor) -> Tensor:
        self.dtype = weight.dtype
        return self.added(weight) if self.active else weight

    def added(self, weight: Tensor) -> Tensor:
        """Return the sum in the weight's precision."""
        exact = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(exact) + ((self.up * self.scale) @ self.down).to(exact)).to(weight.dtype)

    @property
    def state(self) -> tuple[Any, ...]:
        """Return what tells the numbers of one moment from those of another."""
        return self.active, self.scale, self.down._version, self.up._version, self.dtype


def state_of(deltas: Mapping[str, Delta]) -> tuple[Any, ...]:
    """Return what tells all numbers of a LoRA from those of another moment."""
    return tuple(delta.state for delta in deltas.values())


def fits(model: Any, x: Tensor, extra: int) -> bool:
    """Return whether so many bytes are free beside what a forward of a batch like x needs."""
    # Core counts with twice the batch, for guidance.
    needed = model.model.memory_required([2 * len(x), *x.shape[1:]])
    return needed + extra < comfy.model_management.get_free_memory(x.device)


class MergedWeights:
    """Put the LoRA on layers for forwards without gradients, and take it off again.

    Where the sums fit into memory they stand in the layers in place of the weights, so that core neither
    copies a weight nor adds to it at every call. Other layers, such as those with weights in few bits, with
    patches that core applies while it computes, or away from the device, get the function.
    """

    def __init__(self, layers: Mapping[str, nn.Module], deltas: Mapping[str, Delta]) -> None:
        self.layers, self.deltas = layers, deltas
        self.kept: dict[str, Any] = {}
        self.spares = True  # whether memory is spent on this
        self.put_for: Any = None

    def attach(self, model: Any, x: Tensor | None) -> None:
        """Put the LoRA on; merged where the next batch of the MODEL is like x."""
        wanted = "called" if x is None or not self.spares else state_of(self.deltas)
        if self.put_for == wanted:
            return
        self.detach()
        names = [] if x is None or not self.spares else self._mergeable(x.device)
        if names and fits(model, x, sum(self._bytes(name) for name in names)):
            try:
                self._merge(names)
            except torch.cuda.OutOfMemoryError:
                self.spares = False
                self.detach()
        for name, delta in self.deltas.items():
            if name not in self.kept:
                self.layers[name].weight_function = [*self.layers[name].weight_function, delta]
        self.put_for = wanted

    def _mergeable(self, device: torch.device) -> list[str]:
        """Name the layers whose plain weights are on the device and that core has called before."""
        names = []
        for name, layer in self.layers.items():
            weight = layer._parameters.get("weight")
            plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in EXACT
            called = self.deltas[name].dtype in EXACT
            if plain and called and weight.device == device and not layer.weight_function:
                names.append(name)
        return names

    def _bytes(self, name: str) -> int:
        return self.layers[name].weight.numel() * self.deltas[name].dtype.itemsize

    @torch.no_grad()
    def _merge(self, names: Sequence[str]) -> None:
        for name in names:
            layer, delta = self.layers[name], self.deltas[name]
            weight = layer._parameters["weight"]
            self.kept[name] = weight
            if delta.active:
                merged = delta.added(weight.to(delta.dtype))
                layer._parameters["weight"] = nn.Parameter(merged, requires_grad=False)

    def detach(self) -> None:
        """Leave the layers as they were."""
        for name, weight in self.kept.items():
            self.layers[name]._parameters["weight"] = weight
        for name, delta in self.deltas.items():
            own = self.layers[name]
            if delta in own.weight_function:
                own.weight_function = [function for function in own.weight_function if function is not delta]
        self.kept, self.put_for = {}, None
