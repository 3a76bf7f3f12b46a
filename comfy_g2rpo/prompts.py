"""Prompts: read from text or JSON lines, split into trained and held-out, drawn in seeded epochs."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .files.picture_files import PictureError, size_of
from .options import MAX_CHARACTERS

MAX_COLUMNS, MAX_NAME, MAX_ITEMS, MAX_NUMBER = 32, 64, 64, 1e15
MIN_SIDE, MAX_RATIO = (
    32,
    8,
)  # of a picture to start from: pixels of the shorter side, longer side over shorter
TABLES = {".csv": ",", ".tsv": "\t"}  # and what parts their cells
NO_TEXTS = (".json", ".yaml", ".yml", ".parquet", ".arrow", ".xlsx", ".xls", ".ods", ".docx", ".odt", ".pdf")
NONE: Mapping[str, Any] = MappingProxyType({})


class PromptError(ValueError):
    """A prompt file that cannot be used, in one line."""


class Prompt(str):
    """A prompt with the other columns of its row; it equals, hashes and is written as its text."""

    columns: Mapping[str, Any]

    def __new__(cls, text: str, columns: Mapping[str, Any]) -> Prompt:
        """Attach columns to a text."""
        made = super().__new__(cls, text)
        made.columns = MappingProxyType(dict(columns))
        return made

    def __getnewargs__(self) -> tuple[str, dict[str, Any]]:
        """Return how a copy is made."""
        return str(self), dict(self.columns)


def columns_of(prompt: str) -> Mapping[str, Any]:
    """Return what a prompt's row says beside its text; empty for a plain text."""
    return getattr(prompt, "columns", NONE)


def image_of(prompt: str) -> str | None:
    """Return the path of the picture that a prompt starts from, where it has one."""
    given = columns_of(prompt).get("image")
    return given if isinstance(given, str) else None


def identity(prompt: str) -> tuple[str, str | None]:
    """Return what tells prompts apart: the text, and the picture that it starts from."""
    return str(prompt), image_of(prompt)


def titled(prompt: str) -> str:
    """Return a prompt's text as reports show it: with the name of the picture that it starts from."""
    image = image_of(prompt)
    return f"{prompt} ({Path(image).name})" if image else str(prompt)


