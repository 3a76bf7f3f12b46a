"""The server of `g2rpo rewards serve`: one reward behind two addresses, for those who hold its token
(protocol.py says what is spoken).

Who may ask at all is up to trainer/service/http_guard.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from aiohttp import web
from pydantic import ValidationError
from torch import Tensor

from comfy_g2rpo.files.safe import finite
from comfy_g2rpo.prompts import Prompt
from comfy_g2rpo.rewards import Reward, RewardError, checked

from ...service.http_guard import Handler, Refusal, read_body
from .judge_protocol import PROTOCOL, About, Request, without_places
from .sent_pictures import MAX_PIXELS, PictureError, from_base64

MAX_BODY = 72 * 2**20  # what MAX_PIXELS may take as PNG in base64, and the prompts
MAX_WAITING = 16


class JudgeServer:
    """Answers requests about one reward, from any number of clients, judging for one at a time."""

    def __init__(self, reward: Reward) -> None:
        if reward.needs_group:
            raise RewardError(
                f"reward {reward.name!r} compares the pictures of a group, which a served reward never "
                "sees whole; choose another"
            )
        self.reward = reward
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")
        self._waiting = 0
        self._routes: dict[str, dict[str, Handler]] = {
            "/about": {"GET": self.about},
            "/score": {"POST": self.score},
        }

    def find(self, address: str) -> Mapping[str, Handler]:
        """Return what answers at an address, by method."""
        methods = self._routes.get(address)
        if methods is None:
            raise Refusal(404, "there is GET /about and POST /score")
        return methods

    async def about(self, request: web.BaseRequest) -> dict[str, Any]:
        """Say who judges."""
        reward = self.reward
        about = {
            "name": reward.name,
            "licence": reward.licence[:200],
            "compares_across_prompts": bool(reward.compares_across_prompts),
        }
        return About(protocol=PROTOCOL, note=str(reward.note)[:2000], **about).model_dump()

    async def score(self, request: web.BaseRequest) -> dict[str, Any]:
        """Judge pictures, one request after another."""
        if self._waiting >= MAX_WAITING:
            raise Refusal(503, f"{MAX_WAITING} requests wait already")
        self._waiting += 1
        try:
            content = await read_body(request, MAX_BODY)
            loop = asyncio.get_running_loop()
            return {
                "scores": finite(await loop.run_in_executor(self._thread, self._in_turn, request, content))
            }
        finally:
            self._waiting -= 1

    def _in_turn(self, request: web.BaseRequest, content: bytes) -> list[float]:
        """Judge, unless whoever asked gave up while others were judged."""
        if request.transport is None:
            raise Refusal(408, "nobody waits any more")
        return judge(self.reward, content)

    def close(self) -> None:
        """End the thread after what it is at."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def judge(reward: Reward, content: bytes) -> list[float]:
    """Check a request's form and pictures, and score them."""
    try:
        asked = Request.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Refusal(
            400, f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}"[:300]
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON") from error
    columns = (
        [{}] * len(asked.images)
        if asked.columns is None
        else [without_places(each) for each in asked.columns]
    )
    if not len(asked.images) == len(asked.prompts) == len(columns):
        raise Refusal(
            400,
            (
                f"{len(asked.images)} images, {len(asked.prompts)} prompts, {len(columns)} columns; give "
                "one of each per image"
            ),
        )
    prompts = [
        Prompt(text, more) if more else text for text, more in zip(asked.prompts, columns, strict=True)
    ]
    try:
        return checked(reward, pictures(asked.images), prompts).tolist()
    except PictureError as error:
        raise Refusal(400, str(error)) from error
    except RewardError as error:
        raise Refusal(500, " ".join(str(error).split())[:300]) from error


def pictures(images: Sequence[str]) -> Tensor:
    """Read pictures of one size as [B, H, W, 3] float32 in [0, 1]."""
    found: list[np.ndarray] = []
    for i, text in enumerate(images):
        picture = from_base64(text, f"images.{i}")
        if found and picture.shape != found[0].shape:
            raise PictureError(f"images.{i} is not of the size of images.0; send one size at a time")
        if picture.shape[0] * picture.shape[1] * len(images) > MAX_PIXELS:
            raise PictureError(
                f"{len(images)} images of this size have more than {MAX_PIXELS} pixels; send fewer at once"
            )
        found.append(picture)
    return torch.from_numpy(np.stack(found)).float() / 255
