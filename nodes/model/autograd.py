"""Contexts in which a model that core runs for inference only can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn
from torch.autograd.graph import allow_mutation_on_saved_tensors


@contextmanager
def gradients() -> Iterator[None]:
    """Leave the executor's inference mode, and let core know."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if hasattr(comfy.model_management, "in_training"):
            stack.callback(setattr, comfy.model_management, "in_training", comfy.model_management.in_training)
            comfy.model_management.in_training = True
        yield


@contextmanager
def ordinary_weights(model: nn.Module) -> Iterator[None]:
    """Show every weight as an ordinary tensor over the same memory: autograd refuses inference tensors."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    seen: dict[int, Tensor] = {}
    try:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    # Quantised weights are subclasses, which take no part in autograd as they are.
                    if type(tensor) not in (Tensor, nn.Parameter):
                        continue
                    kept.append((store, name, tensor))
                    if id(tensor) not in seen:
                        seen[id(tensor)] = _ordinary(tensor)
                    store[name] = seen[id(tensor)]
        yield
    finally:
        for store, name, tensor in kept:
            store[name] = tensor


def _ordinary(tensor: Tensor) -> Tensor:
    """Return an ordinary tensor, or parameter without gradient, over the memory of another one."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def pytorch_attention(function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Replace whichever attention core has chosen: not every kernel has a backward."""
    return attention_pytorch(*args, **options)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Recompute each block of the model in the backward instead of keeping its activations."""
    blocks = {block for part in model.children() if isinstance(part, nn.ModuleList) for block in part}
    before = {block: block.__dict__.get("forward") for block in blocks}
    try:
        for block in blocks:
            block.forward = _recomputing(block.forward)
        yield
    finally:
        for block, forward in before.items():
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a block's forward in a checkpoint; it gets copies of its inputs, which it may edit in place."""

    def call(*args: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        tensors: list[Tensor] = []
        given = _taken_out((args, options), tensors)
        shape: list[Any] = []
        anchor = torch.zeros((), requires_grad=True, device=tensors[0].device if tensors else None)
        outputs = _Recompute.apply(forward, given, shape, anchor, *tensors)
        return _put_back(shape[0], list(outputs))

    return call


class _Recompute(torch.autograd.Function):
    """Run without a graph, keep the inputs, and run again with one when the gradient arrives."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], given: Any, shape: list[Any], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.given = run, given
        ctx.kept = [tensor.detach().clone() for tensor in tensors]
        ctx.wanted = [tensor.requires_grad for tensor in tensors]
        args, options = _put_back(given, [tensor.detach().clone() for tensor in tensors])
        outputs: list[Tensor] = []
        shape.append(_taken_out(run(*args, **options), outputs))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [tensor.requires_grad_(wanted) for tensor, wanted in zip(ctx.kept, ctx.wanted, strict=True)]
        with torch.enable_grad(), allow_mutation_on_saved_tensors():
            args, options = _put_back(ctx.given, [tensor.clone() for tensor in inputs])
            outputs: list[Tensor] = []
            _taken_out(ctx.run(*args, **options), outputs)
            reached = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if out.requires_grad]
            torch.autograd.backward([out for out, _ in reached], [grad for _, grad in reached])
        return (None, None, None, None, *[tensor.grad for tensor in inputs])


class _Place(int):
    """Where a tensor was taken out of a structure."""


def _taken_out(value: Any, tensors: list[Tensor]) -> Any:
    """Copy a structure of lists, tuples and dicts, its floating tensors moved to `tensors`."""
    if isinstance(value, Tensor) and value.is_floating_point():
        tensors.append(value)
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _taken_out(part, tensors) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_taken_out(part, tensors) for part in value)
    return value


def _put_back(value: Any, tensors: list[Tensor]) -> Any:
    """Undo _taken_out with these tensors."""
    if isinstance(value, _Place):
        return tensors[value]
    if isinstance(value, dict):
        return {key: _put_back(part, tensors) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_put_back(part, tensors) for part in value)
    return value
