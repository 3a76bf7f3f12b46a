"""What comfy_child_hostile.py judges with: an audit hook on files, network and processes, and the verdict
on an attack's outcome.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.truncate",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.chown",
    "os.utime",
)
CHANGES_WHOLE = (
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
    "shutil.copytree",
    "shutil.chown",
    "shutil.make_archive",
)
FORBIDDEN = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.getaddrinfo",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
)
FORBIDDEN += ("os.posix_spawn", "os.spawn", "pickle.find_class", "ftplib.", "urllib.Request", "webbrowser.")
LONGEST = 700  # characters of an error
SLOW = 3.0  # seconds after which something small has become something large


class Watch:
    """Collect what leaves the allowed folders while it is on; an audit hook cannot be taken out again."""

    def __init__(self, allowed: Sequence[Path], secret: Path) -> None:
        self.allowed = [os.path.realpath(path) for path in allowed]
        self.secret = os.path.realpath(secret)
        self.on, self.seen, self.events = False, [], 0
        sys.addaudithook(self.hook)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Be on inside the context."""
        self.on = True
        try:
            yield
        finally:
            self.on = False

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Take an audit event."""
        if not self.on:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open":
            self.opened(*args)
        elif event in CHANGES or event in CHANGES_WHOLE:
            self.events += 1
            # Renaming and linking change two places; of the others the second argument is no path.
            count = (
                2
                if event
                in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile", "shutil.copytree")
                else 1
            )
            for path in args[:count]:
                self.changed(event, path)

    def opened(self, path: Any, mode: Any, flags: int) -> None:
        """Take an opened file."""
        if isinstance(path, int) or path is None:
            return
        if flags & WRITING:
            self.events += 1
            self.changed("open", path)
        elif os.path.realpath(os.fsdecode(path)).startswith(self.secret):
            self.seen.append(f"read {path}")

    def changed(self, event: str, path: Any) -> None:
        """See that a changed place is one of ours.

        A link itself may be removed, what it points to may not be touched.
        """
        if isinstance(path, int):
            return
        name = os.path.abspath(os.fsdecode(path))
        # What opens or makes something follows links; removing and renaming work on the name itself.
        place = (
            os.path.realpath(name)
            if event == "open"
            else os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        )
        if place != os.devnull and not any(
            place == root or place.startswith(root + os.sep) for root in self.allowed
        ):
            self.seen.append(f"{event} {place}")


def wrong_error(error: BaseException, names: Sequence[str], pack: Sequence[str]) -> str:
    """Say why an exception is no named error.

    Blank if it is one: a ValueError in one line that names a culprit, raised by the pack.
    """
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}"
    if not isinstance(error, ValueError) or isinstance(error, UnicodeError):
        return f"{type(error).__name__} from {where}: {text[:200]}"
    if not any(frames[-1].filename.startswith(root) for root in pack):
        return f"ValueError from {where}, outside the pack: {text[:200]}"
    if "\n" in text or not 10 < len(text) <= LONGEST:
        return f"an error of {len(text)} characters and {text.count(chr(10)) + 1} lines: {text[:200]!r}"
    if any("\ud800" <= c <= "\udfff" or c < " " for c in text):
        return f"an error that no log can hold: {text[:200]!a}"
    if not any(name in text for name in names):
        return f"an error that names none of {list(names)}: {text[:200]}"
    return ""


def wrong_value(value: Any, place: str = "result") -> str:
    """Say why a result is no correct one: a tensor that is not finite, an IMAGE out of range, a text that
    no file can hold.
    """
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not value.isfinite().all():
            return f"{place} holds NaN or infinite values"
        if value.ndim == 4 and value.shape[-1] == 3 and not (value.min() >= 0 and value.max() <= 1):
            return f"{place} leaves [0, 1]"
        return ""
    if isinstance(value, str):
        return f"{place} holds a lone surrogate" if any("\ud800" <= c <= "\udfff" for c in value) else ""
    if isinstance(value, Mapping):
        return next(filter(None, (wrong_value(part, f"{place}[{key!r}]") for key, part in value.items())), "")
    if isinstance(value, (list, tuple)):
        return next(filter(None, (wrong_value(part, f"{place}[{i}]") for i, part in enumerate(value))), "")
    return ""


class Court:
    """Carry attacks out and keep the record: how many by block, and what went wrong."""

    def __init__(self, watch: Watch, pack: Sequence[str]) -> None:
        self.watch, self.pack = watch, pack
        self.counts: dict[str, dict[str, int]] = {}
        self.faults: list[str] = []
        self.seconds: dict[str, float] = {}
        self.last = ""

    def attack(
        self,
        block: str,
        what: str,
        names: Sequence[str],
        act: Callable[[], Any],
        refuse: bool | None = None,
        allow_nan: bool = False,
    ) -> None:
        """Run an attack: `refuse` says whether it must be (True), must not be (False) or may be refused
        (None).
        """
        counts = self.counts.setdefault(block, {"attacks": 0, "refused": 0})
        counts["attacks"] += 1
        fault = ""
        before, start = len(self.watch.seen), time.process_time()
        self.last = ""
        try:
            with self.watch.watching(), torch.inference_mode():
                made = act()
        except BaseException as error:
            counts["refused"] += 1
            self.last = f"{type(error).__name__}: {error}"
            fault = wrong_error(error, names, self.pack) or (
                "a correct input was refused: " + self.last[:200] if refuse is False else ""
            )
        else:
            result = getattr(made, "args", made)
            fault = "it was taken" if refuse else "" if allow_nan else wrong_value(result)
        spent = time.process_time() - start
        self.seconds[block] = self.seconds.get(block, 0.0) + spent
        if spent > SLOW:
            fault = f"{fault}; " * bool(fault) + f"it took {spent:.1f} s"
        fault = "; ".join(filter(None, [fault, *self.watch.seen[before:]]))
        if fault:
            self.faults.append(f"{block}, {what}: {fault}")
            print(self.faults[-1].encode("ascii", "backslashreplace").decode(), flush=True)


def live_bytes() -> int:
    """Count the bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Not isinstance: some libraries' lazy proxies load themselves when they are asked.
        if issubclass(type(thing), torch.Tensor) and thing.layout is torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
