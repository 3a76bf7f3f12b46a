"""What an image on disk was asked to show: by our note, a text file, a run, ComfyUI's graph or a web UI.

Where none of them says it for certain, there is no prompt.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..prompts import MAX_CHARACTERS
from .graph_prompts import of_graph
from .picture_files import texts
from .safe import open_file

CHUNK = "g2rpo"  # the text chunk of a PNG that holds scores and prompt
MAX_TEXT_FILE = 100_000
MAX_INDEX = 2**24
INDEX = "index.json"  # what a run writes beside its pictures
JSON = re.compile(r"\s*(\{\s*\"|\[\s*[{\"])")  # the beginning of JSON, even if the rest is cut off


def caption_of(path: Path) -> tuple[str, str]:
    """Find an image's prompt and where it was found; blank and "" without.

    The places: "note" (ours), "txt" (a file beside it), "run" (the index of a run's pictures), "comfyui",
    "parameters" (A1111, SwarmUI, Fooocus …), "invokeai", "novelai".
    """
    chunks = texts(path)
    candidates = (
        ("note", lambda: noted(chunks.get(CHUNK, ""))),
        ("txt", lambda: beside(path)),
        ("run", lambda: of_run(path)),
        ("comfyui", lambda: of_graph(parsed(chunks.get("prompt", "")))),
        ("parameters", lambda: of_parameters(chunks.get("parameters", ""))),
        ("invokeai", lambda: of_invokeai(parsed(chunks.get("invokeai_metadata", "")))),
        ("novelai", lambda: of_novelai(chunks)),
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
        if os.path.dirname(os.path.realpath(place)) != os.path.dirname(os.path.realpath(path)):
            return ""
        with open_file(place) as file:
            return file.read(MAX_TEXT_FILE).decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


def of_run(path: Path) -> str:
    """Take the prompt from the index that a training run keeps of the pictures in a folder."""
    rows = index_beside(path)
    return next((row["prompt"] for row in rows if row["file"] == path.name), "")


def index_beside(path: Path) -> list[dict[str, Any]]:
    """Read the index of the run's folder that a picture lies in: rows with file and prompt, or none."""
    place = path.with_name(INDEX)
    try:
        with open_file(place) as file:
            rows = parsed(file.read(MAX_INDEX).decode("utf-8", errors="replace"))
    except OSError:
        return []
    rows = rows if isinstance(rows, list) else []
    sound = [row for row in rows if isinstance(row, dict)]
    return [row for row in sound if all(isinstance(row.get(key), str) for key in ("file", "prompt"))]


def of_parameters(text: str) -> str:
    """Take the positive prompt from the parameters that web UIs write: A1111's lines, or JSON."""
    content = parsed(text)
    if isinstance(content, dict):
        return of_settings(content)
    if JSON.match(text):
        return ""
    lines = []
    for line in text.splitlines():
        if line.startswith(("Negative prompt:", "Steps: ")):
            break
        lines.append(line)
    return "\n".join(lines)


def of_settings(content: Mapping[str, Any]) -> str:
    """Take the prompt from the JSON of SwarmUI, Fooocus or Easy Diffusion, or a graph kept in JSON."""
    swarm = content.get("sui_image_params")
    prompt = swarm.get("prompt") if isinstance(swarm, dict) else content.get("prompt")
    if isinstance(prompt, dict):
        return of_graph(prompt)
    known = isinstance(swarm, dict) or "negative_prompt" in content
    return prompt if known and isinstance(prompt, str) else ""


def of_invokeai(content: Any) -> str:
    """Take the prompt from InvokeAI's metadata."""
    prompt = content.get("positive_prompt") if isinstance(content, dict) else None
    return prompt if isinstance(prompt, str) else ""


def of_novelai(chunks: Mapping[str, str]) -> str:
    """Take the prompt that NovelAI writes; none where characters have prompts of their own beside it."""
    if chunks.get("Software") != "NovelAI":
        return ""
    caption = parsed(chunks.get("Comment", ""))
    for key in ("v4_prompt", "caption", "char_captions"):
        caption = caption.get(key) if isinstance(caption, dict) else None
    return "" if caption else chunks.get("Description", "")
