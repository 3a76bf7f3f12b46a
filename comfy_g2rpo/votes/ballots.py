"""What a run keeps of people's votes.

    votes.jsonl                  line 1 names the schema, then one table of votes (votes.py) per line; only
    ever appended to ballots/<name>/              a group that was shown: ballot.json (prompt, step, and key
    and file of every picture), 000.png …,
    and forks.safetensors (forks.py), from which votes can teach again

A line that an interruption tore off was never a vote: it is left out when reading, and removed before the
next one is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files.safe import RunError, read_table, write_bytes, write_json
from ..files.save_pictures import save_png
from .strengths import KEY, VoteError, Votes, from_table, picture_key, scores

SCHEMA = "g2rpo-votes/1"
FILE = re.compile(r"[0-9]{3}\.png")
MAX_LINE = 2**20
SAME = 1 / 255  # mean difference of two renderings of one picture


@dataclass(frozen=True)
class Ballot:
    """A group that was shown: the prompt, the step, and every image's file by its key."""

    prompt: str
    step: int
    files: dict[str, Path]
    path: Path


def votes_file(run: Path) -> Path:
    """Return where a run keeps its votes."""
    return Path(run) / "votes.jsonl"


def append(run: Path, votes: Votes) -> None:
    """Add votes to a run in one write that is on disk on return; a torn last line is repaired."""
    place = votes_file(run)
    line = (json.dumps(votes.table(), separators=(",", ":")) + "\n").encode()
    try:
        with open(place, "ab+") as file:
            file.seek(0)
            content = file.read()
            whole = len(_whole(content))
            if whole < len(content):
                file.truncate(whole)
            end = b"" if not whole or content[:whole].endswith(b"\n") else b"\n"
            head = b"" if whole else (json.dumps({"schema": SCHEMA}) + "\n").encode()
            file.write(head + end + line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"cannot write {place}: {(error.strerror or str(error)).lower()}; make room, the vote is "
            "not kept yet"
        ) from error


def _whole(content: bytes) -> bytes:
    """Leave out a last line that was torn off; one that only lacks its end stays."""
    tail = content[content.rfind(b"\n") + 1 :]
    if not tail:
        return content
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        return content[: -len(tail)]
    return content


def read(run: Path) -> list[Votes]:
    """Read a run's votes in their order; whoever votes on the same group again replaces his former votes."""
    place = votes_file(run)
    if not place.exists():
        return []
    try:
        lines = _whole(place.read_bytes()).splitlines()
    except OSError as error:
        raise RunError(
            f"cannot read {place}: {(error.strerror or str(error)).lower()}; check the run folder"
        ) from error
    newest: dict[Any, Votes] = {}
    for number, line in enumerate(lines, start=1):
        content = _table(line, f"{place}, line {number}")
        if number == 1:
            if content.get("schema") != SCHEMA:
                raise RunError(
                    f"{place} is no file of votes (its first line names no {SCHEMA}); move it away"
                )
            continue
        votes = from_table(content, f"{place}, line {number}")
        who = (frozenset(votes.pictures), votes.prompt, votes.voter)
        newest.pop(who, None)
        newest[who] = votes
    return list(newest.values())


def _table(line: bytes, place: str) -> dict[str, Any]:
    """Read a line that must hold a table."""
    try:
        content = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RunError(f"{place} is damaged; remove that line")
    return content


def matching(votes: Sequence[Votes], keys: Sequence[str], prompt: str) -> list[Votes]:
    """Choose the votes that compare some of these pictures, and were given for this prompt."""
    return [vote for vote in votes if vote.prompt == prompt and vote.within(keys)]


def score(run: Path, pictures: Tensor, prompt: str, step: int) -> Tensor | None:
    """Score images [B, H, W, 3] by a run's votes: [B], NaN if never compared; None without votes."""
    votes, keys = read(run), [picture_key(picture) for picture in pictures]
    found = matching(votes, keys, prompt)
    if not found and votes:
        keys = shown_as(run, pictures, prompt, step) or keys
        found = matching(votes, keys, prompt)
    return scores(keys, found) if found else None


