"""What a model takes, before anything is loaded: weights counted, its passes run on a sketch of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from comfy_g2rpo.run.scorer import to_8_bit

from .. import families
from ..config.file_checks import read_prompts
from ..config.reading import Config
from ..model.stored_linear import BYTES, StoredLinear, blocks_of, stored
from ..model.weight_ring import SLOTS
from .card_memory import Footprint, ModelCounts, UnknownMemoryError, footprint_of
from .fewer_blocks import extrapolated
from .meta_model import Sketch, build, cond, look, pretended

if TYPE_CHECKING:
    from ..families.shared.peft_policy import PeftPolicy

TEMPLATE = 32
"""Tokens that a family puts around a prompt, at most."""
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
# PyTorch counts attention on GPUs alone: where the query stands, and how many products of matrices there are.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}


class Live(TorchDispatchMode):
    """Count the bytes of tensors that are made inside the context and still alive: `now`, and at most `peak`;
    those `before` are none.

    On a sketch, `length` is the answer where a model asks a tensor for a number: none asks for another than
    how long a text is.
    """

    def __init__(self, before: Iterable[Tensor] = (), length: int | None = None) -> None:
        super().__init__()
        self.length = length
        self.flops = 0
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in before:
            self.take(tensor, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.length is not None and func is torch.ops.aten._local_scalar_dense.default:
            return self.length
        out = func(*args, **(kwargs or {}))
        if self.length is not None:
            self.flops += operations(func, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once."""
        if tensor.layout is torch.strided:
            self.take(tensor, tensor.untyped_storage().nbytes())
        else:  # what oneDNN has laid out in its own way has no storage to see
            self.count(tensor, id(tensor), tensor.nbytes)

    def take(self, tensor: Tensor, size: int) -> None:
        """Count a tensor's storage as so many bytes, unless it has been counted."""
        storage = tensor.untyped_storage()
        self.count(storage, storage._cdata, size)

    def count(self, holder: object, key: int, size: int) -> None:
        """Count what holds numbers, once, and as long as it lives."""
        if key not in self.alive:
            self.alive[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(holder, self.forget, key)

    def forget(self, key: int) -> None:
        """Record that a storage is gone."""
        self.now -= self.alive.pop(key, 0)


def operations(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the floating-point operations of a call that multiplies matrices; 0 of any other."""
    packet = func._overloadpacket
    if packet in CPU_ATTENTION:
        (query, key), passes = args[CPU_ATTENTION[packet][0] :][:2], CPU_ATTENTION[packet][1]
        return 2 * passes * query.numel() * key.shape[-2]
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def footprint(config: Config, sketch: Sketch | None = None) -> Footprint:
    """Estimate a run's memory from its configuration, and the model's configurations and headers."""
    return footprint_of(config, count_model(config, sketch))


def count_model(config: Config, sketch: Sketch | None = None) -> ModelCounts:
    """Count a model's weights, and the bytes and operations of its passes; takes seconds."""
    sketch = sketch or look(config.model)
    policy = build(config, sketch)
    element = 2 if config.model.dtype == "bf16" else 4
    latent = 1
    for side in families.largest_shape(policy, config.model):
        latent *= side
    (rolling, forward), (decoding, decode), (learning, update) = measure(config, policy, sketch)
    layers, adapter = stored(policy.transformer), count_of(policy.parameters())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    kept = config.memory.quantization
    swapped = [packed_bytes(layer, kept, element) for layer in swapped_layers(config, policy)]
    return ModelCounts(
        parameters=weights + count_of(tensors_of(policy.transformer)) - adapter,
        transformer=transformer_bytes(config, policy),
        vae=plain_bytes(policy.vae, ()),
        adapter=adapter,
        swapped=SLOTS * max(swapped, default=0),
        merged=merged_bytes(config, policy),
        latent=latent,
        rolling=rolling,
        decoding=decoding,
        learning=learning,
        forward=forward / config.train.slots,
        update=update / config.train.micro_batch,
        decode=decode / decoded_at_once(config),
        tokens=text_length(config, policy),
        text_parameters=dict(sketch.text_parameters),
    )


def transformer_bytes(config: Config, policy: PeftPolicy) -> int:
    """Count the bytes of a transformer that stay on the card."""
    element = 2 if config.model.dtype == "bf16" else 4
    away = set(map(id, swapped_layers(config, policy)))
    here = (layer for layer in stored(policy.transformer) if id(layer) not in away)
    packed = sum(packed_bytes(layer, config.memory.quantization, element) for layer in here)
    return int(plain_bytes(policy.transformer, policy.parameters()) + packed)


def swapped_layers(config: Config, policy: PeftPolicy) -> list[StoredLinear]:
    """List the layers whose weights wait in main memory."""
    return [
        layer
        for block in blocks_of(policy.transformer)[: config.memory.block_swap]
        for layer in stored(block)
    ]


def packed_bytes(layer: StoredLinear, quantization: str, element: int) -> int:
    """Count the bytes of a layer's weight as it is kept."""
    count, rows = layer.in_features * layer.out_features, 4 * layer.out_features
    return int(count * BYTES.get(quantization, element) + (rows if quantization == "fp8" else 0))


def plain_bytes(module: nn.Module, without: Sequence[Tensor]) -> int:
    """Count the bytes of a module's own tensors, an adapter's left out."""
    left = {id(tensor) for tensor in without}
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors_of(module) if id(tensor) not in left
    )


def tensors_of(module: nn.Module) -> list[Tensor]:
    """List a module's tensors: parameters, buffers, and tables that some keep beside them."""
    tables = [
        value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)
    ]
    return [*module.parameters(), *module.buffers(), *tables]


