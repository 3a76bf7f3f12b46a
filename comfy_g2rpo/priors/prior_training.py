"""Train a noise prior with all that a run has loaded, and measure it on held-out prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..curriculum.prompt_choice import in_turn
from ..prompts import titled
from ..rewards.mixing import mixed_advantages
from ..rewards.protocol import RewardError, check_alone
from ..rollout import seeded_noise
from ..run.batch_limits import Limits
from ..run.diversity import describe, mean_distance
from ..run.evaluation import Evaluation, interval
from ..run.iteration import draw
from ..run.scorer import Scorer
from ..run.setup import Setup
from ..sampling.search import strided, walk
from ..speed.fitting_rollout import roll_out
from .noise_prior import Critic, NoisePrior, critic_loss, divergence, policy_loss, text_feature, value_loss
from .prior_settings import PriorSettings

USUAL = 1024
"""Numbers of a latent whose learning rate is taken as it is: that of the bundled model."""
KEPT_BYTES = 2**28
"""Of starts that the critic learns from again."""
CRITIC_STEPS, CRITIC_ROWS = 4, 256
CRITIC_RATE = 0.005
"""By how much the critic that is ascended follows the one that learns, as in the paper."""


def feature_of(cond: Any) -> Tensor:
    """Return what a prior reads of a policy's conditioning: [d] on the CPU."""
    return text_feature(cond.tokens, getattr(cond, "pooled", None)).cpu()


def rates(prior: NoisePrior, rate: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: a step makes ‖μ‖ grow by as much for a large latent as for a small one.

    Adam's steps are of one size per number, so the last layer's falls by √D from `USUAL` numbers on.
    """
    inner = [*prior.inner.parameters(), *prior.narrow.parameters()]
    outer = rate * math.sqrt(USUAL / math.prod(prior.shape))
    return [{"params": inner, "lr": rate}, {"params": [*prior.outer.parameters()], "lr": outer}]


class Gain(NamedTuple):
    """What a reward's held-out scores gain, paired by prompt: mean and half of its 95 % interval."""

    mean: float
    width: float

    @property
    def sure(self) -> bool:
        """Return whether the whole interval lies above 0."""
        return self.mean - self.width > 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.width:.3f}"


class Look(NamedTuple):
    """What a prior does to held-out prompts."""

    gains: dict[str, Gain]
    others: dict[str, Gain]
    """The control: the same noise, moved by the shift of another prompt."""
    beyond: dict[str, Gain]
    """What a prompt's own shift gains over another one's."""
    kl: float
    length: float
    """The mean of ‖μ‖."""
    diversity: float
    """Mean distance of a prompt's images, NaN where each has one."""

    def line(self) -> str:
        """Say it in a line."""
        gained = "; ".join(
            f"{name} {gain}, with another prompt's shift {self.others[name]}"
            for name, gain in self.gains.items()
        )
        apart = "" if self.diversity != self.diversity else f", diversity {self.diversity:.3f}"
        return f"{gained}; KL {self.kl:.1f}, shift {self.length:.1f} long{apart}"


@dataclass
class Heldout:
    """The held-out prompts, their noises, and the scores that they have without a prior."""

    prompts: tuple[str, ...]
    before: Evaluation
    diversity: float
    others: list[int]
    """For each prompt the place of another one, whose shift is the control."""


def derangement(count: int, seed: int) -> list[int]:
    """Give everyone of `count` another one, in one random round."""
    order = random.Random(f"another prompt {seed}").sample(range(count), count)
    found = [0] * count
    for one, other in zip(order, [*order[1:], *order[:1]], strict=True):
        found[one] = other
    return found