def shown_as(run: Path, pictures: Tensor, prompt: str, step: int) -> list[str]:
    """Return the keys under which a ballot of this step shows the same pictures but for a rounding or two;
    none where there is no such.

    A processor makes a step's pictures again bit by bit; not every device does.
    """
    for ballot in read_ballots(run):
        if (ballot.prompt, ballot.step, len(ballot.files)) != (prompt, step, len(pictures)):
            continue
        shown = [read_png(file) for file in ballot.files.values()]
        if all(
            old.shape == new.shape and (old - new.cpu()).abs().mean() <= SAME
            for old, new in zip(shown, pictures, strict=True)
        ):
            return list(ballot.files)
    return []


def read_png(path: Path) -> Tensor:
    """Read a picture of a ballot: [H, W, 3] in [0, 1]."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255)
    except (OSError, Image.DecompressionBombError) as error:
        raise RunError(
            f"{path} cannot be read; remove its folder and resume, and it is made again"
        ) from error


def ballot_name(prompt: str, step: int, keys: Sequence[str]) -> str:
    """Name the folder of a ballot by its step, its prompt and its first picture."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(filter(None, (f"{step:06d}", words, keys[0][:8])))


def write_ballot(run: Path, pictures: Tensor, prompt: str, step: int) -> Path:
    """Write a group [B, H, W, 3] to vote on, unless it is there; an image that comes twice is shown once."""
    found = {key: picture for picture in pictures if (key := picture_key(picture))}
    if len(found) < 2:
        raise VoteError(
            "votes: the group has fewer than two different pictures, so there is nothing to compare; "
            "raise group_size"
        )
    place = Path(run) / "ballots" / ballot_name(prompt, step, list(found))
    if (place / "ballot.json").is_file():
        return place
    rows = [{"key": key, "file": f"{i:03d}.png"} for i, key in enumerate(found)]
    for row in rows:
        save_png(place / row["file"], found[row["key"]])
    # Last, so that a ballot is whole where this file is.
    write_json(place / "ballot.json", {"prompt": prompt, "step": step, "pictures": rows})
    return place


def read_ballots(run: Path) -> list[Ballot]:
    """Read the groups that a run has shown, in the order of their steps."""
    found = [read_ballot(path.parent) for path in sorted((Path(run) / "ballots").glob("*/ballot.json"))]
    return sorted(found, key=lambda ballot: ballot.step)


def read_ballot(place: Path) -> Ballot:
    """Read the ballot of a folder."""
    path = place / "ballot.json"
    content = read_table(path)
    prompt, step, rows = (content.get(name) for name in ("prompt", "step", "pictures"))
    if not isinstance(prompt, str) or not isinstance(step, int) or not isinstance(rows, list):
        raise RunError(f"{path} is damaged; remove its folder")
    files = {}
    for row in rows:
        key, file = (row.get(name) for name in ("key", "file")) if isinstance(row, dict) else (None, None)
        if (
            not isinstance(key, str)
            or not KEY.fullmatch(key)
            or not isinstance(file, str)
            or not FILE.fullmatch(file)
        ):
            raise RunError(f"{path} is damaged; remove its folder")
        files[key] = place / file
    return Ballot(prompt, step, files, place)


def open_ballots(run: Path) -> list[Ballot]:
    """List the ballots that nobody has voted on yet."""
    votes = read(run)
    return [ballot for ballot in read_ballots(run) if not matching(votes, list(ballot.files), ballot.prompt)]


def pairs(run: Path) -> Iterator[tuple[Votes, Path, Path]]:
    """Yield votes with the better and the worse image of every pair that a run's votes compare."""
    ballots = read_ballots(run)
    for votes in read(run):
        files = {
            key: file
            for ballot in ballots
            if ballot.prompt == votes.prompt
            for key, file in ballot.files.items()
            if file.is_file()
        }
        for winner, loser in votes.within(files):
            yield votes, files[winner], files[loser]


def export(run: Path, place: Path) -> int:
    """Write a run's votes as {"prompt", "winner", "loser"} lines, relative paths; return how many."""
    place = Path(place)
    if place.exists():
        raise RunError(f"{place} exists; choose another file")
    lines = []
    for votes, winner, loser in pairs(run):
        files = {
            name: Path(os.path.relpath(file, place.parent)).as_posix()
            for name, file in (("winner", winner), ("loser", loser))
        }
        row = {"prompt": votes.prompt, **files} | ({"voter": votes.voter} if votes.voter else {})
        lines.append(json.dumps(row, ensure_ascii=False))
    if not lines:
        raise RunError(f"{run} keeps no votes on pictures that lie in it; vote first (g2rpo vote {run})")
    write_bytes(place, ("\n".join(lines) + "\n").encode())
    return len(lines)
