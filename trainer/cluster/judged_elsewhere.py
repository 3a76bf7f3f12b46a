"""A reward whose pictures reward workers judge: what a rollout worker has in the reward's place.

Pictures travel as 8-bit levels in safetensors, prompts as text with their columns, scores as safetensors.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from safetensors.torch import load, save
from torch import Tensor

from comfy_g2rpo.prompts import Prompt, columns_of
from comfy_g2rpo.rewards import Reward, RewardError

AGAIN_AFTER = 1.0
"""Seconds after which the next reward worker is asked, where one is lost."""
MEMBERS = ("name", "licence", "compares_across_prompts", "about", "note", "needs", "reads_prompt")
MEMBERS += ("needs_group", "depends_on_batch", "takes_turns", "may_abstain", "frames")
Words = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass
class Judges:
    """The reward workers, who are asked in turn; what one of them had when it was lost, the next one gets.

    The learner's machine sees to it that one comes back, or ends the run.
    """

    actors: Sequence[Any]
    turn: int = 0

    def ask(self, method: str, *given: Any) -> bytes:
        """Return what the next one answers; RewardError in one line where a reward fails there."""
        while True:
            actor, self.turn = self.actors[self.turn % len(self.actors)], self.turn + 1
            try:
                answer = ray.get(getattr(actor, method).remote(*given))
            except RayActorError:
                time.sleep(AGAIN_AFTER)
                continue
            if isinstance(answer, bytes):
                return answer
            raise RewardError(f"reward worker on {answer['host']}: {answer['text']}")

    def rewards(self) -> tuple[Reward, ...]:
        """Return what stands for the rewards of the run."""
        return tuple(JudgedElsewhere(told, self) for told in json.loads(self.ask("about")))


class JudgedElsewhere(Reward):
    """A reward in every respect, so that the same pictures are judged in the same calls; but it has no
    weights here, and drawing goes on while it judges.
    """

    def __init__(self, told: Mapping[str, Any], judges: Judges) -> None:
        for member in MEMBERS:
            setattr(self, member, told[member])
        self.judges, self.runs_elsewhere = judges, not self.takes_turns
        self.embed = self.embedded if told["embeds"] else None
        self.measured: float | None = None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, H, W, 3] by prompts [B]: [B]."""
        words = [(str(prompt), dict(columns_of(prompt))) for prompt in prompts]
        return load(self.judges.ask("score", self.name, packed(images), words))["found"]

    def embedded(self, images: Tensor) -> Tensor:
        """Return the features [B, D] of images [B, H, W, 3]."""
        return load(self.judges.ask("embed", self.name, packed(images)))["found"]

    def noise(self) -> float:
        """Ask for the noise of scores, once."""
        if self.measured is None:
            self.measured = float(load(self.judges.ask("noise", self.name))["found"])
        return self.measured


def packed(images: Tensor) -> bytes:
    """Write images in [0, 1] as 8-bit levels; as float32 where they are something else."""
    images = images.detach().float().cpu().contiguous()
    levels = (images * 255).round().byte()
    return save({"images": levels if torch.equal(levels.float() / 255, images) else images})


def unpacked(content: bytes) -> Tensor:
    """Read images [B, H, W, 3] float32 in [0, 1]."""
    images = load(content)["images"]
    return images if images.is_floating_point() else images.float() / 255


def prompts_of(words: Words) -> list[str]:
    """Make prompts again of texts and their columns."""
    return [Prompt(text, columns) if columns else text for text, columns in words]
