"""Run the program in forks of one process that has all libraries loaded: one order per line of JSON, which
starts the processes of one run, or one process alone; or those of a module's `main`. `others` are the words
of all but the first process, where they differ.

One of them may meet a fault: RANK POINT NUMBER KIND. A point is MODULE:FUNCTION, which is called, or the
start of a path, below which something changes. In that process, as it comes to that point for that time, the
process is killed, told to end, stopped, or left without more memory (but for some MiB: memory8). The system
does it, not our code: nothing of the program is changed. Who is killed as a file is about to be on the disk
leaves half of it there.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Any

from comfy_g2rpo.run.folder import RunFolder
from g2rpo_trainer import cli
from g2rpo_trainer import run as training
from g2rpo_trainer.config.reading import load
from g2rpo_trainer.reports.report import write_report

TAKEN: list[bytearray] = []
BLOCK, LEFT = 2**16, 32
"""What takes the rest of a process's memory, and how many blocks of it are left: for words, not for work."""
LOADED = (
    "scipy.stats",
    "peft.tuners.lora.bnb",
    "comfy_g2rpo.rewards.models.catalogue",
    "comfy_g2rpo.sampling.base_tail",
    "comfy_g2rpo.trees.branching",
    "comfy_g2rpo.trees.dense_chains",
    "g2rpo_trainer.cost.presets",
    "g2rpo_trainer.model.inference",
    "g2rpo_trainer.rewards.vote_reward",
)
"""What a run imports late, which every fork would do again."""
LATE = -99
"""How a process ended that did not end by itself."""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR


class Lookout:
    """Count how often a process comes to some points; at one of them, it meets a fault."""

    def __init__(self, points: Collection[str], log: str, fault: tuple[str, int, str] = ("", 0, "")) -> None:
        self.log, (self.point, self.number, self.kind) = log, fault
        self.counts = dict.fromkeys(points, 0)
        self.paths = tuple(point for point in points if point.startswith("/"))
        named = [(point.partition(":"), point) for point in points if not point.startswith("/")]
        self.functions = {(function, module): point for (module, _, function), point in named}
        self.names = {function for function, _ in self.functions}
        if self.paths:
            self.fsync, os.fsync = os.fsync, self.synced  # in a fork of a test, which dies with it
            sys.addaudithook(self.heard)
        if self.names:
            threading.setprofile(self.seen)
            sys.setprofile(self.seen)

    def seen(self, frame: FrameType, event: str, given: Any) -> None:
        """Take note of a call."""
        if event != "call" or frame.f_code.co_name not in self.names:
            return
        if point := self.functions.get((frame.f_code.co_name, frame.f_globals["__name__"])):
            self.count(point)

    def heard(self, event: str, given: tuple[Any, ...]) -> None:
        """Take note of a change of the file system that is about to happen."""
        if event not in CHANGES or (event == "open" and not (given[2] & WRITING)):
            return
        if isinstance(given[0], (str, bytes, os.PathLike)):
            self.changed(os.fsdecode(given[0]))

    def synced(self, handle: int) -> None:
        """Take note that a file is about to be on the disk: at a fatal one, half of it is."""
        path = os.readlink(f"/proc/self/fd/{handle}")
        if os.path.isfile(path):
            due = path.startswith(self.point or "?") and self.counts[self.point] + 1 == self.number
            if due and self.kind == "kill":
                content = Path(path).read_bytes()
                # Of what is appended to, only the last line is new.
                kept = content.rfind(b"\n", 0, -1) + 1 if path.endswith("metrics.jsonl") else 0
                os.ftruncate(handle, kept + (len(content) - kept) // 2)
            self.changed(path)
        self.fsync(handle)

    def changed(self, path: str) -> None:
        """Count a change for every path that it lies below."""
        for start in self.paths:
            if path.startswith(start):
                self.count(start)

    def count(self, point: str) -> None:
        """Count, and let the fault happen where it is time."""
        self.counts[point] += 1
        if point == self.point and self.counts[point] == self.number:
            sys.setprofile(None)
            threading.setprofile(None)
            meet(self.kind, self.log)


def meet(kind: str, log: str) -> None:
    """Let the fault happen to this process, and note when."""
    with open(f"{log}.met", "w") as file:
        file.write(str(time.time()))
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
    else:
        exhaust(int(kind.removeprefix("memory") or 0) * 2**20)


def exhaust(room: int) -> None:
    """Leave no more memory to this process than some words need, and new room of so many bytes."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    try:
        while True:  # what the process has reserved and does not use
            TAKEN.append(bytearray(BLOCK))
    except MemoryError:
        del TAKEN[-LEFT:]
    resource.setrlimit(resource.RLIMIT_AS, (size + room, resource.RLIM_INFINITY))


def enter(net: str) -> None:
    """Leave this machine's network for a named one."""
    handle = os.open(f"/run/netns/{net}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, 0):
        raise OSError(ctypes.get_errno(), f"cannot enter the network {net}")
    os.close(handle)


def work(order: dict[str, Any], rank: int) -> None:
    """Be one process of a run."""
    count, log = order["count"], f"{order['log']}.{rank}"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    machines = order.get("nets") or [""] * count
    if machines[rank]:
        enter(machines[rank])
    os.environ |= order.get("environment", {})
    if count > 1:
        local = machines[:rank].count(machines[rank])
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": order["address"], "MASTER_PORT": str(order["port"])}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    whose, _, fault = order.get("fault", "").partition(" ")
    if fault and rank == int(whose):
        point, number, kind = fault.split()
        Lookout([point], log, (point, int(number), kind))
    lookout = Lookout(order["points"], log) if order.get("points") else None
    words = order.get("others", order["words"]) if rank else order["words"]
    try:
        if module := order.get("module"):
            importlib.import_module(module).main(*words)
        else:
            cli.main([*words, "--quiet"])
    finally:
        if lookout:
            Path(f"{log}.counts").write_text(json.dumps(lookout.counts))


def born(order: dict[str, Any], rank: int) -> int:
    """Start one process of a run; return its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        work(order, rank)
        code = 0
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
    for name in LOADED:
        importlib.import_module(name)
    config = load(sys.argv[1], [])
    training.load_policy(config, "cpu", ("a red circle",))
    gc.freeze()  # else every fork copies what it looks through
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer: Any = ended(order["wait"], order["limit"])
        elif "draw" in order:
            answer = len(write_report(RunFolder(Path(order["draw"]))))  # so that forks find all of it loaded
        else:
            answer = [born(order, rank) for rank in range(order["count"])]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
