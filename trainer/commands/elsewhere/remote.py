"""`g2rpo remote …`: train on a machine where `g2rpo serve` runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..answers import Program, answer
from ..arguments import CommandError, Quiet, Recipe, Settings

if TYPE_CHECKING:
    from ...service.remote_client import RemoteService

TOKEN = "G2RPO_REMOTE_TOKEN"

remote_app = Program(
    help="Train on another machine, where `g2rpo serve` runs: submit, watch, fetch, cancel, list.",
    no_args_is_help=True,
)

Job = Annotated[str, typer.Argument(metavar="ID", help="The job; `g2rpo remote list` shows them.")]
Url = Annotated[str, typer.Option(help="Address of the service, as a tunnel or a proxy with TLS offers it.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File of the service's token [default: the variable G2RPO_REMOTE_TOKEN].")
]
HERE = "http://127.0.0.1:8766"


@remote_app.command()
def submit(
    recipe: Recipe,
    url: Url = HERE,
    token_file: TokenFile = None,
    settings: Settings = None,
    name: Annotated[
        str | None, typer.Option("--id", help="Name of the job [default: one with date and time].")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Watch the job at once.")] = False,
) -> None:
    """Submit a recipe as a job; the files it names must lie on the other machine."""
    import secrets
    from datetime import datetime

    from ...config.reading import find_recipe, read_yaml

    service = connect(url, token_file)
    sections = read_yaml(find_recipe(recipe))
    # Named here, so that a job whose answer is lost is not submitted twice.
    job_id = name or f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
    taken = service.submit(sections, settings or [], job_id, source="g2rpo remote")
    typer.echo(f"job {job_id}: {taken['status']}; watch it with: g2rpo remote watch {job_id}")
    if watch:
        follow(service, job_id, quiet=False)
    else:
        answer(taken)


@remote_app.command()
def watch(job: Job, url: Url = HERE, token_file: TokenFile = None, quiet: Quiet = False) -> None:
    """Show a job's progress until it ends; a connection that drops is taken up again."""
    follow(connect(url, token_file), job, quiet)


@remote_app.command()
def fetch(
    job: Job,
    url: Url = HERE,
    token_file: TokenFile = None,
    to: Annotated[Path, typer.Option(help="Folder to put the LoRA into.")] = Path(),
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Bring the run's pictures and its report, too.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite existing files.")] = False,
) -> None:
    """Bring a job's LoRA here: its result, or that of its newest checkpoint so far."""
    service, place = connect(url, token_file), to / f"{job}.safetensors"
    about = service.fetch_lora(job, place, replace)
    typer.echo(f"{place}, of step {about.get('step')}")
    files = [place, *(fetch_pictures(service, job, to, replace) if pictures else ())]
    answer({"files": files, "step": about.get("step")})


def fetch_pictures(service: RemoteService, job: str, to: Path, replace: bool) -> list[Path]:
    """Bring a run's pictures and its report; return where they are."""
    from comfy_g2rpo.files.safe import write_json

    from ...service.remote_client import at, refuse_existing

    view, files = service.job(job), []
    for name in ("curves.png", "before_after.png"):
        if name not in view.get("pictures", []):
            continue
        picture = to / f"{job}-{name}"
        service.download(at(job, f"/pictures/{name}"), picture, check_picture, replace)
        files.append(picture)
        typer.echo(picture)
    if view.get("report"):
        report = to / f"{job}-summary.json"
        refuse_existing(report, replace)
        write_json(report, service.report(job))
        files.append(report)
        typer.echo(report)
    return files


@remote_app.command()
def cancel(job: Job, url: Url = HERE, token_file: TokenFile = None) -> None:
    """End a job: at once while it waits, at its next step while it runs, with a LoRA to fetch."""
    found = connect(url, token_file).cancel(job)
    status = found["status"]
    typer.echo(f"job {job}: {status}" + ("; it ends at its next step" if status == "running" else ""))
    answer(found)


@remote_app.command("list")
def list_jobs(url: Url = HERE, token_file: TokenFile = None) -> None:
    """List the jobs of a service, the newest first."""
    jobs = connect(url, token_file).jobs()
    for job in jobs:
        step = "" if job.get("step") is None else f" step {job['step']}"
        typer.echo(plainly(f"{job.get('id')} {job.get('status')}{step} {job.get('submitted')}"))
    answer({"jobs": jobs})


def connect(url: str, token_file: Path | None, patience: float = 120.0) -> RemoteService:
    """Return the service at an address, with the token of a file or of the environment."""
    from ...service.http_guard import read_token
    from ...service.remote_client import RemoteService

    token = read_token(token_file.expanduser()) if token_file else os.environ.get(TOKEN, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise CommandError(f"the service's token is missing; give --token-file, or set {TOKEN} to it")
    return RemoteService(url, token, patience)


def follow(service: RemoteService, job: str, quiet: bool) -> None:
    """Show what happens to a job until it ends; exit code 1 unless it is done."""
    from ...reports.progress import for_terminal

    display, begun, end = for_terminal(quiet), False, {}
    try:
        for event in service.watch(job):
            if event.kind == "metrics" and isinstance(event.content.get("step"), int):
                if not begun:
                    steps = service.job(job).get("steps") or 0
                    display.start(int(steps), event.content["step"], f"job {job} at {service.url}")
                    begun = True
                display.step(harmless(event.content))
            elif event.kind == "state":
                display.note(plainly(f"job {job}: {event.content.get('status')}"))
            elif event.kind == "end":
                end = event.content
        if end.get("status") == "done":
            display.finish(service.report(job))
    finally:
        display.close()
    error = f": {end['error']}" if end.get("error") else ""
    typer.echo(plainly(f"job {job}: {end.get('status')}{error}"))
    answer({"id": job, **end})
    if end.get("status") != "done":
        raise typer.Exit(1)
    typer.echo(f"fetch it with: g2rpo remote fetch {job}")


def check_picture(file: Path) -> None:
    """Refuse what came as a picture and is no PNG."""
    with open(file, "rb") as content:
        if content.read(8) != b"\x89PNG\r\n\x1a\n":
            raise CommandError("what came as a picture is no PNG; is that address a g2rpo serve?")


def harmless(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose texts cannot steer a terminal."""
    return {plainly(name): plainly(value) if isinstance(value, str) else value for name, value in row.items()}


def plainly(text: Any) -> str:
    """Make foreign text one harmless line."""
    from ...service.remote_client import plain

    return plain(text)
