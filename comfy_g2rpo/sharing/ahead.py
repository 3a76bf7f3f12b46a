"""Exploring by workers, at most so many steps before the learner comes to them.

Step n is explored with the adapter of step max(n − staleness, 0), never another: so a run is the same however
quick its workers are, whichever of them die, and after a resume. At staleness 0 it is the run of one process
that draws as many prompts at once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..curriculum.prompt_choice import Chosen, choose_prompts
from ..recipes import Recipe, build_plan
from ..run.iteration import explore_part, slotted
from ..run.setup import Check, Learner, Setup
from .explored import Explored, merged, packed, parted, unpacked


@dataclass(frozen=True)
class Order:
    """A part of a step to explore: the places of all the step's prompts, the slots that are meant, and the
    number of the adapter to draw with.
    """

    step: int
    part: int
    version: int
    places: tuple[int, ...]
    slots: tuple[int, ...]


class Workers(Protocol):
    """Who explores: elsewhere, at the same time, and over again where one of them is lost."""

    def publish(self, version: int, adapter: bytes) -> None:
        """Keep an adapter for the orders that name it."""
        ...

    def submit(self, order: Order) -> None:
        """Take an order, and do it when there is somebody."""
        ...

    def collect(self, step: int, wait: Callable[[], None]) -> list[bytes]:
        """Return the parts of a step in their order, once all are there; `wait` is called meanwhile."""
        ...

    def told(self) -> dict[str, float]:
        """Return metrics of what happened since the last time."""
        ...


@dataclass
class Ahead:
    """An explorer: hands the parts of the next steps to workers, and takes back the one whose turn it is."""

    workers: Workers
    staleness: int = 0
    asked: dict[int, tuple[Chosen, int]] = field(default_factory=dict)
    """By step: its prompts, and the adapter that it is explored with."""

    def __call__(self, setup: Setup, learner: Learner, check: Check) -> Explored:
        """Return the step that comes next, and let workers begin those after it."""
        now, pace = learner.step, setup.pace
        versions = {n: made for n, made in learner.versions.items() if n >= now - self.staleness}
        versions[now] = [p.detach().cpu().clone() for p in learner.old or setup.policy.parameters()]
        # A checkpoint needs them where the next steps are not explored with what it holds anyway.
        learner.versions = versions if self.staleness else {}
        for step in range(now, min(now + self.staleness + 1, max(pace.steps, now + 1))):
            if step not in self.asked:
                self.ask(setup, dataclasses.replace(learner, step=step, versions=versions), now, check)
        chosen, version = self.asked.pop(now)
        if self.staleness:
            # The prompts came in turn; what is remembered of scores has moved on since they were asked for.
            chosen = dataclasses.replace(chosen, history=learner.history)
        begin = time.perf_counter()
        found = self.workers.collect(now, lambda: check("rollout"))
        waited = time.perf_counter() - begin
        plan, size = build_plan(setup.recipe, now, pace.seed), setup.size(now)
        prompts, _ = slotted(setup, chosen.places, now, range(len(chosen.places)))
        conds, parts = setup.policy.encode(prompts), []
        for content, slots in zip(found, slots_of(setup), strict=True):
            some = conds[slots[0] : slots[-1] + 1]
            parts.append(unpacked(content, plan, size.sigmas, some, setup.policy.device))
        told = {"time/waiting": waited, "workers/staleness": float(now - version), **self.workers.told()}
        drew = versions[version] if version != now else ()
        return dataclasses.replace(merged(parts, chosen), told=told, drawn_by=drew, cheap=learner.cheap)

    def ask(self, setup: Setup, learner: Learner, now: int, check: Check) -> None:
        """Hand out the parts of the learner's step, for the adapter whose turn it is, or the oldest kept."""
        step, versions = learner.step, learner.versions
        version = max(step - self.staleness, min(versions))
        version = version if version in versions else now
        chosen = choose_prompts(setup, learner, lambda: check("rollout"))
        self.workers.publish(version, adapter_bytes(versions[version]))
        for part, slots in enumerate(slots_of(setup)):
            self.workers.submit(Order(step, part, version, tuple(chosen.places), tuple(slots)))
        self.asked[step] = chosen, version


def slots_of(setup: Setup) -> list[Sequence[int]]:
    """List the slots of every part of a step."""
    return parted(range(setup.pace.prompts_per_step), setup.pace.prompts_at_once)


def adapter_bytes(tensors: Sequence[Tensor]) -> bytes:
    """Write an adapter's tensors, in the order of the policy's parameters, as safetensors."""
    return save({str(i): tensor.contiguous() for i, tensor in enumerate(tensors)})


def take_adapter(parameters: Sequence[nn.Parameter], content: bytes) -> None:
    """Give a policy's parameters the numbers of an adapter; ValueError where they do not fit."""
    tensors = load(content)
    found = [tensors.get(str(i)) for i in range(len(parameters))]
    if len(tensors) != len(found) or not all(
        value is not None and value.shape == like.shape for value, like in zip(found, parameters, strict=True)
    ):
        raise ValueError(
            "a rollout worker's adapter differs from the learner's; install the same version of g2rpo, "
            "diffusers and peft on every machine"
        )
    with torch.no_grad():
        for parameter, value in zip(parameters, found, strict=True):
            parameter.copy_(value)


def work_off(setup: Setup, learner: Learner, order: Order, adapter: bytes, check: Check) -> bytes:
    """Explore what an order says, as a worker."""
    take_adapter(setup.policy.parameters(), adapter)
    learner.step = order.step
    return packed(explore_part(setup, learner, order.places, order.slots, check))


def check_ahead(recipe: Recipe, staleness: int) -> None:
    """Raise ValueError where steps cannot be explored elsewhere, or not ahead of the learner."""
    if recipe.objective == "pairs":
        raise ValueError("method.objective is pairs, which explores nothing; leave --ray out")
    if not staleness:
        return
    if recipe.objective == "on_policy":
        raise ValueError(
            f"staleness is {staleness}, but method.objective on_policy learns from the newest adapter's "
            "images alone; set method.objective=clip, or --staleness 0"
        )
    if recipe.prompt_choice != "in_turn":
        raise ValueError(
            f"staleness is {staleness}, but method.prompt_choice {recipe.prompt_choice} needs the step "
            "before; give --staleness 0, or set method.prompt_choice=in_turn"
        )
