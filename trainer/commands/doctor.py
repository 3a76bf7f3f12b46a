"""`g2rpo doctor`: what of an installation works, what does not, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import answer
from .arguments import Settings
from .exit_codes import UNFORESEEN

if TYPE_CHECKING:
    from ..doctor.findings import Finding

Asked = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE", help="Also look at this recipe's model, prompts and rewards."),
]


def doctor(
    recipe: Asked = None,
    settings: Settings = None,
    reach: Annotated[
        bool, typer.Option("--reach", help="Also ask the recipe's judges over HTTP whether they are there.")
    ] = False,
    comfyui: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A ComfyUI, whose jobs for this trainer are looked at."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="A service on another machine, which is asked with the token $G2RPO_REMOTE_TOKEN."),
    ] = None,
) -> None:
    """Check the installation: libraries, card, disk, and what a recipe needs.

    Exit code 1 if there is a problem. Nothing is changed, and nobody is asked over the network unless you
    say so.
    """
    from ..doctor.findings import PROBLEM, apart
    from ..doctor.hand_over import check_service, check_spool
    from ..doctor.machine_checks import check_card, check_disk, check_libraries, check_python, check_ray
    from ..doctor.recipe_health import check_installed_rewards, check_recipe

    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": check_python,
        "libraries": check_libraries,
        "ray": check_ray,
        "card": check_card,
        "disk": check_disk,
    }
    if recipe is None:
        checks["reward models"] = check_installed_rewards
    else:
        checks["recipe"] = lambda: check_recipe(recipe, settings or [], reach)
    if comfyui:
        checks["spool"] = lambda: check_spool(comfyui)
    if url:
        checks["service"] = lambda: check_service(url)
    findings = []
    for name, check in checks.items():
        for found in apart(name, check):
            typer.echo(found.line())
            findings.append(found)
    bad = sum(found.state == PROBLEM for found in findings)
    typer.echo(f"{bad} problem{'s' * (bad != 1)}" if bad else "no problem")
    answer({"ok": not bad, "checks": [found._asdict() for found in findings]})
    if bad:
        raise typer.Exit(UNFORESEEN)
