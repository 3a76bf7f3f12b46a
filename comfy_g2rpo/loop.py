"""A whole run, whoever hosts it: roll out, score, update; evaluate, save, stop, resume. The command line and the graph share it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import lora
from .advantages import mixed, zero_std_share
from .evaluation import Evaluation, compare, evaluate
from .pace import Pace
from .policy import Trainee
from .prompts import PromptCursor, Prompts
from .recipes import Recipe, build_plan
from .rewards import Reward, RewardError
from .rollout import stream
from .runs import RunFolder, fitting, load_optimizer_tensors, optimizer_tensors, read_progress, write_state
from .scoring import Scorer, roll_out_and_score
from .update import records, update, update_average

try:
    import resource
except ImportError:  # Windows has none
    resource = None


@dataclass(frozen=True)
class World:
    """The processes that share a run; `gather` stacks scores [R, P, images] over P, `reduce` averages a gradient, `wait` lines them up."""

    index: int = 0
    count: int = 1
    gather: Callable[[Tensor], Tensor] = lambda scores: scores
    reduce: Callable[[Tensor], Tensor] | None = None
    wait: Callable[[], None] = lambda: None

    @property
    def speaks(self) -> bool:
        """Say whether this is the process that writes and shows."""
        return self.index == 0


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
    gates: tuple[float | None, ...] = ()
    style: str = "diffusers"
    metadata: Mapping[str, str] = field(default_factory=dict)
    world: World = field(default_factory=World)


@dataclass
class Learner:
    """What learning changes: the optimizer over the adapter, the adapter's moving average, and the count of finished steps."""

    optimizer: torch.optim.AdamW
    average: list[Tensor]
    step: int = 0
    forwards: int = 0
    seconds: float = 0.0


class Watcher(Protocol):
    """Who is told what happens."""

    def start(self, total_steps: int, first_step: int, plan_line: str) -> None:
        """Begin at `first_step`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Take the row of a step, as it goes into the run folder."""

    def note(self, text: str) -> None:
        """Take a remark."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End, with the summary."""


Check = Callable[[str], None]
"""Called before every forward and every batch of pictures with the phase, one of PHASES; raises to stop."""

PHASES = ("rollout", "update", "evaluate")


def make_learner(setup: Setup) -> Learner:
    """Set up AdamW over the adapter."""
    parameters = setup.policy.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=setup.recipe.learning_rate, weight_decay=setup.recipe.weight_decay)
    return Learner(optimizer, [p.detach().clone() for p in parameters] if setup.recipe.ema else [])


def learn(
    setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check, stops: tuple[type[BaseException], ...]
) -> None:
    """Run up to the budget of steps or minutes; one of `stops` leaves a checkpoint of the last finished step and goes on up."""
    pace, plan = setup.pace, build_plan(setup.recipe)
    count = pace.prompts_per_step
    watcher.start(pace.steps, learner.step, f"{count * plan.forwards} forwards and {count * len(plan.images)} pictures per step")
    for note in setup.prompts.notes:
        watcher.note(note)
    try:
        if learner.step == 0 or (due(pace.eval_every, learner.step) and learner.step < pace.steps):
            # A run that was stopped while it looked looks again.
            look(setup, learner, folder, watcher, check)
        while learner.step < pace.steps and not out_of_time(setup, learner):
            row = iterate(setup, learner, check)
            if setup.world.speaks:
                folder.append(row)
            watcher.step(row)
            if due(pace.eval_every, learner.step) and learner.step < pace.steps:
                look(setup, learner, folder, watcher, check)
            if due(pace.checkpoint_every, learner.step):
                save(setup, learner, folder)
    except stops:
        if learner.step:
            save(setup, learner, folder)
        raise
    save(setup, learner, folder)


