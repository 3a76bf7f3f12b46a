"""Text in pictures as the prompt asks for it in quotes: the text task of Flow-GRPO (arXiv 2505.05470).

RapidOCR reads it: PaddleOCR's models on onnxruntime, both Apache-2.0; its wheel brings the models.

    score = 1 − min(edits, letters) / letters

`letters` counts the letters and digits that are asked for, `edits` those to insert, delete or replace in what
was read to get them (Levenshtein): 0 where all of it stands somewhere in the picture, as the authors have it.
Case, spaces and punctuation do not count. 1 is perfect, 0 nothing alike.
"""

from __future__ import annotations

import importlib.util
import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from comfy_g2rpo.rewards import Reward, RewardError

if TYPE_CHECKING:
    from rapidocr import RapidOCR

NAME = "ocr"
ABOUT = "likes pictures that show the text which the prompt has in quotes: how much of it, from 0 to 1"
NEEDS = ("rapidocr", "onnxruntime", "rapidfuzz")
MODELS = {"Det": "PP-OCRv6_det_small.onnx", "Rec": "PP-OCRv6_rec_small.onnx"}
"""What rapidocr 3.10 brings, by its name of the step; a newer one may bring newer ones."""
MAX_ORDERED = 4  # pieces of which every order is tried
PAIRS = (("“”„", "“”"), ("«»", "«»"), ("「", "」"), ("『", "』"))
# After a letter or digit the straight one is a sign of inches.
DOUBLE = r'(?<!\w)"([^"]*)"'
# An apostrophe is none of these: it stands between letters, or after one as in "dogs' bowls".
SINGLE = r"(?<!\w)['‘‚]((?:[^'‘’\n]|(?<=\w)['’](?=\w))+)['’‘](?!\w)"
QUOTED = re.compile("|".join([DOUBLE, SINGLE, *(f"[{a}]([^{a}{b}]*)[{b}]" for a, b in PAIRS)]))


def quoted(prompt: str) -> list[str]:
    """List the letters and digits of what a prompt puts in quotes, piece by piece."""
    pieces = (next(filter(None, match.groups()), "") for match in QUOTED.finditer(prompt))
    return [text for text in map(plain, pieces) if text]


def plain(text: str) -> str:
    """Leave letters, digits and their marks, in lower case."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in folded if c.isalnum() or unicodedata.category(c).startswith("M"))


def likeness(read: str, asked: Sequence[str]) -> float:
    """Compare what was read with the pieces that were asked for, in whatever order they stand: 0 to 1."""
    from rapidfuzz.distance import Levenshtein

    if all(piece in read for piece in asked):
        return 1.0
    letters = sum(map(len, asked))
    orders = permutations(asked) if len(asked) <= MAX_ORDERED else [asked]
    edits = min(Levenshtein.distance(read, "".join(order)) for order in orders)
    return 1 - min(edits, letters) / letters


def check_installed() -> None:
    """Refuse the reward where what it reads with is not there."""
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise RewardError(
            f"reward '{NAME}' needs {' and '.join(missing)}; install with: pip install 'g2rpo[ocr]'"
        )


@cache
def reader() -> RapidOCR:
    """Load RapidOCR with the models of its own wheel, so that it never downloads any."""
    check_installed()
    import rapidocr

    params: dict[str, Any] = {"Global.log_level": "error", "Global.use_cls": False, "Global.text_score": 0.0}
    folder = Path(rapidocr.__file__).parent / "models"
    for step, known in MODELS.items():
        found = {path.name: path for path in folder.glob(f"*_{step.lower()}_*.onnx")}
        if known not in found and len(found) != 1:
            raise RewardError(
                f"reward '{NAME}': this rapidocr brings no {known}; pip install 'rapidocr==3.10.*' does"
            )
        params[f"{step}.model_path"] = str(found.get(known) or next(iter(found.values())))
    return rapidocr.RapidOCR(params=params)


class OcrReward(Reward):
    """Reads pictures, and compares with what their prompts ask for in quotes."""

    name, licence, compares_across_prompts = NAME, "Apache-2.0", True
    about = ABOUT
    note = "letters, and nothing of the picture around them"
    needs = "text in quotes in the prompt"
    may_abstain = True
    runs_elsewhere = True  # in onnxruntime's own threads

    def __init__(self) -> None:
        self._stopped = Event()
        self._reader = reader()

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts of which none asks for text."""
        if prompts and not any(map(quoted, prompts)):
            raise RewardError(
                f"reward '{NAME}' has nothing to read: no prompt asks for text in quotes, such as: "
                'a sign that says "OPEN"'
            )

    def cancel(self) -> None:
        """Stop before the next picture."""
        self._stopped.set()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B] from 0 to 1, NaN where none is asked for."""
        self._stopped.clear()
        return torch.tensor([self._one(image, quoted(p)) for image, p in zip(images, prompts, strict=True)])

    def _one(self, image: Tensor, asked: Sequence[str]) -> float:
        if self._stopped.is_set():
            raise RewardError(f"reward '{NAME}' was broken off")
        return likeness(plain("".join(self.lines(image))), asked) if asked else math.nan

    def lines(self, image: Tensor) -> list[str]:
        """Read the lines of text in an image [H, W, 3] in [0, 1], from the top down."""
        levels = image.detach().mul(255).round().clamp(0, 255).byte().cpu().numpy()
        return list(self._reader(levels[..., ::-1].copy()).txts or ())  # as OpenCV has it: blue first
