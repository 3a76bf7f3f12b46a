"""Frozen linear layers whose weights are kept in few bits, or in the computer's memory, and are made anew
whenever they are used.

The backward pass makes a weight a second time and so keeps none: hooks that change a parameter's data between
two calls, such as diffusers' layerwise casting and group offloading, would leave it a weight of another type
or on another device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .weight_ring import Packed, Waiting, WeightRing

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
NF4_BLOCK = 64
"""Weights that share a scale in nf4 (QLoRA, arXiv 2305.14314)."""
BYTES = {"fp8": 1.0, "nf4": 0.5 + 4 / NF4_BLOCK}
"""Bytes of a weight, by the way of keeping it; fp8 has 4 more per row."""


class Whole:
    """A weight as it is."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def tensors(self) -> tuple[Tensor, ...]:
        """List what it consists of."""
        return (self.kept,)

    def like(self, tensors: Sequence[Tensor]) -> Whole:
        """Return another of its kind."""
        return Whole(*tensors)

    def to(self, device: torch.device) -> Whole:
        """Return it on a device."""
        return Whole(self.kept.to(device))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Make the weight [out, in]."""
        return self.kept.to(dtype)


class Float8:
    """A weight in float8_e4m3fn with a scale per row, a power of two; off by 1/16 at most."""

    def __init__(self, kept: Tensor, scale: Tensor) -> None:
        self.kept, self.scale = kept, scale

    @classmethod
    def of(cls, weight: Tensor) -> Float8:
        """Pack a weight [out, in]."""
        largest = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-30)
        scale = torch.exp2(torch.ceil(torch.log2(largest / LARGEST_FP8)))
        return cls((weight / scale).to(FP8), scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """List what it consists of."""
        return self.kept, self.scale

    def like(self, tensors: Sequence[Tensor]) -> Float8:
        """Return another of its kind."""
        return Float8(*tensors)

    def to(self, device: torch.device) -> Float8:
        """Return it on a device."""
        return Float8(self.kept.to(device), self.scale.to(device))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Make the weight [out, in]."""
        return self.kept.to(dtype).mul_(self.scale.to(dtype))


class NormalFloat4:
    """A weight in bitsandbytes' nf4, two to a byte, and a scale per 64 of them."""

    def __init__(
        self, kept: Tensor, scale: Tensor, code: Tensor, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        self.kept, self.scale, self.code, self.shape, self.dtype = kept, scale, code, shape, dtype

    @classmethod
    def of(cls, weight: Tensor) -> NormalFloat4:
        """Pack a weight [out, in]."""
        kept, state = bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        return cls(kept, state.absmax, state.code, weight.shape, weight.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """List what it consists of."""
        return self.kept, self.scale

    def like(self, tensors: Sequence[Tensor]) -> NormalFloat4:
        """Return another of its kind: the code, the same 16 numbers for all, stays where it is."""
        return NormalFloat4(*tensors, self.code, self.shape, self.dtype)

    def to(self, device: torch.device) -> NormalFloat4:
        """Return it on a device."""
        parts = (part.to(device) for part in (self.kept, self.scale, self.code))
        return NormalFloat4(*parts, self.shape, self.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Make the weight [out, in]."""
        functional = bitsandbytes()
        state = functional.QuantState(
            absmax=self.scale,
            shape=self.shape,
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return functional.dequantize_4bit(self.kept, state).to(dtype)


PACKINGS = {"none": Whole, "fp8": Float8.of, "nf4": NormalFloat4.of}


def bitsandbytes() -> Any:
    """Import bitsandbytes' functions, or say how to get them."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            "memory.quantization is nf4, which needs bitsandbytes; install it with: pip install "
            "bitsandbytes, or take fp8"
        ) from error
    return functional


class _Product(torch.autograd.Function):
    """x Wᵀ + b by a layer that makes its weight; the gradient is x's alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(
            x, layer.make(x.dtype, x.device), None if layer.bias is None else layer.bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.make(grad.dtype, grad.device), None


class StoredLinear(nn.Linear):
    """A frozen linear layer with a packed weight, on the device where it is used or in a ring beside it."""

    def __init__(
        self, layer: nn.Linear, quantization: str, device: torch.device, ring: WeightRing | None = None
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.in_features, self.out_features, self.device = layer.in_features, layer.out_features, device
        self.dtype = layer.weight.dtype
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        # A GPU packs faster; what is kept as it is need not go there and back.
        plain = quantization == "none" and ring is not None
        weight = layer.weight.detach() if plain else layer.weight.detach().to(device)
        packed: Packed = PACKINGS[quantization](weight)
        self.packed = packed if ring is None else ring.add(packed)

    def make(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make the weight [out, in] on a device."""
        return self.packed.to(device).weight(dtype)

    @property
    def weight(self) -> Tensor:
        """Make the weight for those who look at a layer's type, size or device, as peft does."""
        made = self.make(self.dtype, self.device)
        return made.clone() if isinstance(self.packed, Waiting) else made  # which the ring writes over

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x [..., in], in x's precision, or autocast's."""
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self)


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """List a transformer's blocks in the order of its lists: in them lie nearly all of its weights."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return [
        block
        for each in lists
        for block in each
        if any(isinstance(part, nn.Linear) for part in block.modules())
    ]


def linear_layers(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """List a block's linear layers with their parents and names."""
    for parent in block.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                yield parent, name, child


def store(
    transformer: nn.Module, quantization: str, swapped: int, device: torch.device, moving: bool = True
) -> None:
    """Give a transformer's blocks stored layers; the weights of the first `swapped` wait in main memory, but
    where nothing moves, as in an estimate.
    """
    ring = WeightRing(device) if swapped and moving else None
    for number, block in enumerate(blocks_of(transformer)):
        waits = number < swapped
        if quantization == "none" and not waits:
            continue
        for parent, name, layer in list(linear_layers(block)):
            setattr(parent, name, StoredLinear(layer, quantization, device, ring if waits else None))


def stored(transformer: nn.Module) -> list[StoredLinear]:
    """List the layers that keep their weights packed."""
    return [part for part in transformer.modules() if isinstance(part, StoredLinear)]