def iterate(setup: Setup, learner: Learner, check: Check) -> dict[str, float]:
    """Make one update: roll out the step's prompts, score, learn; return the row of metrics. An exception leaves the last step's state."""
    pace, recipe, policy = setup.pace, setup.recipe, setup.policy
    begin = time.perf_counter()
    prompts, seeds = draw(setup, learner.step)
    conds = policy.encode(prompts)
    plan = build_plan(recipe, learner.step, pace.seed)
    rolling = partial(check, "rollout")
    scorer = Scorer(policy.decode, setup.rewards, prompts, len(plan.images), pace.decode_batch, check=rolling)
    rollout = roll_out_and_score(policy, plan, setup.sigmas, conds, seeds, setup.shape, scorer, pace.slots, rolling)
    rolled = time.perf_counter()
    rewards = [plan.values(scorer.scores[:, p]) for p in range(len(prompts))]
    everywhere = setup.world.gather(scorer.scores)
    if everywhere.isnan().all():
        raise RewardError(f"rewards judged none of the {everywhere[0].numel()} pictures of step {learner.step + 1}; check the prompts")
    scale = [plan.values(scores) for scores in everywhere.unbind(1)] if recipe.std == "global" else None
    advantages = mixed(rewards, setup.weights, recipe.mix, setup.gates, recipe.clamp, recipe.std_floor, scale)
    made = records(rollout, advantages, step_weight=recipe.step_weight, samples=recipe.objective == "clip")
    with undone_on_error(setup, learner), policy.training():
        learning = {"micro_batch": pace.micro_batch, "reduce": setup.world.reduce, "check": partial(check, "update")}
        stats = update(policy, made, conds, learner.optimizer, recipe, **learning)
    if recipe.ema:
        update_average(learner.average, policy.parameters(), min(recipe.ema, (learner.step + 1) / (learner.step + 10)))
    learner.step += 1
    learner.forwards += rollout.nfe * setup.world.count
    updated = time.perf_counter()
    learner.seconds += updated - begin
    row: dict[str, float] = {"step": learner.step} | reward_metrics(setup.rewards, everywhere)
    row["advantage/abs_mean"] = torch.stack(advantages).abs().mean().item()
    row["zero_std_share"] = sum(zero_std_share(reward, recipe.std_floor) for reward in rewards) / len(rewards)
    judged = scorer.seconds["decode"] + scorer.seconds["reward"]
    times = {"rollout": rolled - begin - judged, **scorer.seconds, "update": updated - rolled}
    return row | stats | {"nfe": rollout.nfe} | {f"time/{k}": v for k, v in times.items()} | {"memory/peak": peak_memory(policy.device)}


def reward_metrics(rewards: Sequence[Reward], scores: Tensor) -> dict[str, float]:
    """Return mean and standard deviation of each reward's valid scores [R, …]."""
    row = {}
    for reward, values in zip(rewards, scores, strict=True):
        valid = values[~values.isnan()]
        row |= {f"reward/{reward.name}/mean": valid.mean().item(), f"reward/{reward.name}/std": valid.std().item()}
    return row


def draw(setup: Setup, step: int) -> tuple[list[str], list[int]]:
    """Return this process's share of the step's prompts, and the seed of each; a function of (seed, step) alone."""
    pace, world = setup.pace, setup.world
    prompts = PromptCursor(setup.prompts.train, pace.prompts_per_step, pace.seed).batch(step)
    seeds = [stream("rollout", pace.seed, step, place) for place in range(len(prompts))]
    mine = slice(world.index, None, world.count)
    return prompts[mine], seeds[mine]


@contextmanager
def undone_on_error(setup: Setup, learner: Learner) -> Iterator[None]:
    """Bring adapter and optimizer back if an update of several optimizer steps is broken off."""
    if setup.recipe.epochs == 1 and setup.recipe.update == "accumulate":
        # The only optimizer step is the last thing that such an update does.
        yield
        return
    parameters = [p.detach().clone() for p in setup.policy.parameters()]
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(learner.optimizer).items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, before in zip(setup.policy.parameters(), parameters, strict=True):
                parameter.copy_(before)
        learner.optimizer.state.clear()
        load_optimizer_tensors(learner.optimizer, state)
        raise


@contextmanager
def averaged(setup: Setup, learner: Learner) -> Iterator[None]:
    """Put the moving average, where there is one, in the adapter's place."""
    parameters = setup.policy.parameters() if learner.average else []
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for parameter, mean in zip(parameters, learner.average, strict=True):
            parameter.copy_(mean)
        try:
            yield
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def look(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check) -> None:
    """Evaluate on the held-out prompts, unless this step has been; keep scores, pictures and a row of metrics."""
    if not setup.world.speaks or not setup.prompts.heldout or looked(folder, learner.step):
        return
    with averaged(setup, learner):
        looking = partial(check, "evaluate")
        evaluation = evaluate(setup.policy, setup.judges, setup.prompts.heldout, setup.pace, setup.sigmas, setup.shape, looking)
    evaluation.save(folder, learner.step)
    row = {"step": learner.step} | evaluation.metrics()
    folder.append(row)
    watcher.step(row)


