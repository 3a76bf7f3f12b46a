"""The process of one job: the command line, which stops like after Ctrl-C once its parent is gone.

Its standard input is a pipe that its parent holds and never writes to. The pipe ends when the parent closes
it, or dies, however suddenly: so a stop needs no signal, which Windows lacks, and no run outlives its worker.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time

from ..cli import main
from ..commands.exit_codes import SIGNALLED

PATIENCE = 600.0  # seconds for what hangs in a driver, say, and hears of nothing


def follow_parent() -> None:
    """Wait for the end of standard input, then press Ctrl-C; end the process if that is not heard."""
    # Not by sys.stdin, whose lock Python cannot wait for when it ends.
    while os.read(0, 4096):
        pass
    _thread.interrupt_main()
    time.sleep(PATIENCE)
    os._exit(SIGNALLED + signal.SIGINT)


if __name__ == "__main__":
    # A worker in the background may have been told to ignore it, and hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=follow_parent, daemon=True).start()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        # Before the run began to listen for it.
        raise SystemExit(130) from None
