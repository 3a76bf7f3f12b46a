"""The wires between our blocks: frozen data, never changed by a block that receives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..comfy_g2rpo.advantages import FLOOR
from ..comfy_g2rpo.priors.noise_prior import Trained
from ..comfy_g2rpo.rewards import Reward
from ..comfy_g2rpo.rollout import Rollout

RolloutWire = io.Custom("G2RPO_ROLLOUT")
RewardWire = io.Custom("G2RPO_REWARD")
ScoresWire = io.Custom("G2RPO_SCORES")
AdvantagesWire = io.Custom("G2RPO_ADVANTAGES")
PolicyWire = io.Custom("G2RPO_POLICY")
PriorWire = io.Custom("G2RPO_PRIOR")

TRAINING = "model/training/G²RPO"
SAMPLING = "sampling/G²RPO"
SCORING = "image/scoring"


@dataclass(frozen=True)
class RewardSet:
    """Rewards with their weights and gates, and how they become one."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    mix: str = "zscore"
    gates: tuple[float | None, ...] = ()

    @property
    def named_weights(self) -> dict[str, float]:
        """Return every reward's weight by its name."""
        return {reward.name: weight for reward, weight in zip(self.rewards, self.weights, strict=True)}

    @property
    def all_gates(self) -> tuple[float | None, ...]:
        """List a gate, or None, for every reward."""
        return self.gates or (None,) * len(self.rewards)


@dataclass(frozen=True)
class RolloutData:
    """A group's rollout in model space, and the guider (model, conditioning, guidance) that made it."""

    rollout: Rollout  # latents: [1, images, …]
    guider: Any
    sigmas: Tensor  # [T+1]
    granularities: tuple[int, ...]
    branch_steps: tuple[int, ...]


@dataclass(frozen=True)
class ScoresData:
    """Scores [R, images] in the order of the images; pictures [images, H, W, 3] where they were decoded."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    values: Tensor
    prompt: str = ""
    pictures: Tensor | None = None
    mix: str = "zscore"
    gates: tuple[float | None, ...] = ()
    prompts: tuple[str, ...] = ()
    noise: tuple[float, ...] = ()  # of each reward; none if blank


@dataclass(frozen=True)
class AdvantagesData:
    """Advantages [K, G] and the rewards [R, K, G, L] that they come from."""

    rollout: RolloutData
    table: Tensor
    rewards: Tensor
    names: tuple[str, ...]
    noise: tuple[float, ...] = ()
    std_floor: float = FLOOR


@dataclass(frozen=True)
class PolicyData:
    """A LoRA in training on a MODEL: weights, AdamW's state, its step, the run that keeps it (or blank)."""

    model: Any
    adapter: Any
    optimizer: dict[str, Tensor]
    learning_rate: float
    step: int = 0
    run: str = ""


@dataclass(frozen=True)
class PriorData:
    """A noise prior for one checkpoint, which it was compared with when it was loaded."""

    trained: Trained
