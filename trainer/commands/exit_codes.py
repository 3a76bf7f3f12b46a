"""How commands end: the exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

DONE, UNFORESEEN, MISTAKE, WAITING, AGAIN, SIGNALLED = 0, 1, 2, 3, 75, 128
"""Done; a program's error, or a check that found something; what a user can mend; a run that waits for votes;
what helps itself when it is resumed (EX_TEMPFAIL); and a signal's number more."""
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "can't start new thread",  # which needs room for its stack
)
UNSAID = "could not create a primitive"
"""What oneDNN says where a CPU's memory runs out, without the reason."""


def ran_out(error: BaseException) -> bool:
    """Return whether memory ran out, a card's or the computer's."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and (text == UNSAID or any(said in text for said in OUT_OF_MEMORY))
    )


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that ask a program to end."""


def heard() -> list[int]:
    """Return the signals to listen to: not SIGHUP where `nohup` has had it ignored."""
    hung_up = getattr(signal, "SIGHUP", None)
    return [each for each in STOPS if each != hung_up or signal.getsignal(each) != signal.SIG_IGN]


def several() -> bool:
    """Return whether this is one process of a run of several."""
    if "torch.distributed" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave_at_once(code: Any) -> None:
    """End a process of several that has failed.

    Something that the processes began together may still be open, and Python would wait for its end.
    """
    if code and several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else UNFORESEEN)
