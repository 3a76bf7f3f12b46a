"""What every block checks first: core keeps the bounds of what is typed, not of what comes over a link."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from .. import types

MAX_TEXT = 1_000_000  # characters of any widget; many have a lower limit of their own

FAILURES = (RuntimeError, AssertionError, LookupError, ArithmeticError, TypeError, AttributeError)

OURS = {
    types.RolloutWire.io_type: (types.RolloutData, "Rollout"),
    types.RewardWire.io_type: (types.RewardSet, "Load Reward or Mix Rewards"),
    types.ScoresWire.io_type: (types.ScoresData, "Score Rollout or Scores From Values"),
    types.AdvantagesWire.io_type: (types.AdvantagesData, "Advantages"),
    types.PolicyWire.io_type: (types.PolicyData, "LoRA Policy or Update LoRA"),
    types.PriorWire.io_type: (types.PriorData, "Load Noise Prior"),
}


@contextmanager
def blamed(culprit: str) -> Iterator[None]:
    """Turn a failure deep in a model into one line that begins with `culprit`; the log keeps the cause."""
    try:
        yield
    except FAILURES as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
            raise
        said = " ".join(str(error).split())[:160]
        raise ValueError(f"{culprit} ({type(error).__name__}: {said})") from error


def check_inputs(block: type[io.ComfyNode], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block's inputs by name, out of `given`, which may hold other names too.

    Raise ValueError for the first one that the block's own schema does not allow.
    """
    schema = block.define_schema()
    for one in schema.inputs:
        value = given.get(one.id)
        if value is None and one.optional:
            continue
        if not schema.is_input_list:
            check_value(one, value)
        elif one.get_io_type() in OURS:
            # A block looks at numbers, images and what texts say itself, element by element.
            for part in value:
                check_value(one, part)
        elif isinstance(one, io.String.Input) and not all(isinstance(part, str) for part in value):
            raise ValueError(f"{one.id} holds something else than text; connect a text")
    return {one.id: given.get(one.id) for one in schema.inputs}


def check_value(one: io.Input, value: Any) -> None:
    """Check one value by its input's kind."""
    kind = one.get_io_type()
    if isinstance(one, (io.Int.Input, io.Float.Input)):
        check_number(one.id, value, one.min, one.max, whole=isinstance(one, io.Int.Input))
    elif isinstance(one, io.Boolean.Input):
        if not isinstance(value, bool):
            raise ValueError(f"{one.id} is {short(value)}; it must be true or false")
    elif isinstance(one, io.Combo.Input):
        if not isinstance(value, str) or value not in one.options:
            raise ValueError(f"{one.id} is {short(value)}; choose one of: {', '.join(one.options)}")
    elif isinstance(one, io.String.Input):
        check_text(one.id, value)
    elif kind in OURS:
        made, maker = OURS[kind]
        if not isinstance(value, made):
            raise ValueError(f"{one.id} is {short(value)}; connect the output of {maker}")
    elif kind in CORES and (fault := CORES[kind](value)):
        raise ValueError(f"{one.id}: {fault}")


def short(value: Any) -> str:
    """Describe a value in one short line."""
    plain = value is None or isinstance(value, (str, int, float))
    return ascii(value)[:60] if plain else type(value).__name__


def check_number(name: str, value: Any, low: float, high: float, whole: bool) -> None:
    """Raise ValueError unless a number is of its kind, finite and within its bounds."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{name} is {short(value)}; it must be a {kind} from {low:g} to {high:g}")


def check_text(name: str, value: Any) -> None:
    """Raise ValueError unless a text is one, not too long, without what no file or tokenizer can take."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {short(value)}; connect a text")
    if len(value) > MAX_TEXT:
        raise ValueError(f"{name} has {len(value)} characters; at most {MAX_TEXT} are allowed, shorten it")
    check_characters(name, value, "text")


def check_characters(name: str, value: str, what: str) -> None:
    """Raise ValueError where a text holds what is no character."""
    strange = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if strange is not None:
        raise ValueError(f"{name} holds U+{ord(strange):04X}, which is no character; type the {what} again")


def model_fault(value: Any) -> str:
    """Return what is wrong with a MODEL."""
    real = isinstance(value, comfy.model_patcher.ModelPatcher)
    return "" if real else f"{short(value)} is no model; connect a model loader"


def clip_fault(value: Any) -> str:
    """Return what is wrong with a CLIP; a checkpoint without text encoders gives None."""
    real = hasattr(value, "tokenize")
    return "" if real else f"{short(value)} is no text encoder; load one with a CLIP loader"


def vae_fault(value: Any) -> str:
    """Return what is wrong with a VAE; a checkpoint without one gives an empty shell."""
    whole = hasattr(value, "decode") and getattr(value, "first_stage_model", value) is not None
    return "" if whole else "there is none in it; the checkpoint has no VAE, so load one with Load VAE"


def guider_fault(value: Any) -> str:
    """Return what is wrong with a GUIDER."""
    real = isinstance(value, comfy.samplers.CFGGuider)
    return "" if real else f"{short(value)} is no guider; connect BasicGuider or CFGGuider"


def noise_fault(value: Any) -> str:
    """Return what is wrong with a NOISE."""
    whole = hasattr(value, "generate_noise") and isinstance(getattr(value, "seed", None), int)
    return "" if whole else f"{short(value)} is no noise; connect RandomNoise"


def latent_fault(value: Any) -> str:
    """Return what is wrong with a LATENT."""
    samples = value.get("samples") if isinstance(value, Mapping) else None
    if getattr(samples, "is_nested", False):
        return "several streams in one latent (video with sound) are not supported; connect an image latent"
    real = isinstance(samples, Tensor) and samples.is_floating_point()
    fault = f"{short(value)} holds no latent of floating-point numbers; connect an image latent"
    return "" if real else fault


def sigmas_fault(value: Any) -> str:
    """Return what is wrong with SIGMAS as a tensor; every block checks the levels itself."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return "" if real else f"{short(value)} is no list of noise levels; connect a scheduler"


def lora_fault(value: Any) -> str:
    """Return what is wrong with a LORA_MODEL; who uses it checks its keys and shapes."""
    if not isinstance(value, Mapping) or not value:
        return (
            f"{short(value)} is no LoRA; connect the output of Train LoRA, Update LoRA or core's Load LoRA "
            "Model"
        )
    bad = next((key for key, tensor in value.items() if not isinstance(key, str) or not usable(tensor)), None)
    fault = f"its entry {short(bad)} is no tensor of real numbers; connect a LoRA of ordinary weights"
    return "" if bad is None else fault


def usable(tensor: Any) -> bool:
    """Return whether something is a dense tensor of real numbers."""
    dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    return dense and not tensor.is_complex() and not tensor.is_meta


CORES = {
    io.Model.io_type: model_fault,
    io.Clip.io_type: clip_fault,
    io.Vae.io_type: vae_fault,
    io.Guider.io_type: guider_fault,
    io.Noise.io_type: noise_fault,
    io.Latent.io_type: latent_fault,
    io.Sigmas.io_type: sigmas_fault,
    io.LoraModel.io_type: lora_fault,
}
