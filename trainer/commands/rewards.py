"""`g2rpo rewards …`: rewards of this machine."""

from __future__ import annotations

import typer

from .serve import serve

rewards_app = typer.Typer(help="Rewards of this machine: offer one over HTTP.", no_args_is_help=True)
rewards_app.command()(serve)
