"""Score images on disk: their prompts, a journal that survives a crash, and the order."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from comfy_g2rpo.files.captions import INDEX, caption_of, index_beside
from comfy_g2rpo.files.picture_files import SUFFIXES, PictureError, batches, listed, natural, read, size_of
from comfy_g2rpo.files.safe import FileError, finite
from comfy_g2rpo.prompts import MAX_CHARACTERS, beside, columns_of, lines_of, starting, with_columns
from comfy_g2rpo.rewards import Reward, RewardError, check_prompts, score_all
from comfy_g2rpo.run.folder import is_run

SCHEMA = "g2rpo-scores/1"
HEAD = json.dumps({"schema": SCHEMA}) + "\n"
MAX_PICTURES = 1_000_000
BATCH_PIXELS = 2**24  # of one batch: 200 MB as float32
READERS = 4  # files that are looked at at once
AHEAD = 2  # batches that are read while another one is scored

Scores = dict[tuple[str, str, str], float]
"""Scores by (SHA-256 of the file, what was asked for, identity of the reward)."""


class RankingError(ValueError):
    """Pictures that cannot be ranked as asked, in one line."""


@dataclass(frozen=True)
class Entry:
    """A picture to judge; `problem` says why it cannot be."""

    path: Path
    prompt: str = ""
    source: str = ""
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    problem: str = ""

    @property
    def asked(self) -> str:
        """Return the prompt, and its columns where it has any: what a score depends on beside the picture."""
        columns = columns_of(self.prompt)
        return (
            f"{self.prompt}\n{json.dumps(dict(columns), ensure_ascii=False, sort_keys=True)}"
            if columns
            else self.prompt
        )


@dataclass(frozen=True)
class Judge:
    """A reward and what tells it from another one of the same name."""

    reward: Reward
    identity: str


def find_pictures(places: Sequence[Path], deep: bool) -> list[Path]:
    """List the pictures that are meant: files as they are, of folders what lies in them."""
    found: dict[Path, None] = {}
    for place in places:
        inside = pictures_in(place, deep) if place.is_dir() else [place]
        if not inside:
            where = "it or the folders in it" if deep else "it; --deep looks into its folders too"
            raise RankingError(f"{place} holds no picture ({', '.join(SUFFIXES)}): none lies in {where}")
        found |= dict.fromkeys(inside)
    if len(found) > MAX_PICTURES:
        raise RankingError(
            f"there are {len(found)} pictures; at most {MAX_PICTURES} are scored at once, give a part of them"
        )
    return list(found)


def pictures_in(folder: Path, deep: bool) -> list[Path]:
    """List a folder's pictures; of a training run those that it drew, not its curves or starting images."""
    steps = sorted(folder.glob("images/[0-9]*")) if is_run(folder) else []
    found = [path for step in steps for path in listed(step)] or listed(folder, deep)
    indices = {place: index_beside(place / INDEX) for place in {path.parent for path in found}}
    extra = {
        place / str(row.get(key))
        for place, rows in indices.items()
        for row in rows
        for key in ("start", "clip")
    }
    return [path for path in found if path not in extra]


