"""A pixel in the place of curves.png: drawing it takes a third of a short run, and few tests look at it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from comfy_g2rpo.files.safe import write_bytes

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63f80f0001010100b138f6140000000049454e44ae4260"
    "82"
)
DRAWN = {"test_cli", "test_listeners", "test_run_summary"}
"""Files of tests whose runs draw in earnest."""


def pixel(rows: Sequence[Any], path: Path) -> None:
    """Write a picture where curves would be drawn, as safely as they are written."""
    write_bytes(path, PIXEL)


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """Have runs of this process write the pixel."""
    for place in ("report", "listeners"):
        patch.setattr(f"g2rpo_trainer.reports.{place}.curves", pixel)
