"""A workflow's file: read within limits, and its nodes and wires put into tables."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_BYTES = 8 * 2**20
"""Of a file. The largest workflows that people share have a fourth of that."""
MAX_PARTS = 400_000
"""Lists and tables in a file: each takes much more memory than the two characters that make it."""
SHOWN = 60
BOM = b"\xef\xbb\xbf"
PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")
SETTERS = {"GetNode": "SetNode", "easy getNode": "easy setNode"}
"""The Set nodes of Get nodes, KJNodes' and Easy-Use's."""
INPUTS, OUTPUTS = "-10", "-20"
"""The two ends of a folded graph, as the page numbers them."""
Raw = Mapping[str, Any]


class WorkflowError(ValueError):
    """A workflow that cannot be read or said as a recipe, in one line."""


@dataclass(frozen=True)
class Link:
    """A wire's beginning, and its end."""

    origin: str
    slot: int
    target: str
    target_slot: int


@dataclass(frozen=True)
class Definition:
    """A graph of the page, the outermost one or one that is folded into a node."""

    name: str
    nodes: Mapping[str, Raw]
    links: Mapping[str, Link]
    inputs: tuple[str, ...] = ()
    """What a folded graph's sockets on the left are called."""
    promoted: tuple[str, ...] = ()
    """Those of them that lead into a widget, which the page then shows on the folded node."""
    ends: Mapping[int, str] = field(default_factory=dict)
    """The wires that end at its sockets on the right."""
    setters: Mapping[tuple[str, str], list[Raw]] = field(default_factory=dict)
    """Set nodes by their kind and what they are called."""


def shown(value: Any) -> str:
    """Return a value as one short line of ASCII."""
    plain = value is None or isinstance(value, (str, float, int))
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return "a number of more than 60 digits"
    return ascii(value[:SHOWN] if isinstance(value, str) else value) if plain else type(value).__name__


def read_file(path: Path) -> Raw:
    """Read a workflow's JSON; WorkflowError says in one line what is wrong with the file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise WorkflowError(f"{path} is a folder, pipe or device; give a workflow's .json file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise WorkflowError(f"cannot read {path}: {reason}; check the path") from error
    if content.startswith(PICTURES):
        raise WorkflowError(f"{path} is a picture; drag it into ComfyUI's page and save the workflow there")
    if len(content) > MAX_BYTES:
        limit = f"{MAX_BYTES / 2**20:g} MiB"
        raise WorkflowError(f"{path} is larger than {limit}, the limit of a workflow; remove what it embeds")
    if (parts := content.count(b"{") + content.count(b"[")) > MAX_PARTS:
        limit = f"the limit is {MAX_PARTS}; split the workflow"
        raise WorkflowError(f"{path} has {parts} lists and tables; {limit}")
    try:
        tree = json.loads(content.removeprefix(BOM).decode())
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{path} is not UTF-8 (byte {error.start}); save it anew in ComfyUI") from error
    except RecursionError as error:
        raise WorkflowError(f"{path} is nested too deeply for a workflow; save it anew in ComfyUI") from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise WorkflowError(f"{path} holds a number of thousands of digits; correct it") from error
        why = " ".join(str(error).split())[:120]
        raise WorkflowError(f"{path} is not JSON ({why}); save it anew in ComfyUI") from error
    if not isinstance(tree, dict):
        raise WorkflowError(f"{path} holds no workflow; save one in ComfyUI, as it is or in the API format")
    return tree


def definition(raw: Raw, name: str) -> Definition:
    """Put the nodes and wires of one of the page's graphs into tables; refuse numbers that come twice."""
    nodes: dict[str, Raw] = {}
    setters: dict[tuple[str, str], list[Raw]] = {}
    for node in listed(raw, "nodes", name):
        key = number_of(node.get("id"), f"{name}: the id of a node")
        if key in nodes:
            raise WorkflowError(
                f"{name} has two nodes of the id {key}; copy one of them and delete the other"
            )
        nodes[key] = node
        if (
            node.get("type") in SETTERS.values()
            and isinstance(values := node.get("widgets_values"), list)
            and values
        ):
            setters.setdefault((node["type"], name_of(values[0])), []).append(node)
    links: dict[str, Link] = {}
    for number, link in filter(None, map(link_of, listed(raw, "links", name, tables=False))):
        if links.setdefault(number, link) != link:
            raise WorkflowError(f"{name} has two wires of the number {number}; draw one of them anew")
    ports = tuple(name_of(port.get("name")) for port in listed(raw, "inputs", name))
    ends = {link.target_slot: number for number, link in links.items() if link.target == OUTPUTS}
    return Definition(name, nodes, links, ports, _promoted(nodes, links, ports), ends, setters)


def _promoted(nodes: Mapping[str, Raw], links: Mapping[str, Link], ports: tuple[str, ...]) -> tuple[str, ...]:
    """Return the sockets on the left of a folded graph of which a wire leads into a widget, in order."""
    slots = set()
    for node in nodes.values():
        entries = node.get("inputs")
        for entry in entries if isinstance(entries, list) else ():
            if not isinstance(entry, dict) or not entry.get("widget"):
                continue
            link = links.get(name_of(entry.get("link")))
            if link is not None and link.origin == INPUTS:
                slots.add(link.slot)
    return tuple(name for slot, name in enumerate(ports) if slot in slots)


def listed(raw: Raw, key: str, name: str, tables: bool = True) -> list[Any]:
    """Return a list, of tables unless anything may be in it."""
    found = raw.get(key, [])
    if not isinstance(found, list):
        raise WorkflowError(f"{name}: {key} is {shown(found)}; it must be a list; save it anew in ComfyUI")
    for each in found if tables else ():
        if not isinstance(each, dict):
            raise WorkflowError(f"{name}: {key} holds {shown(each)}, which is no table; save it anew")
    return found


def name_of(value: Any) -> str:
    """Return a name as text; blank for what is none, which may be nested more deeply than text is made of."""
    return str(value) if isinstance(value, (str, int)) else ""


def number_of(value: Any, what: str) -> str:
    """Return the id of a node or wire as text; WorkflowError for what is none."""
    plain = isinstance(value, (int, str)) and not isinstance(value, bool) and len(shown(value)) <= SHOWN
    # Errors show ids as they are: nothing in them may move a terminal's cursor.
    if not plain or not (number := str(value)).isascii() or not number.isprintable():
        raise WorkflowError(f"{what} is {shown(value)}; it must be a number; save it anew in ComfyUI")
    return number


ENDS = ("id", "origin_id", "origin_slot", "target_id", "target_slot")


def link_of(raw: Any) -> tuple[str, Link] | None:
    """Return a wire's number and its ends, which a file has as a row or a table; None for what is no wire.

    A wire that is left out is missed by its number when somebody follows it; many are never followed.
    """
    if isinstance(raw, list):
        raw = dict(zip(ENDS, raw, strict=False))
    if not isinstance(raw, dict):
        return None
    number, origin, slot, target, target_slot = (raw.get(key) for key in ENDS)
    if type(slot) is not int or type(target_slot) is not int:
        return None
    try:
        what = "the end of a wire"
        ends = number_of(origin, what), number_of(target, what)
        return number_of(number, what), Link(ends[0], slot, ends[1], target_slot)
    except WorkflowError:
        return None
