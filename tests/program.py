"""The command line, run in the process of a test."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from g2rpo_trainer import cli
from g2rpo_trainer.reports.progress import Silent


def call(*words: object) -> int:
    """Run a command; return its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    return int(left.value.code or 0)


def leave(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run a command; return its exit code and what it printed."""
    code = call(*words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


class Notes(Silent):
    """Keep what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class StopAt(Silent):
    """Press Ctrl-C when a step is shown."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.at and "nfe" in metrics:
            os.kill(os.getpid(), signal.SIGINT)
