"""What a run needs of its card, before anything is loaded: weights counted, the rest run on a sketch."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
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

from comfy_g2rpo.prompts import load as load_prompts
from comfy_g2rpo.recipes import Recipe, build_plan
from comfy_g2rpo.rewards.models.catalogue import KNOWN
from comfy_g2rpo.run.scorer import to_8_bit

from .. import families
from ..config.reading import Config, make_recipe
from ..config.reward_checks import rewards_root
from ..model.stored_linear import BYTES, StoredLinear, blocks_of, stored
from .meta_model import Sketch, build, cond, look, pretended

if TYPE_CHECKING:
    from ..families.shared.peft_policy import PeftPolicy

GIB = 2**30
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "prodigy": 16.0}
"""Bytes that an optimizer keeps per parameter of the adapter."""
CARD = 0.7 * GIB
"""What a CUDA context and its libraries take before anything is loaded."""
TEMPLATE = 32
"""Tokens that a family puts around a prompt, at most."""
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
PHASES = ("encode", "rollout", "decode", "update")


class Live(TorchDispatchMode):
    """Count the bytes of tensors that are made inside the context and still alive: `now`, and at most `peak`;
    those `before` are none.

    On a sketch, `length` is the answer where a model asks a tensor for a number: none asks for another than
    how long a text is.
    """

    def __init__(self, before: Iterable[Tensor] = (), length: int | None = None) -> None:
        super().__init__()
        self.length = length
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


class UnknownMemoryError(ValueError):
    """A model whose memory a sketch of it does not tell."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the card: what stays during training, and the peak of every phase, all included."""

    parts: Mapping[str, int]
    peaks: Mapping[str, int]

    @property
    def need(self) -> int:
        """Return what a run takes at most."""
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """Name the phase that takes most."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    def lines(self) -> list[tuple[str, str]]:
        """Lay it out for reading."""
        parts, peaks = (
            ", ".join(f"{name} {sized(size)}" for name, size in table.items() if size)
            for table in (self.parts, self.peaks)
        )
        return [
            ("memory, estimated", f"{sized(self.need)}, in {self.phase}"),
            ("  what stays", parts),
            ("  peaks", peaks),
        ]


def sized(size: float) -> str:
    """Write bytes as GiB, small ones as MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def footprint(config: Config, sketch: Sketch | None = None) -> Footprint:
    """Estimate a run's memory from its configuration, and the model's configurations and headers."""
    sketch = sketch or look(config.model)
    policy, recipe = build(config, sketch), make_recipe(config)
    parts = resident(config, policy, recipe)
    element = 2 if config.model.dtype == "bf16" else 4
    encoders = 0 if config.memory.text_encoders == "cpu" else element * sum(sketch.text_parameters.values())
    rolling, decoding, learning = measure(config, policy, sketch)
    swapped = max(
        (packed_bytes(layer, "none", element) for layer in swapped_layers(config, policy)), default=0
    )
    stays, judging = sum(parts.values()), max(reward_sizes(config), default=0)
    states, merged = rollout_states(config, policy, recipe), merged_bytes(config, policy)
    peaks = {
        "encode": encoders + parts["vae"] + parts["rewards"],
        "rollout": stays + swapped + states + merged + rolling,
        # Rewards that take turns are on the card while they judge, which is never during a forward.
        "decode": stays + states + merged + max(decoding, 0 if parts["rewards"] else judging),
        # The gradients of earlier micro-batches are there when the next one is at its peak.
        "update": stays + swapped + states + 4 * count_of(policy.parameters()) + learning,
    }
    return Footprint(parts, peaks)


def resident(config: Config, policy: PeftPolicy, recipe: Recipe) -> dict[str, int]:
    """Count what stays on the card during training."""
    element = 2 if config.model.dtype == "bf16" else 4
    transformer = plain_bytes(policy.transformer, policy.parameters())
    away = set(map(id, swapped_layers(config, policy)))
    here = (layer for layer in stored(policy.transformer) if id(layer) not in away)
    transformer += sum(packed_bytes(layer, config.memory.quantization, element) for layer in here)
    count = count_of(policy.parameters())
    copies = bool(recipe.ema) + bool(recipe.kl and recipe.kl_reference == "start")
    return {
        "transformer": int(transformer),
        "vae": plain_bytes(policy.vae, ()),
        "adapter": int(4 * count * (1 + copies)),
        "optimizer": int(count * OPTIMIZER_BYTES[recipe.optimizer]),
        "rewards": 0 if config.memory.rewards_in_turn else sum(reward_sizes(config)),
    }


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


def reward_sizes(config: Config) -> list[int]:
    """List the bytes of reward models' weights on the card: by their files, or as they are published."""
    names = {
        reward.name
        for reward in (*config.rewards, *config.heldout_rewards)
        if not reward.path and not reward.url and reward.device != "cpu"
    }
    sizes = []
    for name in sorted(names):
        files = list((rewards_root() / name).glob("*.safetensors"))
        published = round(KNOWN[name].gigabytes * 1e9) if name in KNOWN else 0
        sizes.append(sum(file.stat().st_size for file in files) if files else published)
    return sizes


def merged_bytes(config: Config, policy: PeftPolicy) -> int:
    """Count the copies of weights that rollouts in fp32 work on, where none is packed or elsewhere."""
    plain = config.memory.quantization == "none" and not config.memory.block_swap
    return policy.rollout_copies() if plain and config.model.dtype == "fp32" else 0


def rollout_states(config: Config, policy: PeftPolicy, recipe: Recipe) -> int:
    """Estimate the latents that a rollout keeps: forks, and states that wait for their children."""
    plan = build_plan(recipe)
    latent = 4
    for side in families.largest_shape(policy, config.model):
        latent *= side
    forks = 3 * config.train.prompts_per_step * len(plan.forks)
    return latent * (forks + 4 * config.train.slots)


def measure(config: Config, policy: PeftPolicy, sketch: Sketch) -> tuple[int, int, int]:
    """Return the bytes that a rollout's forward, a decoding and an update's pass have alive at most."""
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
            # As many as a rollout hands over at once.
            to_8_bit(policy.decode(torch.empty(min(train.decode_batch, train.slots), *shape)))

        def learn() -> None:
            forward(train.micro_batch).square().mean().backward()

        before = weights_of(policy)
        try:
            rolling, decoding = (alive(work, policy.inference(), before, length) for work in (roll, decode))
            return rolling, decoding, alive(learn, policy.training(), before, length)
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
) -> int:
    """Return the bytes that work has alive at most, its context's included, those of `before` not."""
    with Live(before, length) as live, inside:
        work()
    return live.peak


def text_length(config: Config, policy: PeftPolicy) -> int:
    """Return the most tokens that a prompt of the configuration can have."""
    if policy.fills_text:
        return policy.max_sequence_length
    heldout = Path(config.prompts.heldout) if config.prompts.heldout else None
    texts = load_prompts(Path(config.prompts.train), heldout, config.prompts.heldout_share, config.train.seed)
    # A token has at least a byte; the template around a prompt is short.
    known = (*texts.train, *texts.heldout, config.model.negative_prompt or "")
    longest = max(len(text.encode()) for text in known) + TEMPLATE
    return policy.text_tokens(longest, config.model.reference_size)
