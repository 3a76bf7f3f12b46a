"""The pack's door for ComfyUI.

The blocks are imported when ComfyUI asks for them, so that any other import of this folder does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import Pack

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Pack:
    """Hand the graph blocks over."""
    from .nodes import Pack

    return Pack()
