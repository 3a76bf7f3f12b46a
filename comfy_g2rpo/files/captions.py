"""What an image on disk was asked to show: by our note, a text file, ComfyUI's graph or a web UI."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..prompts import MAX_CHARACTERS
from .picture_files import texts

CHUNK = "g2rpo"  # the text chunk of a PNG that holds scores and prompt
DEPTH = 12  # nodes between a sampler and the text that it follows
PROMPT_INPUTS = ("positive", "conditioning")
TEXT_INPUTS = ("text", "prompt", "value", "string", "text_g", "clip_l", "t5xxl")
MAX_TEXT_FILE = 100_000


def caption_of(path: Path) -> tuple[str, str]:
    """Find an image's prompt and where: "note", "txt", "comfyui", "parameters"; blank and "" without."""
    chunks = texts(path) if path.suffix.lower() == ".png" else {}
    candidates = (
        ("note", lambda: noted(chunks.get(CHUNK, ""))),
        ("txt", lambda: beside(path)),
        ("comfyui", lambda: of_graph(parsed(chunks.get("prompt", "")))),
        ("parameters", lambda: of_parameters(chunks.get("parameters", ""))),
    )
    for source, find in candidates:
        text = clean(find())
        if text:
            return text, source
    return "", ""


def clean(text: str) -> str:
    """Trim a prompt; what no reward takes (too long, no characters) is as if it were not there."""
    text = text.strip()
    strange = any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text)
    return "" if strange or len(text) > MAX_CHARACTERS else text


def parsed(text: str) -> Any:
    """Read JSON, or None."""
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None


def noted(text: str) -> str:
    """Take the prompt from our own chunk."""
    content = parsed(text)
    prompt = content.get("prompt") if isinstance(content, dict) else None
    return prompt if isinstance(prompt, str) else ""


def beside(path: Path) -> str:
    """Read <name>.txt beside a picture; a link to elsewhere is none."""
    place = path.with_suffix(".txt")
    try:
        if place.resolve().parent != path.resolve().parent:
            return ""
        with open(place, "rb") as file:
            return file.read(MAX_TEXT_FILE).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


def of_parameters(text: str) -> str:
    """Take the positive prompt from the parameters that web UIs write."""
    lines = []
    for line in text.splitlines():
        if line.startswith(("Negative prompt:", "Steps: ")):
            break
        lines.append(line)
    return "\n".join(lines)


def of_graph(graph: Any) -> str:
    """Follow a ComfyUI graph's positive conditioning to its text; blank unless exactly one is found."""
    if not isinstance(graph, dict):
        return ""
    found: dict[str, None] = {}
    for node in graph.values():
        wired = inputs_of(node)
        # A sampler or guider; what merely passes conditioning on has no model.
        if "model" in wired or "guider" in wired:
            for name in PROMPT_INPUTS:
                found |= dict.fromkeys(texts_behind(graph, wired.get(name), DEPTH))
    return next(iter(found)) if len(found) == 1 else ""


def inputs_of(node: Any) -> Mapping[str, Any]:
    """Return a node's inputs, whatever was written there."""
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def texts_behind(graph: Mapping[str, Any], value: Any, depth: int) -> Iterator[str]:
    """Yield the texts that a link leads to, through whatever passes conditioning or text on."""
    if isinstance(value, str):
        yield value.strip()
    if depth == 0 or not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        return
    inputs = inputs_of(graph.get(value[0]))
    for name in (*PROMPT_INPUTS, *TEXT_INPUTS):
        # Only a link leads on from conditioning; a text may stand there itself.
        if name in inputs and (name in TEXT_INPUTS or isinstance(inputs[name], list)):
            yield from texts_behind(graph, inputs[name], depth - 1)
            return