@dataclass
class PriorTraining:
    """A noise prior in training: `step` learns from one group per prompt, `look` measures."""

    setup: Setup
    settings: PriorSettings
    check: Callable[[], None] = lambda: None
    """Called before every forward; raises to stop."""
    steps: int = 0
    limits: Limits = field(init=False)
    prior: NoisePrior = field(init=False)
    critic: Critic | None = None

    def __post_init__(self) -> None:
        setup, settings = self.setup, self.settings
        check_alone(setup.rewards, "a noise prior")
        self.limits = Limits.of(setup.pace)
        width, seed = len(self.features(setup.prompts.heldout[:1])[0]), setup.pace.seed
        self.prior = NoisePrior(width, setup.shape, settings.rank, seed)
        self.optimizer = torch.optim.Adam(rates(self.prior, settings.learning_rate))
        if settings.estimator == "value":
            self.critic, self.ascended = (Critic(width, setup.shape, seed) for _ in range(2))
            self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), settings.learning_rate)
            self.kept: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def stride(self) -> int:
        """Return how many steps training takes at once: as the recipe's coarsest completions do."""
        return max(self.setup.recipe.granularities)

    def price(self) -> tuple[int, int]:
        """Count the forwards and the images of a step."""
        rows = self.setup.pace.prompts_per_step * self.setup.recipe.group_size
        return rows * (len(strided(self.setup.recipe.num_steps, self.stride)) - 1), rows

    def features(self, prompts: Sequence[str]) -> Tensor:
        """Return the text features of prompts: [P, d]."""
        return torch.stack([feature_of(cond) for cond in self.setup.policy.encode(prompts)])

    def run(self, prompts: Sequence[str], starts: Tensor, stride: int, judges: Sequence[Any]) -> Scorer:
        """Draw one image per prompt from its start [n, …], and score it."""
        setup = self.setup
        policy, count = setup.policy, len(prompts)
        scorer = Scorer(
            policy.decode,
            judges,
            prompts,
            1,
            self.limits.decode_batch,
            check=self.check,
            describe=lambda images: describe(images, None),
        )
        num_steps = setup.recipe.num_steps
        plan, sink = walk(num_steps, strided(num_steps, stride), False), scorer
        with torch.no_grad(), scorer:
            rollout = roll_out(
                policy,
                plan,
                setup.sigmas,
                policy.encode(prompts),
                [0] * count,
                setup.shape,
                slots=self.limits.slots,
                sink=sink if policy.decodes_while_rolling else None,
                check=self.check,
                device=policy.device,
                start=starts.to(policy.device),
            )
            if not policy.decodes_while_rolling:
                scorer(list(range(count)), [0] * count, rollout.latents[:, 0])
        for reward in judges:
            reward.settle()
        return scorer

    def step(self) -> None:
        """Draw a group of starts for each of the next prompts, judge their images, and learn from that."""
        setup, recipe, number = self.setup, self.setup.recipe, self.steps
        prompts, seeds = draw(setup, in_turn(setup, number), number)
        group = recipe.group_size
        noise = torch.stack(
            [
                torch.stack([seeded_noise(setup.shape, "prior", seed, i) for i in range(group)])
                for seed in seeds
            ]
        )
        features = self.features(prompts)
        with torch.no_grad():
            starts = self.prior(features)[:, None] + noise
        rows = [prompt for prompt in prompts for _ in range(group)]
        scores = self.run(rows, starts.flatten(0, 1), self.stride, setup.rewards).scores[:, :, 0]
        if scores.isnan().all():
            raise RewardError(f"rewards judged none of the images of step {number}; mend them or the prompts")
        groups = scores.view(len(scores), len(prompts), 1, group, 1).unbind(1)
        how = setup.weights, recipe.mix, setup.gates, recipe.clamp, recipe.std_floor
        made = mixed_advantages(groups, *how, None, [reward.noise() for reward in setup.rewards])
        self.learn(features, starts, noise, torch.cat(made))
        self.steps += 1

    def learn(self, features: Tensor, starts: Tensor, noise: Tensor, advantages: Tensor) -> None:
        """Update the prior by text features [P, d], starts [P, G, …] with their noise, advantages [P, G]."""
        if self.critic is not None:
            self.learn_values(features, starts, advantages)
        shift, alpha = self.prior(features), self.settings.alpha
        loss = (
            policy_loss(shift, noise, advantages, alpha)
            if self.critic is None
            else value_loss(self.ascended, shift, noise, features, alpha)
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def learn_values(self, features: Tensor, starts: Tensor, values: Tensor) -> None:
        """Regress the critic on what was judged lately; the one that is ascended follows slowly."""
        self.kept.append((features, starts, values))
        most = max(1, KEPT_BYTES // (starts.numel() * starts.element_size()))
        del self.kept[:-most]
        chance = random.Random(f"critic {self.setup.pace.seed} {self.steps}")
        parts = max(1, CRITIC_ROWS // values.numel())
        for _ in range(CRITIC_STEPS):
            chosen = [self.kept[-1], *(chance.choice(self.kept) for _ in range(parts - 1))]
            texts, rows, wanted = (torch.cat(part) for part in zip(*chosen, strict=True))
            self.critic_optimizer.zero_grad()
            critic_loss(self.critic, rows, texts, wanted).backward()
            self.critic_optimizer.step()
        with torch.no_grad():
            for one, other in zip(self.ascended.parameters(), self.critic.parameters(), strict=True):
                one.lerp_(other, max(CRITIC_RATE, 1 / (self.steps + 1)))

    def noises(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Return the start noise [P, N, …] of held-out prompts, the same at every look."""
        shape, count = self.setup.shape, self.setup.pace.eval_noises
        return torch.stack(
            [
                torch.stack([seeded_noise(shape, "prior look", seed, prompt, i) for i in range(count)])
                for prompt in prompts
            ]
        )

    def measure(self, prompts: tuple[str, ...], seed: int, shift: Tensor | None) -> tuple[Evaluation, float]:
        """Score whole images of prompts, their noise moved by shifts [P, …]; see how far they differ."""
        judges, noise = self.setup.judges, self.noises(prompts, seed)
        starts = noise if shift is None else noise + shift[:, None]
        rows = [prompt for prompt in prompts for _ in range(noise.shape[1])]
        scorer = self.run(rows, starts.flatten(0, 1), 1, judges)
        scores = scorer.scores[:, :, 0].view(len(judges), len(prompts), -1)
        pixels = scorer.features["pixels"][:, 0].view(len(prompts), noise.shape[1], -1)
        found = Evaluation(tuple(judge.name for judge in judges), tuple(map(titled, prompts)), scores)
        return found, mean_distance(pixels).nanmean().item()

    def heldout(self, seed: int) -> Heldout:
        """Score the held-out prompts as they are."""
        pace = self.setup.pace
        prompts = tuple(self.setup.prompts.heldout[: pace.eval_prompts or None])
        return Heldout(prompts, *self.measure(prompts, seed, None), derangement(len(prompts), seed))

    @torch.no_grad()
    def look(self, heldout: Heldout, seed: int) -> Look:
        """Measure the prior on held-out prompts, with their own shifts and with those of other prompts."""
        shift = self.prior(self.features(heldout.prompts))
        own, diversity = self.measure(heldout.prompts, seed, shift)
        other, _ = self.measure(heldout.prompts, seed, shift[heldout.others])
        kl = divergence(shift)
        return Look(
            gains(heldout.before, own),
            gains(heldout.before, other),
            gains(other, own),
            kl.mean().item(),
            (2 * kl).sqrt().mean().item(),
            diversity,
        )


def gains(before: Evaluation, after: Evaluation) -> dict[str, Gain]:
    """Return every reward's gain, paired by prompt."""
    tables = (one.scores.double().nanmean(2) for one in (before, after))
    return {name: Gain(*interval(new - old)) for name, old, new in zip(before.names, *tables, strict=True)}
