"""What is said where there is no GPU, before anything else: why, and that a large model takes too long."""

from __future__ import annotations

import os
import sys

import torch

from ..config.file_checks import parameters_of
from ..config.reading import ConfigError
from ..config.sections import ModelSection

LARGE = 2e9
"""Parameters of a transformer above which a forward on a CPU takes minutes."""


def why_no_gpu() -> str:
    """Return why torch has no GPU here, with the remedy."""
    if sys.platform == "darwin":
        return "this torch finds no Apple GPU; install torch for macOS on Apple silicon"
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) is built without CUDA; install one that has it "
            "(https://pytorch.org/get-started/locally)"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES is {hidden!r} and hides every GPU; unset it"
    return "no CUDA device is visible; see whether nvidia-smi lists one, and renew the driver if not"


def refuse_cpu(section: ModelSection, device: torch.device, force: bool = False) -> str:
    """Refuse a large model on a CPU; return what to say of a model whose size nothing tells, or that is
    forced.
    """
    if device.type != "cpu":
        return ""
    count = parameters_of(section)
    if count is not None and count <= LARGE:
        return ""
    reason = why_no_gpu()
    if force or count is None:
        return f"no GPU: {reason}; on a CPU, a large model takes weeks"
    size = f"a model of {count / 1e9:.1f} billion parameters takes weeks on a CPU"
    raise ConfigError(f"no GPU: {reason}, for {size}; or go on with --force")
