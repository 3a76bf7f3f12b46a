"""Cases of tests that take long: some of them in `make test`, every one in `make test-all`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

ALL = bool(os.environ.get("G2RPO_ALL_CASES"))
Case = TypeVar("Case")


def some(cases: Iterable[Case], few: int) -> list[Case]:
    """Return `few` cases from the first to the last, evenly; every one with G2RPO_ALL_CASES=1."""
    found = list(cases)
    if ALL or len(found) <= few:
        return found
    return [found[round(i * (len(found) - 1) / max(few - 1, 1))] for i in range(few)]
