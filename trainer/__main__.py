"""`python -m g2rpo_trainer`, which launchers of several processes start."""

from __future__ import annotations

from .cli import main

main()
