"""Direct noise optimisation (DNO, arXiv 2405.18881): the start noise follows the reward's gradient, back
through the sampler, and a regulariser keeps it like a draw of ordinary noise.

Whoever has the model and the reward gives `look`; here is everything that needs neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..rollout import seeded_noise, stream
from .search import Stopped

MAX_STEPS = 16
"""Steps of the sampler that a gradient goes back through."""
SPREAD = 0.1
"""How far the noises of an estimate lie from the noise itself."""
LENGTHS = (0.95, 1.05)
"""Bounds of ‖z‖/√D: the regulariser does not see a wrong scale."""
SHUFFLES = 100
VECTOR = 16  # elements of the vectors that the regulariser looks at
AT_ONCE = 2**22  # elements of the shuffled noises that are held at a time
FLOOR = 4 * math.log(2)
"""The least value of the regulariser."""


def negative_log_probability(vectors: Tensor) -> Tensor:
    """Bound −log P that vectors [..., m, k] are draws of N(0, I), by their mean and covariance: [...].

    Each of the two bounds ends at ln 2, where nothing speaks against it.
    """
    m, k = vectors.shape[-2:]
    by_mean = m / (2 * k) * vectors.mean(-2).square().sum(-1)
    covariance = vectors.mT @ vectors / m
    away = torch.linalg.eigvalsh(covariance - torch.eye(k).to(vectors)).abs().amax(-1)
    excess = ((1 + away).sqrt() - 1 - math.sqrt(k / m)).clamp(min=0)
    return by_mean.clamp(min=math.log(2)) + (m / 2 * excess.square()).clamp(min=math.log(2))


def vectors_of(noise: Tensor, orders: Tensor) -> Tensor:
    """Cut a noise [D] in the given orders [P, D] into vectors [P, m, k]; what is left over is left out."""
    size = VECTOR
    while size > 1 and size * size > len(noise):
        size //= 4
    count = len(noise) // size
    return noise[orders[:, : count * size]].view(len(orders), count, size)


def shuffles(elements: int, *key: int | str) -> Tensor:
    """Draw random orders [SHUFFLES, D] from a stream of their own."""
    generator = torch.Generator().manual_seed(stream("shuffles", *key))
    return torch.stack([torch.randperm(elements, generator=generator) for _ in range(SHUFFLES)])


def improbability(noise: Tensor, orders: Tensor) -> float:
    """Return −log P of a noise [...] as it is, plus its mean over shuffled orders [P, D].

    A constant noise, a repeated tile or a wrong mean lie far above FLOOR; 0.9 times a noise does not.
    """
    flat = noise.detach().flatten()
    return sum(_share(flat, *part).item() for part in _parts(flat, orders))


def improbability_gradient(noise: Tensor, orders: Tensor) -> Tensor:
    """Return the gradient of `improbability` with respect to the noise."""
    flat = noise.detach().flatten().clone().requires_grad_()
    made = torch.zeros_like(noise).flatten()
    for part in _parts(flat, orders):
        with torch.enable_grad():
            made += torch.autograd.grad(_share(flat, *part), flat)[0]
    return made.view_as(noise)


def _parts(flat: Tensor, orders: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Yield a noise's own order, then the shuffled ones, some at a time, each with its weight."""
    yield torch.arange(len(flat))[None], 1.0
    for part in orders.split(max(1, AT_ONCE // len(flat))):
        yield part, 1 / len(orders)


def _share(flat: Tensor, orders: Tensor, weight: float) -> Tensor:
    return weight * negative_log_probability(vectors_of(flat, orders)).sum()


def length(noise: Tensor) -> float:
    """Return ‖z‖/√D, which is 1 for ordinary noise."""
    return noise.double().square().mean().sqrt().item()


def within_lengths(noise: Tensor, low: float, high: float) -> Tensor:
    """Scale a noise so that its length lies within bounds; a noise of zeros stays."""
    at = length(noise)
    return noise * (min(max(at, low), high) / at) if at else noise


def estimated_gradient(images: Tensor, image: Tensor, scores: Tensor, score: float) -> Tensor:
    """Estimate a reward's gradient with respect to an image [...] from others [n, ...] that are near it.

    mean_i (R(x_i) − R(x))(x_i − x), normalised; those without a score (NaN) are left out.
    """
    gains = (scores.double() - score).nan_to_num(nan=0.0)
    made = torch.einsum("n,n...->...", gains, images.double() - image.double())
    size = made.norm()
    return (made / size if size > 0 else made).to(image)


def backpropagate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    states: Sequence[Tensor],
    sigmas: Tensor,
    gradient: Tensor,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """Take a gradient [1, …] at the end of an Euler walk back to its start.

    `states` are those that the walk took a velocity at. Only one step's graph is held at a time, so that
    memory does not grow with their number. The gradient has unit scale while it is in the model, whose
    half precision would lose a small one.
    """
    for k in reversed(range(len(states))):
        check()
        scale = gradient.square().mean().sqrt()
        if not scale > 0 or not scale.isfinite():
            return gradient
        with torch.enable_grad():
            x = states[k].detach().clone().requires_grad_()
            made = velocity(x, sigmas[k].expand(len(x)))
        (through,) = torch.autograd.grad(made, x, (gradient / scale).to(made))
        gradient = gradient + (sigmas[k + 1] - sigmas[k]).to(gradient) * scale * through
    return gradient


class Seen(NamedTuple):
    """What a look at a noise's image found."""

    score: float
    """NaN where the image could not be judged."""
    gradient: Tensor | None
    """The reward's, with respect to the noise; None where it was not asked for, or to end here."""


Look = Callable[[Tensor, int, bool], Seen]
"""Look at a noise, in a step of this number, with its gradient or without."""


@dataclass(frozen=True)
class Climb:
    """How a noise is optimised."""

    steps: int = 20
    learning_rate: float = 0.05
    regularise: float = 0.1


@dataclass
class Optimised:
    """The best noise so far, and the way to it."""

    noise: Tensor
    score: float = math.nan
    step: int = 0
    scores: list[float] = field(default_factory=list)
    """By step; the first is that of the given noise."""
    ended: str = ""
    """Why it ended early, in words for users."""

    def take(self, noise: Tensor, score: float) -> None:
        """Keep a noise if it is the best."""
        self.scores.append(score)
        if score > self.score or math.isnan(self.score):
            self.noise, self.score, self.step = noise.clone(), score, len(self.scores) - 1


def optimise(noise: Tensor, climb: Climb, seed: int, look: Look) -> Optimised:
    """Move a noise along the reward's gradient by AdamW; return the best on the way, itself included.

    The regulariser's weight is in units of the reward's first gradient, as rewards have scales of all sizes.
    `look` may raise Stopped to end it with the best so far. A gradient that is not finite ends it, too.
    """
    point = noise.detach().clone().float()
    low, high = min(LENGTHS[0], length(point)), max(LENGTHS[1], length(point))
    # The bounds hold its length; decay would only pull it to the lower one.
    optimizer = torch.optim.AdamW([point], lr=climb.learning_rate, weight_decay=0.0)
    made, unit = Optimised(point.clone()), 0.0
    for number in range(climb.steps + 1):
        last = number == climb.steps
        try:
            seen = look(point.clone(), number, not last)
        except Stopped:
            if not made.scores:
                raise
            return made
        made.take(point, seen.score)
        if math.isnan(seen.score) and not last:
            made.ended = "an image could not be judged"
            return made
        if last or seen.gradient is None:
            return made
        own = seen.gradient.float()
        unit = unit or own.norm().item()
        gradient = climb.regularise * unlikely(point, climb.regularise, seed, number) - own / (unit or 1.0)
        size = gradient.norm()
        if not size.isfinite():
            made.ended = "the gradient was not finite any more"
            return made
        point.grad = gradient / size.clamp(min=1.0)
        optimizer.step()
        point.copy_(within_lengths(point, low, high))
    return made


def unlikely(noise: Tensor, weight: float, seed: int, number: int) -> Tensor:
    """Return the regulariser's gradient in a step, if it has a weight."""
    if not weight:
        return torch.zeros_like(noise)
    return improbability_gradient(noise, shuffles(noise.numel(), seed, number))


def nearby(noise: Tensor, count: int, seed: int, number: int) -> Tensor:
    """Draw the noises [count, …] of an estimate around a noise [1, …] in a step of this number."""
    drawn = [seeded_noise(noise.shape[1:], "probe", seed, number, i) for i in range(count)]
    return noise + SPREAD * torch.stack(drawn).to(noise)