def read_prompts(path: Path) -> dict[str, str]:
    """Read a JSONL file of {"file": name, "prompt": …}: prompts and other columns by file name."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RankingError(
                f'{path}, line {number} is not JSON; write {{"file": "a.png", "prompt": "…"}}'
            ) from error
        values = (row.get("file"), row.get("prompt")) if isinstance(row, dict) else (None, None)
        if not all(isinstance(value, str) and value for value in values):
            raise RankingError(
                f'{path}, line {number} lacks file or prompt; write {{"file": "a.png", "prompt": "…"}}'
            )
        columns = {name: value for name, value in row.items() if name not in ("file", "prompt")}
        place = f"{path}, line {number}"
        found[values[0]] = starting(
            beside(with_columns(values[1], columns, place), path.parent), path.parent, place
        )
    return found


def examine(paths: Sequence[Path], prompts: Sequence[str], by_name: Mapping[str, str]) -> list[Entry]:
    """Find out what each picture is: its prompt (given, from the list, or its own), content hash and size."""
    if len(prompts) not in (0, 1, len(paths)):
        raise RankingError(
            f"{len(prompts)} prompts for {len(paths)} pictures; give one --prompt, or one per picture"
        )
    given = list(prompts) * len(paths) if len(prompts) == 1 else list(prompts)
    for text in (*given, *by_name.values()):
        if len(text) > MAX_CHARACTERS:
            raise RankingError(
                f"a prompt has {len(text)} characters; at most {MAX_CHARACTERS} are allowed, shorten it"
            )
    with ThreadPoolExecutor(READERS) as pool:
        return list(
            pool.map(lambda path, text: examined(path, text, by_name), paths, given or [None] * len(paths))
        )


def examined(path: Path, given: str | None, by_name: Mapping[str, str]) -> Entry:
    """Look at one picture."""
    try:
        size = size_of(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except PictureError as error:
        return Entry(path, problem=str(error))
    except OSError as error:
        return Entry(
            path, problem=f"cannot read {path}: {(error.strerror or str(error)).lower()}; check the path"
        )
    listed_prompt = by_name.get(str(path)) or by_name.get(path.name)
    text, source = (
        (given, "given")
        if given is not None
        else (listed_prompt, "list")
        if listed_prompt
        else caption_of(path)
    )
    return Entry(path, text, source, digest, size)


class Journal:
    """Scores on disk, a line each, appended as they are made: what is there is not made again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.scores: Scores = {}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        try:
            # An interruption may have torn even the first line off.
            if not HEAD.encode().startswith(content) and json.loads(lines[0]).get("schema") != SCHEMA:
                raise ValueError("no schema")
            for line in lines[1:]:
                row = json.loads(line)
                score = math.nan if row["score"] is None else float(row["score"])
                self.scores[str(row["sha256"]), str(row["prompt"]), str(row["reward"])] = score
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(
                f"{path} is no journal of scores, or damaged; choose another --out, or remove it"
            ) from error
        if whole != content:
            os.truncate(path, len(whole))

    def add(self, entries: Sequence[Entry], judge: Judge, scores: Sequence[float]) -> None:
        """Keep scores; of a judge elsewhere only those that it gave, so that the next run asks it again."""
        lines = []
        for entry, score in zip(entries, scores, strict=True):
            self.scores[entry.sha256, entry.asked, judge.identity] = score
            if not (math.isnan(score) and judge.reward.runs_elsewhere):
                row = {
                    "sha256": entry.sha256,
                    "prompt": entry.asked,
                    "reward": judge.identity,
                    "score": finite(score),
                }
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            head = "" if self.path.exists() and self.path.stat().st_size else HEAD
            with open(self.path, "a", encoding="utf-8", errors="replace") as file:
                file.write(head + "".join(lines))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise FileError(
                f"cannot write {self.path}: {reason}; make room or choose another folder (--out)"
            ) from error

    def missing(self, entry: Entry, judge: Judge) -> bool:
        """Return whether a picture still has to be judged."""
        return (entry.sha256, entry.asked, judge.identity) not in self.scores

    def table(self, entries: Sequence[Entry], judges: Sequence[Judge]) -> Tensor:
        """Collect scores [R, N]; NaN where there is none."""
        rows = [
            [self.scores.get((entry.sha256, entry.asked, judge.identity), math.nan) for entry in entries]
            for judge in judges
        ]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(judges), len(entries))


def fill(
    journal: Journal, entries: list[Entry], judges: Sequence[Judge], batch: int, done: Callable[[int], None]
) -> list[Entry]:
    """Judge what the journal lacks, reading ahead; return the entries, and what is broken."""
    for judge in judges:
        if judge.reward.needs_group:
            raise RewardError(
                f"reward '{judge.reward.name}' compares the pictures of a group with one another; "
                "files are judged one by one"
            )
    check_prompts(
        [judge.reward for judge in judges], [entry.prompt for entry in entries if not entry.problem]
    )
    wanted = [
        i
        for i, entry in enumerate(entries)
        if not entry.problem and any(journal.missing(entry, judge) for judge in judges)
    ]
    done(len(entries) - len(wanted))
    parts = [
        [wanted[i] for i in part] for part in batches([entries[i].size for i in wanted], batch, BATCH_PIXELS)
    ]
    with ThreadPoolExecutor(AHEAD) as pool:
        for part, results in zip(parts, ahead(pool, entries, parts), strict=True):
            sound = []
            for i, result in zip(part, results, strict=True):
                if isinstance(result, Tensor):
                    sound.append((entries[i], result))
                else:
                    entries[i] = replace(entries[i], problem=result)
            for judge in judges:
                judged(journal, [pair for pair in sound if journal.missing(pair[0], judge)], judge)
            done(len(part))
    return entries


