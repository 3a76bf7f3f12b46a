"""A LoRA in the form that 16-bit models and rollouts need: in the weights' precision, with few operations.

peft's layer converts the input, both halves of the adapter and the sum in every forward, or leaves that to
autocast, which converts the frozen weights' inputs and outputs, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .stored_linear import StoredLinear

SIBLINGS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
"""Layers of a module that see one input, most of the time."""


class Down:
    """The adapters' first halves of layers that see one input, as one product x [n, in] → [n, Σ r]."""

    def __init__(self) -> None:
        self.members: list[LeanLayer] = []
        self.drop()

    def take(self) -> None:
        """Take the adapters as they are now."""
        parts = [member.half("A") for member in self.members]
        self.sizes = [len(part) for part in parts]
        self.weight = torch.cat(parts).T

    def drop(self) -> None:
        """Let the adapters go."""
        self.weight: Tensor | None = None  # [in, Σ r]
        self.forget()

    def forget(self) -> None:
        """Let the last input go."""
        self.seen: Tensor | None = None
        self.rows: Tensor | None = None
        self.found: tuple[Tensor, ...] = ()
        self.taken = 0

    def of(self, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Return an input x [..., in] as rows [n, in], and a member's share of the product [n, r]."""
        if len(self.members) == 1:
            rows = x.reshape(-1, x.shape[-1])
            return rows, rows @ self.weight
        if torch.compiler.is_compiling():  # a graph remembers nothing
            rows = x.reshape(-1, x.shape[-1])
            return rows, rows @ self.weight.split(self.sizes, 1)[place]
        if x is not self.seen:
            self.seen, self.taken, self.rows = x, 0, x.reshape(-1, x.shape[-1])
            self.found = (self.rows @ self.weight).split(self.sizes, 1)
        rows, share, self.taken = self.rows, self.found[place], self.taken + 1
        if self.taken == len(self.members):
            self.forget()
        return rows, share


class LeanLayer(nn.Module):
    """A linear layer with its active adapters."""

    def __init__(self, layer: Any, down: Down) -> None:
        super().__init__()
        self.layer, self.down, self.place = layer, down, len(down.members)
        self.drop()
        down.members.append(self)

    def half(self, letter: str) -> Tensor:
        """Return A [r, in], or B [out, r] with its scale, in the weights' precision."""
        layer, base = self.layer, self.layer.get_base_layer()
        dtype = base.dtype if isinstance(base, StoredLinear) else base.weight.dtype
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if letter == "A":
            halves = [layer.lora_A[name].weight for name in names]
        else:
            halves = [layer.lora_B[name].weight * layer.scaling[name] for name in names]
        return (halves[0] if len(halves) == 1 else torch.cat(halves, "AB".index(letter))).to(dtype)

    def take(self) -> None:
        """Take the adapter's second half as it is now, and the weight as products read it."""
        base = self.layer.get_base_layer()
        self.up = self.half("B").T
        self.weight = base.weight.T if type(base) is nn.Linear else None

    def drop(self) -> None:
        """Let both go."""
        self.up: Tensor | None = None  # [r, out]
        self.weight: Tensor | None = None  # [in, out]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., in] in the weights' precision."""
        base = self.layer.get_base_layer()
        if self.layer.disable_adapters:
            return base(x)
        if self.up is None:
            rows = x.reshape(-1, x.shape[-1])
            share = F.linear(rows, self.half("A"))
            return torch.addmm(base(rows), share, self.half("B").T).view(*x.shape[:-1], -1)
        rows, share = self.down.of(x, self.place)
        if self.weight is None:
            out = base(rows)
        elif base.bias is None:
            out = torch.mm(rows, self.weight)
        else:
            out = torch.addmm(base.bias, rows, self.weight)
        return out.addmm_(share, self.up).view(*x.shape[:-1], -1)


class LeanAdapters:
    """The lean layers of a transformer, which take the places of peft's when asked to."""

    def __init__(self, transformer: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.places = list[tuple[nn.Module, str, nn.Module, LeanLayer]]()
        known: dict[tuple[str, Any], Down] = {}
        for path, layer in layers.items():
            worn = any(name in layer.lora_A for name in layer.active_adapters)
            if not worn or not isinstance(layer.get_base_layer(), nn.Linear):
                continue  # peft's own does
            owner, _, name = path.rpartition(".")
            kind = next((names for names in SIBLINGS if name in names), name)
            down = known.setdefault((owner, kind), Down())
            self.places.append((transformer.get_submodule(owner), name, layer, LeanLayer(layer, down)))
        self.parts: list[Down | LeanLayer] = [*known.values(), *(lean for *_, lean in self.places)]
        self.in_place = self.cast = False

    def used(self, cast: bool) -> AbstractContextManager[None]:
        """Use the lean layers inside; `cast` where nothing is learned there, and no gradient taken."""
        return self.being(True, cast)

    def put_aside(self) -> AbstractContextManager[None]:
        """Use peft's layers inside."""
        return self.being(False, self.cast)

    @contextmanager
    def being(self, in_place: bool, cast: bool) -> Iterator[None]:
        """Be so inside, and as before afterwards."""
        before = self.in_place, self.cast
        try:
            self.become(in_place, cast)
            yield
        finally:
            self.become(*before)

    def become(self, in_place: bool, cast: bool) -> None:
        """Put one kind of layers into the places, and cast the adapters or let the casts go."""
        moves, casts = in_place != self.in_place, cast != self.cast
        self.in_place, self.cast = in_place, cast  # first: what is broken off here is undone
        if moves:
            for owner, name, layer, lean in self.places:
                setattr(owner, name, lean if in_place else layer)
        if casts:
            with torch.no_grad():
                for part in self.parts:
                    part.take() if cast else part.drop()
