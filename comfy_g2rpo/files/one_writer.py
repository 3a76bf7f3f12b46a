"""One writer at a time: a run's folder belongs to one process for as long as that process lives."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from .safe import RunError, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".lock"
FAR = 2**30  # Windows locks bytes: one behind all that is written here, so that others can read who it is


def taken(handle: int) -> bool:
    """Take the system's lock on an open file, which a process loses when it ends; False if another has it.

    A file system without locks lets everybody write, as before.
    """
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def who(path: Path) -> str:
    """Return who holds a lock, as a part of a sentence."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def opened(path: Path) -> int | None:
    """Open and lock a lock file; None if another process has it."""
    if path.parent.exists() and not path.parent.is_dir():
        raise RunError(f"{path.parent} is a file and no run; choose another folder (--out)")
    for _ in range(100):  # an owner who is just done removes it, and then another one is made
        with writing(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except (FileNotFoundError, FileExistsError):
                continue  # the folder's last owner has removed it just now
        if not taken(handle):
            os.close(handle)
            return None
        if still_there(handle, path):
            return handle
        os.close(handle)
    return None


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Keep others from writing into a run's folder inside the context; RunError if somebody writes there now.

    The folder is made where it is not there, and removed again if nothing came into it.
    """
    path = Path(folder) / LOCK
    handle = opened(path)
    if handle is None:
        remedy = "stop that one, wait for it, or choose another folder"
        raise RunError(f"{folder} is being written by {who(path)}; {remedy}")
    try:
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        content = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now})
        with writing(path):
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, content.encode())
        yield
    finally:
        release(handle, path)


def release(handle: int, path: Path) -> None:
    """Give a lock back, and remove its file and the folder that it made."""
    with suppress(OSError):
        path.unlink()
    os.close(handle)
    with suppress(OSError):
        path.parent.rmdir()  # only where it is empty


def still_there(handle: int, path: Path) -> bool:
    """Return whether an open file still has its name: its last owner removes it when he is done."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False
