"""The libraries, the card and the disk."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from ..cluster.cluster_options import INSTALL as RAY
from .findings import INSTALL, OK, PROBLEM, WARNING, Finding

PROJECT = "g2rpo"
MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""What a package is imported as, where that is another name."""
GIB = 2**30
ROOM, LEAST = 20 * GIB, GIB
"""Bytes of disk below which a run of a large model may not fit, and below which none does."""
BUSY = 0.2
"""Share of a card's memory that others may have before it is worth a line."""


def needed() -> tuple[str, list[str]]:
    """Return the bounds of Python and of the trainer's packages: as installed, or of the checkout."""
    try:
        return metadata(PROJECT)["Requires-Python"] or "", requires(PROJECT) or []
    except PackageNotFoundError:
        text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8")
        python = re.search(r'^requires-python = "(.*)"', text, re.MULTILINE)
        block = re.search(r"^trainer = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        names = re.findall(r'"([^"]+)"', block[1] if block else "")
        return python[1] if python else "", [f"{name}; extra == 'trainer'" for name in names]


def check_python() -> Iterator[Finding]:
    """Look at Python and the operating system."""
    from packaging.specifiers import SpecifierSet

    bounds, here = needed()[0], platform.python_version()
    text = f"{here} on {platform.platform(terse=True)}, {sys.prefix}"
    if SpecifierSet(bounds).contains(here, prereleases=True):
        yield Finding("python", OK, text)
    else:
        yield Finding("python", PROBLEM, text, f"install Python {bounds} and make a new environment with it")


def check_libraries() -> Iterator[Finding]:
    """Look at the trainer's packages: there, within the project's bounds, and whole enough to load."""
    from packaging.requirements import Requirement

    for each in map(Requirement, needed()[1]):
        if each.marker and "extra" in str(each.marker) and not each.marker.evaluate({"extra": "trainer"}):
            continue
        try:
            found = version(each.name)
        except PackageNotFoundError:
            yield Finding(each.name, PROBLEM, "is not installed", INSTALL)
            continue
        if not each.specifier.contains(found, prereleases=True):
            said = f"{found} is outside of {each.specifier}"
            mend = f"mend it with: pip install '{each.name}{each.specifier}'"
            yield Finding(each.name, PROBLEM, said, mend)
            continue
        try:
            importlib.import_module(MODULES.get(each.name, each.name))
        except Exception as error:  # a broken library may raise anything
            said = f"{found} does not load: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            again = f"pip install --force-reinstall --no-deps {each.name}=={found}"
            yield Finding(each.name, PROBLEM, said, f"install it again: {again}")
        else:
            yield Finding(each.name, OK, found)


def check_ray() -> Iterator[Finding]:
    """Look whether Ray is there, which only --ray needs."""
    try:
        yield Finding("ray", OK, f"{version('ray')}, for runs with --ray")
    except PackageNotFoundError:
        yield Finding("ray", OK, f"is not installed, and only --ray needs it: {RAY}")


def check_card() -> Iterator[Finding]:
    """Look at the GPU: whether torch sees one, its free memory, its driver and whether it takes bf16."""
    import torch

    from ..model.cpu_refusal import why_no_gpu

    if torch.backends.mps.is_available():
        yield Finding("card", OK, "Apple GPU (MPS), which shares the computer's memory")
        return
    if not torch.cuda.is_available():
        there = f" though an NVIDIA driver is loaded ({driver()})" if driver() else ""
        much = "the bundled model trains on this CPU, large models do not"
        yield Finding("card", WARNING, f"none{there}: {much}", why_no_gpu())
        return
    made = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    made += f", driver {driver()}" if driver() else ""
    for number in range(torch.cuda.device_count()):
        name = f"card {number}"
        free, total = torch.cuda.mem_get_info(number)
        text = f"{torch.cuda.get_device_name(number)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {made}"
        # One small product: a card that the driver lists may be too old for this torch, or broken.
        with torch.cuda.device(number):
            ones = torch.ones(8, 8, device="cuda")
            works = (ones @ ones).sum().item() == 512
        if not works:
            yield Finding(name, PROBLEM, f"{text}; it computes wrongly", "have the card looked at")
        elif free < (1 - BUSY) * total:
            yield Finding(name, WARNING, text, "end what else uses it: nvidia-smi lists it")
        else:
            yield Finding(name, OK, text)
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding(name, WARNING, "has no bf16", "set model.dtype=fp32, which takes twice the memory")


def driver() -> str:
    """Return the version of the NVIDIA driver that is loaded; nothing where there is none, or no Linux."""
    try:
        found = re.search(r"\d+(\.\d+)+", Path("/proc/driver/nvidia/version").read_text("utf-8"))
    except OSError:
        return ""
    return found[0] if found else "of an unknown version"


def check_disk() -> Iterator[Finding]:
    """Look for room where runs, prompts' features and reward models go, and whether one may write there."""
    cache = Path.home() / ".cache" / "g2rpo"
    prompts = Path(os.environ.get("G2RPO_PROMPTS") or cache / "prompts").expanduser()
    yield room_for("runs", Path("runs"), "give --out")
    yield room_for("prompts", prompts, "set G2RPO_PROMPTS")
    from ..config.reward_checks import rewards_root

    yield room_for("rewards", rewards_root(), "set G2RPO_REWARDS")


def room_for(name: str, place: Path, remedy: str) -> Finding:
    """Look at the disk of a folder that may not be there yet."""
    there = place.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free for {place}"
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(f"disk, {name}", PROBLEM, f"{there} cannot be written", f"{remedy} to choose another")
    if free < ROOM:
        state = PROBLEM if free < LEAST else WARNING
        return Finding(f"disk, {name}", state, text, f"make room, or {remedy} to choose another disk")
    return Finding(f"disk, {name}", OK, text)
