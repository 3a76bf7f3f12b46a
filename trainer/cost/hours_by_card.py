"""Hours of a run on cards that are not here, by operations that are counted and what cards are said to do."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from comfy_g2rpo.files.safe import read_header
from comfy_g2rpo.rewards import REWARDS
from comfy_g2rpo.rewards.models.catalogue import KNOWN

from ..config.bundled import bundled_recipes
from ..config.file_checks import read_prompts
from ..config.reading import Config, load
from ..config.reward_checks import rewards_root
from .card_memory import ModelCounts
from .estimate import Counts, count
from .presets import SIZES
from .remembered import counts_of


@dataclass(frozen=True)
class CardSpeed:
    """A card's memory in GB, and its published TFLOPS: bf16 on tensor cores, dense, with sums in fp32; and
    fp32 without these.
    """

    memory: int
    bf16: float
    fp32: float


CARDS = {
    "RTX 3090": CardSpeed(24, 71, 35.6),
    "RTX 4090": CardSpeed(24, 165.2, 82.6),
    "RTX 5090": CardSpeed(32, 209.5, 104.8),
    "A100": CardSpeed(80, 312, 19.5),
    "H100": CardSpeed(80, 989, 67),
    "H200": CardSpeed(141, 989, 67),
}
"""NVIDIA's data sheets and architecture white papers; H100 and H200 as SXM."""
UTILISATION = 1 / 3
"""Share of that speed which a run reaches, all stops for the rest of its work included: an assumption."""
PICTURE_TOKENS = 257
"""Places at which a reward model's weights are used for one picture: the patches of a ViT-L/14 or -H/14."""
FP32_BYTES = 4
"""Of a number in the published files of reward models: of one in 16 bit this counts half."""
CLIP_TOKENS = 77
OPTIMIZER = 20
"""Operations of AdamW for a number of the adapter, about."""
DAY = 24.0


@dataclass(frozen=True)
class Work:
    """A run's floating-point operations by phase, and the seconds of rules that run on the computer's CPU."""

    operations: Mapping[str, float]
    rules: float
    unknown: tuple[str, ...]
    """Rewards whose time nothing tells: judges over HTTP, people, references, and code of your own."""

    def hours(self, tflops: float) -> float:
        """Return the hours on a card of a speed."""
        return (sum(self.operations.values()) / (tflops * 1e12 * UTILISATION) + self.rules) / 3600


def work_of(config: Config, counts: Counts, counted: ModelCounts) -> Work:
    """Count the operations of a run, from reading the prompts to the last evaluation."""
    judges = {reward.name: reward for reward in (*config.heldout_rewards, *config.rewards)}
    trained = {reward.name for reward in config.rewards}
    looked_at = counts.evaluations * counts.evaluation_images
    images = {name: counts.images if name in trained else looked_at for name in judges}
    models = {name: model_parameters(name) for name in judges}
    prompts = read_prompts(config)
    texts = min(counts.steps * counts.prompts, len(prompts.train)) + counts.heldout
    merges = counts.steps + counts.evaluations if counted.merged else 0
    operations = {
        "rollouts": counts.steps * counts.step_forwards * counted.forward,
        "decoding": counts.images * counted.decode,
        "rewards": sum(2.0 * PICTURE_TOKENS * models[name] * number for name, number in images.items()),
        "updates": counts.steps * counts.prompts * counts.update_operations(counted.update, counted.forward),
        "evaluations": counts.evaluations * counts.evaluation_forwards * counted.forward,
        "texts": 2.0 * texts * max(counted.tokens, CLIP_TOKENS) * sum(counted.text_parameters.values()),
        # Where the adapter is merged into copies of the weights, B·A is multiplied out for every rollout.
        "merging": 2.0 * merges * config.lora.rank * counted.merged / 4,
        "optimizer": OPTIMIZER * counts.steps * counted.adapter,
    }
    rules = sum(images[name] * seconds_of_rule(name, config, prompts.train[0]) for name in judges)
    unknown = tuple(name for name in judges if name not in REWARDS and not models[name])
    return Work(operations, rules, unknown)