def judged(journal: Journal, pairs: Sequence[tuple[Entry, Tensor]], judge: Judge) -> None:
    """Have one reward judge pictures, those of one shape together, and keep the scores."""
    shapes = dict.fromkeys(picture.shape for _, picture in pairs)
    for shape in shapes:
        alike = [(entry, picture) for entry, picture in pairs if picture.shape == shape]
        scores = score_all(
            [judge.reward],
            torch.stack([picture for _, picture in alike]),
            [entry.prompt for entry, _ in alike],
        )[0]
        journal.add([entry for entry, _ in alike], judge, scores.tolist())


def ahead(
    pool: ThreadPoolExecutor, entries: Sequence[Entry], parts: Sequence[Sequence[int]]
) -> Iterator[list[Tensor | str]]:
    """Yield the pictures of every batch, or what is wrong with one, while the next ones are being read."""
    paths = [[entries[i].path for i in part] for part in parts]
    waiting: list[Future[list[Tensor | str]]] = [pool.submit(read_all, part) for part in paths[:AHEAD]]
    for i in range(len(parts)):
        results = waiting.pop(0).result()
        if i + AHEAD < len(parts):
            waiting.append(pool.submit(read_all, paths[i + AHEAD]))
        yield results


def read_all(paths: Sequence[Path]) -> list[Tensor | str]:
    """Read pictures; of a broken one, what is wrong."""
    return [read_or_problem(path) for path in paths]


def read_or_problem(path: Path) -> Tensor | str:
    """Read a picture, or say why it cannot be."""
    try:
        return read(path)
    except PictureError as error:
        return str(error)


def order(values: Sequence[float], names: Sequence[str]) -> list[int]:
    """Order by value, best first; equal ones by name, those without a value last."""
    return sorted(
        range(len(values)),
        key=lambda i: (math.inf if math.isnan(values[i]) else -values[i], natural(names[i])),
    )


def kept(
    ranked: Sequence[int],
    values: Sequence[float],
    groups: Sequence[str],
    top: int | None,
    threshold: float | None,
) -> list[int]:
    """Keep of an order the `top` first of every group at the threshold, and none that was not judged."""
    seen: dict[str, int] = {}
    chosen = []
    for i in ranked:
        if math.isnan(values[i]) or (threshold is not None and values[i] < threshold):
            continue
        seen[groups[i]] = seen.get(groups[i], 0) + 1
        if top is None or seen[groups[i]] <= top:
            chosen.append(i)
    return chosen


def copy_best(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Copy images, best first, as 0001_<name> …; the same file is not copied again."""
    made = []
    for rank, path in enumerate(paths, 1):
        content = path.read_bytes()
        for number in range(1, 10_000):
            place = folder / f"{rank:04d}_{path.stem}{f'_{number}' if number > 1 else ''}{path.suffix}"
            if place.exists() and place.read_bytes() == content:
                break
            if write_new(place, content):
                break
        made.append(place)
    return made


def write_new(path: Path, content: bytes) -> bool:
    """Write a file that does not exist yet; False where it does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    except OSError as error:
        raise FileError(
            f"cannot write {path}: {(error.strerror or str(error)).lower()}; choose another folder"
        ) from error
    return True


class Meter:
    """Count on the error stream: over one line of a terminal, a line every few seconds elsewhere."""

    def __init__(self, total: int, quiet: bool, write: Callable[[str], None], terminal: bool) -> None:
        self.total, self.quiet, self.write, self.terminal = total, quiet, write, terminal
        self.count = self.fresh = 0
        self.began: float | None = None
        self.said = time.monotonic()

    def __call__(self, count: int) -> None:
        """Take a number of finished pictures; the first call brings what was there before."""
        self.count += count
        if self.began is None:
            self.began = time.monotonic()
        else:
            self.fresh += count
        now = time.monotonic()
        if self.quiet or (now - self.said < (0.2 if self.terminal else 5) and self.count < self.total):
            return
        self.said = now
        speed = self.fresh / max(now - self.began, 1e-3)
        left = (
            f", {(self.total - self.count) / speed:.0f} s left" if speed and self.count < self.total else ""
        )
        text = f"{self.count}/{self.total} pictures" + (f", {speed:.1f}/s{left}" if self.fresh else "")
        self.write(
            f"\r{text:<60}" + ("\n" if self.count >= self.total else "") if self.terminal else text + "\n"
        )
