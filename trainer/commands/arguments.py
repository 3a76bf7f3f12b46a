"""Options that several commands share, and the error for arguments that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[
    Path | None, typer.Option(metavar="JSONL", help='File of {"file": name, "prompt": …} lines.')
]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="Pictures that are judged at once.")]
Device = Annotated[str, typer.Option(help="Where reward models run: auto, cpu, cuda, mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Family = Annotated[
    str | None,
    typer.Option(help="sd3, flux, flux2, qwen_image, wan, z_image, lumina2 [default: told from the names]."),
]


class CommandError(ValueError):
    """Arguments that do not go together, or a file that cannot be used."""
