"""How much fits into memory at once: found out by running out of it, and halved until it fits.

Results do not depend on it.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field

import torch

from .pace import Pace

try:
    import resource
except ImportError:  # Windows has none
    resource = None
from ..speed.fitting_batch import Limit


@dataclass
class Limits:
    """What a run does at once: latents in a forward of the rollout, pictures in a decoding, latents in a
    forward and backward.
    """

    slots: Limit
    decode_batch: Limit
    micro_batch: Limit
    said: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, pace: Pace) -> Limits:
        """Begin with what is asked for."""
        return cls(Limit(pace.slots), Limit(pace.decode_batch), Limit(pace.micro_batch))

    def within(self, pace: Pace) -> Pace:
        """Return a pace that asks for no more than fits."""
        return dataclasses.replace(pace, **self.lowered())

    def lowered(self) -> dict[str, int]:
        """Return what memory has brought down, by name, and how much fits now."""
        limits = {"slots": self.slots, "decode_batch": self.decode_batch, "micro_batch": self.micro_batch}
        return {name: limit.rows for name, limit in limits.items() if limit.halvings}

    def news(self) -> str:
        """Say once what has come down; nothing where nothing has since the last time."""
        now = self.lowered()
        fresh = [f"{name} is {rows} from now on" for name, rows in now.items() if self.said.get(name) != rows]
        self.said = now
        return f"memory ran out: {', '.join(fresh)}; results stay the same" if fresh else ""


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device, or of the process, in bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
