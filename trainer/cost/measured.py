"""The time of a run as it was measured on this machine, kept for a day."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict

import torch

from comfy_g2rpo import __version__

from ..config.reading import Config
from ..model.quiet_libraries import quieten_libraries
from .estimate import Cost, Counts
from .remembered import keep, key_of, recall

KEPT_SECONDS = 24 * 3600
"""How long a measurement is good for: a machine is busier at one time than at another."""


def measured(config: Config, device: torch.device, counts: Counts, anew: bool = False) -> Cost:
    """Return what a run costs in time, from memory where it was measured here within a day."""
    machine = [__version__, torch.__version__, str(device), platform.node(), torch.get_num_threads()]
    if device.type == "cuda":
        machine.append(torch.cuda.get_device_name(device))
    key = key_of({"run": config.model_dump(mode="json", exclude={"out"}), "machine": machine})
    known = None if anew else recall(key)
    if known and set(known) == set(Cost.__dataclass_fields__) and time.time() - known["at"] < KEPT_SECONDS:
        return Cost(**known)
    quieten_libraries()
    from .timing import measure

    found = measure(config, counts)
    keep(key, asdict(found))
    return found
