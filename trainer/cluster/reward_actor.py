"""The reward worker of a Ray cluster: holds a run's rewards and no model, and judges for rollout workers.

Its answers are bytes, or a table that says what went wrong, as those of a rollout worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import torch
from safetensors.torch import save
from torch import Tensor

from .judged_elsewhere import MEMBERS, Words, prompts_of, unpacked
from .rollout_actor import Answer, told


class RewardActor:
    """Rewards in a process of their own, loaded when they are first asked for, also by one that came back.

    It judges for one at a time, and says in another thread what it is at.
    """

    def __init__(self, tree: Mapping[str, Any], threads: int) -> None:
        self.tree, self.threads = tree, threads
        self.rewards: dict[str, Any] = {}
        self.doing: tuple[str, float] | None = None
        self.longest = 0.0

    @ray.method(concurrency_group="life")
    def here(self) -> dict[str, Any]:
        """Say what this process is at and for how many seconds, and what its longest call has taken."""
        what, since = self.doing or ("", time.monotonic())
        return {"doing": what, "seconds": time.monotonic() - since, "longest": self.longest}

    def about(self) -> Answer:
        """Say what the rewards are, in the order of the recipe."""
        return told(lambda: json.dumps([described(each) for each in self.built().values()]).encode())

    def score(self, name: str, content: bytes, words: Words) -> Answer:
        """Judge pictures by one reward, in one call."""
        from comfy_g2rpo.rewards import checked

        return self.found(name, lambda reward: checked(reward, unpacked(content), prompts_of(words)))

    def embed(self, name: str, content: bytes) -> Answer:
        """Describe pictures by one reward's features."""
        return self.found(name, lambda reward: reward.embed(unpacked(content)))

    def noise(self, name: str) -> Answer:
        """Say how noisy one reward's scores are."""
        return self.found(name, lambda reward: torch.tensor(reward.noise(), dtype=torch.float64))

    def found(self, name: str, ask: Callable[[Any], Tensor]) -> Answer:
        """Return what a reward finds, or what went wrong."""

        def work() -> bytes:
            reward = self.built()[name]
            with self.busy("judge"), torch.no_grad():
                return save({"found": ask(reward).detach().cpu().contiguous()})

        return told(work)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Let the other thread say what this one is at."""
        begin = time.monotonic()
        self.doing = what, begin
        try:
            yield
        finally:
            self.doing = None
        if what == "judge":
            self.longest = max(self.longest, time.monotonic() - begin)

    def built(self) -> dict[str, Any]:
        """Return the rewards by name, and load them before the first time."""
        if self.rewards:
            return self.rewards
        from ..config.reading import from_dict
        from ..config.reward_checks import missing_models
        from ..model.quiet_libraries import quieten_libraries
        from ..processes import accelerator_of
        from ..run import load_rewards

        with self.busy("build"):
            quieten_libraries()
            cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
            if cpu:
                torch.set_num_threads(self.threads)
            config = from_dict(self.tree)
            if missing := missing_models(config.rewards):
                raise ValueError(missing)
            found, _ = load_rewards(config, accelerator_of(cpu).device)
            self.rewards = {reward.name: reward for reward in found}
        return self.rewards


def described(reward: Any) -> dict[str, Any]:
    """Say of a reward what matters to those that ask it from elsewhere."""
    return {member: getattr(reward, member) for member in MEMBERS} | {"embeds": reward.embed is not None}
