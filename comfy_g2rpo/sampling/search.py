"""Searches for images that a reward likes: a method asks, whoever has the model and the reward tells.

A method is a generator of a few lines that knows neither model nor reward: it yields an `Ask`, and is sent
what came of it as a `Told`. `search` counts forwards before they are spent, cuts what is asked to what the
budget leaves, and keeps the best; so a method may be ended at any time and nothing that it found is lost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import step
from ..plan import Plan, PlanBuilder, State
from ..policy import Policy
from ..rollout import seeded_noise
from ..speed.fitting_batch import Limit
from ..speed.fitting_rollout import roll_out
from .early_filter import Gauging

if TYPE_CHECKING:
    from .search_settings import SearchSettings

GIVEN = "the given noise"
"""The name of the image that ordinary sampling would make."""


@dataclass(frozen=True)
class Space:
    """Where a search looks: the noise levels, the noise that it was given, and how noise becomes a start."""

    sigmas: Tensor  # [T+1]
    noise: Tensor  # [C, H, W]: what ordinary sampling would start from
    seed: int
    mix: Callable[[Tensor], Tensor] = lambda noise: noise
    """Noise [N, …] → states [N, …] at sigmas[0]: the noise itself, or mixed with the image to change."""

    @property
    def num_steps(self) -> int:
        """Return T, the forwards of an image."""
        return len(self.sigmas) - 1

    def draw(self, rows: int, *key: int | str) -> Tensor:
        """Draw standard normal noise [rows, …], each row from a stream of its own."""
        return self.streams(range(rows), *key)

    def fresh(self, numbers: Sequence[int]) -> Tensor:
        """Return the start noises [n, …] of these numbers; 0 is the given one."""
        made = self.streams(numbers, "start")
        for row, number in enumerate(numbers):
            if number == 0:
                made[row] = self.noise
        return made

    def streams(self, numbers: Sequence[int], *key: int | str) -> Tensor:
        """Draw the noise of numbered streams."""
        shape = self.noise.shape
        made = [seeded_noise(shape, "search", self.seed, *key, number) for number in numbers]
        return torch.stack(made).to(self.noise)

    def noisy_step(
        self, k: int, x: Tensor, velocity: Tensor, noise: Tensor, settings: SearchSettings
    ) -> Tensor:
        """Take step k of the schedule by the settings' kernel and η: states [N, …] at σ_k → at σ_{k+1}."""
        sigmas = self.sigmas.double()
        made = step(settings.kernel, sigmas[k], sigmas[k + 1], settings.eta, sigmas[1])
        a, c, std = map(float, made)
        return a * x + c * velocity + std * noise

    def euler_step(self, k: int, x: Tensor, velocity: Tensor) -> Tensor:
        """Take step k of the schedule without noise."""
        return x + float(self.sigmas[k + 1] - self.sigmas[k]) * velocity


class Ask(NamedTuple):
    """Deterministic walks over schedule indices, from states that are known."""

    start: Tensor  # [N, …] states at indices[0]
    indices: tuple[int, ...]
    """The last is T. From one index straight to T, a walk ends at x̂₀ = x − σv."""
    names: Sequence[str] = ()
    """What each row's image is, in words for users; none where the ends are no images to return."""
    judged: bool = True
    by_gap: bool = False
    """Whether the scores are how far guidance moves the rows on their way; such rows are not judged."""
    kept: bool = False
    """Whether the states on the way are told."""

    @property
    def forwards(self) -> int:
        """Count the forwards of one row."""
        return len(self.indices) - 1

    def first(self, rows: int) -> Ask:
        """Return the first rows."""
        return self._replace(start=self.start[:rows], names=self.names[:rows])


class Told(NamedTuple):
    """What came of the rows that were affordable, the first n of them."""

    latents: Tensor  # [n, …]: the ends
    scores: Tensor  # [n] float64; NaN where nothing could be judged, or nothing was to be; or gaps
    x: Tensor  # [n, S, …]: the states at indices[:-1]; S = 0 where they are not kept
    velocity: Tensor  # [n, S, …]


class Found(NamedTuple):
    """An image, its score, and where it comes from."""

    latent: Tensor
    score: float
    name: str
    whole: bool
    """Whether the whole schedule led to it; else it is a rough look, the best of a stopped search."""


Asking = Generator[Ask, Told, None]
Method = Callable[[Space, "SearchSettings", int], Asking]
"""A search in a space, by its settings and a budget in forwards."""


def answer(
    ask: Ask,
    policy: Policy,
    cond: Any,
    sigmas: Tensor,
    judge: Callable[[Tensor], Tensor],
    slots: int | Limit = 64,
    check: Callable[[], None] | None = None,
) -> Told:
    """Run a request on a policy, all rows with one conditioning; `judge` scores latents [n, …] as [n].

    Where gaps are asked for, the policy must be a `Guided` one.
    """
    rows = len(ask.start)
    gauge = Gauging(policy, rows) if ask.by_gap else None
    made = roll_out(
        gauge or policy,
        walk(len(sigmas) - 1, ask.indices, ask.kept),
        sigmas,
        [(row, cond) for row in range(rows)] if gauge else [cond] * rows,
        [0] * rows,
        ask.start.shape[1:],
        slots=slots,
        check=check,
        device=ask.start.device,
        start=ask.start,
    )
    latents = made.latents[:, 0]
    unknown = gauge.gaps if gauge else torch.full((rows,), math.nan).double()
    scores = judge(latents).cpu().double() if ask.judged else unknown
    return Told(latents, scores, made.x, made.velocity)