def model_parameters(name: str) -> int:
    """Count the weights of a reward model by its files' headers, or as it is published; 0 of what is none."""
    files = sorted((rewards_root() / name).glob("*.safetensors"))
    if not files:
        return round(KNOWN[name].gigabytes * 1e9 / FP32_BYTES) if name in KNOWN else 0
    headers = [read_header(file) for file in files]
    tensors = [entry for header in headers for key, entry in header.items() if key != "__metadata__"]
    return sum(math.prod(entry["shape"]) for entry in tensors)


def seconds_of_rule(name: str, config: Config, prompt: str) -> float:
    """Time a built-in rule on one picture of the run's size, on this CPU; 0 of what is none."""
    if name not in REWARDS:
        return 0.0
    across = torch.linspace(0, 1, config.model.width)
    down = torch.linspace(0, 1, config.model.height).unsqueeze(1)
    picture = torch.stack([across.expand(len(down), -1), down.expand(-1, len(across)), across * down], -1)
    found = []
    for _ in range(2):
        begin = time.process_time()
        REWARDS[name].score(picture.unsqueeze(0), [prompt])
        found.append(time.process_time() - begin)
    return min(found) * config.model.frames


def rows_by_card(config: Config, recipe: str) -> list[tuple[str, str]]:
    """Return the hours of a run on every card of the table, and the faster recipe where they are many."""
    counts, counted = count(config), counts_of(config)
    work = work_of(config, counts, counted)
    share = f"{UTILISATION:.0%} of the published {'bf16' if config.model.dtype == 'bf16' else 'fp32'} speed"
    total = sum(work.operations.values())
    rows = [
        ("operations of a forward", f"{counted.forward / 1e12:.3g} TFLOP"),
        ("operations in all", f"{total / 1e15:,.3g} PFLOP  ({shares(work.operations)})"),
        ("time, estimated", f"at {share}; nothing was measured"),
    ]
    hours = {name: work.hours(speed(card, config)) for name, card in CARDS.items()}
    for name, card in CARDS.items():
        fitting = [preset for preset, size in SIZES.items() if size <= card.memory]
        rows.append((f"  {name}, {card.memory} GB", f"≈ {spelt(hours[name])}, with --preset {fitting[-1]}"))
    if work.unknown:
        rows.append(("  not in it", f"what {', '.join(work.unknown)} takes"))
    if hours["H100"] > DAY:
        rows.append(("to make it cheaper", cheaper(recipe)))
    return rows


def speed(card: CardSpeed, config: Config) -> float:
    """Return a card's TFLOPS in a configuration's precision."""
    return card.bf16 if config.model.dtype == "bf16" else card.fp32


def shares(operations: Mapping[str, float]) -> str:
    """Name the phases that take most, at least a hundredth."""
    total = sum(operations.values())
    some = sorted(operations.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {value / total:.0%}" for name, value in some if value >= 0.01 * total)


def cheaper(recipe: str) -> str:
    """Name the faster recipe, or the settings that halve a run and more."""
    fast = f"{Path(recipe).stem}_fast"
    if fast in bundled_recipes():
        other = load(fast)
        less = work_of(other, count(other), counts_of(other)).hours(speed(CARDS["H100"], other))
        return f"{fast} takes ≈ {spelt(less)} on an H100, and less by what its cached steps skip"
    settings = "--set 'method.granularities=[2]' --set method.pick=random --set method.pick_size=4"
    return f"it takes over a day even on an H100; {settings}"


def spelt(hours: float) -> str:
    """Write hours as people say them."""
    if hours >= 2 * DAY:
        return f"{hours:,.0f} hours ({hours / DAY:,.0f} days)"
    return f"{hours:.0f} hours" if hours >= 10 else f"{hours:.1f} hours"
