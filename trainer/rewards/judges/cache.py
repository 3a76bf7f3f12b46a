"""A judge's scores by the hash of images, prompt and question: in memory, and in a folder if given."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from comfy_g2rpo.rewards import RewardError

LOG = logging.getLogger("g2rpo_trainer.judges")
MAX_SCORES = 100_000
KEY = re.compile(r"[0-9a-f]{32}")


class Cache:
    """At most MAX_SCORES scores; `folder` keeps them in scores.jsonl, which only grows."""

    def __init__(self, folder: Path | None = None, most: int = MAX_SCORES) -> None:
        self.most, self.scores = most, {}
        self.path = folder / "scores.jsonl" if folder else None
        if self.path:
            self._keep(_lines(self.path))

    def get(self, keys: Iterable[str]) -> dict[str, float]:
        """Return the scores that are known, by key."""
        return {key: self.scores[key] for key in keys if key in self.scores}

    def put(self, scores: Mapping[str, float]) -> None:
        """Remember scores by key."""
        new = {key: score for key, score in scores.items() if key not in self.scores and math.isfinite(score)}
        self._keep(new.items())
        if self.path and new:
            lines = "".join(json.dumps({"key": key, "score": score}) + "\n" for key, score in new.items())
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # One write per call: lines of several processes do not mix, and a torn one spoils no other.
                with open(self.path, "ab", buffering=0) as file:
                    file.write(("\n" + lines).encode())
            except OSError as error:
                LOG.warning(
                    "cannot write %s: %s; scores are kept in memory alone",
                    self.path,
                    (error.strerror or str(error)).lower(),
                )
                self.path = None

    def _keep(self, items: Iterable[tuple[str, float]]) -> None:
        for key, score in items:
            self.scores[key] = score
            if len(self.scores) > self.most:
                del self.scores[next(iter(self.scores))]


def _lines(path: Path) -> Iterable[tuple[str, float]]:
    """Read what a cache file holds; a damaged line is passed over."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if (item := _item(line)) is not None:
                    yield item
    except FileNotFoundError:
        return
    except OSError as error:
        raise RewardError(
            f"cannot read {path}: {(error.strerror or str(error)).lower()}; mend it or unset "
            "G2RPO_JUDGE_CACHE"
        ) from error


def _item(line: str) -> tuple[str, float] | None:
    """Read one line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    key, score = (row.get("key"), row.get("score")) if isinstance(row, dict) else (None, None)
    if (
        not isinstance(key, str)
        or not KEY.fullmatch(key)
        or type(score) not in (int, float)
        or not math.isfinite(score)
    ):
        return None
    return key, float(score)


def digest(*parts: Any) -> str:
    """Name what a score depends on in 32 hexadecimal digits: texts, numbers, images [H, W, 3] uint8."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = (
            part.tobytes()
            if isinstance(part, np.ndarray)
            else json.dumps(part, sort_keys=True, default=str).encode()
        )
        head = f"{part.shape} {part.dtype}" if isinstance(part, np.ndarray) else "json"
        found.update(f"{head} {len(content)}\n".encode() + content)
    return found.hexdigest()
