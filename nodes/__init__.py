"""Graph blocks for ComfyUI: every module with blocks lists its own in NODES."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    advantages_block,
    demo,
    folders,
    handover,
    results,
    reward_blocks,
    sampling,
    saving,
    scoring,
    training,
    update_block,
    voting,
)

# Older cores call no on_load: the routes are added by their import.
from .host import routes as routes
from .search import early_filter_sampler, optimize_noise, prior_blocks, search_sampler

NODES: list[type[io.ComfyNode]] = [
    block
    for module in (
        training,
        update_block,
        results,
        handover,
        sampling,
        advantages_block,
        reward_blocks,
        scoring,
        voting,
        folders,
        saving,
        demo,
        search_sampler,
        early_filter_sampler,
        optimize_noise,
        prior_blocks,
    )
    for block in module.NODES
]


class Pack(ComfyExtension):
    """All blocks of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the blocks."""
        return NODES
