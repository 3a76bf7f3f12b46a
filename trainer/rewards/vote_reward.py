"""People as the reward of a run: it shows them what has no votes yet, and stops until they voted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from comfy_g2rpo.prompts import titled
from comfy_g2rpo.rewards import Reward, RewardError
from comfy_g2rpo.rollout import Rollout
from comfy_g2rpo.run.folder import RunFolder
from comfy_g2rpo.votes.ballots import score, write_ballot
from comfy_g2rpo.votes.forks import keep_forks
from comfy_g2rpo.votes.strengths import picture_key

from ..config.input_files import model_digest

NAME = "votes"


class UnvotedError(RewardError):
    """A step whose groups nobody has voted on yet; the run waits, resumable."""


@dataclass
class VoteReward(Reward):
    """Scores a group by its run's votes; groups without are written out, and `settle` stops the run."""

    run: Path
    name: str = NAME
    licence: str = "yours"
    compares_across_prompts: bool = False
    needs_group: bool = True
    may_abstain: bool = True
    note: str = "follows whoever votes, and his mood"
    waiting: list[Path] = field(default_factory=list)
    shown: list[tuple[Path | None, list[str]]] = field(default_factory=list)
    """Of every group that was judged: its ballot, if it waits for votes, and the keys of its pictures."""

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score the pictures [B, H, W, 3] of one prompt's group: [B], NaN for those that nobody compared."""
        prompt, step = titled(prompts[0]), self.step()
        keys = [picture_key(image) for image in images]
        if len(set(keys)) < 2:
            # Nothing to choose between: a tie, about which nobody need be asked.
            self.shown.append((None, keys))
            return torch.zeros(len(images))
        found = score(self.run, images, prompt, step)
        place = write_ballot(self.run, images, prompt, step) if found is None else None
        self.shown.append((place, keys))
        if found is None:
            self.waiting.append(place)
            return torch.full((len(images),), torch.nan)
        return found

    def keep_forks(self, rollout: Rollout, groups: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Write the forks of the groups that wait beside their pictures: their votes can teach again."""
        shown, self.shown = self.shown[len(self.shown) - len(groups) :], []
        base = model_digest(self.folder.config()) if any(place for place, _ in shown) else ""
        for (place, keys), (prompt, images) in zip(shown, groups, strict=True):
            if place:
                keep_forks(place, keys, rollout, prompt, images, base)

    def settle(self) -> None:
        """Stop the run where the step that was just scored has groups without votes."""
        waiting, self.waiting = self.waiting, []
        if waiting:
            groups = (
                f"{len(waiting)} groups wait for votes" if len(waiting) > 1 else "a group waits for votes"
            )
            raise UnvotedError(
                f"{groups} in {self.run / 'ballots'}; vote with: g2rpo vote {self.run}, then resume the run"
            )

    def step(self) -> int:
        """Return the number of the step that the run is at."""
        return max((row["step"] for row in self.folder.metrics() if "nfe" in row), default=0) + 1

    @cached_property
    def folder(self) -> RunFolder:
        """Return the run's folder, which remembers the metrics that it has read."""
        return RunFolder(self.run)
