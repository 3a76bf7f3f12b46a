"""`g2rpo rewards …`: rewards of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .answers import Program, answer
from .exit_codes import UNFORESEEN
from .serve import serve

rewards_app = Program(
    help="Rewards of this machine: list, fetch and check reward models, offer one over HTTP.",
    no_args_is_help=True,
)
rewards_app.command()(serve)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a reward model; `g2rpo rewards list` shows them.")
]
Place = Annotated[
    Path | None,
    typer.Option(
        "--to", help="Folder of reward models [default: $G2RPO_REWARDS, or ~/.cache/g2rpo/rewards]."
    ),
]


@rewards_app.command("list")
def list_rewards(to: Place = None) -> None:
    """List rewards that need no weights, and reward models with licence and size; * is installed."""
    from comfy_g2rpo.rewards import REWARDS
    from comfy_g2rpo.rewards.models.installed import KNOWN, installed

    from ..rewards import ocr

    root = _root(to)
    present = installed(root)
    typer.echo("without weights:")
    for rule in REWARDS.values():
        typer.echo(f"  {rule.name:<17} {rule.about}")
    typer.echo(f"\nwith pip install 'g2rpo[ocr]':\n  {ocr.NAME:<17} {ocr.ABOUT}")
    typer.echo(f"\nreward models in {root} (* installed):")
    for known in KNOWN.values():
        mark = "*" if known.name in present else " "
        across = "" if known.compares_across_prompts else " Compare only within one prompt."
        typer.echo(f"{mark} {known.name:<17} {known.title}, {known.gigabytes} GB, {known.licence}")
        typer.echo(f"{'':<20}{known.scale}.{across}\n{'':<20}{known.note}")
    for name in present:
        if name not in KNOWN:
            typer.echo(f"* {name:<17} yours")
    typer.echo("\nget one with: g2rpo rewards fetch NAME")
    about = ("name", "title", "gigabytes", "licence", "compares_across_prompts", "scale", "note")
    answer(
        {
            "folder": root,
            "rules": [{"name": rule.name, "about": rule.about} for rule in REWARDS.values()],
            "models": [
                {name: getattr(known, name) for name in about} | {"installed": known.name in present}
                for known in KNOWN.values()
            ],
            "yours": [name for name in present if name not in KNOWN],
        }
    )


@rewards_app.command()
def fetch(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Reward models, one or more; `g2rpo rewards list` shows them."),
    ],
    to: Place = None,
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Web address that stands in for the hub and for GitHub [default: $HF_ENDPOINT, "
            "$G2RPO_GITHUB]."
        ),
    ] = None,
    accept_unpinned: Annotated[
        bool,
        typer.Option(
            "--accept-unpinned",
            help="Take a file whose hash this program does not know, as its revision has it.",
        ),
    ] = False,
) -> None:
    """Download the pinned files of reward models, check their hashes, and install them.

    An interrupted download goes on.
    """
    from comfy_g2rpo.rewards.fetching.download import Sources
    from comfy_g2rpo.rewards.fetching.fetch import fetch as run

    how = {"accept_unpinned": accept_unpinned, "say": typer.echo}
    answer({"folders": run(names, _root(to), Sources.chosen(mirror), **how)})


@rewards_app.command()
def check(
    name: Name,
    to: Place = None,
    device: Annotated[str, typer.Option(help="Where it runs: auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """See that an installed reward model is unchanged, loads, and gives its authors' published scores
    where there are any.
    """
    from ..model.inference import device as best_device
    from ..rewards.recheck import check as run

    well = run(_root(to), name, best_device() if device == "auto" else device, typer.echo)
    answer({"name": name, "well": well})
    if not well:
        raise typer.Exit(UNFORESEEN)
    typer.echo("well")


@rewards_app.command()
def add(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What the new reward is called, such as clipscore_dfn5b.")
    ],
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A CLIP that you have: transformers' layout, or open_clip's."),
    ],
    to: Place = None,
    licence: Annotated[
        str | None, typer.Option(help="Licence of those weights, to be shown with its scores.")
    ] = None,
) -> None:
    """Make a CLIPScore from any CLIP on this machine; nothing is downloaded."""
    from ..rewards.add import add as run

    typer.echo(f"installed in {(place := run(_root(to), name, folder, licence))}")
    answer({"name": name, "folder": place})


def _root(to: Path | None) -> Path:
    """Return the folder of reward models."""
    from ..config.reward_checks import rewards_root

    return to.expanduser() if to else rewards_root()