@dataclass(frozen=True)
class Prompts:
    """What is trained on, what only measures, and what was noticed while reading."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_text(given: Path | str | None) -> bool:
    """Return whether a recipe gives the prompts themselves, one per line, in the place of a file."""
    return isinstance(given, str) and "\n" in given


def load(train: Path | str, heldout: Path | str | None = None, share: float = 0.0, seed: int = 0) -> Prompts:
    """Read both sets from two files or texts, or split one by a seeded share."""
    trained, notes = read(train)
    if heldout is not None:
        held, more = read(heldout)
        refuse_common(trained, held, "the held-out prompts" if is_text(heldout) else str(heldout))
        return Prompts(tuple(trained), tuple(held), (*notes, *more))
    return split(trained, share, seed, "the prompts" if is_text(train) else str(train), tuple(notes))


def refuse_common(trained: Sequence[str], held: Sequence[str], name: str) -> None:
    """Refuse held-out prompts that are trained on."""
    known = set(map(identity, trained))
    common = sorted(prompt for prompt in held if identity(prompt) in known)
    if common:
        example = f"{len(common)} held-out prompts are trained on too, such as {common[0][:80]!r}"
        raise PromptError(f"{name}: {example}; remove them from one side")


def split(prompts: Sequence[str], share: float, seed: int, name: str, notes: tuple[str, ...] = ()) -> Prompts:
    """Set a seeded share of the prompts aside."""
    shuffled = random.Random(f"held-out {seed}").sample(prompts, len(prompts))
    held = set(map(identity, shuffled[: round(share * len(prompts))]))
    if share and not 0 < len(held) < len(prompts):
        raise PromptError(
            f"{name}: prompts.heldout_share {share} of {len(prompts)} prompts leaves one side empty; "
            "change it"
        )
    sides = [
        tuple(prompt for prompt in prompts if (identity(prompt) in held) is side) for side in (False, True)
    ]
    return Prompts(*sides, notes)


def lines_of(path: Path) -> list[str]:
    """Read the lines of a prompt file, or say in one line why it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise PromptError(
            f"cannot read prompt file {path}: {(error.strerror or str(error)).lower()}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"prompt file {path} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from error


def read(path: Path | str) -> tuple[list[str], list[str]]:
    """Read a .txt file (a prompt per line; blank and # lines skipped), a .jsonl file ({"prompt": …}), a .csv
    or .tsv file with a column `prompt`, or a text that is no path; return prompts and notes.

    The other keys or columns of a row become the prompt's columns; `image` is the path, beside the file, of a
    picture to start from.
    """
    if is_text(path):
        unique, repeated = prompts_of(str(path).splitlines(), "the prompts")
        return unique, [f"{repeated} repeated prompts were dropped"] if repeated else []
    path = Path(path)
    kind = path.suffix.lower()
    if kind in NO_TEXTS:
        raise PromptError(f"prompt file {path} is {kind}; write .txt (one per line), .jsonl, .csv or .tsv")
    lines = lines_of(path)
    if kind in TABLES:
        try:
            found, repeated = distinct(_table(lines, TABLES[kind], str(path)), str(path))
        except csv.Error as error:
            raise PromptError(f"{path} is not a table: {error}; write it anew, or save it as .txt") from error
    else:
        found, repeated = numbered(lines, str(path), jsonl=kind == ".jsonl")
    unique = [
        starting(beside(prompt, path.parent), path.parent, f"{path}, line {number}")
        for prompt, number in found
    ]
    return unique, [f"{path}: {repeated} repeated prompts were dropped"] if repeated else []


def prompts_of(lines: Sequence[str], name: str, jsonl: bool = False) -> tuple[list[str], int]:
    """Take the distinct prompts of some lines; return them and how many were repeated."""
    found, repeated = numbered(lines, name, jsonl)
    return [prompt for prompt, _ in found], repeated


def numbered(lines: Sequence[str], name: str, jsonl: bool = False) -> tuple[list[tuple[str, int]], int]:
    """Return the distinct prompts of some lines with their lines, and how many were repeated."""
    parse = _json_prompt if jsonl else _text_prompt
    rows = enumerate(lines, start=1)
    return distinct(((number, parse(line.strip(), f"{name}, line {number}")) for number, line in rows), name)


def distinct(rows: Iterable[tuple[int, str]], name: str) -> tuple[list[tuple[str, int]], int]:
    """Return the distinct prompts of some rows with their lines; another image makes another prompt."""
    found: dict[tuple[str, str | None], tuple[str, int]] = {}
    count = 0
    for number, prompt in rows:
        if len(prompt) > MAX_CHARACTERS:
            raise PromptError(
                f"{name}, line {number}: the prompt has {len(prompt)} characters; at most "
                f"{MAX_CHARACTERS} are allowed"
            )
        if not prompt:
            continue
        count += 1
        first, line_of_first = found.setdefault(identity(prompt), (prompt, number))
        if columns_of(first) != columns_of(prompt):
            both = f"{name}, lines {line_of_first} and {number}"
            raise PromptError(
                f"{both} have the same prompt but different columns; remove one of them or reword it"
            )
    if not found:
        raise PromptError(f"{name} holds no prompt; write one per line")
    return list(found.values()), count - len(found)


def beside(prompt: str, folder: Path) -> str:
    """Read a prompt's `reference` as a path beside the prompt file."""
    given = columns_of(prompt).get("reference")
    return (
        Prompt(prompt, {**columns_of(prompt), "reference": str(folder / given)})
        if isinstance(given, str)
        else prompt
    )


def starting(prompt: str, folder: Path, place: str) -> str:
    """Read a prompt's `image` as a path beside the prompt file; refuse what is none, by its place."""
    if "image" not in columns_of(prompt):
        return prompt
    given = columns_of(prompt)["image"]
    if not isinstance(given, str) or not given or "://" in given or "\0" in given:
        raise PromptError(
            f"{place}, column image is {str(given)[:80]!a}; write the path of a picture on this machine"
        )
    image = folder / given
    if not image.is_file():
        raise PromptError(
            f"{place}, column image: {image} is no file; give the path of a picture, looked up beside "
            "the prompt file"
        )
    try:
        width, height = size_of(image)
    except PictureError as error:
        raise PromptError(f"{place}, column image: {error}") from error
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
        limit = f"each side needs {MIN_SIDE} pixels, and one at most {MAX_RATIO} times the other"
        raise PromptError(f"{place}, column image: {image} has {width} × {height} pixels; {limit}")
    return Prompt(prompt, {**columns_of(prompt), "image": str(image)})


def _text_prompt(line: str, place: str) -> str:
    """Take a line as it is, unless it is a comment."""
    return "" if line.startswith("#") else line


def _table(lines: Sequence[str], sign: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the prompt of every row of a table whose first row names its columns."""
    # With their ends again: a cell in quotes may go on in the next line.
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=sign)
    names = [cell.strip() for cell in next(rows, [])]
    at = [i for i, each in enumerate(names) if each.lower() == "prompt"]
    if len(at) != 1 or len(set(names)) < len(names):
        raise PromptError(
            f"{name}, line 1 is {sign.join(names)[:80]!a}; a table needs a first line that names its "
            "columns, each once, and one of them prompt; or save a plain list as .txt"
        )
    for row in rows:
        cells = dict(zip(names, (cell.strip() for cell in row), strict=False))
        place = f"{name}, line {rows.line_num}"
        if len(row) > len(names):
            raise PromptError(f"{place} has {len(row)} cells for {len(names)} columns; put it into quotes")
        prompt = cells.pop(names[at[0]], "")
        yield rows.line_num, with_columns(prompt, {key: cell for key, cell in cells.items() if cell}, place)


def _json_prompt(line: str, place: str) -> str:
    """Take a JSON line's prompt."""
    if not line:
        return ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f'{place} is not JSON; write {{"prompt": "…"}}') from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f'{place} has no prompt; write {{"prompt": "…"}}')
    return with_columns(
        prompt.strip(), {name: value for name, value in row.items() if name != "prompt"}, place
    )


