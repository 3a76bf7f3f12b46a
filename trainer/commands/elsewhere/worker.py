"""`g2rpo worker`: train what graphs have handed over, beside a ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..answers import answer
from ..arguments import CommandError


def worker(
    comfyui: Annotated[
        Path, typer.Option(help="Folder of ComfyUI, or its --base-directory: it has models and output.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Its --output-directory [default: output in that folder].")
    ] = None,
    models: Annotated[
        list[Path] | None,
        typer.Option(help="More folders like ComfyUI's models, or an extra_model_paths.yaml; repeat it."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="End when no job waits.")] = False,
    preset: Annotated[
        str | None, typer.Option(help="Settings for a card of this size: 8gb, 12gb, 16gb, 24gb, 48gb, 80gb.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field of every job, such as model.dtype=fp32."
        ),
    ] = None,
) -> None:
    """Train what the block Submit Training hands over, one job after another, until Ctrl-C."""
    base = comfyui.expanduser().resolve()
    place = (output.expanduser().resolve() if output else base / "output") / "g2rpo"
    if not (base / "models").is_dir():
        raise CommandError(f"--comfyui {comfyui} has no folder models; give the folder that ComfyUI works in")
    if not place.parent.is_dir():
        raise CommandError(f"--output {place.parent} is no folder; give ComfyUI's --output-directory")
    from ...config.reading import apply_overrides
    from ...cost.presets import preset_named
    from ...jobs.graph_job import ModelFolders
    from ...jobs.worker_loop import Worker, use_comfyui

    # What its owner has mistyped would fail every job.
    apply_overrides({}, settings or [])
    card = preset_named(preset) if preset else None
    use_comfyui(base)
    folders = ModelFolders.of([base / "models", *(path.expanduser() for path in models or [])])
    here = Worker(place / "spool", place, folders, settings or [], card, say=typer.echo)
    typer.echo(f"worker: trains what is handed over in {here.spool.path}; Ctrl-C ends it, jobs go on later")
    if not here.work(once):
        typer.echo("worker: stopped", err=True)
    answer({"jobs": here.results})
