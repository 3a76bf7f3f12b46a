"""How a user meets a block: the words that find it in the page's search, and the inputs that wait behind
"Show advanced inputs". Older cores know neither, and show the block as it is.
"""

from __future__ import annotations

from comfy_api.latest import io


def offered(schema: io.Schema, words: str, rare: str = "") -> io.Schema:
    """Return the schema with search words, and with the inputs that are rarely touched marked as advanced.

    Both are lists with commas. Raises ValueError where `rare` names no input of the block.
    """
    if hasattr(schema, "search_aliases"):
        schema.search_aliases = words.split(", ")
    hidden = set(rare.split(", ")) if rare else set()
    if unknown := hidden - {given.id for given in schema.inputs}:
        raise ValueError(f"{schema.node_id} has no inputs {', '.join(sorted(unknown))} to mark as rare")
    for given in schema.inputs:
        if given.id in hidden and hasattr(given, "advanced"):
            given.advanced = True
    return schema
