"""The price of a run, before it runs: forwards and images counted, seconds and memory measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from comfy_g2rpo.prompts import load as load_prompts
from comfy_g2rpo.prompts import read as read_prompts
from comfy_g2rpo.recipes import build_plan
from comfy_g2rpo.rollout import seeded_noise
from comfy_g2rpo.run.evaluation import price
from comfy_g2rpo.speed.peak_memory import peak_memory

from .. import families
from ..config.reading import Config, make_pace, make_recipe
from ..reports.progress import clock

COUNTED_PLANS = 20


@dataclass(frozen=True)
class Counts:
    """What a run does; an average where iterations differ."""

    prompts: int
    heldout: int
    steps: int
    group_forwards: float
    group_images: float
    group_trained: float
    evaluations: int
    evaluation_forwards: int
    evaluation_images: int

    @property
    def step_forwards(self) -> float:
        """Forwards of a step's rollout."""
        return self.prompts * self.group_forwards

    @property
    def forwards(self) -> float:
        """Forwards of the whole run, those of evaluations among them."""
        return self.steps * self.step_forwards + self.evaluations * self.evaluation_forwards

    @property
    def images(self) -> float:
        """Pictures of the whole run."""
        return self.steps * self.prompts * self.group_images + self.evaluations * self.evaluation_images


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward, of one with backward and of a decoded image at the recipe's batch sizes."""

    device: str
    forward: float
    update: float
    decode: float
    peak: int

    def step(self, counts: Counts) -> float:
        """Estimate the seconds of one step."""
        group = (
            counts.group_forwards * self.forward
            + counts.group_images * self.decode
            + counts.group_trained * self.update
        )
        return counts.prompts * group

    def run(self, counts: Counts) -> float:
        """Estimate the seconds of the run."""
        look = counts.evaluation_forwards * self.forward + counts.evaluation_images * self.decode
        return counts.steps * self.step(counts) + counts.evaluations * look


def count(config: Config) -> Counts:
    """Count what a configuration does."""
    recipe, train = make_recipe(config), config.train
    plans = [
        build_plan(recipe, iteration, train.seed, config.speed.tail_stride)
        for iteration in range(min(train.steps, COUNTED_PLANS))
    ]
    heldout = Path(config.prompts.heldout) if config.prompts.heldout else None
    held = len(
        load_prompts(Path(config.prompts.train), heldout, config.prompts.heldout_share, train.seed).heldout
    )
    looks = price(recipe, make_pace(config), held, preview=bool(train.preview_width))
    between = (train.steps - 1) // train.eval_every if train.eval_every else 0
    # All branches of a fork share its forward and backward; the clipped form first takes a snapshot of the
    # old velocities.
    passes = 1 if recipe.objective == "on_policy" else recipe.epochs + 1
    trained = [passes * len(plan.forks) for plan in plans]
    return Counts(
        prompts=train.prompts_per_step,
        heldout=held,
        steps=train.steps,
        group_forwards=sum(plan.forwards for plan in plans) / len(plans),
        group_images=sum(len(plan.images) for plan in plans) / len(plans),
        group_trained=sum(trained) / len(plans),
        evaluations=(2 + between) if held else 0,
        evaluation_forwards=sum(forwards for forwards, _ in looks.values()),
        evaluation_images=sum(images for _, images in looks.values()),
    )


def measure(config: Config) -> Cost:
    """Load the model and time one forward, one forward with backward and one decoding."""
    from ..model.inference import device
    from ..run import load_policy

    where, train = device(), config.train
    # A prompt of the run: some models read none without its picture.
    prompts = read_prompts(Path(config.prompts.train))[0][:1]
    policy = load_policy(config, where, prompts)
    shape = families.largest_shape(policy, config.model)
    policy.add_lora(config.lora.rank, config.lora.alpha, train.seed, config.lora.targets != "attention")
    cond = policy.encode(prompts)[0]

    def forward(batch: int) -> Tensor:
        x = seeded_noise((batch, *shape), "estimate").to(where)
        return policy.velocity(x, torch.full((batch,), 0.5, device=where), [cond] * batch)

    def rollout() -> None:
        with policy.inference():
            forward(train.slots)

    latents = seeded_noise((train.decode_batch, *shape), "estimate").to(where)
    return Cost(
        device=torch.cuda.get_device_name() if where.type == "cuda" else where.type,
        forward=seconds(rollout, where) / train.slots,
        update=seconds(lambda: forward(train.micro_batch).square().mean().backward(), where)
        / train.micro_batch,
        decode=seconds(lambda: policy.decode(latents), where) / train.decode_batch,
        peak=peak_memory(where),
    )


def seconds(work: Callable[[], object], where: torch.device, repeats: int = 2) -> float:
    """Time work after one warm-up; the best of a few."""
    best = float("inf")
    for turn in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize()
        if turn:
            best = min(best, time.perf_counter() - begin)
    return best


def table(counts: Counts, cost: Cost | None, memory: Sequence[tuple[str, str]] = ()) -> str:
    """Lay the price out for reading, rows about memory among it."""
    rows = [
        ("steps", f"{counts.steps}"),
        ("forwards per prompt group", f"{counts.group_forwards:,.0f}"),
        ("pictures per prompt group", f"{counts.group_images:,.0f}"),
        ("forwards per step", f"{counts.step_forwards:,.0f}  ({counts.prompts} prompts)"),
        ("pictures per step", f"{counts.prompts * counts.group_images:,.0f}"),
        ("forward + backward passes per step", f"{counts.prompts * counts.group_trained:,.0f}"),
        (
            "evaluations",
            (
                f"{counts.evaluations}  ({counts.heldout} held-out prompts, {counts.evaluation_images:,} "
                "pictures each)"
            ),
        ),
        ("forwards in all", f"{counts.forwards:,.0f}"),
        ("pictures in all", f"{counts.images:,.0f}"),
    ]
    rows += memory
    if cost:
        rows += [
            ("measured on", cost.device),
            ("time per step", f"about {cost.step(counts):.1f} s"),
            ("time in all", f"about {clock(cost.run(counts))}"),
            ("memory, measured peak", f"{cost.peak / 2**30:.1f} GiB"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
