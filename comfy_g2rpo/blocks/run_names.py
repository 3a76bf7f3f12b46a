"""Names of runs and files, as graphs have them: each can be a folder on every system, below ours."""

from __future__ import annotations

import re

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # no files on Windows


def checked_name(name: str, widget: str) -> str:
    """Return the name of a run or file; raise ValueError unless it can be a folder or file under ours."""
    name = name.strip() if isinstance(name, str) else ""
    if not RUN_ID.fullmatch(name) or name.endswith(".") or DEVICES.fullmatch(name):
        raise ValueError(
            f"{widget} is {name[:80]!a}; use 1 to 64 letters, digits, dots, dashes and underscores, a "
            "letter or digit first"
        )
    return name
