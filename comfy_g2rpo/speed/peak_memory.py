"""The most memory that a run has taken so far, on every system that it runs on."""

from __future__ import annotations

import sys

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of a CUDA device, else of this process, in bytes; 0 where nothing tells it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return windows_peak()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def windows_peak() -> int:
    """Return this process's peak working set by psutil, which ComfyUI and accelerate bring; else 0."""
    try:
        import psutil
    except ImportError:
        return 0
    return getattr(psutil.Process().memory_info(), "peak_wset", 0)
