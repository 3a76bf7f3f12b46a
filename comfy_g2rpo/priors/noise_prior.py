"""Noise priors: a small network that moves the start noise by what the prompt says; the model stays as it is.

Prior Guidance (arXiv 2505.10881): p(z | c) = N(μ(c), 1) instead of N(0, 1), trained to raise the expected
reward minus α·KL(p ‖ N(0, 1)), where KL = ½‖μ‖². The standard deviation stays 1: a learned one makes the
noise collapse. The network is of low rank and begins at μ = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..files.safe import FileError, read_header, read_tensors, sound, write_tensors
from ..rollout import seeded_noise

HIDDEN = 64
MAX_NUMBERS = 2**28
"""Numbers of one network: 1 GB."""
FORMAT = "1"
TOLERANCE = 1e-4
"""How far the mean size of two checkpoints' vectors may differ: rounding to 16 bit stays far below."""
FOREIGN = "get it again, or make one with g2rpo prior"


class Vectors(NamedTuple):
    """What tells a checkpoint from others under any names of its weights: how many numbers its vectors
    (biases, norms) hold, and their mean size. Matrices may be fused or stored in few bits, vectors are not.
    """

    count: int
    mean: float

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> Vectors:
        """Measure a model's named weights."""
        count, total = 0, 0.0
        for name, weight in named:
            if weight.ndim == 1 and weight.is_floating_point() and "scale_" not in name.rpartition(".")[2]:
                count += weight.numel()
                total += weight.detach().double().abs().sum().item()
        return cls(count, total / max(count, 1))

    def same(self, other: Vectors) -> bool:
        """Return whether both may be one checkpoint; weights kept in 16 bit are the same."""
        return self.count == other.count and math.isclose(self.mean, other.mean, rel_tol=TOLERANCE)

    def __str__(self) -> str:
        return f"{self.count} numbers of mean size {self.mean:.6g}"


