"""Settings that every test shares: one thread per process, no network, reproducible hypothesis, and gpu
tests where a GPU is.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

# Before the first import of torch; child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "MKL_CBWR", "AUTO"
)  # MKL may else sum in another order where a weight lies at another address, on some processors
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("G2RPO_PLANS", tempfile.mkdtemp(prefix="g2rpo-plans-"))

import pytest
import torch
from comfy_host import base, comfyui, older, served  # noqa: F401
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what older ComfyUIs are not asked for, and skip gpu tests by name where there is no CUDA
    device.
    """
    left = [item for item in items if older(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not older(item)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(
                pytest.mark.skip(reason="no CUDA device: run `pytest -m gpu` on a machine that has one")
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the slowest files and functions, too, where --durations asks for the slowest tests."""
    files: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file, _, name = report.location
                files[Path(file).stem] += report.duration
                functions[f"{Path(file).stem}: {name.partition('[')[0]}"] += report.duration
    for kind, seconds in (("file", files), ("function", functions)):
        if config.option.durations and seconds:
            terminalreporter.section(f"seconds by {kind}, {sum(seconds.values()):.0f} in all")
            told = (f"{name} {spent:.0f}" for name, spent in seconds.most_common(60))
            terminalreporter.write_line(", ".join(told))
