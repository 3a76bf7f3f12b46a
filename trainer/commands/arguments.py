"""Options that several commands share, and the error for arguments that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config.bundled import bundled_recipes

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help=f"A YAML file, or a bundled one: {', '.join(bundled_recipes())}."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the recipe, such as method.eta=0.5."),
]
Preset = Annotated[
    str | None, typer.Option(help="Settings for a card of this size: 8gb, 12gb, 16gb, 24gb … 141gb.")
]
Force = Annotated[
    bool, typer.Option("--force", help="Start even without a GPU, or where memory will not be enough.")
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="JSONL", help='File of {"file": name, "prompt": …} lines.')
]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="Pictures that are judged at once.")]
Device = Annotated[str, typer.Option(help="Where reward models run: auto, cpu, cuda, mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Best = Annotated[
    bool, typer.Option("--best", help="Of a run: its best held-out evaluation instead of its result.")
]
Family = Annotated[
    str | None,
    typer.Option(help="sd3, flux, flux2, qwen_image, wan, z_image, lumina2 [default: told from the names]."),
]


class CommandError(ValueError):
    """Arguments that do not go together, or a file that cannot be used."""


def refuse_best(best: bool, place: object) -> None:
    """Refuse --best where there is no run."""
    if best:
        raise CommandError(f"--best is for runs, and {place} is none; give a run folder")


def lora_of(place: Path, best: bool = False) -> Path:
    """Return the LoRA file of a run, its result or that of its best evaluation; any other path as it is."""
    from comfy_g2rpo.run.folder import RunFolder, is_run
    from comfy_g2rpo.run.summary import best_checkpoint

    if not is_run(place):
        refuse_best(best, place)
        return place
    run = RunFolder(place)
    chosen = best_checkpoint(run) if best else run.outcome()
    if chosen is None:
        raise CommandError(f"{place} has no checkpoint yet; let it train on")
    return chosen / "lora.safetensors"
