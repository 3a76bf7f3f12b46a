"""`g2rpo serve`: train jobs that come over HTTP, on a machine with a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..answers import answer, wanted
from ..arguments import CommandError

if TYPE_CHECKING:
    import socket

    from ...service.job_server import JobService

CardPreset = Annotated[
    str | None, typer.Option(help="Settings for a card of this size, such as 24gb, for jobs of a graph.")
]
GraphSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of every job of a graph."),
]
TOKEN_FILE = Path("~/.cache/g2rpo/service.token")


def serve_jobs(
    host: Annotated[str, typer.Option(help="IP address to listen at; it is not encrypted.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8766,
    known_as: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST:PORT", help="Another name that clients use; repeat for several."),
    ] = None,
    token_file: Annotated[
        Path, typer.Option(help="File of the token that clients must give; made where there is none.")
    ] = TOKEN_FILE,
    jobs: Annotated[Path, typer.Option(help="Folder of the jobs and their runs.")] = Path("jobs"),
    models: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder in which jobs find models, prompts and LoRAs by name; repeat for several.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Jobs that may wait at once.")] = 16,
    hours: Annotated[float, typer.Option(min=0.001, max=10_000, help="Hours that a job may take.")] = 24.0,
    gigabytes: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="Gigabytes that all jobs together may hold.")
    ] = 50.0,
    preset: CardPreset = None,
    settings: GraphSettings = None,
    behind_tls_proxy: Annotated[
        bool,
        typer.Option(
            "--behind-tls-proxy", help="Listen beyond this machine: a proxy elsewhere encrypts what passes."
        ),
    ] = False,
    print_openapi: Annotated[
        bool, typer.Option("--print-openapi", help="Print the OpenAPI description and leave.")
    ] = False,
) -> None:
    """Train jobs that come over HTTP, one after another, until Ctrl-C; for a GPU elsewhere."""
    from comfy_g2rpo.files.one_writer import one_writer

    from ...service.http_guard import check_private, listen, names_of
    from ...service.job_server import JobService, Quotas

    if print_openapi:
        print_document()
        return
    check_private(host, behind_tls_proxy)
    roots = [each.expanduser() for each in models or []]
    if missing := next((each for each in roots if not each.is_dir()), None):
        raise CommandError(f"--models is {missing}, which is no folder; choose another")
    given = checked_settings(preset, settings or [])
    folder = jobs.expanduser()
    with listen(host, port) as at, one_writer(folder):
        names = names_of(host, at.getsockname()[1], known_as or [])
        service = JobService(folder, roots, Quotas(queue, hours, gigabytes), *given)
        run_service(service, at, names, token_file.expanduser())


def print_document() -> None:
    """Print the OpenAPI description."""
    import json

    from ...service.api_document import document

    if not wanted():
        typer.echo(json.dumps(document(), indent=1))
    answer(document())


def checked_settings(preset: str | None, settings: list[str]) -> tuple[list[str], str | None]:
    """Return settings and the name of a preset; what an owner has mistyped would fail every job."""
    from ...config.reading import apply_overrides
    from ...cost.presets import preset_named

    apply_overrides({}, settings)
    return settings, preset_named(preset) if preset else None


def run_service(service: JobService, at: socket.socket, names: Sequence[str], token_file: Path) -> None:
    """Serve and train until Ctrl-C or SIGTERM."""
    import asyncio

    from ...service.http_guard import Guard, serve, token_of

    guard = Guard(token_of(token_file), names, service.find)

    def ready() -> None:
        typer.echo(
            f"serving {service.folder} at http://{names[0]}\nthe other side needs: export "
            f'G2RPO_REMOTE_TOKEN="$(cat {token_file})"'
        )
        answer({"url": f"http://{names[0]}", "token_file": token_file})

    try:
        service.start()
        asyncio.run(serve(guard, at, ready))
    except KeyboardInterrupt:
        pass
    finally:
        typer.echo("stopping; what runs leaves a checkpoint and goes on with the next start")
        service.close()
