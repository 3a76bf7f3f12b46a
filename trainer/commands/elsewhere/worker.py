"""`g2rpo worker`: train what graphs have handed over, beside a ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..answers import answer
from ..arguments import CommandError, Preset
from ..exit_codes import AGAIN
from .remote import TokenFile, connect
from .serve_jobs import checked_settings

if TYPE_CHECKING:
    from ...jobs.worker_loop import Trainer

ONCE = -1.0
"""Patience of one try: the worker itself goes on, and looks for other wishes between two of them."""


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
    preset: Preset = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a field of every job, such as model.dtype=fp32."
        ),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Train nothing here: pass jobs on to the g2rpo serve there."),
    ] = None,
    token_file: TokenFile = None,
) -> None:
    """Train what the block Submit Training hands over, one job after another, until Ctrl-C."""
    base = comfyui.expanduser().resolve()
    place = (output.expanduser().resolve() if output else base / "output") / "g2rpo"
    if not (base / "models").is_dir():
        raise CommandError(f"--comfyui {comfyui} has no folder models; give the folder that ComfyUI works in")
    if not place.parent.is_dir():
        raise CommandError(f"--output {place.parent} is no folder; give ComfyUI's --output-directory")
    from ...jobs.worker_loop import Worker

    if forward:
        given = {"--models": models, "--preset": preset, "--set": settings}
        if wrong := next((name for name, value in given.items() if value), None):
            raise CommandError(f"{wrong} is up to the machine that trains; give it to g2rpo serve there")
        trainer = passing_on(forward, token_file)
        how = f"has {forward} train"
    else:
        trainer = training_here(base, models or [], settings or [], preset)
        how = "trains"
    here = Worker(place / "spool", place, trainer, say=typer.echo)
    typer.echo(f"worker: {how} what is handed over in {here.spool.path}; Ctrl-C ends it, jobs go on later")
    finished = here.work(once)
    left = here.waiting() if finished else []
    if not finished:
        typer.echo("worker: stopped", err=True)
    if left:
        typer.echo(
            f"worker: could not run {', '.join(left)} yet; mend what is said above, and start it again"
        )
    answer({"jobs": here.results})
    if left:
        raise typer.Exit(AGAIN)


def training_here(base: Path, models: list[Path], settings: list[str], preset: str | None) -> Trainer:
    """Return how jobs are trained on this machine."""
    from ...jobs.graph_job import Owner
    from ...jobs.worker_loop import Here, use_comfyui
    from ...workflows.model_files import ModelFolders

    given = checked_settings(preset, settings)
    use_comfyui(base)
    folders = ModelFolders.of([base / "models", *(path.expanduser() for path in models)])
    return Here(Owner(folders, *given))


def passing_on(url: str, token_file: Path | None) -> Trainer:
    """Return how jobs are trained by a service; CommandError where it does not know the token."""
    from ...jobs.forward_job import Forward
    from ...service.remote_client import RemoteError

    try:
        service = connect(url, token_file, patience=ONCE)
    except RemoteError as error:
        raise CommandError(str(error).replace("--url", "--forward")) from error
    try:
        service.health()
    except RemoteError as error:
        if error.status in (401, 403, 421):
            raise CommandError(str(error)) from error
        typer.echo(f"worker: {error}; jobs wait until it answers", err=True)
    return Forward(service)
