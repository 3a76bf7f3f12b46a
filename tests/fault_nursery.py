"""Run the program in forks of one process that has all libraries loaded: one order per line of JSON, which
starts the processes of one run, or one process alone.

One of them may meet a fault: RANK MODULE:FUNCTION NUMBER KIND. In that process, as that function is called
for that time, the process is killed, told to end, stopped, or left without more memory. The system does it,
not our code: nothing of the program is changed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from g2rpo_trainer import cli
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import load

TAKEN: list[bytearray] = []
BLOCK, LEFT = 2**16, 32
"""What takes the rest of a process's memory, and how many blocks of it are left: for words, not for work."""
LATE = -99
"""How a process ended that did not end by itself."""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}


def meet(kind: str, log: str) -> None:
    """Let the fault happen to this process, and note when."""
    with open(f"{log}.met", "w") as file:
        file.write(str(time.time()))
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
        return
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    try:
        while True:  # what the process has reserved and does not use
            TAKEN.append(bytearray(BLOCK))
    except MemoryError:
        del TAKEN[-LEFT:]


def expect(module: str, function: str, number: int, kind: str, log: str) -> None:
    """Look on, without changing anything, until a function is called for the n-th time."""
    left = [number]

    def see(frame: FrameType, event: str, given: Any) -> None:
        if event != "call" or frame.f_code.co_name != function or frame.f_globals["__name__"] != module:
            return
        left[0] -= 1
        if left[0] == 0:
            sys.setprofile(None)
            threading.setprofile(None)
            meet(kind, log)

    threading.setprofile(see)
    sys.setprofile(see)


def work(order: dict[str, Any], rank: int) -> None:
    """Be one process of a run."""
    count, log = order["count"], f"{order['log']}.{rank}"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"])}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    os.environ |= order.get("env", {})
    whose, _, fault = order.get("fault", "").partition(" ")
    if fault and rank == int(whose):
        where, number, kind = fault.split()
        module, _, function = where.partition(":")
        expect(module, function, int(number), kind, log)
    cli.main(order["words"])


def born(order: dict[str, Any], rank: int) -> int:
    """Start one process of a run; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work(order, rank)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pids: list[int], limit: float) -> list[list[float]]:
    """Wait for processes; return how each ended and when. What does not end in time is killed."""
    deadline = time.monotonic() + limit
    found: dict[int, list[float]] = {}
    while len(found) < len(pids):
        late = time.monotonic() > deadline
        for pid in set(pids) - set(found):
            if late:
                os.kill(pid, signal.SIGKILL)
            gone, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if gone:
                found[pid] = [LATE if late else os.waitstatus_to_exitcode(status), time.time()]
        time.sleep(0.02)
    return [found[pid] for pid in pids]


def main() -> None:
    """Load what a run loads, but differentiate nothing: forks of a process that has cannot. Then obey."""
    import scipy.stats  # noqa: F401

    config = load(sys.argv[1], [])
    training.load_policy(config, "cpu", ("a red circle",))
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = ended(order["wait"], order["limit"])
        elif "wake" in order:
            answer = os.kill(order["wake"], signal.SIGCONT)
        else:
            answer = [born(order, rank) for rank in range(order["count"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