class Stopped(Exception):
    """Raised by whoever evaluates, to end a search with what it has found."""


class Walk(Plan):
    """A deterministic walk all of whose states are kept."""

    @cached_property
    def forks(self) -> tuple[int, ...]:
        """List every state on the way."""
        return tuple(range(len(self.states) - 1))


def walk(num_steps: int, indices: Sequence[int], kept: bool) -> Plan:
    """Plan a walk over schedule indices, from a state at the first of them."""
    tree = PlanBuilder(num_steps)
    tree.score(tree.follow(tree.add(State(indices[0], noise=tree.draw())), indices[1:]))
    plan = tree.build()
    return Walk(num_steps, plan.states, plan.leaves) if kept else plan


def strided(num_steps: int, stride: int) -> tuple[int, ...]:
    """List the schedule indices of a trajectory that takes `stride` steps at once, the last one shorter."""
    return tuple(dict.fromkeys([*range(0, num_steps, stride), num_steps]))


@dataclass
class Result:
    """What a search has found, best first, and what it has spent."""

    keep: int
    found: list[Found] = field(default_factory=list)
    forwards: int = 0
    scored: int = 0
    given: float = math.nan
    """The score of the image that the given noise leads to; NaN where the method did not look at it."""

    def take(self, ask: Ask, told: Told) -> None:
        """Count what a request took, and keep what is among the best."""
        rows = len(told.latents)
        self.forwards += rows * ask.forwards
        if not ask.judged:
            return
        self.scored += rows
        names, scores = ask.names or ("a rough look",) * rows, told.scores.tolist()
        made = zip(told.latents, scores, names, strict=True)
        self.found += [Found(latent, score, name, bool(ask.names)) for latent, score, name in made]
        # Stable: of equals, the one that was found first stays first.
        self.found.sort(key=lambda one: (one.whole, not math.isnan(one.score), one.score), reverse=True)
        # A rough look is no image to return beside whole ones.
        self.found = [one for one in self.found if one.whole] or self.found
        # Copies, that do not hold the whole batch.
        self.found = [one._replace(latent=one.latent.clone()) for one in self.found[: self.keep]]
        if GIVEN in names:
            self.given = scores[list(names).index(GIVEN)]


def search(
    method: Method,
    space: Space,
    settings: SearchSettings,
    budget: int,
    evaluate: Callable[[Ask], Told],
    keep: int = 1,
) -> Result:
    """Spend a budget of forwards on a search; return what it found, the best `keep` images first.

    What a method leaves over goes to fresh starts, and so does all where it pays for less than two images.
    `evaluate` runs and judges a request, and may raise Stopped. ValueError where the budget does not pay for
    one image.
    """
    images = budget // space.num_steps
    if not images:
        raise ValueError(
            f"budget is {budget}; one image of {space.num_steps} steps takes {space.num_steps} forwards"
        )
    result = Result(keep)
    try:
        if images > 1:
            spend(method(space, settings, budget), result, budget, evaluate)
        spend(left_over(space, result, budget), result, budget, evaluate)
    except Stopped:
        if not result.found:
            raise
    return result


def spend(asking: Asking, result: Result, budget: int, evaluate: Callable[[Ask], Told]) -> None:
    """Answer requests until the method ends, or until the budget does not pay for a row of the next."""
    with contextlib.closing(asking):
        ask = next(asking, None)
        while ask is not None:
            left = budget - result.forwards
            rows = min(len(ask.start), left // ask.forwards) if ask.forwards else len(ask.start)
            if not rows:
                return
            told = evaluate(ask.first(rows))
            result.take(ask.first(rows), told)
            try:
                ask = asking.send(told)
            except StopIteration:
                return


def left_over(space: Space, result: Result, budget: int) -> Asking:
    """Make whole images from starts that no method counts, or from the given noise if no method did."""
    count = (budget - result.forwards) // space.num_steps
    first = 0 if math.isnan(result.given) else BEYOND
    yield from images(space, range(first, first + count))


BEYOND = 1_000_000
"""The first of the start noises that no method counts to."""
TOGETHER = 32
"""Rows of a request, so that its latents fit into memory whatever the budget is."""


def images(space: Space, numbers: Sequence[int]) -> Asking:
    """Make the images of numbered start noises, some at a time."""
    for at in range(0, len(numbers), TOGETHER):
        yield whole(space, numbers[at : at + TOGETHER])


def whole(space: Space, numbers: Sequence[int]) -> Ask:
    """Ask for the images of numbered start noises, by the whole schedule."""
    names = [f"start {number}" if number else GIVEN for number in numbers]
    return Ask(space.mix(space.fresh(numbers)), tuple(range(space.num_steps + 1)), names)