def with_columns(prompt: str, row: Mapping[str, Any], place: str) -> str:
    """Attach the other columns of a row, if there are any, after checking them."""
    columns = {name: _column(value, f"{place}, column {name[:MAX_NAME]!a}") for name, value in row.items()}
    if len(columns) > MAX_COLUMNS or any(len(name) > MAX_NAME for name in columns):
        raise PromptError(
            f"{place}: at most {MAX_COLUMNS} columns with names of {MAX_NAME} characters are allowed"
        )
    return Prompt(prompt, columns) if columns else prompt


def _column(value: Any, place: str, within: bool = False) -> Any:
    """Check what a column holds: a text, a finite number, true, false, or a list of these."""
    if isinstance(value, list) and not within and len(value) <= MAX_ITEMS:
        return [_column(item, place, within=True) for item in value]
    if isinstance(value, str) and len(value) <= MAX_CHARACTERS:
        return value
    if isinstance(value, (bool, int, float)) and abs(value) <= MAX_NUMBER:
        return value
    allowed = (
        f"a text of at most {MAX_CHARACTERS} characters, a number, true, false, or a list of at most "
        f"{MAX_ITEMS} of them"
    )
    raise PromptError(f"{place} is {json.dumps(value)[:40]}; write {allowed}")


@dataclass(frozen=True)
class PromptCursor:
    """Draws prompts in seeded epochs, each once per epoch; a batch depends on (seed, step) alone."""

    prompts: Sequence[str]
    per_step: int
    seed: int = 0

    def place(self, draw: int) -> int:
        """Return the place in the list of the prompt that comes at a draw, counted from the run's start."""
        count = len(self.prompts)
        return order_of_epoch(count, self.seed, draw // count)[draw % count]

    def places(self, step: int) -> list[int]:
        """Return the places in the list of the step's prompts."""
        return [self.place(draw) for draw in range(step * self.per_step, (step + 1) * self.per_step)]

    def batch(self, step: int) -> list[str]:
        """Return the step's prompts."""
        return [self.prompts[place] for place in self.places(step)]


@lru_cache(maxsize=2)
def order_of_epoch(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Shuffle the places of `count` prompts for an epoch; it is kept, because many steps share an epoch."""
    order = list(range(count))
    random.Random(f"prompts {seed} {epoch}").shuffle(order)
    return tuple(order)
