"""A training run in the terminal: what it needs, its progress, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import Ended, answer, wanted
from .arguments import CommandError
from .exit_codes import SIGNALLED, WAITING

if TYPE_CHECKING:
    from ..cluster.cluster_options import Cluster
    from ..config.reading import Config

ChangedInputs = Annotated[
    bool, typer.Option("--changed-inputs", help="Resume although prompts, rewards or weights have changed.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")]


@dataclass(frozen=True)
class How:
    """How a run is begun, beside its configuration."""

    resume: bool = False
    replace: bool = False
    changed_inputs: bool = False
    force: bool = False
    quiet: bool = False
    cluster: Cluster | None = None


def run_in(folder: Path, config: Config, settings: Sequence[str], begun: How) -> None:
    """Train in a run folder and say what came of it, and how to go on."""
    quiet = begun.quiet
    from ..config.reward_checks import missing_models
    from ..cost.presets import before_training
    from ..model.quiet_libraries import quieten_libraries
    from ..reports.progress import JsonLines, for_terminal

    for line in before_training(config, begun.force):
        if not quiet:
            typer.echo(line)
    if missing := missing_models((*config.rewards, *config.heldout_rewards)):
        raise CommandError(missing)
    progress = JsonLines() if wanted() else for_terminal(quiet)
    quieten_libraries()
    from ..cluster.connecting import exploring
    from ..processes import Left, speaks
    from ..rewards.vote_reward import UnvotedError
    from ..run import train as start

    place = shlex.quote(str(folder))
    try:
        how = {name: getattr(begun, name) for name in ("resume", "replace", "changed_inputs")}
        explorers = exploring(begun.cluster, config) if begun.cluster else None
        told = {"progress": progress, "settings": settings, "explorers": explorers}
        summary = start(config, folder, **told, **how)
        if summary:
            answer({"run": folder, "lora": folder / summary["lora"], "summary": summary})
        if summary and not quiet:
            see = f"see {folder / 'before_after.png'} and {folder / 'curves.png'}"
            typer.echo(f"LoRA: {folder / summary['lora']}\n{see}")
    except (KeyboardInterrupt, Left) as ended:
        code = ended.code if isinstance(ended, Left) else SIGNALLED + getattr(ended, "number", 2)
        said = str(ended) or ("interrupted" if code > SIGNALLED and speaks() else "")
        raise Ended(f"{said}; continue with: g2rpo resume {place}" if said else "", code) from None
    except UnvotedError:
        line = f"vote with: g2rpo vote {place}, then: g2rpo resume {place}"
        raise Ended(line, WAITING) from None
    finally:
        progress.close()
