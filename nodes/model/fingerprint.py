"""What tells a MODEL from others, over restarts of ComfyUI and whatever was sampled with it in between."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

FINGERPRINTED = 64  # weights that are looked into
SAMPLED = 64  # values of each tensor of a patch
UNPATCHED = "none"


def fingerprint(model: Any) -> str:
    """Return what tells a MODEL's own weights from others: its class, its shapes and some of its weights.

    Patches count nothing: core may still have those of another clone in the weights, and keeps what was
    there before in `backup`, which all clones share.
    """
    digest = hashlib.blake2b(digest_size=8)
    left = FINGERPRINTED
    for name, weight in model.model.diffusion_model.named_parameters():
        key = f"diffusion_model.{name}"
        if key in model.backup:
            weight = model.backup[key].weight
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        # Vectors alone: runs of before, when patched matrices could not be told apart, are known by these.
        if weight.ndim == 1 and left:
            digest.update(weight.detach()[:16].float().cpu().numpy().tobytes())
            left -= 1
    return f"{type(model.model).__name__} {digest.hexdigest()}"


def patches_of(model: Any) -> str:
    """Return what tells the patches on a MODEL from others (LoRAs, merges), by their content and strength."""
    found = {key: made for key, made in model.patches.items() if made}
    if not found:
        return UNPATCHED
    digest = hashlib.blake2b(digest_size=8)
    for key in sorted(found):
        digest.update(key.encode())
        for part in parts_of(found[key]):
            digest.update(part)
    return f"{len(found)} patched weights, {digest.hexdigest()}"


def parts_of(patch: Any) -> Iterator[bytes]:
    """Name the parts of a patch in order, tensors by a sample of their values.

    Functions are core's own, and the same wherever key and tensors are.
    """
    if isinstance(patch, Tensor):
        yield f"{tuple(patch.shape)}".encode()
        if not patch.is_meta and patch.numel():
            values = patch.detach().flatten()
            yield values[:: -(-len(values) // SAMPLED)].float().cpu().numpy().tobytes()
    elif isinstance(patch, (list, tuple)):
        yield f"{len(patch)}".encode()
        for part in patch:
            yield from parts_of(part)
    elif isinstance(patch, dict):
        yield from parts_of(sorted(patch.items()))
    elif patch is None or isinstance(patch, (str, bool, int, float)):
        yield repr(patch).encode()
    elif isinstance(getattr(patch, "name", None), str):
        # One of core's adapters (LoRA, LoKr …).
        yield patch.name.encode()
        yield from parts_of(getattr(patch, "weights", None))