def looked(folder: RunFolder, step: int) -> bool:
    """Say whether a step has its row of held-out metrics."""
    return any(key.startswith("heldout/") for row in folder.metrics() if row.get("step") == step for key in row)


def finish(setup: Setup, learner: Learner, folder: RunFolder, watcher: Watcher, check: Check, name: str) -> dict[str, Any]:
    """Evaluate the outcome and write the summary of a run by the recipe `name`."""
    look(setup, learner, folder, watcher, check)
    setup.world.wait()
    if not setup.world.speaks:
        return {}
    steps = [old for old in folder.metrics() if "nfe" in old]
    names = [reward.name for reward in setup.rewards]
    ends = {"before": steps[: max(len(steps) // 10, 1)], "after": steps[-max(len(steps) // 10, 1) :]}
    summary: dict[str, Any] = {"recipe": name, "steps": learner.step, "seed": setup.pace.seed}
    for when, rows in ends.items():
        summary[f"reward_{when}"] = {n: sum(old[f"reward/{n}/mean"] for old in rows) / len(rows) for n in names}
    if setup.prompts.heldout:
        before, after = Evaluation.read(folder, 0), Evaluation.read(folder, learner.step)
        summary |= {"heldout_before": before.means(), "heldout_after": after.means(), "heldout_gain": compare(before, after)}
    summary |= {
        "seconds": learner.seconds,
        "forwards": learner.forwards,
        "lora": f"{folder.latest().relative_to(folder.path)}/lora.safetensors",
    }
    folder.save_summary(summary)
    return summary


def save(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Write a checkpoint: the adapter as a LoRA file, and all that a bit-equal continuation needs."""
    if not setup.world.speaks or (folder.latest() and int(folder.latest().name) == learner.step):
        return
    tensors = {f"parameter/{i}": p.detach() for i, p in enumerate(setup.policy.parameters())} | optimizer_tensors(learner.optimizer)
    tensors |= {f"average/{i}": mean for i, mean in enumerate(learner.average)}
    progress = {"step": learner.step, "forwards": learner.forwards, "seconds": learner.seconds}
    metadata = {**setup.metadata, "g2rpo.step": str(learner.step)}

    def write(path: Any) -> None:
        with averaged(setup, learner):
            lora.write(path / "lora.safetensors", setup.policy.pairs(), setup.alpha, style=setup.style, metadata=metadata)
        write_state(path, tensors, progress)

    folder.save_checkpoint(learner.step, write, keep_last=setup.pace.keep_checkpoints)


def restore(setup: Setup, learner: Learner, folder: RunFolder) -> None:
    """Bring adapter, average, optimizer and metrics back to the newest checkpoint; without one, to the start."""
    place = folder.latest()
    if place is None:
        if setup.world.speaks:
            folder.truncate_metrics(0)
        return
    tensors, progress = read_progress(place, ("forwards", "seconds"))
    targets = {"parameter": setup.policy.parameters(), "average": learner.average}
    found = {kind: fitting(tensors, kind, like, place) for kind, like in targets.items()}
    load_optimizer_tensors(learner.optimizer, tensors)
    with torch.no_grad():
        for kind, like in targets.items():
            for target, value in zip(like, found[kind], strict=True):
                target.copy_(value)
    learner.step, learner.forwards, learner.seconds = progress["step"], progress["forwards"], progress["seconds"]
    if setup.world.speaks:
        folder.truncate_metrics(learner.step)


def due(every: int, step: int) -> bool:
    """Say whether something that happens every so many steps happens after this one."""
    return every > 0 and step % every == 0


def out_of_time(setup: Setup, learner: Learner) -> bool:
    """Say whether the budget of training minutes is spent."""
    return setup.pace.minutes is not None and learner.seconds >= 60 * setup.pace.minutes


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device, or of the process, in bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
