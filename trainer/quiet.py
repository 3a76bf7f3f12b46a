"""What libraries say that no user can act upon is kept off the display; their errors are shown."""

from __future__ import annotations

import logging
import os
import sys
import warnings

VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
TALKATIVE = ("bitsandbytes", "huggingface_hub", "matplotlib", "torch.distributed.elastic")


def quieten_notices() -> None:
    """Keep notices of libraries that are not imported yet out of a command's answer.

    Whoever has set their verbosity, or Python's warnings, keeps that.
    """
    for name in VERBOSITY:
        os.environ.setdefault(name, "error")
    # Where a process of several is gone, the others' torch says so in a page; this program says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        # Both are meant for those who write programs.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)


def stay_offline() -> None:
    """Keep libraries that are not imported yet off the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
