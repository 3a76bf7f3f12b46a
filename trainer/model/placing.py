"""Where a model's parts are kept so that a run fits its card: encoders first and away, then the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from comfy_g2rpo.rewards import Reward
from comfy_g2rpo.rewards.protocol import Wrapped

from .stored_linear import bitsandbytes, blocks_of, store, stored

if TYPE_CHECKING:
    from ..config.sections import MemorySection, ModelSection
    from ..families.shared.peft_policy import PeftPolicy
import ctypes
import platform


def check_card(model: ModelSection, memory: MemorySection, device: torch.device) -> str:
    """Refuse a precision that a device cannot keep, with another; return a remark where it is slow."""
    if memory.quantization == "nf4":
        bitsandbytes()
    if device.type == "mps" and memory.quantization != "none":
        raise ValueError(
            f"memory.quantization is {memory.quantization}, which Apple's GPUs do not know; set it to none"
        )
    if device.type == "mps" and memory.block_swap:
        raise ValueError(
            "memory.block_swap is for cards with memory of their own; on Apple's GPUs set it to 0"
        )
    if (
        device.type == "cuda"
        and model.dtype == "bf16"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} computes bf16 by detours, slowly; model.dtype: fp32 with memory.quantization: fp8 may "
            "be quicker"
        )
    return ""


def move_encoders(policy: PeftPolicy, device: torch.device) -> None:
    """Move what reads prompts and their images to a device, where the policy encodes from now on."""
    pipeline = policy.pipeline
    for name in pipeline.components:
        part = getattr(pipeline, name)
        if isinstance(part, nn.Module) and part is not policy.transformer:
            part.to(device)
    policy.device = device


def place(policy: PeftPolicy, memory: MemorySection, device: torch.device) -> None:
    """Put a loaded policy on its device: packed transformer, VAE, and what has been encoded."""
    transformer, count = policy.transformer, len(blocks_of(policy.transformer))
    if memory.block_swap > count:
        raise ValueError(
            f"memory.block_swap is {memory.block_swap}, but this model has {count} blocks; set it to "
            f"{count} at most"
        )
    if memory.quantization == "nf4":
        bitsandbytes()
    policy.packed = memory.quantization != "none" or memory.block_swap > 0
    store(transformer, memory.quantization, memory.block_swap, device)
    transformer.to(device)
    if memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if memory.vae_tiling:
        policy.vae.enable_tiling()
    move_encoders(policy, device)
    policy.moved(device)


def load_in_stages(
    load: Callable[[], PeftPolicy], memory: MemorySection, device: torch.device, prompts: Sequence[str]
) -> PeftPolicy:
    """Load a policy, encode the prompts, drop the text encoders, and place the rest: no two large parts are
    on the device at once.

    Without prompts the text encoders stay, for those who encode later.
    """
    policy = load()
    move_encoders(policy, torch.device("cpu") if memory.text_encoders == "cpu" else device)
    for prompt in prompts:
        policy.encode([prompt])
    if prompts:
        policy.drop_text_encoders()
    place(policy, memory, device)
    return policy


def weight_bytes(module: nn.Module, device: torch.device) -> int:
    """Count the bytes of a module's weights that are on a device, packed ones among them."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    tensors += [tensor for layer in stored(module) for tensor in layer.packed.tensors()]
    alone = {
        tensor.untyped_storage()._cdata: tensor for tensor in tensors if tensor.device.type == device.type
    }
    return sum(tensor.untyped_storage().nbytes() for tensor in alone.values())


@dataclass
class Seat:
    """Room for the weights of one reward on a device: whoever sits down sends the one before away."""

    device: torch.device
    holder: InTurn | None = None


class InTurn(Wrapped):
    """A reward whose weights come to the device when it judges, and leave it when it rests or another comes.

    They stay in the computer's memory all along, page-locked for a GPU: leaving copies nothing.
    """

    runs_elsewhere, takes_turns = False, True
    """A reward that comes and goes takes its turn with the rest."""

    def __init__(self, reward: Reward, seat: Seat) -> None:
        self.reward, self.seat, self.moves = reward, seat, 0
        self.measured: float | None = None
        module = reward.module.to("cpu")
        self.weights: list[Tensor] = [*module.parameters(), *module.buffers()]
        pinned = seat.device.type == "cuda"
        self.homes = [each.data.pin_memory() if pinned else each.data for each in self.weights]
        self.put(self.homes)

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Let the module compute with these weights."""
        for weight, tensor in zip(self.weights, tensors, strict=True):
            weight.data = tensor

    def rest(self) -> None:
        """Leave the device."""
        if self.seat.holder is self:
            self.put(self.homes)
            self.seat.holder = None

    def come(self) -> None:
        """Bring the weights to the device, unless they are there."""
        if self.seat.holder is self:
            return
        if self.seat.holder:
            self.seat.holder.rest()
        self.put([home.to(self.seat.device, non_blocking=True, copy=True) for home in self.homes])
        self.seat.holder = self
        self.moves += 1

    def noise(self) -> float:
        """Measure the noise of scores on the device, once."""
        if self.measured is None:
            self.come()
            try:
                self.measured = self.reward.noise()
            finally:
                self.rest()
        return self.measured

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        self.come()
        return self.reward.score(images, prompts)

    @property
    def embed(self) -> Callable[[Tensor], Tensor] | None:
        """Return the reward's function from images to features, with the weights on the device."""
        return self._embed if self.reward.embed else None

    def _embed(self, images: Tensor) -> Tensor:
        self.come()
        return self.reward.embed(images)


def in_turn(reward: Reward, seat: Seat) -> Reward:
    """Let a reward with weights on a device share it with others; return any other as it is."""
    module = reward.module
    if module is None or next(module.parameters(), torch.empty(0)).device.type == "cpu":
        return reward
    return InTurn(reward, seat)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
LARGEST_KEPT = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, which it would otherwise fault in anew at the next forward."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)
