"""The pack as the registry publishes it."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from comfy_host import ROOT


def published() -> list[str]:
    """List the tracked files that .comfyignore, read as git reads its own, lets through."""
    command = ["git", "-c", "core.quotepath=off", "ls-files"]
    try:
        tracked, left_out = (
            subprocess.run(
                [*command, *more], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.splitlines()
            for more in ([], ["--cached", "--ignored", "--exclude-from=.comfyignore"])
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: what the registry would publish cannot be listed")
    return sorted(set(tracked) - set(left_out))


def install(folder: Path) -> Path:
    """Pack those files and unpack them into a folder, as ComfyUI's manager does."""
    folder.mkdir(parents=True)
    packed = folder.with_suffix(".zip")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name in published():
            archive.write(ROOT / name, name)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(folder)
    packed.unlink()
    return folder
