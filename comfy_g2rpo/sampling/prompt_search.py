"""Searches with all that a run has loaded: its model, its rewards, a prompt and a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..rewards.mixing import MixedReward
from ..rewards.protocol import Reward, check_alone
from ..run.batch_limits import Limits
from ..run.scorer import Scorer, to_8_bit
from ..run.setup import Setup
from .search import Ask, Result, Space, Told, answer, search
from .search_methods import METHODS
from .search_settings import SearchSettings


@dataclass
class Searcher:
    """Search for one prompt after another; the rewards that a run trains on are searched for."""

    setup: Setup
    check: Callable[[], None] = lambda: None
    """Called before every forward; raises to stop."""
    limits: Limits = field(init=False)
    """What fits into memory, as learned so far."""

    def __post_init__(self) -> None:
        self.limits = Limits.of(self.setup.pace)
        check_alone(self.setup.rewards, "a search")

    @property
    def price(self) -> int:
        """Return the forwards that a state takes: 2 with guidance by a second prompt."""
        policy = self.setup.policy
        guided = getattr(policy, "guidance", 1.0) > 1 and getattr(policy, "blank", None) is not None
        return 2 if guided else 1

    @property
    def reward(self) -> Reward:
        """Return what is searched for: one reward, or several as they are mixed for single images."""
        setup = self.setup
        if len(setup.rewards) == 1 and setup.weights == (1.0,) and not any(setup.gates):
            return setup.rewards[0]
        mode = "minimum" if setup.recipe.mix == "minimum" else "sum"
        return MixedReward(setup.rewards, setup.weights, mode, setup.gates)

    def images(self, latents: Tensor) -> Tensor:
        """Decode latents [n, …] as they will be saved."""
        limit = self.limits.decode_batch
        return torch.cat([to_8_bit(self.setup.policy.decode(part)) for part in latents.split(limit.rows)])

    @torch.no_grad()
    def scores(self, rewards: Sequence[Reward], latents: Tensor, prompt: str) -> Tensor:
        """Score latents [n, …] by rewards: [R, n]."""
        policy, count = self.setup.policy, len(latents)
        scorer = Scorer(policy.decode, rewards, [prompt], count, self.limits.decode_batch, check=self.check)
        with scorer:
            scorer([0] * count, list(range(count)), latents)
        return scorer.scores[:, 0]

    def find(
        self, method: str, settings: SearchSettings, budget: int, prompt: str, seed: int, keep: int = 1
    ) -> Result:
        """Spend a budget of forwards on a prompt's image, from the noise that ComfyUI draws for the seed."""
        setup, reward = self.setup, self.reward
        settings.check(method, self.price > 1)
        cond = setup.policy.encode([prompt])[0]
        noise = torch.randn((1, *setup.shape), generator=torch.Generator().manual_seed(seed))[0]
        space = Space(setup.sigmas, noise.to(setup.policy.device), seed)

        def evaluate(ask: Ask) -> Told:
            judge = self.judge(reward, prompt)
            return answer(ask, setup.policy, cond, setup.sigmas, judge, self.limits.slots, self.check)

        return search(METHODS[method], space, settings, budget // self.price, evaluate, keep)

    def judge(self, reward: Reward, prompt: str) -> Callable[[Tensor], Tensor]:
        """Return what scores latents [n, …] of a prompt as [n]."""
        return lambda latents: self.scores([reward], latents, prompt)[0]
