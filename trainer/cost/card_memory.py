"""What a run needs of its card, by arithmetic on what is counted on its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from comfy_g2rpo.recipes import Recipe, build_plan
from comfy_g2rpo.rewards.models.catalogue import KNOWN
from comfy_g2rpo.trees.pruned import PrunedPlan

from ..config.reading import Config, make_recipe
from ..config.reward_checks import rewards_root

GIB = 2**30
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "prodigy": 16.0}
"""Bytes that an optimizer keeps per parameter of the adapter."""
CARD = 0.7 * GIB
"""What a CUDA context and its libraries take before anything is loaded."""


class UnknownMemoryError(ValueError):
    """A model whose memory a sketch of it does not tell."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the card: what stays during training, and the peak of every phase, all included."""

    parts: Mapping[str, int]
    peaks: Mapping[str, int]

    @property
    def need(self) -> int:
        """Return what a run takes at most."""
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """Name the phase that takes most."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    def lines(self) -> list[tuple[str, str]]:
        """Lay it out for reading."""
        parts, peaks = (
            ", ".join(f"{name} {sized(size)}" for name, size in table.items() if size)
            for table in (self.parts, self.peaks)
        )
        return [
            ("memory, estimated", f"{sized(self.need)}, in {self.phase}"),
            ("  what stays", parts),
            ("  peaks", peaks),
        ]


def sized(size: float) -> str:
    """Write bytes as GiB, small ones as MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


@dataclass(frozen=True)
class ModelCounts:
    """What is counted on a model without weights: numbers, bytes, and floating-point operations."""

    parameters: int
    """Numbers of the transformer, the adapter's not among them."""
    transformer: int
    """Bytes of the transformer that stay on the card."""
    vae: int
    adapter: int
    """Numbers of the adapter."""
    swapped: int
    """Bytes of the room for layers that are fetched when needed."""
    merged: int
    latent: int
    """Numbers of a latent."""
    rolling: int
    """Bytes alive at most in a rollout's forward, in a decoding, in a pass of the update."""
    decoding: int
    learning: int
    forward: float
    """Operations of a latent's forward, of its forward and backward, of decoding it."""
    update: float
    decode: float
    tokens: int
    text_parameters: Mapping[str, int]


def footprint_of(config: Config, counted: ModelCounts) -> Footprint:
    """Estimate a run's memory from what was counted on its model."""
    recipe, element = make_recipe(config), 2 if config.model.dtype == "bf16" else 4
    parts = resident(config, counted, recipe)
    encoders = 0 if config.memory.text_encoders == "cpu" else element * sum(counted.text_parameters.values())
    stays, judging = sum(parts.values()), max(reward_sizes(config), default=0)
    states = rollout_states(config, counted, recipe)
    # Their state, velocity and a row of zeros; their noise waits in the computer's memory.
    replayed = (
        3 * 4 * counted.latent * recipe.replay * config.train.prompts_per_step * build_plan(recipe).rows
    )
    peaks = {
        "encode": encoders + parts["vae"] + parts["rewards"],
        "rollout": stays + counted.swapped + states + counted.merged + counted.rolling,
        # Rewards that take turns are on the card while they judge, which is never during a forward.
        "decode": stays + states + counted.merged + max(counted.decoding, 0 if parts["rewards"] else judging),
        # The gradients of earlier micro-batches are there when the next one is at its peak.
        "update": stays + counted.swapped + states + replayed + 4 * counted.adapter + counted.learning,
    }
    return Footprint(parts, peaks)


def resident(config: Config, counted: ModelCounts, recipe: Recipe) -> dict[str, int]:
    """Count what stays on the card during training."""
    copies = bool(recipe.ema) + bool(recipe.old_decay) + bool(recipe.kl and recipe.kl_reference == "start")
    return {
        "transformer": counted.transformer,
        "vae": counted.vae,
        "adapter": int(4 * counted.adapter * (1 + copies)),
        "optimizer": int(counted.adapter * OPTIMIZER_BYTES[recipe.optimizer]),
        "rewards": 0 if config.memory.rewards_in_turn else sum(reward_sizes(config)),
    }


def reward_sizes(config: Config) -> list[int]:
    """List the bytes of reward models' weights on the card: by their files, or as they are published."""
    names = {
        reward.name
        for reward in (*config.rewards, *config.heldout_rewards)
        if not reward.path and not reward.url and reward.device != "cpu"
    }
    sizes = []
    for name in sorted(names):
        files = list((rewards_root() / name).glob("*.safetensors"))
        published = round(KNOWN[name].gigabytes * 1e9) if name in KNOWN else 0
        sizes.append(sum(file.stat().st_size for file in files) if files else published)
    return sizes


def rollout_states(config: Config, counted: ModelCounts, recipe: Recipe) -> int:
    """Estimate the latents that a rollout keeps: forks, and states that wait for their children."""
    plan = build_plan(recipe)
    # Branches that are judged on the way wait with their velocity.
    waiting = sum(map(len, plan.members)) if isinstance(plan, PrunedPlan) else 0
    kept = config.train.prompts_per_step * (3 * plan.rows + 2 * waiting)
    return 4 * counted.latent * (kept + 4 * config.train.slots)
