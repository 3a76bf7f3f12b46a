"""Graph blocks for ComfyUI: every module with blocks lists its own in NODES."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import advantages, demo, folders, results, rewards, sampling, saving, scoring, stepping, training, voting

# Older cores call no on_load: the routes are added by their import.
from . import routes as routes

NODES: list[type[io.ComfyNode]] = [
    block
    for module in (training, stepping, results, sampling, advantages, rewards, scoring, voting, folders, saving, demo)
    for block in module.NODES
]


class Pack(ComfyExtension):
    """All blocks of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the blocks."""
        return NODES