def count_of(tensors: Sequence[Tensor]) -> int:
    """Count the numbers of tensors."""
    return sum(tensor.numel() for tensor in tensors)


def merged_bytes(config: Config, policy: PeftPolicy) -> int:
    """Count the copies of weights that rollouts in fp32 work on, where none is packed or elsewhere."""
    plain = config.memory.quantization == "none" and not config.memory.block_swap
    return policy.rollout_copies() if plain and config.model.dtype == "fp32" else 0


def decoded_at_once(config: Config) -> int:
    """Return how many latents a rollout hands over to the decoder at once."""
    return min(config.train.decode_batch, config.train.slots)


def measure(config: Config, policy: PeftPolicy, sketch: Sketch) -> list[tuple[int, int]]:
    """Return the bytes alive at most, and the operations, of a rollout's forward, a decoding and an update's
    pass.
    """
    train, shape = config.train, families.largest_shape(policy, config.model)
    length = text_length(config, policy)
    with pretended(policy):
        one = cond(policy, sketch, length, config.model.reference_size)
        if policy.blank is not None and policy.guidance > 1:
            policy._prompts[policy.key(policy.blank)] = one

        def forward(rows: int) -> Tensor:
            return policy.velocity(torch.empty(rows, *shape), torch.empty(rows), [one] * rows)

        def roll() -> None:
            forward(train.slots)

        def decode() -> None:
            to_8_bit(policy.decode(torch.empty(decoded_at_once(config), *shape)))

        def learn() -> None:
            forward(train.micro_batch).square().mean().backward()

        before = weights_of(policy)

        def passes() -> list[int]:
            rolling = alive(roll, policy.inference(), before, length)
            return [*rolling, *alive(learn, policy.training(), before, length)]

        try:
            decoded = alive(decode, policy.inference(), before, length)
            rolling, forward, learning, update = extrapolated(policy.transformer, passes)
            return [(rolling, forward), decoded, (learning, update)]
        except UNKNOWN as error:
            raise UnknownMemoryError(
                f"memory cannot be estimated for this model, whose forward looks at numbers ({error})"
            ) from error


def weights_of(policy: PeftPolicy) -> list[Tensor]:
    """List all tensors of a model."""
    packed = [tensor for layer in stored(policy.transformer) for tensor in layer.packed.tensors()]
    return [*packed, *tensors_of(policy.transformer), *tensors_of(policy.vae)]


def alive(
    work: Callable[[], object], inside: AbstractContextManager[None], before: Iterable[Tensor], length: int
) -> tuple[int, int]:
    """Return the bytes that work has alive at most, its context's included and those of `before` not, and its
    floating-point operations.
    """
    with Live(before, length) as live, inside:
        work()
    return live.peak, live.flops


def text_length(config: Config, policy: PeftPolicy) -> int:
    """Return the most tokens that a prompt of the configuration can have."""
    if policy.fills_text:
        return policy.max_sequence_length
    texts = read_prompts(config)
    # A token has at least a byte; the template around a prompt is short.
    known = (*texts.train, *texts.heldout, config.model.negative_prompt or "")
    longest = max(len(text.encode()) for text in known) + TEMPLATE
    return policy.text_tokens(longest, config.model.reference_size)
