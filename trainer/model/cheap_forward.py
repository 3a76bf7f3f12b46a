"""Cheaper velocities for completions: lower precision, compiled blocks. All else stays exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from comfy_g2rpo.policy import Policy
from comfy_g2rpo.run.setup import CheapVelocity
from comfy_g2rpo.speed.cheap_completions import Speed
from comfy_g2rpo.speed.fitting_batch import OutOfMemory

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP8 = torch.float8_e4m3fn
BACKEND: Any = "inductor"
# rows below which a product is bound by reading its weights: quantising them costs more than it saves
FEW = 256


class Completing(Policy, Protocol):
    """A policy over a transformer whose blocks may be exchanged while it evaluates completions."""

    device: torch.device
    dtype: torch.dtype
    transformer: Any

    def completing(self, dtype: torch.dtype | None) -> AbstractContextManager[None]:
        """Evaluate by the transformer's own blocks inside, under autocast to `dtype` if given."""
        ...


class Completions:
    """A policy's velocity by other means; `notes` says what could not be had, and why."""

    def __init__(self, policy: Completing, speed: Speed) -> None:
        self.policy, self.notes = policy, list[str]()
        self.dtype = AUTOCAST.get(speed.precision)
        self.fp8 = speed.precision == "fp8"
        self.blocks = CompiledBlocks(policy.transformer) if speed.compile else None

    def __call__(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v [B, …] in float32. Blocks that do not compile are run as they are from then on."""
        with self.policy.completing(self.dtype), FP8Products() if self.fp8 else nullcontext():
            if self.blocks is None:
                return self.policy.velocity(x, sigma, cond)
            try:
                with self.blocks.in_place():
                    return self.policy.velocity(x, sigma, cond)
            except OutOfMemory:
                raise
            except (
                RuntimeError,
                ImportError,
                OSError,
            ) as error:  # all that the compiler raises is one of these
                why = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
                self.notes.append(f"speed.compile is off: the blocks do not compile here ({why[:200]})")
                self.blocks = None
            return self.policy.velocity(x, sigma, cond)


class CompiledBlocks:
    """A transformer's repeated blocks beside their compiled selves, which share one graph of each kind."""

    def __init__(self, transformer: nn.Module) -> None:
        # What diffusers' compile_repeated_blocks goes by; that compiles in place, and here the exact path
        # must stay as it is.
        kinds = set(getattr(transformer, "_repeated_blocks", ())) or {
            type(block).__name__
            for part in transformer.children()
            if isinstance(part, nn.ModuleList)
            for block in part
        }
        self.places = [
            (owner, name, block, torch.compile(block, backend=BACKEND))
            for owner in transformer.modules()
            for name, block in owner.named_children()
            if type(block).__name__ in kinds
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the compiled blocks in the places of the others."""
        for owner, name, _, compiled in self.places:
            setattr(owner, name, compiled)
        try:
            yield
        finally:
            for owner, name, block, _ in self.places:
                setattr(owner, name, block)


class FP8Products(TorchFunctionMode):
    """Multiply by frozen weights in 8 bit: rows of the input and of the weight scaled to float8's range, sums
    in float32.

    What learns (the adapter) stays as it is, and so does what is small, or has sizes that are no multiple of
    16, which the hardware wants.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the place of linear layers where that pays."""
        return INSTEAD.get(func, func)(*args, **kwargs or {})


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Do what torch.nn.functional.linear does, in 8 bit where that pays."""
    return (fp8_linear if eligible(input, weight) else functional.linear)(input, weight, bias)


def addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Do what torch.addmm does with a weight [K, N], in 8 bit where that pays."""
    return fp8_linear(x, weight.T, bias) if eligible(x, weight.T) else torch.addmm(bias, x, weight)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """Do what torch.mm does with a weight [K, N], in 8 bit where that pays."""
    return fp8_linear(x, weight.T, None) if eligible(x, weight.T) else torch.mm(x, weight)


def eligible(x: Tensor, weight: Tensor) -> bool:
    """Return whether a product x [..., K] · weight [N, K]ᵀ is made in 8 bit."""
    plain = weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and not weight.requires_grad
    fitting = weight.dim() == 2 and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return plain and fitting and x.numel() >= FEW * weight.shape[1]


INSTEAD: dict[Any, Any] = {functional.linear: linear, torch.addmm: addmm, torch.mm: mm}


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x [..., K] · weight [N, K]ᵀ + bias in x's type, both float8 (e4m3) with a scale per row."""
    flat = x.flatten(0, -2)
    (left, left_scale), (right, right_scale) = quantised(flat), quantised(weight)
    # Scales by row need a product in bf16 on the hardware.
    out = torch._scaled_mm(left, right.T, scale_a=left_scale, scale_b=right_scale.T, out_dtype=torch.bfloat16)
    made = out.to(x.dtype).unflatten(0, x.shape[:-1])
    return made if bias is None else made + bias.to(x.dtype)


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [M, K] as float8 and the scale [M, 1] that brings them back."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FP8).max
    return (rows / scale).to(FP8), scale


def multiplies_fp8(device: torch.device) -> str:
    """Return why a device cannot multiply in 8 bit, or nothing."""
    try:
        fp8_linear(torch.ones(32, 32, device=device), torch.ones(32, 32, device=device), None)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        return str(error).partition("\n")[0][:160] or type(error).__name__
    return ""


def completions(policy: Any, speed: Speed) -> CheapVelocity | None:
    """Return the velocity of a run's completions, None for the policy's; ValueError for the impossible."""
    if speed.precision == "same" and not speed.compile:
        return None
    device = torch.device(policy.device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type}"
    if AUTOCAST.get(speed.precision) == policy.dtype:
        raise ValueError(
            f"speed.precision is {speed.precision}, which the model has anyway (model.dtype); remove "
            "it, or choose fp8"
        )
    if (
        speed.precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(f"speed.precision is bf16, which {card} does not compute in; choose fp16")
    if speed.precision == "fp8" and (why := multiplies_fp8(device)):
        raise ValueError(
            f"speed.precision is fp8, which {card} cannot multiply ({why}); choose bf16, or same where "
            "model.dtype is that"
        )
    return Completions(policy, speed)
