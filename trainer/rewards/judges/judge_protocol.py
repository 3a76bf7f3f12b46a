"""The protocol between `g2rpo train` and `g2rpo rewards serve`: JSON over HTTP, pictures as PNG, nothing that
could run.

    GET  /about  → {"protocol": "g2rpo-judge/1", "name": "hpsv3", "licence": "MIT", "compares_across_prompts":
    true, "note": ""} POST /score    {"images": ["<PNG in base64>", …], "prompts": ["…", …], "columns": [{…},
    …]}
                 → {"scores": [0.31, null, …]}

Both carry `Authorization: Bearer <token>`. Images are RGB and of one size; there is a prompt for each, and,
if anything, a table of columns for each (what a prompt file says beside the prompt). Scores are finite, in
the order of the images, higher is better; null means "cannot judge". A failure is a status other than 200 and
{"error": "one line"}; 429 and 503 may say Retry-After.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from comfy_g2rpo.prompts import MAX_CHARACTERS, columns_of
from comfy_g2rpo.rewards import Reward

from .cache import digest
from .client import Client, Nonsense, Question
from .sent_pictures import MAX_PIXELS, levels, to_base64

PROTOCOL = "g2rpo-judge/1"
MAX_IMAGES = 64
MAX_COLUMNS = 64
PLACES = ("image", "reference")  # columns that hold the path of a picture
MAX_SCORE = 1e30  # beyond it, float32 is infinite


class Form(BaseModel):
    """A message: closed, and of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class About(Form):
    """What a judge says of itself."""

    protocol: Literal["g2rpo-judge/1"]
    name: Annotated[str, Field(min_length=1, max_length=200)]
    licence: Annotated[str, Field(max_length=200)]
    compares_across_prompts: bool
    note: Annotated[str, Field(max_length=2000)] = ""


Column = str | int | float | bool | None | list[Any]


class Request(Form):
    """Pictures to be judged by their prompts."""

    images: Annotated[list[str], Field(min_length=1, max_length=MAX_IMAGES)]
    prompts: Annotated[
        list[Annotated[str, Field(max_length=MAX_CHARACTERS)]], Field(min_length=1, max_length=MAX_IMAGES)
    ]
    columns: (
        Annotated[
            list[Annotated[dict[str, Column], Field(max_length=MAX_COLUMNS)]], Field(max_length=MAX_IMAGES)
        ]
        | None
    ) = None


class Scores(Form):
    """A judgement; null where the judge cannot say."""

    scores: list[Annotated[float, Field(ge=-MAX_SCORE, le=MAX_SCORE)] | None]


@dataclass(frozen=True)
class RemoteReward(Reward):
    """A reward on another machine, or in another environment of this one."""

    name: str
    client: Client
    about: About
    batch: int = 32
    runs_elsewhere: bool = True

    @property
    def licence(self) -> str:
        """Name the licence."""
        return self.about.licence

    @property
    def compares_across_prompts(self) -> bool:
        """Return whether a score means the same for every prompt."""
        return self.about.compares_across_prompts

    @property
    def note(self) -> str:
        """Return how it fails as a target."""
        return self.about.note

    def cancel(self) -> None:
        """Break off the call that is under way."""
        self.client.cancel()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B], NaN where there is no sound answer."""
        asked = list(zip(levels(images), prompts, strict=True))
        keys = [
            digest(self.client.url, self.about.name, str(prompt), dict(columns_of(prompt)), picture)
            for picture, prompt in asked
        ]
        known = self.client.cache.get(keys)
        new = [(key, one) for key, one in dict(zip(keys, asked, strict=True)).items() if key not in known]
        # Fewer than `batch` at a time where that lets all connections work, or where pictures are large.
        share = math.ceil(len(new) / self.client.limits.concurrency)
        size = max(1, min(self.batch, MAX_IMAGES, share, MAX_PIXELS // (images.shape[1] * images.shape[2])))
        parts = [new[start : start + size] for start in range(0, len(new), size)]
        questions = [
            Question(
                tuple(key for key, _ in part),
                partial(body, [one for _, one in part]),
                partial(read, len(part)),
            )
            for part in parts
        ]
        found = known | (self.client.ask("/score", questions) if questions else {})
        return torch.tensor([found.get(key, math.nan) for key in keys], dtype=torch.float32)


def connect_remote(client: Client, batch: int) -> RemoteReward:
    """Ask a judge who it is."""

    def look(answer: Any) -> About:
        try:
            return About.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the answer"
            raise Nonsense(
                "it does not speak this project's protocol; start it with g2rpo rewards serve",
                f"{where}: {first['msg']}",
            ) from error

    return RemoteReward(client.name, client, client.get("/about", look), min(batch, MAX_IMAGES))


def body(asked: Sequence[tuple[np.ndarray, str]]) -> dict[str, Any]:
    """Write a request about pictures [H, W, 3] uint8 and their prompts."""
    content: dict[str, Any] = {
        "images": [to_base64(picture) for picture, _ in asked],
        "prompts": [str(prompt) for _, prompt in asked],
    }
    columns = [without_places(columns_of(prompt)) for _, prompt in asked]
    return content | ({"columns": columns} if any(columns) else {})


def without_places(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where images lie, which is no judge's business."""
    return {name: value for name, value in columns.items() if name not in PLACES}


def read(count: int, answer: Any) -> list[float]:
    """Read the scores of `count` pictures; NaN for null."""
    try:
        scores = Scores.model_validate(answer).scores
    except ValidationError as error:
        first = error.errors()[0]
        raise Nonsense(
            "the answer holds no scores", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    if len(scores) != count:
        raise Nonsense("the answer has the wrong number of scores", f"{len(scores)} for {count} pictures")
    return [math.nan if score is None else score for score in scores]