def text_feature(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """Return what a prior reads of a prompt: its pooled feature [d], or the mean of its tokens [L, d] → [d].

    Tokens of nothing but zeros are padding.
    """
    if pooled is not None:
        return pooled.detach().float().flatten()
    rows = tokens.detach().float()
    rows = rows[rows.any(1)] if rows.any() else rows
    return rows.mean(0)


class NoisePrior(nn.Module):
    """μ(c): Linear(d, 64) → SiLU → Linear(64, r) → Linear(r, D), the last one zero at first."""

    def __init__(self, features: int, shape: Sequence[int], rank: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.features, self.shape, self.rank = features, tuple(shape), rank
        self.inner, self.narrow = nn.Linear(features, HIDDEN), nn.Linear(HIDDEN, rank)
        self.outer = nn.Linear(rank, math.prod(shape))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.zero_()
                if parameter.ndim == 2 and not name.startswith("outer"):
                    made = seeded_noise(parameter.shape, "noise prior", seed, name)
                    parameter.copy_(made / math.sqrt(parameter.shape[1]))

    def forward(self, features: Tensor) -> Tensor:
        """Return the shift μ [B, …] of start noise for text features [B, d]."""
        hidden = nn.functional.silu(self.inner(features.float()))
        return self.outer(self.narrow(hidden)).view(-1, *self.shape)


def divergence(shift: Tensor) -> Tensor:
    """Return KL(N(μ, 1) ‖ N(0, 1)) = ½‖μ‖² of shifts [B, …] as [B]."""
    return 0.5 * shift.flatten(1).square().sum(1)


def policy_loss(shift: Tensor, noise: Tensor, advantages: Tensor, alpha: float) -> Tensor:
    """Return a loss whose gradient by the shift is the score function's, −Σ A_i ε_i / G + α·μ.

    Shifts [P, …], the standard normal noise [P, G, …] of starts z = μ + ε, and their advantages [P, G]. As
    log N(z; μ, 1) has the gradient z − μ = ε, this is exact in expectation, whatever decodes and judges z.
    """
    pull = torch.einsum("pg,pg...->p...", advantages, noise) / advantages.shape[1]
    return (alpha * divergence(shift) - (pull * shift).flatten(1).sum(1)).mean()


class Critic(nn.Module):
    """V̄(z, c): what an image from start z is worth, for the paper's own estimator."""

    def __init__(self, features: int, shape: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.start, self.text = nn.Linear(math.prod(shape), HIDDEN), nn.Linear(features, HIDDEN, bias=False)
        self.value = nn.Linear(HIDDEN, 1)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                made = seeded_noise(parameter.shape, "critic", seed, name)
                scale = 1 / math.sqrt(parameter.shape[1]) if parameter.ndim == 2 else 0.0
                parameter.copy_(made * scale)

    def forward(self, starts: Tensor, features: Tensor) -> Tensor:
        """Return the values [P, G] of starts [P, G, …] for text features [P, d]."""
        hidden = self.start(starts.flatten(2)) + self.text(features)[:, None]
        return self.value(nn.functional.silu(hidden)).squeeze(2)


def critic_loss(critic: Critic, starts: Tensor, features: Tensor, values: Tensor) -> Tensor:
    """Return the squared error of the critic on values [P, G] of decoded samples."""
    return (critic(starts, features) - values).square().mean()


def value_loss(critic: Critic, shift: Tensor, noise: Tensor, features: Tensor, alpha: float) -> Tensor:
    """Return a loss that ascends the critic by the shift [P, …], at noise [P, G, …] around it."""
    values = critic(shift[:, None] + noise, features).mean(1)
    return (alpha * divergence(shift) - values).mean()


class Trained(NamedTuple):
    """A noise prior, the checkpoint that it is for, and what was written down about its training."""

    prior: NoisePrior
    model: Vectors
    notes: Mapping[str, str]

    def check_model(self, model: Vectors) -> None:
        """Raise ValueError where a prior is for another checkpoint."""
        if not self.model.same(model):
            raise ValueError(
                f"prior is for another checkpoint ({self.notes.get('model', 'unnamed')}, {self.model}) than "
                f"this model ({model}); load that checkpoint, or train a prior for this one"
            )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError where noise [C, …] has another size than the prior's."""
        if squeezed(shape) != squeezed(self.prior.shape):
            raise ValueError(
                f"prior is for latents of the shape {list(self.prior.shape)}, and this one has "
                f"{list(shape)}; choose the size that it was trained for, or train one for this size"
            )

    def check_feature(self, feature: Tensor) -> None:
        """Raise ValueError where a text feature [d] is not of the prior's kind."""
        if feature.shape != (self.prior.features,):
            raise ValueError(
                f"prior reads text features of {self.prior.features} numbers, and these have "
                f"{feature.numel()}; use the text encoders that it was trained with"
            )
        if not feature.isfinite().all():
            raise ValueError("conditioning: its text features hold NaN or infinite values; encode it again")

    @torch.no_grad()
    def shift(self, feature: Tensor) -> Tensor:
        """Return μ [C, …] for a text feature [d]."""
        self.check_feature(feature)
        return self.prior(feature[None].cpu())[0]


def squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """Leave out the frames of a still image: [C, 1, h, w] → (C, h, w)."""
    whole = tuple(shape)
    return (whole[0], *whole[2:]) if len(whole) == 4 and whole[1] == 1 else whole


def save_prior(path: Path, prior: NoisePrior, model: Vectors, notes: Mapping[str, str]) -> None:
    """Write a noise prior whole or not at all; `notes` says what is known of its training."""
    facts = {
        "g2rpo.noise_prior": FORMAT,
        "latent_shape": ",".join(map(str, prior.shape)),
        "text_features": str(prior.features),
        "rank": str(prior.rank),
        "model_vectors": f"{model.count} {model.mean!r}",
    }
    write_tensors(path, dict(prior.named_parameters()), {**notes, **facts})


def load_prior(path: Path) -> Trained:
    """Read a noise prior; FileError where the file is none, or damaged."""
    notes = read_header(path)["__metadata__"]
    if not isinstance(notes, dict) or notes.get("g2rpo.noise_prior") != FORMAT:
        raise FileError(f"{path} is no noise prior of this version; {FOREIGN}")
    try:
        shape = tuple(int(size) for size in notes["latent_shape"].split(","))
        features, rank = int(notes["text_features"]), int(notes["rank"])
        count, mean = notes["model_vectors"].split()
        model = Vectors(int(count), float(mean))
    except (KeyError, ValueError, AttributeError) as error:
        raise FileError(f"{path} is damaged: it does not say what it is for; {FOREIGN}") from error
    sizes = (*shape, features, rank)
    numbers = HIDDEN * (features + rank) + rank * math.prod(shape)
    if len(shape) not in (3, 4) or min(sizes) < 1 or numbers > MAX_NUMBERS or not math.isfinite(model.mean):
        raise FileError(f"{path} is refused: it claims a network of {list(sizes)}; {FOREIGN}")
    tensors, _ = read_tensors(path)
    prior = NoisePrior(features, shape, rank)
    wanted = {name: one.shape for name, one in prior.named_parameters()}
    for name in wanted.keys() | tensors.keys():
        if name not in wanted or name not in tensors or tensors[name].shape != wanted[name]:
            raise FileError(f"{path} is damaged: its tensor {name[:60]!a} does not fit; {FOREIGN}")
        if not sound(tensors[name]):
            raise FileError(f"{path} is damaged: its tensor {name!a} holds no finite numbers; {FOREIGN}")
    prior.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return Trained(prior.requires_grad_(False), model, notes)
