"""What a run is made of: the settings that do not change, and what learning changes."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .. import lora
from ..curriculum.prompt_history import History, check_baseline
from ..objectives import OBJECTIVES
from ..policy import Trainee
from ..prompts import PromptCursor, Prompts
from ..recipes import Recipe
from ..replay.old_forks import Fork, refuse_too_many
from ..rewards import Reward
from ..rewards.protocol import embedder
from ..speed.cheap_completions import Speed
from .batch_limits import Limits
from .diversity import measure
from .optimizers import Optimizers, adamw, rate_schedule
from .pace import Pace


@dataclass(frozen=True)
class World:
    """The processes of a run: `gather` stacks tables [R, P, …] over P, on the CPU, `reduce` averages all the
    gradients in place, `wait` lines up. None of them gives up while another process is at work. `waited` are
    the seconds that went into them so far.
    """

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda scores: scores
    reduce: Callable[[Sequence[Tensor]], None] | None = None
    wait: Callable[[], None] = lambda: None
    waited: Callable[[], float] = lambda: 0.0

    @property
    def speaks(self) -> bool:
        """Return whether this is the process that writes and shows."""
        return self.index == 0

    def told(self, said: bool) -> bool:
        """Return, in every process alike, what the one that speaks has said."""
        return bool(self.gather(torch.tensor([[[float(said and self.speaks)]]])).any())

    def let_one_say(self) -> None:
        """Before an error that every process finds: let all but the one that speaks end as that one does."""
        if not self.speaks:
            self.wait()

    def mean(self, row: Mapping[str, float]) -> dict[str, float]:
        """Return the means over processes of what each has measured, of those that could."""
        if self.count == 1:
            return dict(row)
        each = self.gather(torch.tensor([[[*row.values()]]], dtype=torch.float64))[0]
        return dict(zip(row, each.nanmean(0).tolist(), strict=True))

    def waiting(self, since: float) -> dict[str, float]:
        """Return as metrics the seconds that processes waited since `waited` said so much; none alone."""
        if self.count == 1:
            return {}
        each = self.gather(torch.tensor([[[self.waited() - since]]]))
        return {"time/waiting": each.mean().item(), "time/waiting_max": each.max().item()}

    def dealt(self, count: int) -> list[list[int]]:
        """Deal out rows by number, to every process as many; who would have fewer takes some once more."""
        each = -(-count // self.count)
        return [[(index + i * self.count) % count for i in range(each)] for index in range(self.count)]

    def collect(self, table: Tensor, count: int) -> Tensor:
        """Return a table [R, rows, …] on the CPU from every process's part of it, as its rows were dealt."""
        each = table.shape[1]
        order = [i % self.count * each + i // self.count for i in range(count)]
        return self.gather(table.cpu())[:, order]


ALONE = World()


@dataclass(frozen=True)
class Size:
    """A size of pictures: the shape of their latents, and noise levels [T+1], which may depend on it."""

    shape: tuple[int, ...]
    sigmas: Tensor


@dataclass(frozen=True)
class Setup:
    """Everything of a run that does not change while it runs."""

    recipe: Recipe
    pace: Pace
    policy: Trainee
    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    judges: tuple[Reward, ...]
    prompts: Prompts
    sigmas: Tensor
    shape: tuple[int, ...]
    alpha: float
    sizes: tuple[Size, ...] = ()
    """Sizes that steps take in turn; without any, all are of `shape`, as evaluations are in any case."""
    gates: tuple[float | None, ...] = ()
    style: str = "diffusers"
    rename: lora.Rename | None = None
    """Gives the adapter's modules the names that they have in LoRA files, where these differ."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    world: World = field(default_factory=World)
    preview: tuple[int, ...] | None = None
    """Shape of a latent at the preview size, where evaluations draw there, too."""
    preview_sigmas: Tensor | None = None
    """Noise levels [T+1] at that size; those of training where they do not depend on the size."""
    speed: Speed = field(default_factory=Speed)
    velocity: CheapVelocity | None = None
    """Evaluates completions in the policy's place, where `speed` asks for it."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """The watch's weights of rewards that only measure, by name: 1 if left out, below 0 less is better."""

    stored: StoredSteps | None = None
    """What a run learns from that rolls nothing out."""
    optimizer: Optimizers = adamw
    """Makes the recipe's optimizer."""
    explorer: Explorer | None = None
    """Explores in this process's place, such as by workers on other machines."""

    def __post_init__(self) -> None:
        refuse_too_many(self.recipe, [self.shape, *(size.shape for size in self.sizes)])

    @property
    def trained(self) -> dict[str, float]:
        """Return the weights of the rewards that are trained on, by name."""
        return {reward.name: weight for reward, weight in zip(self.rewards, self.weights, strict=True)}

    def size(self, step: int) -> Size:
        """Return a step's size by (seed, step) alone: each once in every round, in a new order."""
        if not self.sizes:
            return Size(self.shape, self.sigmas)
        turn, place = divmod(step, len(self.sizes))
        order = random.Random(f"sizes {self.pace.seed} {turn}").sample(self.sizes, len(self.sizes))
        return order[place]


@dataclass
class Learner:
    """What learning changes: the optimizer, the adapter's moving average, the count of steps."""

    optimizer: torch.optim.Optimizer
    average: list[Tensor]
    step: int = 0
    forwards: int = 0
    seconds: float = 0.0
    start: list[Tensor] = field(default_factory=list)
    """The adapter as the run began with it, where the KL is measured against that."""
    old: list[Tensor] = field(default_factory=list)
    """The moving average that draws, where the objective learns against that and not the adapter itself."""
    cheap: bool = True
    """Whether completions may still be cheaper than exact (`Setup.speed`)."""
    limits: Limits = field(default_factory=lambda: Limits.of(Pace()))
    """What fits into memory at once; not part of a checkpoint, for results do not depend on it."""
    history: History = field(default_factory=History)
    """What is remembered of prompts and scores, where the recipe chooses or judges by it."""
    schedule: LRScheduler | None = None
    """Sets the learning rate of every step; the count of steps says where it stands."""
    forks: list[Fork] = field(default_factory=list)
    """Old forks that updates learn from once more, oldest first."""
    versions: dict[int, list[Tensor]] = field(default_factory=dict)
    """By the number of steps made, the adapters that steps still to come are explored with, on the CPU."""


class CheapVelocity(Protocol):
    """A velocity for completions, and what there is to say about it, such as why blocks are not compiled."""

    notes: list[str]

    def __call__(self, x: Tensor, sigma: Tensor, cond: Sequence[Any]) -> Tensor:
        """Return v as the policy does."""
        ...


class StoredSteps(Protocol):
    """Makes steps from what is stored, in place of explore, score and update."""

    @property
    def about(self) -> str:
        """Say what a step is."""
        ...

    def __call__(self, setup: Setup, learner: Learner, check: Check) -> dict[str, float]:
        """Make a step; return its row of metrics. An exception leaves the last step's state."""
        ...


class Explorer(Protocol):
    """Explores a step elsewhere, and learns from the learner which step it is and by which adapter."""

    def __call__(self, setup: Setup, learner: Learner, check: Check) -> Any:
        """Return the step as `iteration.explore` does; `check` is called while one waits."""
        ...


Check = Callable[[str], None]
"""Called before every forward and every batch of pictures with the phase, one of PHASES; raises to stop."""

PHASES = ("rollout", "update", "evaluate")


def preview_shape(pace: Pace, shape_of: Callable[[int, int], tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of a preview's latent, by the host's function of (width, height), or None."""
    if not pace.preview_width and not pace.preview_height:
        return None
    size = f"preview_width and preview_height are {pace.preview_width}×{pace.preview_height}"
    if not pace.preview_width or not pace.preview_height:
        raise ValueError(f"{size}; give both, or 0 for none")
    try:
        return shape_of(pace.preview_width, pace.preview_height)
    except ValueError as error:
        raise ValueError(f"{size}, which the model cannot draw: {error}") from error


def make_learner(setup: Setup) -> Learner:
    """Set up the recipe's optimizer over the adapter."""
    if OBJECTIVES[setup.recipe.objective].stored != (setup.stored is not None):
        what = "learns from votes that runs keep" if setup.stored is None else "needs rollouts"
        remedy = "start it by g2rpo pairs, or in ComfyUI by Update LoRA on Kept Votes"
        raise ValueError(
            f"objective is {setup.recipe.objective}, which {what}; pairs are trained otherwise: {remedy}"
        )
    measure(embedder(setup.rewards), setup.recipe.diversity_by)
    if setup.recipe.credit == "gain" and any(gate is not None for gate in setup.gates):
        raise ValueError("rewards has a gate, a limit for whole scores, not for gains; use credit: final")
    check_baseline(setup.recipe, setup.rewards)
    parameters = setup.policy.parameters()
    optimizer = setup.optimizer(parameters, setup.recipe)
    schedule = rate_schedule(optimizer, setup.recipe, setup.pace.steps)
    start = setup.recipe.kl and setup.recipe.kl_reference == "start"
    average, start, old = (
        [p.detach().clone() for p in parameters] if wanted else []
        for wanted in (setup.recipe.ema, start, setup.recipe.old_decay)
    )
    limits = Limits.of(setup.pace)
    return Learner(optimizer, average, start=start, old=old, limits=limits, schedule=schedule)


def prompts_ahead(prompts: Prompts, pace: Pace, recipe: Recipe) -> tuple[str, ...]:
    """Return the prompts that a run can come to: its steps' and those that it is measured on."""
    each = recipe.candidates if recipe.prompt_choice == "curriculum" else 1
    drawn = min(pace.steps * pace.prompts_per_step * each, len(prompts.train))
    return (
        *PromptCursor(prompts.train, drawn, pace.seed).batch(0),
        *prompts.heldout[: pace.eval_prompts or None],
    )
